"""The one error tree of K2 Lab.

    K2Error
    ├── RecipeError      (ValueError)       exit 2   the recipe is wrong: key path, got, allowed
    ├── DataError        (ValueError)       exit 2   a record, file or data set is wrong: file, line, what
    ├── CheckpointError  (ValueError)       exit 2   an artifact or checkpoint is incomplete, edited or of another format
    ├── NumericsError    (ArithmeticError)  exit 4   non-finite numbers, or two computations that must agree do not
    ├── RolloutError     (RuntimeError)     recorded in a rollout, not raised to the user
    ├── SandboxError     (RuntimeError)     exit 3   untrusted code could not be contained
    ├── SyncError        (RuntimeError)     exit 4   trainer and sampler disagree after a weight sync
    └── MachineError     (OSError)          exit 3   disk full, no permission, missing device, directory in use

Each class also inherits the builtin that it replaces, so `except ValueError` keeps working. Messages follow one template:
what, where, got, allowed, next; they are printed as one paragraph, never as a traceback, unless `--traceback` is given.

Exit codes of the `k2` command: 0 done, 1 our bug, 2 user's recipe or data, 3 machine, 4 numerics.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class K2Error(Exception):
    """Base of all errors that a user should see as one paragraph.

    Args: `what` went wrong (a clause without final stop); `where` (key path, file:line, step); `got` the offending value;
    `allowed` what would have been right; `next` what to do now. All but `what` may be omitted.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        allowed: str | None = None,
        next: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.allowed, self.next = what, where, got, allowed, next
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        parts = [text.rstrip(".") + "."]
        if self.got is not None:
            shown = self.got if isinstance(self.got, str) else repr(self.got)
            parts.append(f"Got: {shown if len(shown) <= 300 else shown[:297] + '...'}.")
        if self.allowed:
            parts.append(f"Allowed: {self.allowed.rstrip('.')}.")
        if self.next:
            parts.append(f"{self.next.rstrip('.')}.")
        return " ".join(parts)

    def __reduce__(self):  # keyword-only arguments would be lost by the default pickling of exceptions
        state = {"where": self.where, "got": repr(self.got) if self.got is not None else None}
        return (_rebuild, (type(self), self.what, {**state, "allowed": self.allowed, "next": self.next}))


def _rebuild(cls: type[K2Error], what: str, fields: dict) -> K2Error:
    return cls(what, **fields)


class RecipeError(K2Error, ValueError):
    """The recipe cannot be run as written; raised before any model is loaded."""

    exit_code = 2


class DataError(K2Error, ValueError):
    """A record, file or data set is wrong; `where` names file and line."""

    exit_code = 2


class CheckpointError(K2Error, ValueError):
    """An artifact or checkpoint is incomplete, was edited, or has a format this version does not read."""

    exit_code = 2


class NumericsError(K2Error, ArithmeticError):
    """Non-finite numbers, or two computations that must agree and do not."""

    exit_code = 4


class RolloutError(K2Error, RuntimeError):
    """A failure inside one rollout. Recorded in the rollout; never ends a run."""


class SandboxError(K2Error, RuntimeError):
    """Untrusted code could not be run under the promised limits."""

    exit_code = 3


class SyncError(K2Error, RuntimeError):
    """Trainer and sampler disagree beyond their bound after a weight sync."""

    exit_code = 4


class MachineError(K2Error, OSError):
    """The machine, not the user's input, is the obstacle: disk, memory, permission, device, lock."""

    exit_code = 3


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The closest known name as a sentence, or None: `did_you_mean("lerning_rate", ["lr", "learning_rate"])`."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else None
