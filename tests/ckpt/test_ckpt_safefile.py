"""Single safetensors files: what the writer writes, other readers read; what fails leaves nothing behind."""

from __future__ import annotations

import made_up_checkpoints as made
import pytest
import torch

from k2lab.ckpt import safefile
from k2lab.ckpt.folder import open_folder
from k2lab.ckpt.safefile import SafeFile, Writer
from k2lab.core.artifacts import file_sha256
from k2lab.core.errors import CheckpointError


def test_writer_and_safetensors_agree(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = {
        "a": torch.arange(12, dtype=torch.int32).reshape(3, 4),
        "none": torch.empty(0, 5),
        "b": torch.randn(7, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
        "c": torch.tensor(2.5),
        "d": torch.ones(2, 3).to(torch.float8_e4m3fn),
    }
    entries = {name: (safefile.NAMES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    with Writer(path, entries, {"format": "pt"}, digest=True) as writer:
        writer.write("a", tensors["a"][:1])
        writer.write("a", tensors["a"][1:].numpy())
        assert not path.exists()
        for name in ("b", "c", "d"):
            writer.write(name, tensors[name])
    assert writer.sha256 == file_sha256(path) and writer.size == path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    theirs = load_file(path)
    with SafeFile(path) as file:
        assert file.metadata == {"format": "pt"} and list(file.entries) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(theirs[name].float(), tensor.float())
            assert torch.equal(file.tensor(name).float(), tensor.float())
            assert bytes(file.bytes(name)) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _write(path, entries, pieces, error=None):
    with Writer(path, entries) as writer:
        for name, size in pieces:
            writer.write(name, torch.zeros(size))
        if error is not None:
            raise error


def test_writer_leaves_nothing_behind_when_it_fails(tmp_path):
    path, two = tmp_path / "x.safetensors", {"a": ("F32", (2,)), "b": ("F32", (1,))}
    with pytest.raises(ZeroDivisionError):
        _write(path, two, [("a", 2)], ZeroDivisionError())
    for pieces, says in (
        ([("a", 1)], "a lacks 4 bytes"),
        ([("a", 2)], "b lacks 4 bytes"),
        ([("a", 3)], "too many"),
        ([("a", 1), ("b", 1)], "b is written while a lacks"),
        ([("b", 1)], "b is written while a lacks"),
        ([("a", 2), ("c", 1)], "c is written while b lacks"),
    ):
        with pytest.raises(AssertionError, match=says):
            _write(path, two, pieces)
    assert not list(tmp_path.iterdir())


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(tmp_path):
    made.make(tmp_path, "small-k2")
    folder = open_folder(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(CheckpointError, match="shorter"):
        folder.read("lm_head.weight")
    with pytest.raises(CheckpointError, match="shorter"):
        folder.read("lm_head.weight", slice(1, 5), slice(3, 9))
    with pytest.raises(CheckpointError, match="shorter"):
        folder.raw("lm_head.weight")
