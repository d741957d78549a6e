"""What one call of each sandbox costs, next to a plain `python3 -I` subprocess, which protects nothing.

The program is `print(6 * 7)`, so that all of the time is the sandbox's. The ways take turns, call by call, in one process;
warm: each has run before. "parallel" is calls per second with as many threads as there are processors.

    python bench/sandbox_latency.py [--calls 60]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from k2lab import sandbox
from k2lab.core.errors import SandboxError

CODE = "print(6 * 7)"


def plain(python: str) -> Callable[[], str]:
    """A bare subprocess of the interpreter `python`."""
    return lambda: subprocess.run([python, "-I", "-c", CODE], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def sandboxed(box: sandbox.Sandbox) -> Callable[[], str]:
    """A call of `box`."""
    limits = sandbox.Limits(seconds=30)
    return lambda: box.run(CODE, limits).stdout


def timed(call: Callable[[], str]) -> float:
    """Seconds of one call, whose result is checked."""
    began = time.perf_counter()
    result = call()
    took = time.perf_counter() - began
    assert result == "42\n", result
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=60, help="timed calls of each way")
    calls = parser.parse_args().calls
    python = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{platform.platform()}, {cores} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    ways = {f"plain {python} -I": plain(python)}
    for kind in sandbox.KINDS:
        try:
            box = sandbox.pick(kind)
        except SandboxError as error:
            print(f"{kind}: not measured: {error}")
            continue
        print(f"{kind}: {box.describe()}")
        ways[kind] = sandboxed(box)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        for _ in range(3):
            timed(call)
    for _ in range(calls):
        for name, call in ways.items():
            times[name].append(timed(call) * 1e3)
    reference = statistics.median(next(iter(times.values())))
    print(f"\n{'way':<28}{'median ms':>10}{'p95 ms':>10}{'x plain':>10}{'parallel/s':>12}")
    for name, call in ways.items():
        row = sorted(times[name])
        began = time.perf_counter()
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(lambda _, call=call: timed(call), range(calls)))
        rate = calls / (time.perf_counter() - began)
        middle = statistics.median(row)
        print(f"{name:<28}{middle:>10.1f}{row[int(0.95 * (len(row) - 1))]:>10.1f}{middle / reference:>10.2f}{rate:>12.1f}")


if __name__ == "__main__":
    main()
