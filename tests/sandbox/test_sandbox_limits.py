import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from k2lab import doctor, sandbox
from k2lab.core.errors import RecipeError, SandboxError
from k2lab.sandbox import Limits, _process, wasm


@pytest.fixture(params=sandbox.KINDS)
def box(request):
    try:
        return sandbox.pick(request.param)
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def bwrap():
    try:
        return sandbox.pick("bubblewrap")
    except SandboxError as error:
        pytest.skip(str(error))


# ---------------------------------------------------------------- outcomes


@pytest.mark.parametrize(
    "code, echo, stdout, stop, exit_code",
    [
        ("print('a\u00e9\u4e2d')", False, "a\u00e9\u4e2d\n", "exit", 0),
        ("1 + 1", False, "", "exit", 0),
        ("1 + 1", True, "2\n", "exit", 0),
        ("x = 1", True, "", "exit", 0),
        ("None", True, "", "exit", 0),
        ("print('a')\n'b'", True, "a\n'b'\n", "exit", 0),
        ("def f():\n    return 3\nf()", True, "3\n", "exit", 0),
        ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\nA()", True, "A(x=1)\n", "exit", 0),
        ("if __name__ == '__main__':\n    print(__name__)", False, "__main__\n", "exit", 0),
        ("exit(3)", False, "", "exit", 3),
        ("print('before')\n1 / 0", False, "before\n", "exit", 1),
        ("print('before')\nx = bytearray(1 << 30)", False, "before\n", "memory", 1),
        ("print('before')\nwhile True: pass", False, "before\n", "timeout", None),
        ("import sys\nprint(repr(sys.stdin.read()), sys.argv)", False, "'' ['<code>']\n", "exit", 0),
        ("", True, "", "exit", 0),
    ],
)
def test_what_a_program_does_is_its_outcome(box, code, echo, stdout, stop, exit_code):
    outcome = box.run(code, Limits(seconds=0.7 if stop == "timeout" else 20, memory_mb=128), echo=echo)
    assert (outcome.stdout, outcome.stop, outcome.ok) == (stdout, stop, stop == "exit" and exit_code == 0)
    if exit_code is not None:
        assert outcome.exit_code == exit_code


@pytest.mark.parametrize(
    "code, last, line",
    [
        ("x = 1\n\nx.y", "AttributeError: 'int' object has no attribute 'y'", 3),
        ("def f(", "SyntaxError: '(' was never closed", 1),
        ("def f():\n    raise ValueError('no')\nf()", "ValueError: no", 2),
    ],
)
def test_an_error_names_the_program_and_its_line_and_nothing_else(box, code, last, line):
    said = box.run(code, Limits(seconds=20)).stderr
    assert said.rstrip().endswith(last)
    assert f'File "<code>", line {line}' in said
    assert "_boot" not in said


def test_equal_programs_print_equal_text(box):
    code = "print({'a', 'b', 'c', 'd', 'e'}, hash('x'))"
    assert box.run(code, Limits(seconds=20)).stdout == box.run(code, Limits(seconds=20)).stdout != ""


def test_a_long_program_and_odd_text_arrive(box):
    outcome = box.run("x = '''" + "\u00fc" * 300_000 + "'''\nprint(len(x))", Limits(seconds=20))
    assert outcome.stdout == "300000\n"
    assert box.run("print('\ud800')", Limits(seconds=20)).stdout == "?\n"


def test_only_the_standard_library(box):
    code = """
import sys
try:
    import numpy
except ImportError:
    print("none", [p for p in sys.path if "site" in p or "dist-" in p])
"""
    assert box.run(code, Limits(seconds=20)).stdout == "none []\n"


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "change", [{"seconds": 0}, {"seconds": -1.0}, {"memory_mb": 1}, {"output_bytes": 0}, {"files_mb": 0}, {"processes": 0}]
)
def test_limits_that_make_no_sense_are_refused(change):
    with pytest.raises(RecipeError, match=next(iter(change))):
        Limits(**change)


def test_the_output_cap_is_exact_and_counts_both_streams(box):
    limits = Limits(seconds=20, output_bytes=1000)
    whole = box.run("import os\nos.write(1, b'a' * 600)\nos.write(2, b'b' * 400)", limits)
    assert (whole.stop, len(whole.stdout), len(whole.stderr)) == ("exit", 600, 400)
    over = box.run("import os\nos.write(1, b'a' * 600)\nos.write(2, b'b' * 401)", limits)
    assert over.stop == "output" and not over.ok
    assert len(over.stdout) + len(over.stderr) <= 1000


def test_a_flood_is_never_held_in_memory(box):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = box.run("import os\nwhile True: os.write(1, b'x' * (1 << 20))", Limits(seconds=20, output_bytes=10_000))
    assert outcome.stop == "output" and len(outcome.stdout) == 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_eight_at_once_keep_their_own_limits_and_results(box):
    def one(n):
        kind = n % 4
        code = {
            0: f"print({n})",
            1: "import time\ntime.sleep(60)",
            2: "x = bytearray(1 << 30)",
            3: "while True: print('x' * 999)",
        }[kind]
        outcome = box.run(code, Limits(seconds=1.0 if kind == 1 else 30, memory_mb=128))
        return (outcome.stop, outcome.stdout if kind == 0 else None)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(8)))
    assert results == [("exit", "0\n"), ("timeout", None), ("memory", None), ("output", None)] + [
        ("exit", "4\n"),
        ("timeout", None),
        ("memory", None),
        ("output", None),
    ]


def test_nothing_is_kept_between_calls(bwrap):
    assert bwrap.run("open('/tmp/kept', 'w').write('x')").ok
    assert bwrap.run("import os\nprint(os.listdir('/tmp'))").stdout == "[]\n"


def test_files_up_to_the_limit_can_be_written(bwrap):
    code = "data = bytes(1 << 20)\nfor n in range(3): open(f'/tmp/{n}', 'wb').write(data)\nprint('ok')"
    assert bwrap.run(code, Limits(files_mb=4)).stdout == "ok\n"
    assert "No space left" in bwrap.run(code, Limits(files_mb=2)).stderr


def test_processes_up_to_the_limit_can_be_made(bwrap):
    code = """
import os, time
n = 0
try:
    while n < 50:
        if os.fork() == 0: time.sleep(60)
        n += 1
except OSError: pass
print(n)
"""
    assert bwrap.run(code, Limits(processes=6)).stdout == "5\n"
    for layout in ("user", "root") if os.geteuid() == 0 else ():
        assert dataclasses.replace(bwrap, layout=layout).run(code, Limits(processes=4)).stdout == "3\n"


def test_multiprocessing_works_within_the_limits(bwrap):
    code = """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(abs, [-1, -2, 3]))
"""
    assert bwrap.run(code, Limits(seconds=20)).stdout == "[1, 2, 3]\n"


def test_a_program_of_many_processes_stays_within_its_memory_where_there_is_a_cgroup(bwrap):
    if bwrap.cgroups is None:
        assert "no memory cgroup" in bwrap.describe()
        pytest.skip("no memory cgroup can be made here")
    code = """
import mmap, os, time
look = time.monotonic() + 1.5
for n in range(6):
    if os.fork() == 0:
        m = mmap.mmap(-1, 60 << 20)
        for i in range(0, len(m), 4096):
            m[i] = 1
        # One that is killed makes room for the next, so it counts who holds its memory at one moment.
        if time.monotonic() < look:
            time.sleep(look - time.monotonic())
            os.write(1, b"full ")
        time.sleep(60)
time.sleep(60)
"""
    outcome = bwrap.run(code, Limits(seconds=3, memory_mb=128, files_mb=1))
    assert 0 < outcome.stdout.count("full") < 3, outcome
    assert not list(bwrap.cgroups.folder.glob(f"k2lab-sandbox-{os.getpid()}-*"))


def test_fuel_stops_a_program_at_the_same_point_each_time():
    try:
        box = sandbox.pick("wasm")
    except SandboxError as error:
        pytest.skip(str(error))
    # The clock is far away: what ends the loop is the fuel of half a second.
    limits = Limits(seconds=60, output_bytes=1 << 20)
    code = "n = 0\nwhile True:\n    n += 1\n    if n % 5000 == 0: print(n)"
    small = dataclasses.replace(box)
    wasm_fuel, wasm.FUEL_PER_SECOND = wasm.FUEL_PER_SECOND, 20_000_000
    try:
        outcomes = [small.run(code, limits) for _ in range(2)]
    finally:
        wasm.FUEL_PER_SECOND = wasm_fuel
    assert [outcome.stop for outcome in outcomes] == ["timeout", "timeout"]
    assert outcomes[0].stdout == outcomes[1].stdout != ""


HOST = """
from k2lab import sandbox
print("started", flush=True)
sandbox.pick({kind!r}).run({code!r}, sandbox.Limits(seconds=98765))
"""


def test_a_host_that_is_killed_leaves_nothing_behind(box):
    """The programs of a run that gets kill -9 end with it."""
    mark = f"k{os.getpid():x}-{box.name[:4]}"
    # Bubblewrap's program is known by its name, wasm's process by the unusual fuel on its command line.
    code = f"import ctypes, time\nctypes.CDLL(None).prctl(15, b'{mark}')\ntime.sleep(1000)"
    code = code if box.name == "bubblewrap" else "import time\ntime.sleep(1000)"
    fuel = str(98765 * wasm.FUEL_PER_SECOND)[:5]

    def alive():
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if box.name == "bubblewrap":
                    hit = (path / "comm").read_text().strip() == mark
                else:
                    words = (path / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                    hit = any(word.endswith("_wasm_worker.py") for word in words) and any(w.startswith(fuel) for w in words)
                found += [path.name] if hit else []
        return found

    env = {**os.environ, "PYTHONPATH": str(Path(sandbox.__file__).parents[2])}
    host = subprocess.Popen([sys.executable, "-c", HOST.format(kind=box.name, code=code)], env=env, stdout=subprocess.PIPE)
    try:
        wait_for(alive, True)
    finally:
        host.kill()
        host.wait()
        host.stdout.close()
    wait_for(alive, False)


def wait_for(look, wanted):
    for _ in range(300):
        if bool(look()) is wanted:
            return
        time.sleep(0.05)
    raise AssertionError(f"after 15 s: {look()}")


# ---------------------------------------------------------------- choosing, describing, failing


def test_an_unknown_sandbox_is_refused():
    with pytest.raises(SandboxError, match="auto, bubblewrap, wasm"):
        sandbox.pick("docker")


def test_it_says_what_it_is(box):
    line = box.describe(Limits(seconds=3, memory_mb=99))
    assert "\n" not in line and "3 s" in line and "99 MiB" in line


PROGRAM = """
import sys
from k2lab import sandbox
try:
    print(sandbox.pick().describe())
except sandbox.SandboxError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def in_a_bare_machine(tmp_path, **changes):
    """A process that has neither bwrap on its path nor wasmtime in its packages."""
    env = {"PATH": str(tmp_path), "PYTHONPATH": str(Path(sandbox.__file__).parents[2]), "HOME": str(tmp_path), **changes}
    return subprocess.run([sys.executable, "-S", "-c", PROGRAM], env=env, capture_output=True, text=True)


def test_without_any_sandbox_it_refuses_and_says_what_to_install(tmp_path):
    done = in_a_bare_machine(tmp_path)
    assert done.returncode == 3
    assert "apt-get install bubblewrap" in done.stdout and "pip install 'k2lab[wasm]'" in done.stdout


def test_a_bwrap_that_does_not_work_is_not_used(tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    setpriv = "/usr/bin/setpriv"
    if os.path.exists(setpriv):
        (tmp_path / "setpriv").symlink_to(setpriv)
    done = in_a_bare_machine(tmp_path)
    assert done.returncode == 3
    assert "No permissions to create new namespace" in done.stdout


@contextlib.contextmanager
def shim(script):
    """A machine whose bwrap is `script`; `$REAL` in it is the real one. Its folder is readable by everybody, as /usr/bin is."""
    real = shutil.which("bwrap")
    if real is None:
        pytest.skip("bwrap is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "bwrap").write_text(script.replace("$REAL", real))
        (folder / "bwrap").chmod(0o755)
        if path := shutil.which("setpriv"):
            (folder / "setpriv").symlink_to(path)
        yield in_a_bare_machine(folder)


def test_a_bwrap_that_locks_nothing_in_is_not_used():
    with shim('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n') as done:
        assert done.returncode == 3 and "free" in done.stdout, done.stdout + done.stderr


def test_an_old_bwrap_that_cannot_limit_files_gives_none(bwrap):
    script = """#!/bin/sh
for word; do [ "$word" = --size ] && { echo "bwrap: Unknown option --size" >&2; exit 1; }; done
exec $REAL "$@"
"""
    with shim(script) as done:
        assert done.returncode == 0 and "no writable files" in done.stdout, done.stdout + done.stderr
    box = dataclasses.replace(bwrap, files=False)
    assert "Read-only file system" in box.run("open('/tmp/x', 'w')").stderr
    assert box.run("print(2)").stdout == "2\n"


def test_what_never_begins_is_an_error_and_no_outcome(monkeypatch):
    keys = {"source": b"", "seconds": 1.0, "cap": 100, "env": {}}
    with pytest.raises(SandboxError, match="ended with code 1 .*because of that"):
        _process.run(["/bin/sh", "-c", "echo because of that >&2; exit 1"], **keys)
    with pytest.raises(SandboxError, match="cannot be started"):
        _process.run(["/no/such/file"], **keys)
    monkeypatch.setattr(_process, "START_SECONDS", 0.2)
    with pytest.raises(SandboxError, match="did not start within"):
        _process.run(["/bin/sleep", "60"], **keys)


def test_the_whole_group_is_ended_with_its_leader():
    script = "printf '\\006'; sleep 61 & sleep 62"
    began = time.monotonic()
    ended = _process.run(["/bin/sh", "-c", script], source=b"", seconds=0.3, cap=100, env={"PATH": "/usr/bin:/bin"})
    assert ended.stop == "timeout" and ended.code is None
    assert time.monotonic() - began < 20


def test_calls_from_many_threads_find_the_sandbox_once(bwrap):
    found = []
    threads = [threading.Thread(target=lambda: found.append(sandbox.pick("bubblewrap"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({id(one) for one in found}) == 1


def test_the_doctor_says_which_sandbox_works(monkeypatch):
    def rows():
        found = []
        doctor._sandbox(lambda *row: found.append(row))
        return found

    def none(prefer="auto"):
        raise SandboxError("none works", next="Install one")

    monkeypatch.setattr(sandbox, "pick", none)
    assert rows() == [("sandbox", "optional", "none works: stages with tools will not run", "Install one")]
    monkeypatch.undo()
    try:
        wanted = ("sandbox", "ok", sandbox.pick().describe())
    except SandboxError:
        return
    assert rows() == [wanted]


def test_it_needs_neither_torch_nor_numpy():
    program = "import sys, k2lab.sandbox.wasm, k2lab.sandbox.bubblewrap, k2lab.gym.tools.python\n"
    program += "assert not {'torch', 'transformers', 'numpy', 'wasmtime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
