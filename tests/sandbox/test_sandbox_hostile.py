"""Programs that want out, in every sandbox that works on this machine, as this user and as an ordinary one."""

import os
import shutil
import subprocess

import hostile_world
import pytest
from hostile_attack import ESCAPED
from hostile_world import ATTACKS

from k2lab import sandbox
from k2lab.core.errors import SandboxError

_FOUND: dict[str, dict[str, list[str]]] = {}


def found(kind):
    """The problems of all attacks in the sandbox, run once and several at a time."""
    if kind not in _FOUND:
        try:
            box = sandbox.pick(kind)
        except SandboxError as error:
            pytest.skip(str(error))
        with hostile_world.world() as around:
            _FOUND[kind] = hostile_world.all_problems(box, around)
    return _FOUND[kind]


PAIRS = [
    pytest.param(kind, attack, id=f"{kind}, {attack.name}")
    for kind in sandbox.KINDS
    for attack in ATTACKS
    if attack.only in ("", kind)
]


@pytest.mark.parametrize("kind, attack", PAIRS)
def test_it_is_contained(kind, attack):
    assert not found(kind)[attack.name]


@pytest.mark.parametrize("kind", sandbox.KINDS)
def test_neighbours_notice_nothing_and_the_parent_is_healthy(kind):
    assert not found(kind)["neighbours"]
    assert sandbox.pick(kind).run("print(6 * 7)").stdout == "42\n"
    assert subprocess.run(["/bin/true"]).returncode == 0


def test_the_suite_is_large_enough():
    for kind in sandbox.KINDS:
        assert sum(attack.only in ("", kind) for attack in ATTACKS) >= 30


# Without a sandbox these succeed: a suite of programs that cannot do any harm would prove nothing.
BARE = [attack for attack in ATTACKS if attack.bare]
# What this machine itself may refuse to an ordinary user.
MAY_FAIL = {"the file by other roads", "environment of other processes", "homes and more"}


@pytest.mark.parametrize("attack", [pytest.param(attack, id=attack.name) for attack in BARE])
def test_without_a_sandbox_it_succeeds(attack):
    with hostile_world.world() as around:
        said = hostile_world.unprotected(attack, around)
    if ESCAPED not in said and attack.name in MAY_FAIL:
        pytest.skip(f"this machine itself refuses it: {said[:200]}")
    assert ESCAPED in said


def test_all_of_it_as_an_ordinary_user():
    """Root runs the whole suite again as a user who has no rights at all."""
    python, setpriv = "/usr/bin/python3", shutil.which("setpriv")
    if os.geteuid() != 0 or not setpriv or not shutil.which("bwrap"):
        pytest.skip("needs root (to become someone else), setpriv and bubblewrap; without root the other tests are this one")
    command = [setpriv, "--reuid", "12345", "--regid", "12345", "--clear-groups", python]
    able = subprocess.run(
        [*command, "-c", f"import sys; open({hostile_world.__file__!r}); sys.exit(sys.version_info < (3, 11))"],
        capture_output=True,
    )
    if able.returncode:
        pytest.skip(f"an ordinary user needs {python} >= 3.11 and this checkout to be readable")
    done = subprocess.run([*command, hostile_world.__file__, "bubblewrap"], capture_output=True, text=True, timeout=300)
    if "bwrap cannot run a program here" in done.stderr:
        pytest.skip("this machine does not let ordinary users make namespaces")
    assert done.returncode == 0 and "user 12345" in done.stdout, done.stdout + done.stderr[-2000:]


def test_every_attack_has_its_own_name():
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
