"""What every sandbox takes and gives: limits in, outcome out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from k2lab.core.errors import RecipeError

Stop = Literal["exit", "timeout", "memory", "output", "error"]


@dataclass(frozen=True)
class Limits:
    """What one program may use. Raises RecipeError for values that make no sense."""

    # Wall-clock time from the moment that the program begins.
    seconds: float = 5.0
    # Address space of each process, in MiB. The interpreter itself takes about 30.
    memory_mb: int = 512
    # Bytes of stdout and stderr together; a program that writes more is ended.
    output_bytes: int = 65536
    # Everything under /tmp together, and each file, in MiB. (The wasm sandbox has no files at all.)
    files_mb: int = 16
    # Processes and threads together.
    processes: int = 16

    def __post_init__(self) -> None:
        least = {"seconds": 0.0, "memory_mb": 64, "output_bytes": 1, "files_mb": 1, "processes": 1}
        for field in fields(self):
            value = getattr(self, field.name)
            fits = value > 0 if field.name == "seconds" else value >= least[field.name] and value == int(value)
            if not fits:
                allowed = "more than 0" if field.name == "seconds" else f"a whole number of at least {least[field.name]}"
                raise RecipeError("a sandbox limit makes no sense", where=field.name, got=value, allowed=allowed)

    def __str__(self) -> str:
        return (
            f"{self.seconds:g} s, {self.memory_mb} MiB memory, {self.files_mb} MiB files, {self.processes} processes, "
            f"{self.output_bytes} bytes of output"
        )


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    `stop`: "exit" (it ended by itself; `exit_code` says how), "timeout", "memory" (it wanted more than its memory), "output"
    (it wrote more than `output_bytes`; what it wrote up to there is kept), "error" (it was killed by a signal, or crashed).
    `ok` means "exit" with code 0. `seconds` is wall time from the program's start, without the sandbox's own. `exit_code` is
    None where the program was ended from outside.
    """

    stdout: str
    stderr: str
    ok: bool
    stop: Stop
    seconds: float
    exit_code: int | None


class Sandbox(ABC):
    """A way to run untrusted Python. Objects are thread-safe, and many calls may run at once."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, code: str, limits: Limits = Limits(), *, echo: bool = False) -> Outcome:
        """Runs `code` as a program of its own; returns when it has ended and nothing of it is left.

        `echo` prints the value of a last statement that is an expression, as notebooks do. Whatever the program does is an
        Outcome; SandboxError is raised only if the sandbox itself fails.
        """

    @abstractmethod
    def describe(self, limits: Limits | None = None) -> str:
        """One line for a run's log: which sandbox, what it rests on, and `limits` if given."""
