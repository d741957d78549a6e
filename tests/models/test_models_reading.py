"""Loading of checkpoints of every format: names both ways, slices, packed experts, refusals, sharded models; transformers' own
loader gives the same bits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import made_up_checkpoints
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from held_source import Held
from model_samples import K2, LINEAR, VARIANTS, logits, make, pack
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import CompressedTensorsConfig, FineGrainedFP8Config

from k2lab import specs
from k2lab.ckpt import dcp
from k2lab.ckpt.folder import open_folder
from k2lab.core.errors import CheckpointError, RecipeError
from k2lab.models import build, export, reading
from k2lab.models.packed import PackedExperts
from k2lab.models.wrap import ALWAYS_FP32, TrainModel

PACKABLE: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32}
FORMATS = ("plain", "fp8_block", "int4_group")


def released(model: TrainModel) -> dict[str, torch.Tensor]:
    return {new: part for name, whole in model.state().items() for new, part in export.released(name, whole, model.spec.family)}


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", specs.names())
def test_pieces_are_the_released_tensors_and_cover_the_models_tensors(name: str) -> None:
    spec = specs.get(name)
    found = {}
    for whole, tensor in reading._state(build._on_meta(spec), spec).items():
        pieces = reading.pieces(whole, tuple(tensor.shape), spec.family)
        regions = {
            tuple((part, part + 1) if isinstance(part, int) else (part.start, part.stop) for part in p.region) for p in pieces
        }
        assert len(regions) == len(pieces)
        # along every dim their ranges lie end to end, and together they have the tensor's number of values: none overlap
        assert sum(math.prod(piece.shape) for piece in pieces) == tensor.numel()
        for dim, size in enumerate(tensor.shape):
            ends = sorted({region[dim] for region in regions})
            assert ends[0][0] == 0 and ends[-1][1] == size
            assert all(one[1] == two[0] for one, two in zip(ends, ends[1:]))
        found |= {piece.name: piece.shape for piece in pieces}
    assert found == dict(spec.tensor_shapes())


@pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])
def test_export_and_pieces_are_inverse(spec: specs.ModelSpec) -> None:
    model = make(spec)
    parts = released(model)
    for name, tensor in model.state().items():
        back = torch.full_like(tensor, math.nan)
        for piece in reading.pieces(name, tuple(tensor.shape), spec.family):
            back[piece.region] = parts.pop(piece.name)
        assert torch.equal(back, tensor), name
    assert not parts


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_loaded_is_what_is_stored(name: str, format: str) -> None:
    model = make(VARIANTS[name].replace(**PACKABLE))
    source = Held.of(model, format)
    for dtype in (torch.float32, torch.bfloat16):
        again = build.load(source, dtype)
        found, wanted = released(again), source.decoded()
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            assert tensor.dtype == (torch.float32 if key.endswith(ALWAYS_FP32) else dtype), key
            assert torch.equal(tensor, wanted[key].to(tensor.dtype)), key
        assert not again.training
        if format == "plain" and dtype == torch.float32:
            assert torch.equal(logits(again, pack((20, 80))), logits(model, pack((20, 80))))
    assert set(source.bytes) == set(source.names())


def test_fp16_and_tied_heads(tmp_path: Path) -> None:
    student = specs.get("qwen2.5-7b").replace(
        hidden_size=64, num_attention_heads=8, num_kv_heads=2, num_layers=2, vocab_size=97, intermediate_size=96,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = build.from_spec(student, seed=1, dtype=torch.float16)
    build.save(model, tmp_path)
    again = build.load(open_folder(tmp_path))
    assert again.hf.lm_head.weight is again.hf.model.embed_tokens.weight
    assert all(torch.equal(tensor.float(), again.state()[name]) for name, tensor in model.state().items())


# widths that are whole blocks of 128: transformers takes the block's size from the number of scales
WHOLE = {
    "hidden_size": 128, "vocab_size": 352, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 128, "v_head_dim": 64, "num_attention_heads": 2,
    "local_heads": (),
}  # fmt: skip
FOLDERS = {
    "bf16": ("small-k2", torch.bfloat16),
    "bf16 as fp32": ("small-k2", torch.float32),
    "bf16, linear": ("small-linear", torch.bfloat16),
    "fp32, linear": ("small-linear", torch.float32),
    "fp8": ("whole", torch.bfloat16),
    "fp8 as fp32": ("whole", torch.float32),
    "int4": ("small-k2", torch.bfloat16),
    "int4 as fp32": ("small-k2", torch.float32),
}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("case", FOLDERS)
def test_the_bits_are_those_of_transformers_loader(case: str, tmp_path: Path) -> None:
    name, dtype = FOLDERS[case]
    format = case.split(",")[0].split()[0]
    spec = specs.get("tiny-k2").replace(num_layers=2, **WHOLE) if name == "whole" else made_up_checkpoints.spec_of(name)
    folder = made_up_checkpoints.make(tmp_path, spec, format, shard_bytes=400_000)
    ours = build.load(open_folder(folder), dtype)

    class Theirs(build._class_of(spec)):
        _keep_in_fp32_modules_strict = ALWAYS_FP32

    config, how = build.hf_config(spec), {}
    table = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if format == "int4":
        pytest.importorskip("compressed_tensors")
        how["quantization_config"] = CompressedTensorsConfig(run_compressed=False)
    elif format == "fp8":
        how["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    if table is not None:
        config.quantization_config = table
    hf = Theirs.from_pretrained(str(folder), config=config, dtype=dtype, local_files_only=True, **how)
    theirs = hf.state_dict()
    assert ours.hf.state_dict().keys() == theirs.keys()
    for key, tensor in ours.hf.state_dict().items():
        # asked for fp32, transformers leaves what it does not decode, or decodes to bf16, in bf16
        assert tensor.dtype == theirs[key].dtype or table is not None
        assert torch.equal(tensor, theirs[key].to(tensor.dtype)), key
    buffers = dict(ours.hf.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in hf.named_buffers())


def test_a_text_towers_shards_load_quantised(tmp_path: Path) -> None:
    plain = made_up_checkpoints.make(tmp_path / "plain", "small-k2", "int4")
    folder = made_up_checkpoints.make(tmp_path / "tower", "small-k2", "int4", shard_bytes=200_000, vision=True)
    with pytest.warns(UserWarning, match="vision"):
        source = open_folder(folder)
    one, two = build.load(source), build.load(open_folder(plain))
    assert all(torch.equal(tensor, two.state()[name]) for name, tensor in one.state().items())
    assert one.spec.name == "tower"


def test_parts_threads_and_decoding_elsewhere_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(K2.replace(hidden_size=160, moe_intermediate_size=96))
    for format in FORMATS:
        source = Held.of(model, format)
        wanted = source.decoded()

        def check(source: Held = source, wanted: dict[str, torch.Tensor] = wanted, **how: Any) -> None:
            found = released(build.load(source, **how))
            assert all(torch.equal(tensor, wanted[name].to(tensor.dtype)) for name, tensor in found.items())

        check(threads=3)
        with monkeypatch.context() as patch:
            patch.setattr(reading, "ROWS", 16)
            patch.setattr(reading, "AT_ONCE", 2000)
            source.largest = 0
            check(dtype=torch.float64)  # what is stored as it is wanted is read in one go
            assert 0 < source.largest <= 16 * 288
        with monkeypatch.context() as patch:
            patch.setattr(reading, "_decodes", lambda device: True)
            patch.setattr(reading, "AT_ONCE", 2000)
            check()


def test_pieces_of_a_dcp_folder_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_folder(made_up_checkpoints.make(tmp_path / "plain", "small-k2", "bf16"))
    torch_dcp.save({name: source.read(name) for name in source.names()}, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    (tmp_path / "dcp" / "config.json").write_text((tmp_path / "plain" / "config.json").read_text())
    opened = dcp.open_dcp(tmp_path / "dcp")
    loaded, load = [], opened._load
    monkeypatch.setattr(opened, "_load", lambda name, piece, dtype: loaded.append(piece) or load(name, piece, dtype))
    monkeypatch.setattr(reading, "AT_ONCE", 2000)
    ours, theirs = build.load(opened, torch.bfloat16).state(), build.load(source, torch.bfloat16).state()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()) and ours.keys() == theirs.keys()
    assert len(loaded) == sum(len(pieces) for _, _, pieces in opened.tensors.values())


# ---------------------------------------------------------------- packed experts


def test_packed_experts_keep_the_codes(tmp_path: Path) -> None:
    source = open_folder(made_up_checkpoints.make(tmp_path, "small-k2", "int4"))
    kept, dense = build.load(source, torch.bfloat16, experts="packed"), build.load(source, torch.bfloat16)
    experts = [module for module in kept.hf.modules() if isinstance(module, PackedExperts)]
    assert len(experts) == len(source.spec.moe_layers())
    for layer, module in zip(source.spec.moe_layers(), experts):
        name = f"model.layers.{layer}.mlp.experts"
        for stem in ("gate_up_proj", "down_proj"):
            assert torch.equal(module.dense(stem), dense.hf.state_dict()[f"{name}.{stem}"])
        codes, scales = source.packed(f"{name}.3.up_proj.weight")
        F = codes.shape[0]
        assert torch.equal(module.gate_up_codes[3, F:], codes)
        assert torch.equal(module.gate_up_scales[3, F:], scales)
    shared = {name: tensor for name, tensor in kept.hf.state_dict().items() if ".experts." not in name}
    assert all(torch.equal(tensor, dense.hf.state_dict()[name]) for name, tensor in shared.items())
    batch = pack((20, 80))
    with torch.no_grad():
        assert torch.equal(kept.hidden(batch), dense.hidden(batch))


def test_experts_that_are_not_packed_are_not_loaded_packed(tmp_path: Path) -> None:
    source = open_folder(made_up_checkpoints.make(tmp_path, "small-k2", "fp8"))
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj.*fp8_block.*--to int4"):
        build.load(source, experts="packed")


# ---------------------------------------------------------------- refusals


def broken(**change: Any) -> Held:
    source = Held.of(make(K2))
    for name, tensor in change.pop("tensors", {}).items():
        if tensor is None:
            source.order.remove(name)
        else:
            source.plain[name] = tensor
            source.order = list(dict.fromkeys([*source.order, name]))
    source._config |= change
    return source


def test_other_tensors_than_the_configs_are_refused_before_anything_is_allocated() -> None:
    norm, up = "model.norm.weight", "model.layers.1.mlp.experts.2.up_proj.weight"
    cases = {
        "1 missing": {up: None},
        "1 unexpected": {"model.extra": torch.zeros(3)},
        r"1 of another shape.*model\.norm\.weight of shape \[47\] in file instead of \[48\]": {norm: torch.zeros(47)},
        "1 missing, 1 unexpected, 1 of another shape": {up: None, "model.extra": torch.zeros(3), norm: torch.zeros(47)},
    }
    for match, tensors in cases.items():
        source = broken(tensors=tensors)
        hf = build._on_meta(K2)
        with pytest.raises(CheckpointError, match=match):
            reading.fill(hf, K2, source, torch.float32, "cpu")
        assert all(tensor.is_meta for tensor in hf.state_dict().values())
        assert not source.bytes
        with pytest.raises(CheckpointError, match=match):
            build.load(source)
    with pytest.raises(RecipeError, match="attention dropout"):
        build.load(broken(attention_dropout=0.1))


def test_a_read_that_fails_gives_no_model() -> None:
    source = broken()
    whole = source.read_into

    def read_into(target: torch.Tensor, name: str, *part: Any) -> None:
        if len(source.bytes) == 20:
            raise CheckpointError("this file became shorter while it was read", where=name)
        whole(target, name, *part)

    source.read_into = read_into
    for threads in (1, 3):
        source.bytes.clear()
        with pytest.raises(CheckpointError, match="shorter"):
            build.load(source, threads=threads)


# ---------------------------------------------------------------- sharded


PLACEMENTS = [
    (Shard(0), Replicate()),
    (Replicate(), Shard(1)),
    (Shard(0), Shard(0)),
    (Shard(1), Shard(0)),
    (Shard(0), Shard(1)),
    (_StridedShard(0, split_factor=2), Shard(0)),
    (_StridedShard(1, split_factor=3), Replicate()),
]


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
@pytest.mark.parametrize("mesh", [(3, 2), (2, 4)], ids=str)
def test_ranges_are_those_of_torch(placements: tuple[Any, ...], mesh: tuple[int, int]) -> None:
    for shape in ((12, 24), (7, 5), (2, 13), (1, 1)):
        whole = torch.arange(math.prod(shape)).view(shape)
        seen = torch.zeros(shape, dtype=torch.int64)
        for coordinate in ((i, j) for i in range(mesh[0]) for j in range(mesh[1])):
            ranges = reading.placed(shape, mesh, coordinate, placements)
            local = whole
            for dim, held in enumerate(ranges):
                local = torch.cat([local.narrow(dim, a, b - a) for a, b in held] or [local.narrow(dim, 0, 0)], dim)
            size, offset = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
            assert tuple(local.shape) == tuple(size)
            if local.numel():
                assert local.flatten()[0] == whole[tuple(offset)]
                seen.view(-1)[local.flatten()] += 1
        copies = math.prod(num for num, placement in zip(mesh, placements) if placement.is_replicate())
        assert bool((seen == copies).all())
    with pytest.raises(CheckpointError, match="cannot be filled"):
        reading.placed((4, 4), mesh, (0, 0), (Partial(), Replicate()))


def test_two_processes_read_their_shards_only(tmp_path: Path) -> None:
    """FSDP2, experts over ranks and matrices over columns, from three formats: see the worker."""
    worker = Path(__file__).with_name("reading_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker), str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for rank in range(2):
        shares = json.loads((tmp_path / f"shares.{rank}.json").read_text())
        assert len(shares) == 13
        for case, share in shares.items():
            # of five experts the first rank has three; of columns, INT4 is read in whole groups of 32
            low, high = (0.49, 0.62) if "columns" in case else ((0.59, 0.61), (0.39, 0.41))[rank]
            assert low < share < high, (case, share)
