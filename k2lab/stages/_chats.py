"""Records as chats: what fine-tuning and evaluation render."""

from __future__ import annotations

from typing import Any, Literal

from k2lab.core.errors import DataError
from k2lab.core.types import Message, Reasoning, Text
from k2lab.text.layout import THINK, THINK_END


def messages_of(record: dict[str, Any], side: Literal["chosen", "rejected"] = "chosen") -> list[Message]:
    """The conversation of a record: its prompt as the user's turn and its response as the assistant's.

    instruction, question-answer, response and task records have one answer (a task's right one); a reasoning record's answer
    thinks first; of a preference record `side` is taken; a chat record is taken as it is. DataError for text records.
    """
    from k2lab.data.records import kind_of
    from k2lab.gym.task import question_of
    from k2lab.text.chat import from_openai

    kind = kind_of(record)
    if kind == "chat":
        return from_openai(record["messages"], where=f"{record.get('key', 'record')}: messages")
    if kind == "instruction":
        return [*question_of(record), Message.text("assistant", record["output"])]
    if kind == "qa":
        return [Message.text("user", record["question"]), Message.text("assistant", record["answer"])]
    if kind == "reasoning":
        thoughts = (Reasoning(record["reasoning"]),) if record["reasoning"] else ()
        return [Message.text("user", record["prompt"]), Message("assistant", (*thoughts, Text(record["final"])))]
    if kind in ("preference", "response", "task"):
        answer = record[{"preference": side, "response": "response", "task": "answer"}[kind]]
        prompt = (
            from_openai(record["prompt_messages"]) if "prompt_messages" in record else [Message.text("user", record["prompt"])]
        )
        return [*prompt, written(answer)]
    raise DataError(
        f"a {kind} record is no conversation",
        where=str(record.get("key")),
        allowed='{"instruction","input","output"}, {"messages"}, {"question","answer"}, {"prompt","reasoning","final"}, '
        '{"prompt","response"}, {"prompt","answer"} or {"prompt","chosen","rejected"}',
    )


def written(text: str) -> Message:
    """An assistant's message of a text that may begin with `<think>...</think>`: what stands inside becomes its thoughts. Other
    markers stay text; thoughts without an end leave no answer."""
    head, begins, rest = text.partition(THINK)
    if not begins or head.strip():
        return Message.text("assistant", text)
    thoughts, _, answer = rest.partition(THINK_END)
    parts = [Reasoning(thoughts)] if thoughts else []
    return Message("assistant", (*parts, Text(answer)))


def document_start(tokenizer: Any) -> int:
    """The token before a document's first: [BOS], or where a vocabulary has none (Qwen) the end-of-document token."""
    from k2lab.core.errors import RecipeError

    try:
        return tokenizer.bos_id
    except RecipeError:
        return tokenizer.eos_id
