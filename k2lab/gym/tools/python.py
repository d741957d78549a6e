"""The tool `python`: a model's program is run in a sandbox, and what it prints is the result."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from k2lab.core.errors import RecipeError
from k2lab.sandbox import Limits, Outcome, pick

_LINE = re.compile(r'^\s*File "<code>", line (\d+)', re.MULTILINE)
# An error message is the program's text, too; a few lines' worth is enough.
_ERROR_CHARS = 400
_DESCRIPTION = (
    "Runs a Python 3 program and returns what it prints, or the error that ended it. The value of a last line that is an "
    "expression is printed, too. Only the standard library; no network; nothing is kept between calls."
)


@dataclass(frozen=True, kw_only=True)
class Python:
    """Runs a program of the model's in a sandbox: prints come back as text. One string argument, `code`.

    Every call is a fresh interpreter. `sandbox` is "auto" (bubblewrap if it works here, else wasm), "bubblewrap" or "wasm"; there
    is no way without one.
    """

    # What the model is told about the tool.
    description: str = _DESCRIPTION
    # Which sandbox: "auto", "bubblewrap" or "wasm".
    sandbox: str = "auto"
    # Wall-clock seconds per call.
    seconds: float = 5.0
    # MiB of memory per process of the program.
    memory_mb: int = 512
    # MiB under /tmp, the only place where the program may write.
    files_mb: int = 16
    # Processes and threads of the program.
    processes: int = 16
    # A program that writes more bytes than these is ended.
    output_bytes: int = 1 << 20
    # Characters of output that the model gets to see.
    output_chars: int = 4000

    def __post_init__(self) -> None:
        if self.output_chars < 1:
            raise RecipeError("the model must see something", where="output_chars", got=self.output_chars)
        self.limits()

    def limits(self) -> Limits:
        """The sandbox's limits. Raises RecipeError for values that make no sense."""
        return Limits(
            seconds=self.seconds,
            memory_mb=self.memory_mb,
            files_mb=self.files_mb,
            processes=self.processes,
            output_bytes=self.output_bytes,
        )

    def describe(self) -> str:
        """One line for a run's log: which sandbox, which limits. Raises SandboxError if there is none."""
        return pick(self.sandbox).describe(self.limits())

    def spec(self) -> dict[str, Any]:
        """The tool's specification, in OpenAI's form."""
        code = {"type": "string", "description": "The program."}
        parameters = {"type": "object", "properties": {"code": code}, "required": ["code"]}
        return {"type": "function", "function": {"name": "python", "description": self.description, "parameters": parameters}}

    def call(self, arguments: str) -> str:
        """What the program printed; if it failed, a last line that begins with "error:" and says why.

        `arguments` is the JSON text that the model wrote. Raises SandboxError if no sandbox works here, never for a model's
        mistake.
        """
        box = pick(self.sandbox)
        try:
            given = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return f'error: the arguments are no JSON ({error}); give {{"code": "..."}}'
        code = given.get("code") if isinstance(given, dict) else None
        if not isinstance(code, str):
            return 'error: the argument "code" (a string) is missing; give {"code": "..."}'
        return self._text(box.run(code, self.limits(), echo=True))

    def _text(self, outcome: Outcome) -> str:
        printed = outcome.stdout.rstrip("\n")
        if outcome.ok:
            return self._cut(printed or outcome.stderr.rstrip("\n")) or "(no output)"
        why = {
            "timeout": f"stopped: it did not end within {self.seconds:g} s",
            "memory": f"out of memory: at most {self.memory_mb} MiB",
            "output": f"stopped: more than {self.output_bytes} bytes of output",
            "error": "the program crashed",
            "exit": _reason(outcome),
        }[outcome.stop]
        return "\n".join(filter(None, (self._cut(printed), f"error: {why}")))

    def _cut(self, text: str) -> str:
        if len(text) <= self.output_chars:
            return text
        return text[: self.output_chars] + f"\n[cut: {self.output_chars} of {len(text)} characters]"

    @staticmethod
    def examples() -> list[Python]:
        return [Python(), Python(seconds=2.0, memory_mb=256, output_chars=500)]


def _reason(outcome: Outcome) -> str:
    """What a failed program said last (behind the traceback), with the line of the program where it happened."""
    lines = outcome.stderr.rstrip().splitlines()
    if not lines:
        return f"the program ended with exit code {outcome.exit_code}"
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    said = "\n".join(lines[frames[-1] + 1 if frames else -1 :]) or lines[-1].strip()
    places = _LINE.findall(outcome.stderr)
    said = said if len(said) <= _ERROR_CHARS else said[:_ERROR_CHARS] + "..."
    return f"line {places[-1]}: {said}" if places else said
