"""Records: plain dicts as users have them in files, before any tokenizer sees them.

A record's *kind* is told by its keys:

    text         {"text"}                              pretraining text
    qa           {"question", "answer"}                becomes the text "question\\nanswer"
    instruction  {"instruction", "output"} ("input" may be absent or empty)
    chat         {"messages": [{"role", "content"}, ...]}
    reasoning    {"prompt", "reasoning", "final"}
    preference   {"prompt", "chosen", "rejected"}
    response     {"prompt", "response"}
    task         {"prompt", "answer"}                  a question and what is right, without a worked-out response

Optional tags: `source`, `domain`, `difficulty` (a number or a text), `license`, `module`, `group`, `split` ("train" or "valid":
where the record goes, whatever its group). Every record that a source yields has a stable `key` (source name and path with line,
or object name), which fixes its split, its place in the order and its randomness.

A record of any kind but `qa` that carries `answer` is also a *task* (`is_task`): `answer` is what rewards compare a response
with, `rewards` names reward slots (["exact_match"] if absent) and `options` holds their settings by name. So one data set serves
fine-tuning, evaluation and reinforcement learning. A chat record may declare the `tools` that it uses, in the OpenAI form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from k2lab.core import slots
from k2lab.core.errors import DataError, RecipeError, did_you_mean

Record = dict[str, Any]

# Required keys per kind, in the order in which kinds are tried.
KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "qa": ("question", "answer"),
    "instruction": ("instruction", "output"),
    "chat": ("messages",),
    "reasoning": ("prompt", "reasoning", "final"),
    "preference": ("prompt", "chosen", "rejected"),
    "response": ("prompt", "response"),
    "task": ("prompt", "answer"),
}
# What a task is judged by that names no reward.
REWARDS = ("exact_match",)
ROLES = ("system", "user", "assistant", "tool")

# The order in which the parts of a record are read out.
_PARTS = {**KINDS, "instruction": ("instruction", "input", "output")}


class Source(Protocol):
    """What a slot of `k2lab/data/sources/` offers.

    `records()` yields records with `key` and `source`; each call starts anew and gives the same records in the same order.
    `fingerprint()` is a sha256 hex over what decides the content; it is cheap and changes when the content does.
    """

    def records(self) -> Iterator[Record]: ...
    def fingerprint(self) -> str: ...


def kind_of(record: Record) -> str | None:
    """The kind whose required keys are all present, or None."""
    for kind, keys in KINDS.items():
        if all(key in record for key in keys):
            return kind
    return None


def check_kind(kind: str) -> None:
    """Raises RecipeError unless `kind` is a record kind or "" (any)."""
    if kind and kind not in KINDS:
        raise RecipeError(
            f"there is no record kind {kind!r}", where="kind", allowed=", ".join(KINDS), next=did_you_mean(kind, KINDS)
        )


def check_record(record: Any, where: str, kind: str = "") -> Record:
    """Returns `record` if it is a well-formed record (of `kind`, if given); else raises DataError naming `where`."""
    if not isinstance(record, dict):
        raise DataError("a record must be a JSON object", where=where, got=type(record).__name__, allowed=_allowed(kind))
    found = kind or kind_of(record)
    missing = [key for key in KINDS[found] if key not in record] if found else ["all"]
    if found is None or missing:
        what = f"the record lacks {', '.join(map(repr, missing))}" if found else "the record is of no known kind"
        raise DataError(what, where=where, got="keys " + (", ".join(map(str, record)) or "none"), allowed=_allowed(kind))
    if found == "chat":
        _check_messages(record["messages"], where)
        tools = record.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise DataError("'tools' must be a list of tool specifications", where=where, got=tools)
    else:
        for key in _PARTS[found]:
            if key in record and not isinstance(record[key], str) and not (key == "input" and record[key] is None):
                raise DataError(f"{key!r} must be a text", where=where, got=record[key])
    for tag in ("key", "source", "domain", "license", "group", "module"):
        if record.get(tag) is not None and not isinstance(record[tag], str):
            raise DataError(f"the tag {tag!r} must be a text", where=where, got=record[tag])
    if isinstance(record.get("difficulty"), bool) or not isinstance(record.get("difficulty"), (int, float, str, type(None))):
        raise DataError("the tag 'difficulty' must be a number or a text", where=where, got=record["difficulty"])
    if record.get("split") not in (None, "train", "valid"):
        raise DataError("the tag 'split' says where the record goes", where=where, got=record["split"], allowed="train, valid")
    if found == "reasoning" and not record["final"].strip():
        raise DataError("'final' is empty: a worked-out response must come to an answer", where=where)
    if found != "qa" and any(record.get(tag) is not None for tag in ("answer", "rewards", "options")):
        _check_task(record, where)
    return record


def _check_task(record: Record, where: str) -> None:
    """The tags that make a record a task: `answer`, `rewards`, `options`."""
    answer, rewards, options = record.get("answer"), record.get("rewards"), record.get("options")
    if not isinstance(answer, str) or not answer.strip():
        raise DataError("a task needs the text 'answer' that its rewards compare with", where=where, got=repr(answer))
    if rewards is not None:
        if not isinstance(rewards, list) or not rewards or not all(isinstance(name, str) for name in rewards):
            raise DataError("'rewards' must be a list of at least one name", where=where, got=rewards, allowed='["exact_match"]')
        for name in rewards:
            if not name.endswith(".py") and name not in slots.names("reward"):
                known = slots.names("reward")
                raise DataError(
                    f"there is no reward {name!r}",
                    where=where,
                    allowed=", ".join(known) + ", or a path to your own .py file",
                    next=did_you_mean(name, known),
                )
    if options is not None and not (isinstance(options, dict) and all(isinstance(each, dict) for each in options.values())):
        raise DataError("'options' must hold a table of settings per reward", where=where, got=options)
    for name in options or ():
        if name not in (rewards or REWARDS):
            raise DataError(f"'options' has settings for {name!r}, which is none of the rewards", where=where, got=options)


def is_task(record: Record) -> bool:
    """Whether a record says how responses to it are judged: it carries `answer` (and is no question-answer text)."""
    return record.get("answer") is not None and kind_of(record) not in (None, "qa", "text")


def _allowed(kind: str) -> str:
    if kind in KINDS:
        return f"{kind} records with the keys " + ", ".join(KINDS[kind])
    return "; ".join(f"{name}: {', '.join(keys)}" for name, keys in KINDS.items())


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' must be a list of at least one message", where=where, got=messages)
    for index, message in enumerate(messages):
        at = f"{where}, message {index}"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            got = message.get("role") if isinstance(message, dict) else message
            raise DataError("a message needs a known 'role'", where=at, got=got, allowed=", ".join(ROLES))
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError("'content' must be a text (null only beside 'tool_calls')", where=at, got=content)


def text_of(record: Record) -> str:
    """All text of a record, its parts joined by newlines: what filters look at, and what pretraining reads."""
    kind = kind_of(record)
    if kind == "text":
        return record["text"]
    if kind == "chat":
        return "\n".join(m["content"] for m in record["messages"] if m.get("content"))
    if kind is None:
        raise DataError("the record is of no known kind", where=str(record.get("key")), allowed=_allowed(""))
    return "\n".join(record[part] for part in _PARTS[kind] if record.get(part))


def map_text(record: Record, change: Callable[[str], str]) -> Record:
    """A copy of `record` in which `change` was applied to every text part."""
    kind = kind_of(record)
    if kind == "chat":
        messages = [{**m, "content": change(m["content"])} if m.get("content") else m for m in record["messages"]]
        return {**record, "messages": messages}
    parts = _PARTS[kind] if kind else ()
    return {**record, **{part: change(record[part]) for part in parts if record.get(part)}}


def group_of(record: Record) -> str:
    """What is held out together: the record's `group`, else its `module`, else its own `key`."""
    return record.get("group") or record.get("module") or record["key"]
