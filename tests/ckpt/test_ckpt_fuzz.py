"""Damaged checkpoints end in CheckpointError (RecipeError where config.json is that of no model built here), and in nothing else:
no other exception, no crash, no waiting, no memory, nothing written, and never a folder that is opened all the same."""

from __future__ import annotations

import filecmp
import hashlib
import resource
import shutil
import signal
import warnings

import checkpoint_mutations as mutations
import made_up_checkpoints as made
import pytest

from k2lab.ckpt.folder import open_folder
from k2lab.core.errors import CheckpointError, RecipeError

MEMORY = 600 << 20  # what opening may take beyond what the process has
SECONDS = 60  # after which opening is taken to hang


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = made.make(tmp_path_factory.mktemp("fuzz") / "whole", "small-k2", "int4", seed=1, shard_bytes=300_000)
    assert len(list(path.glob("*.safetensors"))) == 4
    return path


@pytest.fixture(scope="module")
def whole_fp8(tmp_path_factory):
    return made.make(tmp_path_factory.mktemp("fuzz-fp8") / "whole", "small-linear", "fp8", seed=1, shard_bytes=200_000)


@pytest.fixture(autouse=True)
def _bounded():
    """Memory by the operating system's limit; time by an alarm."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _hangs(*_):
    raise AssertionError("opening a damaged checkpoint hangs")


def state(folder):
    """Everything in a folder: names, sizes, times."""
    return {str(file.relative_to(folder)): (file.lstat().st_size, file.lstat().st_mtime_ns) for file in sorted(folder.rglob("*"))}


def essence(folder):
    """What a program gets from an opened checkpoint: shape, format, and every stored byte under its name."""
    found = {}
    for name in folder.names():
        for stored, (dtype, shape, data) in folder.raw(name).items():
            found[stored] = (dtype, shape, hashlib.sha256(data).hexdigest())
    spec = folder.spec.replace(name="any")
    return spec, folder.format, list(folder.apart), list(folder.leftovers), found


def refused(path, deep):
    """The error, or None if the checkpoint was opened; anything else goes through."""
    before, error = state(path), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            open_folder(path, deep=deep).close()
        except (CheckpointError, RecipeError) as caught:
            error = caught
    assert state(path) == before
    return error


@pytest.mark.parametrize(("name", "damage"), mutations.SHALLOW, ids=[name for name, _ in mutations.SHALLOW])
def test_damaged_files_are_refused(whole, tmp_path, name, damage):
    path = shutil.copytree(whole, tmp_path / "copy")
    damage(path)
    error = refused(path, deep=False)
    if error is None:  # allowed only where nothing that is read has changed, as a letter of the header's comment
        with open_folder(path) as changed, open_folder(whole) as original:
            assert essence(changed) == essence(original), f"{name} changes the checkpoint and is not refused"
        assert name.startswith("header bit")
    else:
        assert isinstance(error, CheckpointError) or not filecmp.cmp(path / "config.json", whole / "config.json", shallow=False)
        assert str(path) in str(error), "the error names the file"


@pytest.mark.parametrize(("name", "damage"), mutations.VALUES_READ, ids=[name for name, _ in mutations.VALUES_READ])
def test_damaged_values_are_refused_when_all_are_read(whole, tmp_path, name, damage):
    path = shutil.copytree(whole, tmp_path / "copy")
    damage(path)
    assert isinstance(refused(path, deep=True), CheckpointError)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", ["header", "data", "length"])
def test_bits_of_other_formats(whole_fp8, tmp_path, kind, number):
    """Linear attention in FP8; bits of data are seen by their digest."""
    for seed in range(100 + 10 * number, 110 + 10 * number):
        path = shutil.copytree(whole_fp8, tmp_path / str(seed))
        if kind == "data":
            mutations.sums(path)
        mutations.flip(seed, kind, path)
        if refused(path, deep=kind == "data") is None:
            with open_folder(path) as changed, open_folder(whole_fp8) as original:
                assert kind == "header" and essence(changed) == essence(original)


def test_the_whole_checkpoint_is_accepted(whole, whole_fp8, tmp_path):
    """Without this, a reader that refuses everything would pass."""
    for path in (whole, whole_fp8):
        assert refused(path, deep=True) is None
    path = shutil.copytree(whole, tmp_path / "copy")
    mutations.sums(path)
    assert refused(path, deep=True) is None


def test_there_are_hundreds_of_damages():
    names = [name for name, _ in mutations.SHALLOW + mutations.VALUES_READ]
    assert len(set(names)) == len(names) >= 400
