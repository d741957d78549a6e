"""The sandbox of Linux machines: bubblewrap around the system's own Python.

A program sees a file system that consists of the interpreter, the system's libraries (read-only), four harmless devices and an
empty /tmp of limited size; there is no /etc, /proc, /sys, /home or shell. It has process, network, IPC, host-name and (if the
machine lets ordinary users make them) user namespaces of its own, no capabilities, a filter on system calls (`_seccomp`),
limits that it cannot raise (`_boot`), and, where one can be made, a memory cgroup (`_cgroup`). Started by root, it runs as a
user number that nobody has.

Two layouts are tried. "user": everything is set up by an ordinary user inside a new user namespace; root drops to such a user
first. "root": root itself sets up the namespaces and the user is dropped inside, for machines that forbid ordinary users such
namespaces.

What is not covered: see the package's docstring.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

from k2lab.core.errors import SandboxError
from k2lab.sandbox import _boot, _cgroup, _process, _seccomp
from k2lab.sandbox.api import Limits, Outcome, Sandbox, Stop

_FIND = threading.Lock()
_CALLS = itertools.count()
# Where the interpreter lies inside if it does not come with the system.
_INSIDE = "/python"
# A bwrap that starts programs is not enough: they must find themselves locked in.
_PROBE = """
import os, socket
def refused(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        return True
nothing = not any(map(os.path.exists, ("/etc", "/home", "/proc", "/root", "/sys", "/usr/bin/env")))
read_only = refused(open, "/usr/probe", "w") and refused(open, "/probe", "w")
print("locked in" if nothing and read_only and refused(socket.socket) and refused(os.setuid, 0) and os.getuid() else "free")
"""
_PROBE_LIMITS = Limits(seconds=20, memory_mb=256, processes=4)
# Exit codes by which a shell, and bubblewrap, report signals that mean a crash: ILL ABRT BUS FPE KILL SEGV SYS.
_CRASHES = {128 + number for number in (4, 6, 7, 8, 9, 11, 31)}
_OUT_OF_CPU = 128 + 24  # XCPU


@dataclass(frozen=True)
class _Python:
    """An interpreter of the host: `file` shown at `inside`, with the folders it needs, `hidden` ones left empty."""

    file: str
    inside: str
    folders: tuple[tuple[str, str], ...]
    hidden: tuple[str, ...] = ()
    libraries: str = ""


@dataclass(frozen=True)
class Bubblewrap(Sandbox):
    """One way that works on this machine; made by `find`."""

    name: ClassVar[str] = "bubblewrap"

    bwrap: str
    version: str
    python: _Python
    layout: Literal["user", "root"]
    drop: str  # setpriv, "" for an ordinary user
    files: bool  # whether /tmp is writable
    cgroups: _cgroup.Parent | None = None

    def run(self, code: str, limits: Limits = Limits(), *, echo: bool = False) -> Outcome:  # noqa: B008 (frozen)
        """See `Sandbox.run`."""
        group = None
        if self.cgroups is not None:
            try:
                group = self.cgroups.make((limits.memory_mb + limits.files_mb) << 20, limits.processes)
            except OSError as error:
                raise SandboxError(f"no memory cgroup can be made any more: {error}", where=str(self.cgroups.folder)) from error
        filter_fd = _filter_fd()
        try:
            ended = _process.run(
                [*(group.enter() if group else []), *self._command(limits, echo, filter_fd)],
                source=code.encode("utf-8", "replace"),
                seconds=limits.seconds,
                cap=limits.output_bytes,
                env=self._env(),
                pass_fds=(filter_fd,),
            )
            full = group is not None and group.ran_out()
        finally:
            os.close(filter_fd)
            if group is not None:
                group.remove()
        return _outcome(ended, full)

    def describe(self, limits: Limits | None = None) -> str:
        """See `Sandbox.describe`."""
        how = "own user namespace" if self.layout == "user" else "namespaces made by root"
        parts = [
            f"bubblewrap {self.version}",
            self.python.file,
            how + (", dropped user" if self.drop else ""),
            "no network",
            "system call filter",
            *([] if self.files else ["no writable files: this bwrap (before 0.7, or setuid) cannot limit their size"]),
            f"memory cgroup v{self.cgroups.version}" if self.cgroups else "no memory cgroup: the memory limit is per process",
        ]
        return "; ".join(parts) + (f"; limits: {limits}" if limits else "")

    def _env(self) -> dict[str, str]:
        env = {"PATH": "/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        return env | ({"LD_LIBRARY_PATH": self.python.libraries} if self.python.libraries else {})

    def _command(self, limits: Limits, echo: bool, filter_fd: int) -> list[str]:
        user = _user() if self.drop else ""
        leave = ["--reuid", user, "--regid", user, "--clear-groups"]
        command: list[str] = []
        if self.layout == "user":
            if self.drop:
                command += [self.drop, *leave, "--inh-caps=-all", "--no-new-privs", "--"]
            command += [self.bwrap, "--unshare-user", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL"]
        else:
            command += [self.bwrap, "--cap-drop", "ALL"]
            for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # for setpriv, which gives them up
                command += ["--cap-add", capability]
        command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        # As process 1 of its namespace, the program takes all others with it when it ends, before bubblewrap itself can end.
        command += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1"]
        # Folders that bubblewrap has to make by itself are readable by their maker alone, which is root in the other layout.
        for folder in ("/usr", "/usr/bin", "/usr/share", "/dev", _INSIDE, f"{_INSIDE}/bin"):
            command += ["--perms", "0755", "--dir", folder]
        command += [*_system(), *_shown(self.python)]
        if self.layout == "root":
            command += ["--ro-bind", self.drop, "/usr/bin/setpriv"]
        for device in ("null", "zero", "random", "urandom"):
            command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        size = ["--size", str(limits.files_mb << 20)] if self.files else []
        command += ["--perms", "1777", *size, "--tmpfs", "/tmp", "--symlink", "/tmp", "/dev/shm"]
        command += [] if self.files else ["--remount-ro", "/tmp"]
        # Everything that bubblewrap made on the way is memory, too: /tmp alone stays writable.
        command += ["--remount-ro", "/", "--chdir", "/tmp", "--seccomp", str(filter_fd), "--"]
        if self.layout == "root":
            command += ["/usr/bin/setpriv", *leave, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs", "--"]
        return [*command, self.python.inside, *_boot.arguments(limits, echo)]


def _outcome(ended: _process.Ended, full: bool) -> Outcome:
    stdout, stderr = ended.stdout.decode("utf-8", "replace"), ended.stderr.decode("utf-8", "replace")
    stop: Stop = ended.stop
    if stop == "exit" and ended.code:
        if full or _boot.out_of_memory(stderr):
            stop = "memory"
        elif ended.code == _OUT_OF_CPU:
            stop = "timeout"
        elif ended.code in _CRASHES or ended.code < 0:
            stop = "error"
    return Outcome(stdout, stderr, ended.stop == "exit" and ended.code == 0, stop, ended.seconds, ended.code)


# ---------------------------------------------------------------- what the program sees


@cache
def _system() -> tuple[str, ...]:
    """The system's libraries, read-only, whether /lib is a folder of its own or part of /usr."""
    options: list[str] = []
    for name in ("lib", "lib64"):
        if os.path.isdir(f"/usr/{name}"):
            options += ["--ro-bind", f"/usr/{name}", f"/usr/{name}"]
        if os.path.islink(f"/{name}"):
            options += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            options += ["--ro-bind", f"/{name}", f"/{name}"]
    if os.path.isdir("/usr/share/zoneinfo"):
        options += ["--ro-bind", "/usr/share/zoneinfo", "/usr/share/zoneinfo"]
    return tuple(options)


def _shown(python: _Python) -> list[str]:
    options = ["--ro-bind", python.file, python.inside]
    for folder, inside in python.folders:
        options += ["--ro-bind", folder, inside]
    for inside in python.hidden:
        options += ["--tmpfs", inside, "--remount-ro", inside]
    return options


def _pythons() -> Iterator[_Python]:
    """The system's interpreter, whose files are everybody's anyway; then the one that runs this, without its packages."""
    system = os.path.realpath("/usr/bin/python3")
    if os.access(system, os.X_OK) and Path(system).parent == Path("/usr/bin"):
        yield _Python(system, system, ())
    own = os.path.realpath(getattr(sys, "_base_executable", sys.executable) or sys.executable)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library = Path(sys.base_prefix, "lib")
    if own != system and (library / version).is_dir():
        inside = f"{_INSIDE}/lib/{version}/site-packages"
        hidden = (inside,) if (library / version / "site-packages").is_dir() else ()
        folders = ((str(library), f"{_INSIDE}/lib"),)
        yield _Python(own, f"{_INSIDE}/bin/{version}", folders, hidden, f"{_INSIDE}/lib")


def _filter_fd() -> int:
    """A fresh descriptor from which bubblewrap reads the filter."""
    fd = os.memfd_create("k2lab-seccomp")
    os.write(fd, _filter())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@cache
def _filter() -> bytes:
    code = _seccomp.program()
    assert code is not None
    return code


def _user() -> str:
    """A user number that no other running program has: the kernel counts processes by user."""
    low, span = _user_range()
    return str(low + (os.getpid() * 997 + next(_CALLS)) % span)


@cache
def _user_range() -> tuple[int, int]:
    """(first, how many) numbers that exist in this user namespace and belong to nobody; containers may have only 65536."""
    mapped = []
    for name in ("uid_map", "gid_map"):
        rows = [list(map(int, row.split())) for row in Path("/proc/self", name).read_text().splitlines()]
        mapped.append([(row[0], row[0] + row[2]) for row in rows])
    for low, span in ((2_000_000_000, 1 << 20), (61_184, 4_000), (1_001, 500)):
        if all(any(first <= low and low + span <= end for first, end in ranges) for ranges in mapped):
            return low, span
    raise SandboxError("this container has no free user numbers to drop to", where="/proc/self/uid_map")


# ---------------------------------------------------------------- finding out what works


def find() -> Bubblewrap:
    """The way that works here, found by running a program. Raises SandboxError, with what each attempt said, if there is none."""
    with _FIND:
        found = _search()
    if isinstance(found, SandboxError):
        raise SandboxError(found.what, where=found.where, got=found.got, allowed=found.allowed, next=found.next)
    return found


@cache
def _search() -> Bubblewrap | SandboxError:
    try:
        return _try_all()
    except SandboxError as error:
        return error


def _try_all() -> Bubblewrap:
    if platform.system() != "Linux":
        raise SandboxError("bubblewrap exists on Linux only", where="bubblewrap", got=platform.system())
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError("bwrap is not installed", where="bubblewrap")
    root = os.geteuid() == 0
    drop = shutil.which("setpriv") or "" if root else ""
    if root and not drop:
        raise SandboxError("setpriv (util-linux) is missing, and programs must not run as root", where="bubblewrap")
    if _seccomp.program() is None:
        raise SandboxError("there is no system call filter for this processor", where="bubblewrap", got=platform.machine())
    version, layouts = _version(bwrap), ("user", "root") if root else ("user",)
    said: dict[str, None] = {}
    for files, layout, python in itertools.product((True, False), layouts, _pythons()):
        candidate = Bubblewrap(bwrap, version, python, layout, drop, files)  # type: ignore[arg-type]
        try:
            outcome = candidate.run(_PROBE, _PROBE_LIMITS)
        except SandboxError as error:
            said[str(error.got or error.what)] = None
            continue
        if outcome.ok and outcome.stdout == "locked in\n":
            return replace(candidate, cgroups=_cgroup.find())
        told = (outcome.stderr or outcome.stdout).strip()[-200:]
        said[f"the program that tries it ended with {outcome.stop} {outcome.exit_code}: {told}"] = None
    raise SandboxError(
        "bwrap cannot run a program here; containers often forbid it the namespaces that it needs",
        where="bubblewrap",
        got="; ".join(list(said)[:3]) or "no interpreter that could be shown to it",
    )


def _version(bwrap: str) -> str:
    try:
        text = subprocess.run([bwrap, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"bwrap --version: {error}", where="bubblewrap") from error
    return text.split()[-1] if text.split() else "of unknown version"
