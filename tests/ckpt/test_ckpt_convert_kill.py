"""`k2 convert` that is killed, shared by ranks, out of disk or fed a damaged source: it goes on to the same bytes, or leaves
nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import made_up_checkpoints as made
import pytest
from convert_cases import EXPERT, dies_at, forked, hashes, open_folder, rewrite, run, stored

from k2lab import cli
from k2lab.ckpt import convert
from k2lab.ckpt.safefile import Writer
from k2lab.core.errors import CheckpointError, DataError, MachineError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources_of(tmp_path_factory):
    """{format: folder} of small Kimi K2 checkpoints."""
    root = tmp_path_factory.mktemp("sources")
    return {format: made.make(root / format, "small-k2", format, seed=2, shard_bytes=250_000) for format in ("bf16", "int4")}


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("format,to", [("int4", "bf16"), ("bf16", "int4"), ("bf16", "dcp")])
def test_killed_anywhere_and_resumed_equals_never_interrupted(sources_of, tmp_path, format, to):
    """`kill -9` before every so many syncs, renames and writes, each time in a fresh target, then the same command again."""
    source = sources_of[format]
    run(source, tmp_path / "whole", to)
    expected = hashes(tmp_path / "whole")
    kills = unfinished = 0
    for event in range(1, 400, 3 if to == "dcp" else 9):
        target = tmp_path / f"killed{event}"

        def command(event: int = event, target: Path = target) -> None:
            dies_at(event)
            run(source, target, to, workers=1)

        code = forked(command)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        if not (target / "checksums.json").is_file():
            unfinished += 1
            if not (target / "config.json").is_file() and to != "dcp":
                with pytest.raises(CheckpointError):
                    open_folder(target)
        assert run(source, target, to).state in ("done", "already")
        assert hashes(target) == expected, event
        shutil.rmtree(target)
    assert kills > 10 and unfinished > 10


def test_what_was_finished_before_a_kill_is_not_written_again(sources_of, tmp_path):
    target = tmp_path / "out"

    def command() -> None:
        dies_at(60)
        run(sources_of["int4"], target, "bf16", workers=1)

    assert forked(command) == -signal.SIGKILL
    noted = [path.name.removesuffix(".json") for path in (target / ".k2convert").glob("*.safetensors.json")]
    finished = {name: (target / name).stat().st_mtime_ns for name in noted}
    assert finished
    run(sources_of["int4"], target, "bf16")
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}.items()


def test_a_shard_that_was_renamed_but_not_noted_is_written_again(sources_of, tmp_path):
    job = convert.Job(convert.Request(sources_of["bf16"], tmp_path / "out", "int4", shard_bytes=200_000))
    job.journal.begin()
    shards = [shard.file for shard in job.plan.shards]
    (tmp_path / "out" / shards[0]).write_bytes(b"of another time")
    (tmp_path / "out" / (shards[1] + ".tmp")).write_bytes(b"cut off")
    convert.run(job)
    run(sources_of["bf16"], tmp_path / "whole", "int4")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_the_command_killed_by_the_clock_and_given_again(tmp_path):
    """The real command in its own process, at moments that fall anywhere."""
    source = made.make(tmp_path / "source", "tiny-k2", "bf16", shard_bytes=2 << 20)
    command = [sys.executable, "-m", "k2lab", "convert", str(source), str(tmp_path / "out"), "--to", "int4"]
    command += ["--shard-bytes", "1000000", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run(source, tmp_path / "whole", "int4", shard_bytes=1_000_000)
    kills = 0
    for wait in (0.0, 0.02, 0.05, 0.1):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "out").exists():
            time.sleep(0.005)
        time.sleep(wait)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kills and hashes(tmp_path / "out") == hashes(tmp_path / "whole")


# ---------------------------------------------------------------- what a target may be


def test_a_finished_target_is_not_touched(sources_of, tmp_path, capsys):
    target = tmp_path / "out"
    command = ["convert", str(sources_of["bf16"]), str(target), "--to", "int4", "--quiet"]
    assert cli.main(command) == 0
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "nothing was touched" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    (target / "tokenizer.json").unlink()
    assert cli.main(command) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_another_source_or_option_is_refused(sources_of, tmp_path):
    target = tmp_path / "out"
    run(sources_of["bf16"], target, "int4")
    before = hashes(target)
    for source, to, shard in (("int4", "int4", 200_000), ("bf16", "fp8", 200_000), ("bf16", "int4", 300_000)):
        with pytest.raises(DataError, match="another conversion"):
            run(sources_of[source], target, to, shard_bytes=shard)
    assert hashes(target) == before
    shutil.copytree(sources_of["bf16"], tmp_path / "changed")
    run(tmp_path / "changed", tmp_path / "begun", "int4")
    (tmp_path / "begun" / "checksums.json").unlink()
    rewrite(tmp_path / "changed", lambda name, t: -t if name == EXPERT else t)
    with pytest.raises(DataError, match="holds files|another conversion"):
        run(tmp_path / "changed", tmp_path / "begun", "int4")


def test_a_begun_target_belongs_to_its_source(sources_of, tmp_path):
    shutil.copytree(sources_of["bf16"], tmp_path / "source")
    job = convert.Job(convert.Request(tmp_path / "source", tmp_path / "out", "int4"))
    job.journal.begin()
    rewrite(tmp_path / "source", lambda name, t: -t if name == EXPERT else t)
    with pytest.raises(DataError, match="files was"):
        run(tmp_path / "source", tmp_path / "out", "int4", shard_bytes=convert.SHARD_BYTES)


def test_foreign_folders_are_refused(sources_of, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(DataError, match=r"thesis\.txt"):
        run(sources_of["bf16"], tmp_path / "mine", "int4")
    source = tmp_path / "source"
    shutil.copytree(sources_of["bf16"], source)
    for target in (source, source / "inside"):
        with pytest.raises(DataError, match="must lie apart"):
            run(source, target, "int4")
    with pytest.raises(DataError, match="no folder"):
        run(source, tmp_path / "mine" / "thesis.txt", "int4")
    assert hashes(source) == hashes(sources_of["bf16"])


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_ranks_one_after_the_other_by_hand(sources_of, tmp_path, order, capsys, monkeypatch):
    run(sources_of["int4"], tmp_path / "whole", "bf16")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    command = ["convert", str(sources_of["int4"]), str(tmp_path / "out"), "--to", "bf16", "--shard-bytes", "200000", "--quiet"]
    for number, rank in enumerate(order):
        assert not (tmp_path / "out" / "config.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(command) == 0
        assert ("done:" in capsys.readouterr().out) == (number == 2)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_ranks_at_once_and_another_number_of_them_later(sources_of, tmp_path):
    run(sources_of["bf16"], tmp_path / "whole", "int4")
    run(sources_of["bf16"], tmp_path / "out", "int4", rank=2, world=3)
    assert not (tmp_path / "out" / "checksums.json").exists()
    threads = [
        threading.Thread(target=run, args=(sources_of["bf16"], tmp_path / "out", "int4"), kwargs={"rank": rank, "world": 2})
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_two_commands_on_one_target_do_not_mix(sources_of, tmp_path):
    job = convert.Job(convert.Request(sources_of["bf16"], tmp_path / "out", "int4", shard_bytes=200_000))
    job.journal.begin()
    with job.journal.lock(0), pytest.raises(MachineError, match="another command"):
        run(sources_of["bf16"], tmp_path / "out", "int4")
    assert run(sources_of["bf16"], tmp_path / "out", "int4").state == "done"


@pytest.mark.slow
def test_torchrun_shares_the_shards(sources_of, tmp_path):
    run(sources_of["bf16"], tmp_path / "whole", "int4")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "k2lab", "convert"]
    command += [str(sources_of["bf16"]), str(tmp_path / "out"), "--to", "int4", "--shard-bytes", "200000", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done:") == 1
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


# ---------------------------------------------------------------- the machine


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("to", ["int4", "dcp"])
def test_a_full_disk_is_said_and_the_command_goes_on_later(sources_of, tmp_path, monkeypatch, code, to):
    run(sources_of["bf16"], tmp_path / "whole", to)
    room = 400_000
    sync = os.fsync

    def full(handle: int) -> None:
        nonlocal room
        room -= os.fstat(handle).st_size
        if room < 0:
            raise OSError(code, os.strerror(code))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MachineError, match="full" if code == errno.ENOSPC else "permission") as error:
            run(sources_of["bf16"], tmp_path / "out", to, workers=1)
    assert "--run-dir" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.tmp"))
    finished = [path.name for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert finished and "config.json" not in finished
    assert run(sources_of["bf16"], tmp_path / "out", to).state == "done"
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_a_write_that_fails_leaves_no_half_file(sources_of, tmp_path, monkeypatch):
    put, calls = Writer._put, 0

    def full(self, piece):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise OSError(errno.ENOSPC, "no space")
        put(self, piece)

    monkeypatch.setattr(Writer, "_put", full)
    with pytest.raises(MachineError, match="full"):
        run(sources_of["bf16"], tmp_path / "out", "int4")
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_too_little_space_is_said_before_anything_is_written(sources_of, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(MachineError, match="still to be written"):
        run(sources_of["bf16"], tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_peak_memory_is_below_two_shards(tmp_path):
    """A conversion of a quarter of a gigabyte in shards of 32 MB, against the same process before it."""
    spec = made.spec_of("small-k2").replace(
        hidden_size=1024, moe_intermediate_size=1024, n_routed_experts=20, num_layers=3, vocab_size=4096
    )
    source = made.make(tmp_path / "source", spec, "bf16", shard_bytes=64 << 20)
    shard = 32 << 20

    def command() -> None:
        run(made.make(tmp_path / "warm", "small-k2", "bf16"), tmp_path / "warm-out", "int4", workers=2)
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")  # the highest mark begins anew
        before = _status("VmRSS")
        run(source, tmp_path / "out", "int4", shard_bytes=shard, workers=2)
        (tmp_path / "grown").write_text(str(_status("VmHWM") - before))

    assert forked(command) == 0
    grown = int((tmp_path / "grown").read_text()) * 1024
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size > 240e6
    assert grown <= 2 * shard, f"{grown / 1e6:.0f} MB for shards of {shard / 1e6:.0f} MB"


def _status(key: str) -> int:
    """A figure of /proc/self/status in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise AssertionError(key)


# ---------------------------------------------------------------- damaged sources


@pytest.mark.parametrize("fault", ["nan", "zero"])
@pytest.mark.parametrize(
    "format,name,to",
    [
        ("bf16", EXPERT, "int4"),
        ("bf16", EXPERT, "bf16"),
        ("bf16", EXPERT, "dcp"),
        ("fp8", EXPERT, "bf16"),
        ("fp8", EXPERT, "fp8"),
        ("int4", EXPERT + "_packed", "bf16"),
        ("int4", EXPERT + "_packed", "int4"),
        ("int4", EXPERT + "_scale", "int4"),
    ],
)
def test_values_that_no_training_leaves_are_refused_and_nothing_stays(tmp_path, format, name, to, fault):
    if (fault, name) == ("nan", EXPERT + "_packed"):
        pytest.skip("INT4 codes have no NaN")
    source = made.make(tmp_path / "bad", "small-k2", format, **{fault: name})
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj.*safetensors"):
        run(source, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_file_whose_checksum_is_wrong_is_refused(sources_of, tmp_path):
    run(sources_of["bf16"], tmp_path / "first", "bf16")
    run(tmp_path / "first", tmp_path / "good", "int4")
    file = sorted((tmp_path / "first").glob("*.safetensors"))[2]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file.name}.*sha256"):
        run(tmp_path / "first", tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_what_fetch_wrote_counts_as_checksums(sources_of, tmp_path):
    shutil.copytree(sources_of["bf16"], tmp_path / "fetched")
    file = sorted((tmp_path / "fetched").glob("*.safetensors"))[0].name
    (tmp_path / "fetched" / "fetched.json").write_text(json.dumps({"files": {file: {"size": 1, "sha256": "0" * 64}}}))
    with pytest.raises(CheckpointError, match="sha256"):
        run(tmp_path / "fetched", tmp_path / "out", "int4")


def test_a_dry_run_writes_nothing(sources_of, tmp_path, capsys):
    assert cli.main(["convert", str(sources_of["bf16"]), str(tmp_path / "out"), "--to", "int4", "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert "12 put on the INT4 grid" in text and "free" in text and len(stored(sources_of["bf16"])) == 41
