"""A conversion writes the same bytes with numba's loops and without, and says what is missing where numba is."""

from __future__ import annotations

from pathlib import Path

import made_up_checkpoints as made
import pytest
from convert_cases import hashes, run

from k2lab.ckpt import convert, encode
from k2lab.quant import compiled

FORMATS = ("bf16", "fp8", "int4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in every format."""
    root = tmp_path_factory.mktemp("sources")
    return {format: made.make(root / format, "small-k2", format, seed=6, shard_bytes=200_000) for format in FORMATS}


@pytest.mark.parametrize("to", ["bf16", "fp32", "fp8", "int4", "dcp"])
@pytest.mark.parametrize("format", FORMATS)
def test_both_ways_to_compute_write_the_same_files(folders, tmp_path, monkeypatch, format: str, to: str) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(encode, "PIECE", 1 << 14)  # several pieces of a tensor, in memory that is used again
    monkeypatch.setattr(compiled, "WORTH", 0)
    run(folders[format], tmp_path / "loops", to)
    monkeypatch.setattr(compiled, "wanted", lambda tensor: False)
    run(folders[format], tmp_path / "torch", to, workers=1)
    found, expected = hashes(tmp_path / "loops"), hashes(tmp_path / "torch")
    assert found == expected and len(found) > 5


def test_what_computes_without_numba_is_said_where_something_is_computed(folders, tmp_path, monkeypatch) -> None:
    def notes(to: str) -> list[str]:
        job = convert.Job(convert.Request(folders["bf16"], tmp_path / to, to))
        job.close()
        return [note for note in job.notes if "numba" in note]

    assert notes("int4") == []
    monkeypatch.setattr(compiled, "module", lambda name: None)
    (note,) = notes("int4")
    assert "k2lab[cpu]" in note and "same bytes" in note
    assert notes("bf16") == [] and notes("fp32") == []
