"""DCP folders: what `k2 convert --to dcp` writes is read by torch.distributed.checkpoint into DTensors on any mesh, what ranks
save is read back exactly, and a damaged or hostile folder is refused."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import made_up_checkpoints as made
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from convert_cases import forked, run, stored
from torch.distributed.checkpoint import metadata as dcp_types
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from k2lab.ckpt import dcp
from k2lab.ckpt.folder import open_folder
from k2lab.core.errors import CheckpointError

MESHES = {"rows": ((2,), (0,)), "columns": ((2,), (1,)), "both": ((2, 2), (0, 1)), "copies": ((2, 2), (0, None))}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return made.make(tmp_path_factory.mktemp("source") / "bf16", "small-linear", "bf16", seed=4, shard_bytes=200_000)


@pytest.fixture(scope="module")
def written(source, tmp_path_factory):
    """The source as a DCP folder; pieces of a few rows, as large matrices have them."""
    folder = tmp_path_factory.mktemp("dcp") / "dcp"
    with pytest.MonkeyPatch.context() as patch:
        rows = dcp.row_pieces
        patch.setattr(dcp, "row_pieces", lambda shape, itemsize: rows(shape, itemsize, limit=20_000))
        run(source, folder, "dcp")
    return folder


def on_ranks(world: int, tmp_path: Path, do) -> None:
    """Runs `do(rank)` in `world` forked processes of one gloo group; errors are shown."""
    (tmp_path / "store").unlink(missing_ok=True)

    def begin(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=world)
        try:
            do(rank)
        except BaseException as error:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
            raise
        finally:
            dist.destroy_process_group()

    children = []
    for rank in range(1, world):
        pid = os.fork()
        if pid == 0:
            os._exit(forked(lambda rank=rank: begin(rank)) & 1)
        children.append(pid)
    first = forked(lambda: begin(0))
    others = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert [first, *others] == [0] * world


def placements(tensor: torch.Tensor, dims: tuple) -> list:
    return [Shard(dim) if dim is not None and dim < tensor.ndim else Replicate() for dim in dims]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mesh", MESHES)
def test_plain_torch_loads_it_into_dtensors_on_any_mesh(source, written, tmp_path, mesh):
    shape, dims = MESHES[mesh]

    def load(rank: int) -> None:
        grid = init_device_mesh("cpu", shape)
        folder = open_folder(source)
        state = {}
        for name in folder.names():
            empty = torch.zeros(folder.info(name).shape, dtype=folder.read(name).dtype)
            state[name] = distribute_tensor(empty, grid, placements(empty, dims))
        torch_dcp.load(state, checkpoint_id=str(written))
        for name, tensor in state.items():
            wanted = distribute_tensor(folder.read(name), grid, placements(tensor, dims))
            assert torch.equal(tensor.to_local(), wanted.to_local()), name

    on_ranks(torch.Size(shape).numel(), tmp_path, load)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mesh", ["columns", "both"])
def test_what_ranks_saved_comes_back_to_the_release(source, tmp_path, mesh):
    shape, dims = MESHES[mesh]

    def save(rank: int) -> None:
        grid = init_device_mesh("cpu", shape)
        folder = open_folder(source)
        tensors = {name: folder.read(name) for name in folder.names()}
        state = {name: distribute_tensor(tensor, grid, placements(tensor, dims)) for name, tensor in tensors.items()}
        torch_dcp.save(state, checkpoint_id=str(tmp_path / "saved"))

    on_ranks(torch.Size(shape).numel(), tmp_path, save)
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(source / file, tmp_path / "saved")
    opened = dcp.open_dcp(tmp_path / "saved")
    assert any(len(pieces) == torch.Size(shape).numel() for _, _, pieces in opened.tensors.values())
    folder = open_folder(source)
    for name in folder.names():
        assert torch.equal(opened.read(name), folder.read(name)), name
    run(tmp_path / "saved", tmp_path / "back", "bf16")
    assert stored(tmp_path / "back") == stored(source)
    run(tmp_path / "saved", tmp_path / "int4", "int4")
    run(source, tmp_path / "wanted", "int4")
    assert stored(tmp_path / "int4") == stored(tmp_path / "wanted")


@pytest.mark.filterwarnings("ignore")
def test_one_process_loads_it_and_torchs_own_converter_reads_it(source, written, tmp_path):
    folder = open_folder(source)
    state = {name: torch.zeros(folder.info(name).shape) for name in folder.names()}  # fp32: torch casts
    torch_dcp.load(state, checkpoint_id=str(written), no_dist=True)
    assert all(torch.equal(state[name], folder.read(name).float()) for name in folder.names())
    dcp_to_torch_save(str(written), str(tmp_path / "all.pt"))
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert set(found) == set(folder.names())
    assert all(torch.equal(found[name], folder.read(name)) for name in found)


def test_parts_are_read_from_the_pieces_that_hold_them(source, written, monkeypatch):
    opened, folder = dcp.open_dcp(written), open_folder(source)
    name = "model.embed_tokens.weight"
    assert len(opened.tensors[name][2]) > 4
    read, load = [], opened._load
    monkeypatch.setattr(opened, "_load", lambda name, piece, dtype: read.append(piece) or load(name, piece, dtype))
    for rows, columns in ((slice(3, 5), None), (slice(60, 200), slice(7, 31)), (None, slice(0, 1)), (slice(5, 5), None)):
        read.clear()
        assert torch.equal(opened.read(name, rows, columns), folder.read(name, rows, columns))
        wanted = range(*(rows or slice(None)).indices(opened.info(name).shape[0]))
        inside = [p for p in opened.tensors[name][2] if p.offsets[0] < wanted.stop and p.offsets[0] + p.sizes[0] > wanted.start]
        assert read == (inside if len(wanted) else [])


# ---------------------------------------------------------------- refused


class Hostile:
    def __reduce__(self):
        return os.system, ("touch /tmp/k2_dcp_was_here",)


@pytest.fixture
def copy(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def table_of(folder: Path):
    return pickle.loads((folder / ".metadata").read_bytes())


def put(folder: Path, table) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def test_a_metadata_that_would_run_code_is_refused(copy, tmp_path):
    table = table_of(copy)
    table.planner_data = Hostile()
    put(copy, table)
    Path("/tmp/k2_dcp_was_here").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="not part of the format"):
        dcp.open_dcp(copy)
    assert not Path("/tmp/k2_dcp_was_here").exists()


@pytest.mark.parametrize(
    "damage,said",
    [
        (lambda folder: (folder / "__1_0.distcp").unlink(), "is missing"),
        (lambda folder: os.truncate(folder / "__1_0.distcp", 500), "cut off"),
        (lambda folder: os.truncate(folder / ".metadata", 500), "cannot be read"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({})), "no table"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_damaged_files_are_refused(copy, tmp_path, damage, said):
    damage(copy)
    with pytest.raises(CheckpointError, match=said):
        run(copy, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


NAME = "model.embed_tokens.weight"


def _drop_piece(table):
    table.state_dict_metadata[NAME].chunks.pop()


def _double_piece(table):
    table.state_dict_metadata[NAME].chunks.append(table.state_dict_metadata[NAME].chunks[0])


def _beyond(table):
    table.state_dict_metadata[NAME].size = torch.Size((5, 160))


def _unnamed(table):
    chunk = table.state_dict_metadata[NAME].chunks[0]
    del table.storage_data[dcp_types.MetadataIndex(NAME, chunk.offsets)]


def _outside(table):
    next(iter(table.storage_data.values())).relative_path = "../elsewhere"


def _extended(table):
    next(iter(table.storage_data.values())).transform_descriptors = ["zstd"]


def _missing(table):
    del table.state_dict_metadata[NAME]


def _extra(table):
    table.state_dict_metadata["optim.step"] = table.state_dict_metadata[NAME]
    for chunk in table.state_dict_metadata[NAME].chunks:
        index = dcp_types.MetadataIndex(NAME, chunk.offsets)
        table.storage_data[dcp_types.MetadataIndex("optim.step", chunk.offsets)] = table.storage_data[index]


def _none(table):
    table.state_dict_metadata[NAME].chunks = None


@pytest.mark.parametrize(
    "damage,said",
    [
        (_drop_piece, "cover"),
        (_double_piece, "cover"),
        (_beyond, "outside"),
        (_unnamed, "no file"),
        (_outside, "outside of the folder"),
        (_extended, "extension"),
        (_missing, "missing"),
        (_extra, "not config"),
        (_none, "damaged"),
    ],
)
def test_tables_that_contradict_themselves_are_refused(copy, damage, said):
    table = table_of(copy)
    damage(table)
    put(copy, table)
    with pytest.raises(CheckpointError, match=said):
        dcp.open_dcp(copy)


def test_bytes_that_are_no_tensor_are_refused_with_tensor_and_file(copy, tmp_path):
    opened = dcp.open_dcp(copy)
    piece = opened.tensors[NAME][2][0]
    data = bytearray((copy / piece.file).read_bytes())
    data[piece.start : piece.start + 64] = os.urandom(64)
    (copy / piece.file).write_bytes(data)
    (copy / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{NAME}.*{piece.file}"):
        run(copy, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


def test_random_damage_to_the_table_is_always_one_error(copy):
    whole = (copy / ".metadata").read_bytes()
    draw = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        at = int(torch.randint(len(data), (1,), generator=draw))
        data[at] ^= 1 + int(torch.randint(255, (1,), generator=draw))
        (copy / ".metadata").write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.open_dcp(copy)
        except CheckpointError:
            refused += 1
    assert refused > 50  # the others hit what says nothing of the tensors, such as planner data
