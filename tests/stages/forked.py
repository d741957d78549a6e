"""Runs of the command line that begin at once: forked from a process that has imported everything and computed nothing.

Importing torch and transformers takes longer than what a test kills. The server answers one line of JSON with one.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
from functools import cache

SLOW = (
    "k2lab.engine.run", "k2lab.models.build", "k2lab.sampling.local",
    "transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers.models.kimi_linear.modeling_kimi_linear",
    "transformers.models.qwen2.modeling_qwen2",
)  # fmt: skip


class Run:
    """A `k2` command in a forked process of one thread, silent; like `subprocess.Popen` as far as tests need it."""

    def __init__(self, *arguments: object) -> None:
        self.pid = _ask("start", [str(argument) for argument in arguments])
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask("poll", self.pid)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = _ask("wait", self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As Popen's: nothing happens if the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def finish(*arguments: object) -> None:
    """Runs a command to its end; AssertionError unless it succeeds."""
    code = Run(*arguments).wait()
    assert code == 0, (code, arguments)


@cache
def _server() -> subprocess.Popen:
    from small_run import environment

    command = [sys.executable, __file__]
    server = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def _ask(what: str, value: object) -> int | None:
    server = _server()
    print(json.dumps([what, value]), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _serve() -> None:
    for name in SLOW:
        importlib.import_module(name)
    said = sys.stdout
    for line in sys.stdin:
        what, value = json.loads(line)
        if what == "start":
            answer = os.fork() or _become(value)
        else:
            pid, status = os.waitpid(value, os.WNOHANG if what == "poll" else 0)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=said, flush=True)


def _become(arguments: list[str]) -> int:
    """Runs the command in this process and ends it."""
    from k2lab.cli import main

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    code = 1
    try:
        code = main(arguments)
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
