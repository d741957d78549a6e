"""Checkpoint folders of every format are read exactly, in whole and in parts, and what is wrong with one is said with tensor and
file."""

from __future__ import annotations

import json
import warnings

import made_up_checkpoints as made
import numpy as np
import pytest
import torch

from k2lab.ckpt import formats, safefile
from k2lab.ckpt.folder import open_folder
from k2lab.ckpt.safefile import Writer
from k2lab.core.errors import CheckpointError
from k2lab.models import build, export
from k2lab.quant import fp8, int4

WHOLE_BLOCKS = {"hidden_size": 256, "kv_lora_rank": 240, "intermediate_size": 256, "moe_intermediate_size": 128, "num_layers": 2}
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each family and format, in shards; weights of a family are the same in all formats."""
    root = tmp_path_factory.mktemp("folders")
    return {
        (spec, format): made.make(root / f"{spec}-{format}", spec, format, seed=3, shard_bytes=300_000)
        for spec in ("small-k2", "small-linear")
        for format in ("bf16", "fp8", "int4")
    }


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("spec", ["small-k2", "small-linear"])
@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
def test_values_are_those_of_the_format_applied_to_the_weights(folders, spec, format):
    with open_folder(folders[spec, format], deep=True) as folder:
        assert folder.format == {"fp8": "fp8_block", "int4": "int4_group"}.get(format, format)
        assert len(folder.files) > 2
        names, quantised = [], 0
        for name, weight in made.weights_of(made.spec_of(spec), seed=3):
            names.append(name)
            info = folder.info(name)
            if info.format == "int4_group":
                weight = int4.dequantise(*int4.quantise(weight))
            elif info.format == "fp8_block":
                weight = fp8.dequantise(*fp8.fp8_grid(weight))
            quantised += info.format != "plain"
            assert info.shape == tuple(weight.shape) and info.dtype == safefile.NAMES[weight.dtype]
            assert torch.equal(folder.read(name), weight), name
        assert folder.names() == names
        assert (quantised > 0) == (format != "bf16")


def test_all_experts_are_int4_and_only_they(folders):
    with open_folder(folders["small-linear", "int4"]) as folder:
        packed = {name for name in folder.names() if folder.info(name).format == "int4_group"}
        assert packed == {name for name in folder.names() if ".experts." in name}
    with open_folder(folders["small-k2", "fp8"]) as folder:
        plain = {name for name in folder.names() if folder.info(name).format == "plain" and len(folder.info(name).shape) == 2}
        assert plain == {EMBEDDING, "lm_head.weight", ROUTER}
        assert folder.info("model.layers.0.self_attn.kv_b_proj.weight").format == "fp8_block"


@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
def test_parts_equal_the_whole(folders, format):
    with open_folder(folders["small-k2", format]) as folder:
        for name in (EXPERT, EMBEDDING, "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_b_proj.weight"):
            whole = folder.read(name)
            rows, columns = whole.shape
            draw = np.random.Generator(np.random.Philox(7))
            cuts = [
                (0, rows, 0, columns),
                (5, 6, 7, 8),
                (1, rows, 0, columns),
                (0, rows, 31, 33),
                (3, 3, 0, columns),
                (0, 2, 9, 9),
            ]
            for _ in range(30):
                (top, bottom), (left, right) = (sorted(draw.integers(0, size + 1, 2).tolist()) for size in (rows, columns))
                cuts.append((top, bottom, left, right))
            for top, bottom, left, right in cuts:
                part = folder.read(name, slice(top, bottom), slice(left, right))
                assert torch.equal(part, whole[top:bottom, left:right]) and part.dtype == whole.dtype, (name, top, bottom)
            assert torch.equal(folder.read(name, rows=slice(2, None)), whole[2:])
            assert torch.equal(folder.read(name, columns=slice(None, -1)), whole[:, :-1])


def test_vectors_and_convolutions_are_read_by_rows(folders):
    with open_folder(folders["small-linear", "bf16"]) as folder:
        for name in ("model.layers.0.self_attn.A_log", "model.norm.weight", "model.layers.0.self_attn.q_conv1d.weight"):
            whole = folder.read(name)
            assert torch.equal(folder.read(name, slice(0, 1)), whole[:1]) and tuple(whole.shape) == folder.info(name).shape


def test_a_part_needs_only_its_own_bytes(folders, tmp_path, monkeypatch):
    read = []
    preadv = safefile.os.preadv
    monkeypatch.setattr(safefile.os, "preadv", lambda handle, buffers, at: read.append(preadv(handle, buffers, at)) or read[-1])
    with open_folder(folders["small-k2", "int4"]) as folder:
        read.clear()
        folder.read(EXPERT, slice(4, 8))
    assert sum(read) == 4 * (160 // 2 + 160 // 32 * 2)
    with open_folder(folders["small-k2", "fp8"]) as folder:
        read.clear()
        folder.read(EXPERT, slice(5, 8))
    assert sum(read) == 3 * 160 + 1 * 2 * 4


def test_packed_gives_stored_codes_and_scales(folders):
    with open_folder(folders["small-k2", "int4"]) as folder:
        codes, scales = folder.packed(EXPERT, slice(3, 9), slice(32, 128))
        assert codes.shape == (6, 12) and scales.shape == (6, 3)
        assert torch.equal(int4.dequantise(codes, scales), folder.read(EXPERT)[3:9, 32:128])
        raw = folder.raw(EXPERT)
        assert list(raw) == [EXPERT + "_packed", EXPERT + "_scale", EXPERT + "_shape"] == folder.stored(EXPERT)
        dtype, shape, data = raw[EXPERT + "_packed"]
        assert (dtype, shape) == ("I32", (96, 20)) and bytes(data) == folder.packed(EXPERT)[0].numpy().tobytes()
        with pytest.raises(CheckpointError, match="whole groups"):
            folder.packed(EXPERT, None, slice(8, 64))
        with pytest.raises(CheckpointError, match="not quantised"):
            folder.packed(ROUTER)
        with pytest.raises(CheckpointError, match="no such tensor"):
            folder.read("model.layers.9.mlp.gate.weight")
    with open_folder(folders["small-k2", "fp8"]) as folder:
        name = "model.layers.0.mlp.gate_proj.weight"  # 288 x 160: blocks at both edges are cut
        codes, scales = folder.packed(name, slice(128, 288), slice(128, 160))
        assert torch.equal(fp8.dequantise(codes, scales), folder.read(name)[128:, 128:])
        with pytest.raises(CheckpointError, match="whole groups or blocks"):
            folder.packed(name, slice(64, 128))


def test_code_minus_eight_is_read(folders, tmp_path):
    folder = made.make(tmp_path / "f", "small-k2", "int4")
    with open_folder(folder) as opened:
        entry = opened.file_of(EXPERT + "_packed").entries[EXPERT + "_packed"]
        scale = float(opened.packed(EXPERT)[1][0, 0])
        before = opened.read(EXPERT)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[entry.start] &= 0xF0  # the first column's code becomes 0 - 8
    (folder / "model.safetensors").write_bytes(data)
    with open_folder(folder, deep=True) as opened:
        after = opened.read(EXPERT)
    assert float(after[0, 0]) == -8 * scale
    assert torch.equal(after.flatten()[1:], before.flatten()[1:])


def test_int4_equals_compressed_tensors(folders):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    with open_folder(folders["small-linear", "int4"]) as folder:
        table = quantization.QuantizationConfig.model_validate(folder.config()["quantization_config"])
        (scheme,) = table.config_groups.values()
        compressor = compressors.BaseCompressor.get_value_from_registry(table.format)
        names = [name for name in folder.names() if folder.info(name).format == "int4_group"]
        assert len(names) == 12
        for name in names:
            stem = name.removesuffix("weight")
            stored = {part.removeprefix(stem): folder.file_of(part).tensor(part) for part in folder.stored(name)}
            theirs = compressor.decompress(stored, scheme)["weight"]
            assert theirs.dtype == torch.bfloat16 and torch.equal(folder.read(name), theirs)


def _transformers_state(folder, spec, quantization):
    config = build.hf_config(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.quantization_config = json.loads((folder / "config.json").read_text())["quantization_config"]
        model, info = build._class_of(spec).from_pretrained(
            str(folder), config=config, quantization_config=quantization, dtype=torch.bfloat16, output_loading_info=True
        )
    assert not any(info.values())
    return {k: v for name, t in model.state_dict().items() for k, v in export.released(name, t, spec.family)}


def test_int4_folder_equals_transformers(folders):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    path = folders["small-k2", "int4"]
    with open_folder(path) as folder:
        theirs = _transformers_state(path, folder.spec, transformers.CompressedTensorsConfig(dequantize=True))
        assert set(theirs) == set(folder.names())
        for name, value in theirs.items():
            assert torch.equal(folder.read(name).to(value.dtype), value), name


def test_fp8_folder_equals_transformers(tmp_path):
    """In whole blocks only: where a matrix ends within a block, transformers 5.23 guesses another block size."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    spec = made.spec_of("small-k2").replace(
        **WHOLE_BLOCKS, q_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64, num_attention_heads=2
    )
    spec = spec.replace(qk_nope_head_dim=64, qk_rope_head_dim=64, kv_lora_rank=64)
    path = made.make(tmp_path / "f", spec, "fp8")
    with open_folder(path) as folder:
        theirs = _transformers_state(path, folder.spec, transformers.FineGrainedFP8Config(dequantize=True))
        assert set(theirs) == set(folder.names())
        for name, value in theirs.items():
            assert torch.equal(folder.read(name).to(value.dtype), value), name


# ---------------------------------------------------------------- folders as people have them


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_text_tower_of_a_vision_model(tmp_path, format):
    plain = made.make(tmp_path / "plain", "small-k2", format, seed=5)
    tower = made.make(tmp_path / "tower", "small-k2", format, seed=5, shard_bytes=10**6, vision=True)
    with pytest.warns(UserWarning, match="2 of mm_projector, 4 of vision_tower"):
        seen = open_folder(tower, deep=True)
    with open_folder(plain) as blind, seen:
        assert seen.names() == blind.names() and seen.format == blind.format and seen.prefix == "language_model."
        assert all(torch.equal(seen.read(name), blind.read(name)) for name in seen.names())
        assert set(seen.apart) == set(made.VISION)
        ((dtype, shape, data),) = seen.raw("mm_projector.proj.0.weight").values()
        assert (dtype, shape, len(data)) == ("BF16", (96, 96), 96 * 96 * 2)
        table = seen.config()["text_config"].get("quantization_config", {})
        assert {"re:vision_tower.*", "re:.*lm_head.*"} <= set(table["ignore"]) if format == "int4" else not table


@pytest.mark.parametrize("spec", ["tiny-k2", "tiny-linear", "tiny-qwen2"])
def test_folders_that_we_save(tmp_path, spec):
    model = build.from_spec(made.spec_of(spec), seed=1)
    build.save(model, tmp_path)
    ours = {k: v for name, t in model.state().items() for k, v in export.released(name, t, model.spec.family)}
    with open_folder(tmp_path, deep=True) as folder:
        assert folder.format == "fp32" and set(folder.names()) <= set(ours)
        assert all(torch.equal(folder.read(name), ours[name]) for name in folder.names())


def test_leftovers_are_not_read_but_listed(tmp_path):
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with open_folder(made.make(tmp_path / "a", extra=rotary)) as folder:
        assert list(folder.leftovers) == [rotary] and rotary not in folder.names()
    predicted = "model.layers.2.enorm.weight"
    with open_folder(made.make(tmp_path / "b", extra=predicted, config={"num_nextn_predict_layers": 1})) as folder:
        assert list(folder.leftovers) == [predicted]
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.enorm.*not those of config"):
        open_folder(made.make(tmp_path / "c", extra=predicted))


def test_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    model = build.from_spec(made.spec_of("tiny-qwen2").replace(tie_word_embeddings=True), seed=1)
    build.save(model, tmp_path)
    with open_folder(tmp_path) as folder:
        tensors = {name: folder.read(name) for name in folder.names()}
    for head, right in ((tensors[EMBEDDING], True), (tensors[EMBEDDING] + 1, False)):
        stored = tensors | {"lm_head.weight": head}
        with Writer(tmp_path / "model.safetensors", {k: ("F32", v.shape) for k, v in stored.items()}) as writer:
            for name, tensor in stored.items():
                writer.write(name, tensor)
        if right:
            assert list(open_folder(tmp_path).leftovers) == ["lm_head.weight"]
        else:
            with pytest.raises(CheckpointError, match="lm_head"):
                open_folder(tmp_path)


def test_qat_folder_is_known_by_its_key(tmp_path):
    table = {"format": "int4_group", "group_size": 32}
    assert open_folder(made.make(tmp_path / "a", config={"k2_qat": table})).qat == "int4_group"
    assert open_folder(made.make(tmp_path / "b")).qat is None
    with pytest.raises(CheckpointError, match="k2_qat"):
        open_folder(made.make(tmp_path / "c", config={"k2_qat": table | {"group_size": 64}}))


def test_ignore_lists_leave_exactly_the_experts_to_int4():
    """compressed-tensors' own matching of the table that exports carry, over the linear modules of releases and of engines."""
    match = pytest.importorskip("compressed_tensors.utils.match")
    linear = torch.nn.Linear(1, 1)
    for name, vision in (("small-k2", ()), ("small-linear", ()), ("small-k2", ("vision_tower", "mm_projector"))):
        spec, prefix = made.spec_of(name), made.TOWER if vision else ""
        table = formats.quantization_config("int4_group", spec, vision)
        (group,) = table["config_groups"].values()
        modules = {"model.layers.0.mlp.gate_up_proj": "fused", "model.layers.1.self_attn.fused_qkv_a_proj": "fused"}
        for tensor in spec.tensors():  # Kimi K2's router is no Linear anywhere
            if tensor.kind in ("linear", "expert", "head") or (tensor.kind == "router" and spec.family == "kimi_linear"):
                modules[tensor.name.replace("{e}", "3").removesuffix(".weight")] = tensor.kind
        modules = {prefix + module: kind for module, kind in modules.items()}
        if vision:
            modules |= {"vision_tower.encoder.blocks.0.mlp.fc0": "vision", "mm_projector.proj.0": "vision"}
        packed = {module for module in modules if match.is_match(module, linear, group["targets"], table["ignore"])}
        assert packed == {module for module, kind in modules.items() if kind == "expert"} != set()


def test_made_up_weights_of_large_matrices_are_the_same_in_every_format_and_all_different(tmp_path):
    """They are laid from blocks that were quantised once; here the grids are applied to the whole matrices."""
    spec = made.spec_of("small-k2").replace(hidden_size=1024, moe_intermediate_size=1152, intermediate_size=1056)
    opened = {format: open_folder(made.make(tmp_path / format, spec, format, seed=2)) for format in ("bf16", "fp8", "int4")}
    seen = set()
    for name in opened["bf16"].names():
        weight = opened["bf16"].read(name)
        if ".experts." in name:
            assert weight.numel() > made.TILED
            assert all(map(torch.equal, opened["int4"].packed(name), int4.quantise(weight))), name
        if opened["fp8"].info(name).format == "fp8_block":
            codes, scales = opened["fp8"].packed(name)
            assert torch.equal(codes.view(torch.uint8), fp8.quantise(weight)[0].view(torch.uint8))
            assert torch.equal(scales, fp8.quantise(weight)[1])
        seen.add(weight.view(torch.uint8).numpy().tobytes() if weight.ndim else None)
    assert len(seen) == len(opened["bf16"].names())
