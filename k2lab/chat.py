"""`k2 chat`: talk to a model; tokens appear as they are decoded, and tool calls and their results are shown.

It is the agent's loop (`gym.agent`) with a person in place of a task.
"""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from k2lab.core.errors import DataError, RecipeError, did_you_mean
from k2lab.core.types import Completion, Message, Reasoning, SampleParams, StopReason, ToolCall
from k2lab.gym.agent import Conversation, Toolbox, calls_of
from k2lab.text import chat, layout

MAX_TURNS = 8  # answers of the model to one message of the user: tool calls and the last word
_HELP = "/reset forgets the conversation, /tools says what the model may call, /exit ends; anything else is said to the model"
_STOPS = {
    StopReason.LENGTH: "cut off: --max-tokens is reached",
    StopReason.CONTEXT: "cut off: the model's window is full; /reset begins anew",
    StopReason.ABORTED: "interrupted",
}


@dataclass
class Session:
    """A conversation between a person and a model. `show(kind, text)` gets what is to be seen, in order: kinds are "text" (the
    answer, piece by piece), "thought", "call", "result" and "note"."""

    sampler: Any
    tokenizer: Any
    show: Callable[[str, str], None]
    toolbox: Toolbox = field(default_factory=Toolbox)
    params: SampleParams = SampleParams(max_tokens=512)
    system: str = ""
    default_system: bool = True
    max_turns: int = MAX_TURNS
    interruptible: bool = False  # Ctrl-C ends the model's turn, not the program
    messages: list[Message] = field(default_factory=list)
    _talk: Conversation | None = None
    _turns: int = 0  # of the model since the session began: no two turns may have the same draws

    def reset(self) -> None:
        """Forgets everything that was said."""
        self.forget([])

    def forget(self, messages: list[Message]) -> None:
        """Goes back to a conversation of these messages."""
        self.messages, self._talk = messages, None

    def ask(self, text: str) -> str:
        """Says `text` to the model and shows what it does until it has answered; the answer's text. A message that the window has
        no room for is shown as such and forgotten."""
        before = list(self.messages)
        talk = self._begin(Message.text("user", text))
        left = self.max_turns
        while True:
            left -= 1
            completion, message = self._turn(talk)
            calls = calls_of(message)
            if completion.stop is not StopReason.EOS or not calls or not self.toolbox.tools:
                break
            if not left:
                self.show("note", f"stopped after {self.max_turns} turns with tool calls")
                break
            self._serve(talk, calls)
        self.messages = talk.messages
        if completion.stop is StopReason.CONTEXT and not completion.tokens and left == self.max_turns - 1:
            self.forget(before)
            self.show("note", "there is no room for this in the model's window; /reset begins anew")
        elif completion.stop in _STOPS:
            self.show("note", _STOPS[completion.stop])
        return message.content

    def _begin(self, message: Message) -> Conversation:
        """The conversation with the user's next message. Tokens that the model produced are kept, except where it thought: the
        format drops past thoughts from history, so then the conversation is rendered anew."""
        if not self.messages and self.system:
            self.messages = [Message.text("system", self.system)]
        thought = any(isinstance(part, Reasoning) for said in self.messages for part in said.parts)
        if self._talk is not None and not thought:
            self._talk.ask([message])
            return self._talk
        messages = [*self.messages, message]
        tokens = chat.render(
            messages,
            self.tokenizer,
            tools=self.toolbox.specs or None,
            add_generation_prompt=True,
            default_system=self.default_system,
        ).tokens
        self._talk = Conversation(self.tokenizer, messages, tokens)
        return self._talk

    def _turn(self, talk: Conversation) -> tuple[Completion, Message]:
        """One turn of the model, shown as it comes. Ctrl-C ends the turn, and what was said so far stays."""
        from k2lab.sampling.streaming import stream

        screen = _Screen(self.tokenizer, self.show)
        params = replace(self.params, stop_tokens=(self.tokenizer.im_end_id,))
        tokens = stream(self.sampler, talk.tokens, params, f"chat/{self._turns}")
        self._turns += 1
        seen: list[int] = []
        try:
            while True:
                seen.append(next(tokens))
                screen.take(seen[-1])
        except StopIteration as end:
            completion = end.value
        except KeyboardInterrupt:
            if not self.interruptible:
                raise
            tokens.close()
            completion = Completion(tuple(seen), (0.0,) * len(seen), StopReason.ABORTED)
        screen.finish()
        return completion, talk.take(completion)

    def _serve(self, talk: Conversation, calls: Sequence[ToolCall]) -> None:
        for call in calls:
            self.show("call", f"{call.name or '(no name)'} {call.arguments.strip()}")
        answers = self.toolbox.run(calls)
        for call, answer in zip(calls, answers):
            self.show("result", f"{call.name or '(no name)'}, {answer.seconds:.2f} s\n{answer.content}")
        talk.give([answer.content for answer in answers])


class _Screen:
    """Turns tokens into text as far as it is whole: bytes of half a character wait, tool calls and markers are not text."""

    def __init__(self, tokenizer: Any, show: Callable[[str, str], None]) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.names = {token: name for name, token in tokenizer.special.items()}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.kind, self.in_call = "text", False

    def take(self, token: int) -> None:
        name = self.names.get(token)
        if name is None:
            if not self.in_call:
                self._say(self.decoder.decode(self.tokenizer.token_bytes(token)))
            return
        self.finish()
        if name in (layout.SECTION_BEGIN, layout.CALL_BEGIN):
            self.in_call = True
        elif name == layout.SECTION_END:
            self.in_call = False
        elif name in (layout.THINK, layout.THINK_END):
            self.kind = "thought" if name == layout.THINK else "text"
        elif name != layout.IM_END and token != self.tokenizer.im_end_id and not self.in_call:
            self._say(name)

    def finish(self) -> None:
        """Shows what waits for the rest of a character."""
        self._say(self.decoder.decode(b"", final=True))
        self.decoder.reset()

    def _say(self, text: str) -> None:
        if text:
            self.show(self.kind, text)


class Printer:
    """Prints what a session shows; on a terminal in colours, elsewhere plain. Control characters, which could command a terminal,
    are not passed on."""

    COLOURS = {"thought": "2", "call": "36", "result": "2;36", "note": "33"}

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.colour = self.out.isatty()
        self.last, self.at_start = "", True

    def __call__(self, kind: str, text: str) -> None:
        text = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
        if kind != self.last or kind in ("call", "result", "note"):
            self.end()
            if kind != "text":
                text = {"thought": "[thinks] ", "call": "[calls] ", "result": "[returned] ", "note": "["}[kind] + text
        if kind == "note":
            text += "]"
        shown = f"\033[{self.COLOURS[kind]}m{text}\033[0m" if self.colour and kind in self.COLOURS else text
        print(shown, end="", file=self.out, flush=True)
        self.last, self.at_start = kind, text.endswith("\n")

    def end(self) -> None:
        """Ends the line, if one is open."""
        if not self.at_start:
            print(file=self.out, flush=True)
        self.last, self.at_start = "", True


def repl(session: Session, printer: Printer, source: TextIO | None = None) -> None:
    """Reads lines until the end or /exit and answers each. On a terminal it prompts; piped, one answer per line."""
    source = source or sys.stdin
    if isinstance(source, io.TextIOWrapper):
        source.reconfigure(errors="replace")  # what is no text cannot be said to a model
    interactive = source.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            line = input("you> ") if interactive else source.readline()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not interactive and not line:
            return
        line = line.strip()
        if line in ("/exit", "/quit"):
            return
        if line.startswith("/"):
            _command(line, session, printer)
        elif line:
            _say(line, session, printer)
        printer.end()


def _say(line: str, session: Session, printer: Printer) -> None:
    before = list(session.messages)
    try:
        session.ask(line)
    except KeyboardInterrupt:  # while a tool was running: the exchange has no end, so it is forgotten
        if not session.interruptible:
            raise
        session.forget(before)
        printer("note", "interrupted")


def _command(line: str, session: Session, printer: Printer) -> None:
    names = ("/reset", "/tools", "/help", "/exit")
    if line == "/reset":
        session.reset()
        printer("note", "the conversation begins anew")
    elif line == "/tools":
        listed = [f"{spec['function']['name']}: {spec['function'].get('description', '')}" for spec in session.toolbox.specs]
        printer("note", "; ".join(listed) or "the model has no tools; start with --tools python")
    elif line == "/help":
        printer("note", _HELP)
    else:
        hint = did_you_mean(line, names)
        printer("note", f"there is no command {line}. {hint + ' ' if hint else ''}{_HELP}")


# ---------------------------------------------------------------- which model


def model_directory(path: Path) -> Path:
    """The model that RUN, RUN/STAGE, a stage's directory or a model directory names; of a run the last one that was trained.

    Raises DataError for paths that hold none, RecipeError for stages that make none or are not finished.
    """
    if (path / "config.json").is_file():
        return path
    if (path / "recipe.resolved.toml").is_file():
        return _stage_directory(path, None)
    if (path.parent / "recipe.resolved.toml").is_file():
        return _stage_directory(path.parent, path.name)
    raise DataError(
        f"{path} is no run directory, no RUN/STAGE and no model directory (with config.json)",
        next="Give for example runs/tiny, runs/tiny/sft or a directory that holds config.json and *.safetensors",
    )


def _stage_directory(run_dir: Path, name: str | None) -> Path:
    from k2lab.report.collect import collect

    stages = collect(run_dir).stages
    trained = {stage.name: stage.directory for stage in stages if stage.directory is not None and stage.kind == "checkpoint"}
    if not trained:
        raise DataError(f"{run_dir} has no finished model yet", next="Give `k2 run` the recipe again to go on")
    if name is None:
        name = list(trained)[-1]
    if name not in trained:
        known = {stage.name for stage in stages}
        what = f"the stage {name!r} has no finished model" if name in known else f"{run_dir} has no stage {name!r}"
        raise RecipeError(what, allowed=", ".join(trained), next=did_you_mean(name, trained))
    return trained[name]


def begins_with_default_system(folder: Path) -> bool:
    """Whether a model's own chat template puts Kimi's default system message before conversations that have none."""
    from k2lab.text.template import chat_template

    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return not any(text == chat_template(default_system=False, thinking=thinking) for thinking in (False, True))
