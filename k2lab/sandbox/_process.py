"""One process tree on a leash: fed, listened to with a bound, and ended."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from k2lab.core.errors import SandboxError
from k2lab.sandbox._boot import READY

# A sandbox takes tens of milliseconds to start; more than this is a fault of the machine and not the program's.
START_SECONDS = 30.0
# Descendants of a process that has ended may hold its pipes open for the moment that they take to die.
_GRACE = 1.0
# What a process takes to end after its children.
_LAST_WORDS = 1.0
_CHUNK = 65536


@dataclass(frozen=True)
class Ended:
    """How a process tree ended. `code` as in `subprocess` (negative: signal), None if it was ended from here; `seconds` since the
    program in it began."""

    stdout: bytes
    stderr: bytes
    stop: Literal["exit", "timeout", "output"]
    code: int | None
    seconds: float


@dataclass
class _Ears:
    """The two streams of a process, of which no more than `cap` bytes are ever kept."""

    cap: int
    kept: dict[str, bytearray] = field(default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})
    ready: float | None = None  # when the program began
    flooded: bool = False

    def hear(self, name: str, data: bytes) -> None:
        if name == "stdout" and self.ready is None and data.startswith(READY):
            self.ready, data = time.monotonic(), data[len(READY) :]
        room = self.cap - sum(map(len, self.kept.values()))
        self.kept[name] += data[:room]
        self.flooded |= len(data) > room


def run(
    argv: Sequence[str], *, source: bytes, seconds: float, cap: int, env: dict[str, str], pass_fds: Sequence[int] = ()
) -> Ended:
    """Runs `argv` in a process group of its own with `source` as stdin until it ends, `seconds` are over, or `cap` bytes are
    written.

    The clock starts when the process writes READY. Whatever happens, the group is dead on return. Raises SandboxError if the
    process cannot be started, or ends or dawdles before it is ready.
    """
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=env,
            cwd="/",
            pass_fds=pass_fds,
            process_group=0,
        )
    except OSError as error:
        raise SandboxError(f"{argv[0]} cannot be started: {error}") from error
    ears = _Ears(cap)
    try:
        stop = _attend(process, source, seconds, ears)
    finally:
        _kill(process)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    if ears.ready is None:
        said = bytes(ears.kept["stderr"]).decode("utf-8", "replace").strip()[-300:]
        how = f"did not start within {START_SECONDS:g} s" if stop == "timeout" else f"ended with code {process.returncode}"
        raise SandboxError(f"the sandbox {how} before the program began", got=said or None)
    took = time.monotonic() - ears.ready
    code = process.returncode if stop == "exit" else None
    return Ended(bytes(ears.kept["stdout"]), bytes(ears.kept["stderr"]), stop, code, took)


def _attend(process: subprocess.Popen[bytes], source: bytes, seconds: float, ears: _Ears) -> Literal["exit", "timeout", "output"]:
    """Feeds and hears the process until it has ended and its streams are closed, or its time or its room is used up."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    started, rest, exited = time.monotonic(), memoryview(source), None
    ending = _pidfd(process.pid)
    with selectors.DefaultSelector() as selector:
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        waiting_for: dict[str, Any] = {"stdout": process.stdout, "stderr": process.stderr}
        if ending is not None:
            waiting_for["end"] = ending
        for name, stream in waiting_for.items():
            selector.register(stream, selectors.EVENT_READ, name)
        try:
            while waiting_for:
                left = _limit(started, ears.ready, exited, seconds) - time.monotonic()
                if left <= 0:
                    return "timeout" if exited is None else "exit"
                for key, _ in selector.select(left):
                    name = key.data
                    if name == "stdin":
                        rest = _feed(process, rest)
                        if not rest:
                            selector.unregister(process.stdin)
                            process.stdin.close()
                    elif name != "end" and (data := os.read(key.fd, _CHUNK)):
                        ears.hear(name, data)
                        if ears.flooded:
                            return "output"
                    else:
                        selector.unregister(key.fileobj)
                        del waiting_for[name]
                        exited = time.monotonic() if name == "end" else exited
        finally:
            if ending is not None:
                os.close(ending)
    try:
        process.wait(max(_limit(started, ears.ready, None, seconds) - time.monotonic(), 0.001))
    except subprocess.TimeoutExpired:
        return "timeout"
    return "exit"


def _limit(started: float, ready: float | None, exited: float | None, seconds: float) -> float:
    """When patience ends: with the start, with the program, or with pipes that the dead have left open."""
    if exited is not None:
        return exited + _GRACE
    return started + START_SECONDS if ready is None else ready + seconds


def _feed(process: subprocess.Popen[bytes], rest: memoryview) -> memoryview:
    """Writes what the pipe takes; what remains is empty if all is written or nobody reads."""
    assert process.stdin is not None
    try:
        return rest[os.write(process.stdin.fileno(), rest[:_CHUNK]) :]
    except BlockingIOError:
        return rest
    except BrokenPipeError:
        return rest[:0]


def _pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the system has none (then closed pipes say so)."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole tree and waits for it; its numbers cannot have been given to others, since nobody has been waited for.

    Children go first, so that their own parent waits for them: orphans would stay as zombies where process 1 waits for nobody.
    """
    if process.returncode is not None or process.poll() is not None:
        return
    ended = [_end(int(pid)) for pid in _children(process.pid)]
    if any(ended):
        try:
            process.wait(_LAST_WORDS)
            return
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def _children(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return file.read().split()
    except OSError:
        return []


def _end(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return False
    return True
