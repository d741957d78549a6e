"""`k2 convert` between every pair of formats: the bits that the definitions say, original bytes for what did not change, and what
lies beside the weights."""

from __future__ import annotations

import json
import shutil

import convert_cases as cases
import made_up_checkpoints as made
import pytest
import torch
from convert_cases import EXPERT, rewrite, run, stored

from k2lab.ckpt import diff, origin, peft, sources
from k2lab.ckpt.folder import open_folder
from k2lab.core.artifacts import file_sha256
from k2lab.core.errors import CheckpointError, DataError
from k2lab.quant import fp8, int4
from k2lab.specs import ModelSpec

SPECS = ("small-k2", "small-linear")
SOURCES = ("bf16", "fp32", "fp8", "int4")
STORED_AS = {"bf16": "bf16", "fp32": "fp32", "fp8": "fp8_block", "int4": "int4_group"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder of each family and format; weights of a family are the same bf16 numbers behind all formats."""
    root = tmp_path_factory.mktemp("sources")
    return {
        (spec, format): made.make(root / f"{spec}-{format}", spec, format, seed=5, shard_bytes=150_000)
        for spec in SPECS
        for format in SOURCES
    }


def expected(source, name: str, kind: str, to: str) -> torch.Tensor:
    """What a tensor must decode to after the conversion, by the definitions."""
    value = source.read(name)
    if to == "fp32":
        return value.float()
    if to == "dcp" or kind == "fp32_vector":
        return value
    if to == "fp8" and kind in ("linear", "expert"):
        if source.info(name).format == "fp8_block":
            return value
        return fp8.dequantise(*fp8.quantise(value))
    if to == "int4" and kind == "expert":
        return int4.values(value)
    return value.to(torch.bfloat16)


@pytest.mark.parametrize("to", ["bf16", "fp32", "fp8", "int4", "dcp"])
@pytest.mark.parametrize("format", SOURCES)
@pytest.mark.parametrize("spec", SPECS)
def test_every_pair_of_formats_gives_the_defined_bits(folders, tmp_path, spec, format, to):
    result = run(folders[spec, format], tmp_path / "out", to)
    assert result.state == "done" and len(result.plan.shards) > 1
    source, out = sources.open_source(folders[spec, format]), sources.open_source(tmp_path / "out")
    kinds = {}
    for tensor in source.spec.tensors():
        kinds |= {tensor.name.replace("{e}", str(n)): tensor.kind for n in range(tensor.count)}
    assert out.names() == source.names()
    for name in source.names():
        wanted = expected(source, name, kinds[name], to)
        found = out.read(name)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
    if to != "dcp":
        assert out.format == STORED_AS[to]
        open_folder(tmp_path / "out", deep=True)  # sha256 of every file, and every value
    assert out.spec.replace(name="x") == source.spec.replace(name="x")


@pytest.mark.parametrize("to", ["fp8", "int4"])
@pytest.mark.parametrize("format", ["bf16", "fp32"])
@pytest.mark.parametrize("spec", SPECS)
def test_an_export_has_the_bytes_of_the_release(folders, tmp_path, spec, format, to):
    run(folders[spec, format], tmp_path / "out", to)
    found, wanted = stored(tmp_path / "out"), stored(folders[spec, to])
    differ = [name for name in found.keys() | wanted.keys() if format == "bf16" and found.get(name) != wanted.get(name)]
    assert not differ
    assert diff.compare(folders[spec, to], tmp_path / "out").codes() == (0, 0)


@pytest.mark.parametrize("format", SOURCES)
def test_the_same_format_is_copied_byte_for_byte(folders, tmp_path, format):
    result = run(folders["small-k2", format], tmp_path / "out", format)
    assert stored(tmp_path / "out") == stored(folders["small-k2", format])
    assert result.done.copied == len(open_folder(tmp_path / "out").names()) and not result.done.quantised


@pytest.mark.parametrize("detour", ["fp32", "dcp"])
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_a_detour_through_exact_values_comes_back_without_the_original(folders, tmp_path, format, detour):
    run(folders["small-linear", format], tmp_path / "wide", detour)
    (tmp_path / "wide" / origin.ORIGIN).unlink()
    result = run(tmp_path / "wide", tmp_path / "back", format)
    assert result.done.quantised and not result.done.kept
    assert stored(tmp_path / "back") == stored(folders["small-linear", format])


# ---------------------------------------------------------------- original bytes


def strange(folder, name):
    """Changes a quantised folder to one that our grids would not give back: other scales, and codes -8."""

    def change(stored_name, tensor):
        if stored_name.endswith("_scale"):
            return (tensor.float() * 1.2).to(torch.bfloat16)
        if stored_name.endswith("_packed"):
            codes = int4.unpack(tensor)
            return int4.pack(torch.where(codes == -7, -8, codes).to(torch.int8))
        if stored_name.endswith("_scale_inv"):
            return tensor * 1.37
        return tensor

    rewrite(folder, change)


@pytest.fixture
def released(folders, tmp_path):
    """Copies of quantised folders whose bytes no grid of ours gives back."""

    def make(spec, format):
        shutil.copytree(folders[spec, format], tmp_path / "released")
        strange(tmp_path / "released", format)
        return tmp_path / "released"

    return make


@pytest.mark.parametrize("detour", ["bf16", "fp32", "dcp"])
@pytest.mark.parametrize("format", ["fp8", "int4"])
@pytest.mark.parametrize("spec", SPECS)
def test_what_did_not_change_comes_back_with_its_original_bytes(released, tmp_path, spec, format, detour):
    source = released(spec, format)
    run(source, tmp_path / "plain", detour)
    result = run(tmp_path / "plain", tmp_path / "back", format)
    assert result.done.kept == len(origin.read(tmp_path / "plain").tensors) and not result.done.quantised
    assert stored(tmp_path / "back") == stored(source)
    # and not because the grid would have given these bytes in any case
    shutil.rmtree(tmp_path / "back")
    (tmp_path / "plain" / origin.ORIGIN).unlink()
    run(tmp_path / "plain", tmp_path / "back", format)
    assert stored(tmp_path / "back") != stored(source)


def test_only_what_training_changed_is_quantised(released, tmp_path):
    source = released("small-k2", "int4")
    run(source, tmp_path / "plain", "bf16")
    rewrite(tmp_path / "plain", lambda name, t: t + (torch.arange(t.numel()).view(t.shape) == 3) if name == EXPERT else t)
    (tmp_path / "plain" / "checksums.json").unlink()
    shutil.move(source, tmp_path / "moved")  # origin.json names a folder that is gone
    result = run(tmp_path / "plain", tmp_path / "lost", "int4")
    assert result.done.kept == 0 and any("is not there" in note for note in result.notes)
    result = run(tmp_path / "plain", tmp_path / "back", "int4", original=tmp_path / "moved")
    assert (result.done.kept, result.done.quantised) == (11, 1)
    found, wanted = stored(tmp_path / "back"), stored(tmp_path / "moved")
    assert {name for name in wanted if found[name] != wanted[name]} == {EXPERT + "_packed", EXPERT + "_scale"}
    assert torch.equal(open_folder(tmp_path / "back").read(EXPERT), int4.values(open_folder(tmp_path / "plain").read(EXPERT)))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_without_hashes_the_values_decide(released, tmp_path, format, precision):
    """A run that read the packed checkpoint itself leaves an origin.json without hashes, in the precision it trained in."""
    source = released("small-k2", format)
    run(source, tmp_path / "plain", "fp32" if precision == torch.float32 else "bf16")
    origin.carry(source, tmp_path / "plain")
    (tmp_path / "plain" / "origin.json").unlink()
    origin.carry(source, tmp_path / "plain")
    assert origin.read(tmp_path / "plain") == origin.Origin(str(source), STORED_AS[format])
    (tmp_path / "plain" / "checksums.json").unlink()
    result = run(tmp_path / "plain", tmp_path / "back", format)
    assert result.done.kept and not result.done.quantised
    assert stored(tmp_path / "back") == stored(source)


def test_training_in_fp32_after_a_bf16_detour_keeps_what_it_did_not_change(released, tmp_path):
    source = released("small-k2", "fp8")
    run(source, tmp_path / "plain", "bf16")
    run(tmp_path / "plain", tmp_path / "wide", "fp32")
    assert origin.read(tmp_path / "wide") == origin.read(tmp_path / "plain")
    result = run(tmp_path / "wide", tmp_path / "back", "fp8")
    assert result.done.kept == 28 and stored(tmp_path / "back") == stored(source)


def test_an_original_that_changed_meanwhile_is_not_trusted(released, tmp_path):
    source = released("small-k2", "int4")
    run(source, tmp_path / "plain", "bf16")
    rewrite(source, lambda name, t: t.flip(0) if name == EXPERT + "_packed" else t)
    result = run(tmp_path / "plain", tmp_path / "back", "int4")
    assert (result.done.kept, result.done.quantised) == (11, 1)


def test_an_original_of_another_model_or_format_is_refused(folders, tmp_path):
    with pytest.raises(CheckpointError, match="not in the format"):
        run(folders["small-k2", "bf16"], tmp_path / "out", "int4", original=folders["small-k2", "fp8"])
    with pytest.raises(CheckpointError, match="another model"):
        run(folders["small-k2", "bf16"], tmp_path / "out", "int4", original=folders["small-linear", "int4"])
    with pytest.raises(DataError, match="packs nothing"):
        run(folders["small-k2", "bf16"], tmp_path / "out", "bf16", original=folders["small-k2", "int4"])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- adapters, QAT, vision


def adapter(folder, names):
    """A LoRA folder for some matrices, and {name: what it adds}."""
    draw = torch.Generator().manual_seed(1)
    pairs, added = {}, {}
    for name, (out, width) in names.items():
        A, B = torch.randn(4, width, generator=draw), torch.randn(out, 4, generator=draw) * 0.01
        pairs[name.removesuffix(".weight")] = (A, B, 2.0)
        added[name] = (B @ A) * 2.0
    peft.save(folder, pairs.items(), rank=4, alpha=8.0)
    return added


@pytest.mark.parametrize("format,to", [("int4", "int4"), ("bf16", "int4"), ("int4", "bf16"), ("fp8", "fp8"), ("fp8", "fp32")])
def test_an_adapter_is_merged_and_the_rest_keeps_its_bytes(folders, tmp_path, format, to):
    source = open_folder(folders["small-k2", format])
    attention = "model.layers.0.self_attn.o_proj.weight"
    added = adapter(tmp_path / "adapter", {name: source.info(name).shape for name in (EXPERT, attention)})
    result = run(source.path, tmp_path / "out", to, adapter=tmp_path / "adapter")
    assert result.done.merged == 2
    out = open_folder(tmp_path / "out")
    for name in (EXPERT, attention):
        merged = source.read(name).float() + added[name]
        wanted = merged if to == "fp32" else merged.to(torch.bfloat16)
        if to == "int4" and name == EXPERT:
            wanted = int4.values(wanted)
        if to == "fp8":
            wanted = fp8.dequantise(*fp8.quantise(wanted))
        assert torch.equal(out.read(name), wanted), name
    if format == to:
        before, after = stored(source.path), stored(tmp_path / "out")
        changed = {name for name in before if before[name] != after[name]}
        assert changed <= {name for name in before if name.startswith((EXPERT, attention))} and changed


def test_an_adapter_for_another_model_is_refused(folders, tmp_path):
    adapter(tmp_path / "adapter", {"model.layers.7.self_attn.o_proj.weight": (160, 64)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.self_attn\.o_proj"):
        run(folders["small-k2", "bf16"], tmp_path / "out", "bf16", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_weights_trained_on_the_grid_stay_on_it(tmp_path):
    """`k2_qat`: a model multiplies by grid values of the weights that are stored."""
    table = {"k2_qat": {"format": "int4_group", "group_size": 32}}
    source = made.make(tmp_path / "qat", "small-k2", "bf16", config=table)
    weights = open_folder(source)
    for to in ("bf16", "int4", "fp8"):
        run(source, tmp_path / to, to)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["k2_qat"] == table["k2_qat"]
    assert torch.equal(open_folder(tmp_path / "bf16").read(EXPERT), weights.read(EXPERT))
    for to in ("int4", "fp8"):
        assert "k2_qat" not in json.loads((tmp_path / to / "config.json").read_text())
    trained = int4.values(weights.read(EXPERT))
    assert torch.equal(open_folder(tmp_path / "int4").read(EXPERT), trained)
    assert torch.equal(open_folder(tmp_path / "fp8").read(EXPERT), fp8.dequantise(*fp8.quantise(trained)))


@pytest.mark.filterwarnings("ignore:.*vision tensors")
@pytest.mark.parametrize("detour", ["bf16", "dcp"])
def test_vision_tensors_are_carried_over_under_their_names(tmp_path, detour):
    source = made.make(tmp_path / "k25", "small-k2", "int4", vision=True, shard_bytes=200_000)
    run(source, tmp_path / "plain", detour)
    run(tmp_path / "plain", tmp_path / "back", "int4")
    assert stored(tmp_path / "back") == stored(source)
    if detour == "bf16":
        found = stored(tmp_path / "plain")
        assert {name for name in found if name.startswith(("vision_tower", "mm_projector"))} == set(made.VISION)
        assert made.TOWER + EXPERT in found
        assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "back"))
    assert after == before


# ---------------------------------------------------------------- what lies beside


def test_a_finished_folder_says_of_every_file_what_it_is(folders, tmp_path):
    out = tmp_path / "out"
    run(folders["small-k2", "bf16"], out, "int4")
    sums = json.loads((out / "checksums.json").read_text())
    assert set(sums) == {path.name for path in out.iterdir()} - {"checksums.json"}
    for name, facts in sums.items():
        assert facts == {"sha256": file_sha256(out / name), "size": (out / name).stat().st_size}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folders["small-k2", "bf16"] / name).read_bytes()
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        open_folder(out, deep=True)


def test_engines_find_the_legacy_keys_they_need(folders, tmp_path):
    """A config as transformers 5 writes it says YaRN in words that engines do not know."""
    shutil.copytree(folders["small-k2", "bf16"], tmp_path / "modern")
    table = json.loads((tmp_path / "modern" / "config.json").read_text())
    spec = ModelSpec.from_config(table)
    yarn = table.pop("rope_scaling")
    table["rope_parameters"] = {**yarn, "rope_type": yarn["type"], "rope_theta": table.pop("rope_theta")}
    del table["rope_parameters"]["type"]
    for key in ("topk_method", "scoring_func", "torch_dtype"):
        table.pop(key)
    table |= {"model_type": "deepseek_v3", "dtype": "bfloat16", "transformers_version": "5.23.0", "my_key": [1]}
    (tmp_path / "modern" / "config.json").write_text(json.dumps(table))
    (tmp_path / "modern" / "generation_config.json").unlink()
    run(tmp_path / "modern", tmp_path / "out", "int4")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {
        "model_type": "kimi_k2",
        "architectures": ["DeepseekV3ForCausalLM"],
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_theta": 50000.0,
        "rope_scaling": made.YARN,
        "torch_dtype": "bfloat16",
        "my_key": [1],
    }
    assert {key: found[key] for key in wanted} == wanted and "rope_parameters" not in found and "dtype" not in found
    assert ModelSpec.from_config(found) == spec
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == table["eos_token_id"]


def test_a_released_config_keeps_its_words(folders, tmp_path):
    shutil.copytree(folders["small-k2", "fp8"], tmp_path / "release")
    table = json.loads((tmp_path / "release" / "config.json").read_text())
    table |= {"model_type": "deepseek_v3", "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
    (tmp_path / "release" / "config.json").write_text(json.dumps(table))
    (tmp_path / "release" / "configuration_deepseek.py").write_text("# code of the release\n")
    run(tmp_path / "release", tmp_path / "out", "bf16")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    del table["quantization_config"]
    assert found == table and (tmp_path / "out" / "configuration_deepseek.py").is_file()


def test_a_layer_for_multi_token_prediction_is_left_out_where_the_format_changes(tmp_path):
    name = "model.layers.2.eh_proj.weight"
    source = made.make(tmp_path / "mtp", "small-k2", "bf16", extra=name, config={"num_nextn_predict_layers": 1})
    result = run(source, tmp_path / "int4", "int4")
    assert result.plan.dropped == (name,) and any(name in note for note in result.notes)
    assert json.loads((tmp_path / "int4" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not open_folder(tmp_path / "int4").leftovers


def test_a_model_without_experts_has_nothing_for_int4(tmp_path):
    source = made.make(tmp_path / "dense", "tiny-dense", "bf16")
    with pytest.raises(CheckpointError, match="no tensor that int4_group quantises"):
        run(source, tmp_path / "out", "int4")
    assert not (tmp_path / "out").exists()


def test_experts_whose_rows_are_no_whole_groups_are_refused(tmp_path):
    spec = made.spec_of("small-k2").replace(moe_intermediate_size=48)
    source = made.make(tmp_path / "odd", spec, "bf16")
    with pytest.raises(CheckpointError, match="no whole groups"):
        run(source, tmp_path / "out", "int4")


def test_the_cases_of_this_file_are_what_they_say(folders):
    """Guards the tests above: the sources hold the same weights, and the formats differ."""
    weights = dict(made.weights_of(made.spec_of("small-k2"), seed=5))
    folder = open_folder(folders["small-k2", "bf16"])
    assert all(torch.equal(value, weights[name]) for name, value in cases.values(folder))
    assert {format: open_folder(folders["small-k2", format]).format for format in SOURCES} == STORED_AS
