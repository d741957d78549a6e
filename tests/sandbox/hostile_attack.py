"""What a hostile program is, and what every one of them begins with. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

ESCAPED = "ESC" + "APED"
ANY = ("exit", "timeout", "memory", "output", "error")
SPIN = ("timeout",)


@dataclass(frozen=True)
class Attack:
    """A program that prints ESCAPED if it got what it wanted.

    `stops`: how it may end; `bare`: it is harmless enough to be run without a sandbox, where it must succeed, which proves that
    it can; `only`: the sandbox that it is about; then its limits. Words between @ are places of the world around the sandbox.
    """

    name: str
    code: str
    stops: tuple[str, ...] = ("exit",)
    bare: bool = False
    only: str = ""
    seconds: float = 4.0
    files_mb: int = 4
    processes: int = 8


# In every program: `attempt(f)` says ESCAPED if f() returns something true; what it raises is a refusal.
PRELUDE = """
import os, sys
def attempt(f, name=""):
    try:
        got = f()
    except BaseException as error:
        print("refused", name, type(error).__name__)
    else:
        print("ESC" + "APED" if got else "nothing", name)
def libc():
    import ctypes
    return ctypes.CDLL(None, use_errno=True)
def syscall(*arguments):
    import ctypes
    function = libc().syscall
    function.restype = ctypes.c_long
    return function(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)) >= 0
"""
