"""A memory cgroup per program, where this process may make one: then a limit holds for all of a program's processes together.

Version 1 (also beside version 2, "hybrid") and version 2 are known. A group is made inside the group of this process, or, since
version 2 allows no processes in inner groups, beside it. Whether that works is found out by doing it.

Source: the kernel's Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "k2lab-sandbox"
_NUMBERS = itertools.count()
# The interpreter's own pages, page tables and the kernel's bookkeeping, beyond what a program may use.
_SLACK = 32 << 20


@dataclass(frozen=True)
class Parent:
    """A folder in which groups can be made."""

    folder: Path
    version: int

    def make(self, memory: int, processes: int) -> Group:
        """A new group with room for `memory` bytes (swap included) and `processes`. Raises OSError where that is not allowed."""
        path = self.folder / f"{_PREFIX}-{os.getpid()}-{next(_NUMBERS)}"
        path.mkdir()
        group = Group(path, self.version)
        try:
            if self.version == 1:
                (path / "memory.limit_in_bytes").write_text(str(memory + _SLACK))
                _write_if_there(path / "memory.memsw.limit_in_bytes", str(memory + _SLACK))
            else:
                (path / "memory.max").write_text(str(memory + _SLACK))
                _write_if_there(path / "memory.swap.max", "0")
                _write_if_there(path / "memory.oom.group", "1")
                _write_if_there(path / "pids.max", str(processes + 4))
        except OSError:
            group.remove()
            raise
        return group


@dataclass(frozen=True)
class Group:
    """One group, for one program."""

    path: Path
    version: int

    def enter(self) -> list[str]:
        """The start of a command line that enters the group before it becomes the command that follows."""
        # "tasks" moves one thread, and a thread that moves itself takes no lock of the whole machine (5 ms less).
        door = self.path / ("tasks" if self.version == 1 else "cgroup.procs")
        return ["/bin/sh", "-c", f'echo 0 > {shlex.quote(str(door))} && exec "$@"', "sh"]

    def ran_out(self) -> bool:
        """Whether the kernel ended a process of the group because the group was full."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        try:
            found = re.search(r"^oom_kill (\d+)$", (self.path / name).read_text(), re.MULTILINE)
        except OSError:
            return False
        return found is not None and int(found[1]) > 0

    def remove(self) -> None:
        """Ends what is left in the group, and removes it; the kernel needs a moment for processes that are just dying."""
        for attempt in range(100):
            with contextlib.suppress(OSError):
                for pid in (self.path / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(min(0.001 * 2**attempt, 0.05))
            else:
                return


def find() -> Parent | None:
    """A place where groups can be made and entered from here, or None. Leftovers of processes that are gone are removed."""
    for folder, version in _candidates():
        if not os.access(folder, os.W_OK):
            continue
        _sweep(folder, version)
        parent = Parent(folder, version)
        try:
            group = parent.make(64 << 20, 8)
        except OSError:
            continue
        try:
            tried = subprocess.run(
                [*group.enter(), "/bin/sh", "-c", "exit 0"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError):
            continue
        finally:
            group.remove()
        if tried.returncode == 0:
            return parent
    return None


def _candidates() -> list[tuple[Path, int]]:
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[Path, int]] = []
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        root, point = before.split(" ")[3:5]
        if kind == "cgroup" and "memory" in options.split(" ")[-1].split(","):
            inside = next((row.split(":", 2)[2] for row in own if "memory" in row.split(":", 2)[1].split(",")), None)
            if inside is not None:
                found.append((_below(point, root, inside), 1))
        elif kind == "cgroup2":
            inside = next((row.split(":", 2)[2] for row in own if row.startswith("0::")), None)
            if inside is not None:
                here = _below(point, root, inside)
                for folder in dict.fromkeys((here, here.parent if here != Path(point) else here)):
                    with contextlib.suppress(OSError):
                        if "memory" in (folder / "cgroup.subtree_control").read_text().split():
                            found.append((folder, 2))
    return [(folder, version) for folder, version in found if folder.is_dir()]


def _below(point: str, root: str, inside: str) -> Path:
    """Where a process's group lies under a mount point; in a container the mount may show only a part of the tree."""
    if root != "/" and inside.startswith(root):
        inside = inside[len(root) :]
    path = Path(point) / inside.lstrip("/")
    return path if path.is_dir() else Path(point)


def _sweep(folder: Path, version: int) -> None:
    for path in folder.glob(f"{_PREFIX}-*-*"):
        pid = path.name.split("-")[-2]
        if pid.isdigit() and not Path("/proc", pid).exists():
            Group(path, version).remove()


def _write_if_there(path: Path, text: str) -> None:
    if path.exists():
        path.write_text(text)
