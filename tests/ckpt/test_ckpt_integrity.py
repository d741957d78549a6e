"""What is wrong with a checkpoint is said with tensor and file, before anything of it is used."""

from __future__ import annotations

import json
import shutil

import made_up_checkpoints as made
import pytest

from k2lab.ckpt import formats
from k2lab.ckpt.folder import open_folder
from k2lab.core.artifacts import file_sha256
from k2lab.core.errors import CheckpointError, RecipeError

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each format, in shards."""
    root = tmp_path_factory.mktemp("folders")
    return {
        ("small-k2", format): made.make(root / format, "small-k2", format, seed=3, shard_bytes=300_000)
        for format in ("bf16", "fp8", "int4")
    }


def edited(folder, tmp_path, **changes):
    """A copy of `folder` with keys of config.json set; None removes a key."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    table = json.loads((copy / "config.json").read_text())
    table |= changes
    (copy / "config.json").write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
    return copy


@pytest.mark.parametrize(
    ("fault", "tensor", "says"),
    [
        ("missing", ROUTER, "are missing"),
        ("missing", EXPERT + "_scale", "part of a quantised tensor is missing"),
        ("extra", "model.layers.1.mlp.experts.4.up_proj.weight", "not those of config.json"),
        ("misshaped", ROUTER, "another shape"),
        ("misshaped", EMBEDDING, "vocab_size in config.json is 352, but this tensor has 351 rows"),
        ("misshaped", EXPERT + "_packed", "another shape"),
        ("misshaped", EXPERT + "_scale", "another shape"),
        ("retyped", ROUTER, "U16"),
        ("retyped", EXPERT + "_packed", "U32"),
        ("retyped", EXPERT + "_scale", "U16"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, fault, tensor, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        open_folder(made.make(tmp_path / "f", "small-k2", "int4", **{fault: tensor}))
    assert tensor in str(caught.value) and str(tmp_path / "f") in str(caught.value)


@pytest.mark.parametrize(
    ("format", "fault", "tensor", "says"),
    [
        ("bf16", "nan", EXPERT, "NaN"),
        ("bf16", "nan", "model.norm.weight", "NaN"),
        ("bf16", "nan", "model.layers.1.mlp.gate.e_score_correction_bias", "NaN"),
        ("bf16", "zero", ROUTER, "zero"),
        ("bf16", "zero", EXPERT, "zero"),
        ("bf16", "zero", "model.layers.0.input_layernorm.weight", "zero"),
        ("fp8", "nan", EXPERT, "NaN"),
        ("fp8", "zero", EXPERT, "zero"),
        ("fp8", "nan", EXPERT + "_scale_inv", "scale that is not finite"),
        ("fp8", "zero", EXPERT + "_scale_inv", "scale is zero"),
        ("int4", "zero", EXPERT + "_packed", "all values of this tensor are zero"),
        ("int4", "nan", EXPERT + "_scale", "scale that is not finite"),
        ("int4", "zero", EXPERT + "_scale", "scale is zero"),
    ],
)
def test_values_that_no_training_leaves_are_refused(tmp_path, format, fault, tensor, says):
    path = made.make(tmp_path / "f", "small-k2", format, **{fault: tensor})
    open_folder(path).close()
    with pytest.raises(CheckpointError, match=says) as caught:
        open_folder(path, deep=True)
    assert tensor in str(caught.value) and "model.safetensors" in str(caught.value)


def test_biases_may_be_zero(tmp_path):
    open_folder(made.make(tmp_path, zero="model.layers.1.mlp.gate.e_score_correction_bias"), deep=True)


def test_weight_shape_must_agree(tmp_path):
    path = made.make(tmp_path, "small-k2", "int4", zero=EXPERT + "_shape")
    with pytest.raises(CheckpointError, match=r"weight_shape disagrees.*\[0, 0\]"):
        open_folder(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"factor": 64.0}, "64.0 x 4096 = 262144"),
        ({"type": "linear"}, "not known"),
        ({"mscale_all_dim": None}, "mscale_all_dim"),
        ({"beta_fast": "1"}, "beta_fast"),
        ({"original_max_position_embeddings": 8192}, "262144"),
    ],
)
def test_wrong_yarn_is_refused(tmp_path, changes, says):
    rope = {key: value for key, value in (made.YARN | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=says) as caught:
        open_folder(made.make(tmp_path, config={"rope_scaling": rope}))
    assert "rope_scaling" in str(caught.value) and "config.json" in str(caught.value)


def test_yarn_of_all_releases_is_accepted(tmp_path):
    for factor in (32.0, 40, 64.0):
        changes = {"rope_scaling": made.YARN | {"factor": factor}, "max_position_embeddings": int(4096 * factor)}
        open_folder(made.make(tmp_path / str(factor), config=changes)).close()


def test_both_kinds_of_position_tables_must_agree(tmp_path):
    modern = {**made.YARN, "rope_type": "yarn", "rope_theta": 50000.0}
    open_folder(made.make(tmp_path / "a", config={"rope_parameters": modern})).close()
    with pytest.raises(CheckpointError, match="disagree"):
        open_folder(made.make(tmp_path / "b", config={"rope_parameters": modern | {"beta_fast": 32.0}}))


def _int4_table(**weights):
    table = json.loads(json.dumps(formats.quantization_config("int4_group", made.spec_of("small-k2"))))
    table["config_groups"]["group_0"]["weights"] |= weights
    return table


@pytest.mark.parametrize(
    "table",
    [
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "mxfp4"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "fp8", "weight_block_size": [64, 64], "fmt": "e4m3"},
        {"quant_method": "fp8", "fmt": "e5m2", "weight_block_size": [128, 128]},
        {"quant_method": "fp8", "fmt": "e4m3"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        {"bits": 4},
        _int4_table(num_bits=8),
        _int4_table(group_size=128),
        _int4_table(symmetric=False),
        _int4_table(actorder="group"),
        _int4_table(type="float"),
        _int4_table(strategy="channel"),
        _int4_table() | {"format": "nvfp4-pack-quantized"},
        _int4_table() | {"format": "mixed-precision"},
        _int4_table() | {"transform_config": {"config_groups": {"R1": {}}}},
        _int4_table() | {"config_groups": {}},
        _int4_table() | {"surprise": 1},
    ],
)
def test_unknown_quantisation_is_refused(tmp_path, table):
    with pytest.raises(CheckpointError, match="unknown quantisation"):
        open_folder(made.make(tmp_path, "small-k2", "int4", config={"quantization_config": table}))


def test_format_said_and_format_stored_must_be_the_same(folders, tmp_path):
    with pytest.raises(CheckpointError, match="stored as int4_group, but config.json says plain"):
        open_folder(edited(folders["small-k2", "int4"], tmp_path / "a", quantization_config=None))
    with pytest.raises(CheckpointError, match="stored as fp8_block, but config.json says plain"):
        open_folder(edited(folders["small-k2", "fp8"], tmp_path / "b", quantization_config=None))
    with pytest.raises(CheckpointError, match="no tensor is stored so"):
        open_folder(edited(folders["small-k2", "bf16"], tmp_path / "c", quantization_config=_int4_table()))


def test_tokenizer_must_fit_the_embedding(folders, tmp_path):
    few = made.make(tmp_path / "few", made.spec_of("small-k2").replace(vocab_size=300), with_tokenizer=False)
    made.small_tokenizer().save(few)
    with pytest.raises(CheckpointError, match=r"id 319.*below vocab_size = 300"):
        open_folder(few)
    with pytest.raises(CheckpointError, match=r"config\.json: pad_token_id.*Got: 352"):
        open_folder(edited(folders["small-k2", "bf16"], tmp_path / "pad", pad_token_id=352))
    copy = edited(folders["small-k2", "bf16"], tmp_path)
    (copy / "tokenizer.json").unlink()
    (copy / "tiktoken.model").write_text("AA== 0\nAQ== 352\n")
    with pytest.raises(CheckpointError, match=r"tiktoken\.model.*id 352"):
        open_folder(copy)
    (copy / "tiktoken.model").write_text("AA== 0 7\n")
    with pytest.raises(CheckpointError, match="damaged"):
        open_folder(copy)


def test_other_families_are_recipe_errors(folders, tmp_path):
    with pytest.raises(RecipeError, match="not one that K2 Lab builds"):
        open_folder(edited(folders["small-k2", "bf16"], tmp_path, kv_lora_rank=None, model_type="gpt2"))


def test_two_checkpoints_in_one_folder_are_refused(folders, tmp_path):
    copy = edited(folders["small-k2", "bf16"], tmp_path)
    shutil.copy(next(copy.glob("model-*.safetensors")), copy / "model-00009-of-00009.safetensors")
    with pytest.raises(CheckpointError, match="not part of the checkpoint"):
        open_folder(copy)


def test_wrong_total_is_said_and_harms_nobody(folders, tmp_path):
    copy = edited(folders["small-k2", "bf16"], tmp_path)
    index = copy / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["metadata"]["total_size"] += 1
    index.write_text(json.dumps(table))
    with pytest.warns(UserWarning, match="total_size"):
        open_folder(copy).close()


def _checksums(folder, **wrong):
    return {
        file.name: {"sha256": file_sha256(file), "size": file.stat().st_size} for file in folder.iterdir() if file.is_file()
    } | wrong


def test_digests_are_verified_when_deep(folders, tmp_path):
    copy = edited(folders["small-k2", "bf16"], tmp_path)
    shard = sorted(copy.glob("model-*.safetensors"))[1]
    (copy / "checksums.json").write_text(json.dumps(_checksums(copy)))
    open_folder(copy, deep=True).close()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    open_folder(copy).close()
    with pytest.raises(CheckpointError, match="sha256") as caught:
        open_folder(copy, deep=True)
    assert shard.name in str(caught.value)
    (copy / "checksums.json").unlink()
    open_folder(copy, deep=True).close()  # one bit of one weight: nothing but the digest tells
    sums = "".join(f"{facts['sha256']}  {name}\n" for name, facts in _checksums(folders["small-k2", "bf16"]).items())
    (copy / "SHA256SUMS").write_text(sums)
    with pytest.raises(CheckpointError, match="sha256"):
        open_folder(copy, deep=True)


def test_manifest_of_an_artifact_and_of_a_download_count(folders, tmp_path):
    for number, (name, facts) in enumerate((("manifest.json", {"format": 1, "kind": "model"}), ("fetched.json", {"item": 1}))):
        copy = edited(folders["small-k2", "bf16"], tmp_path / str(number))
        files = {file: entry for file, entry in _checksums(copy).items() if file.startswith("model-")}
        (copy / name).write_text(json.dumps({**facts, "files": files}))
        open_folder(copy, deep=True).close()
        next(iter(files.values()))["sha256"] = "0" * 64
        (copy / name).write_text(json.dumps({**facts, "files": files}))
        with pytest.raises(CheckpointError, match="changed after it was written"):
            open_folder(copy, deep=True)


def test_positions_must_be_said(folders, tmp_path):
    with pytest.raises(CheckpointError, match="rope_theta.*missing"):
        open_folder(edited(folders["small-k2", "bf16"], tmp_path / "a", rope_theta=None))
    with pytest.raises(CheckpointError, match="131072 positions must say how they are scaled"):
        open_folder(edited(folders["small-k2", "bf16"], tmp_path / "b", rope_scaling=None))
    copy = edited(folders["small-k2", "bf16"], tmp_path / "c")
    text = (copy / "config.json").read_text()
    rope = text[text.index('"rope_scaling": {') : text.index("}", text.index('"rope_scaling": {')) + 1]
    (copy / "config.json").write_text(text.replace(rope, '"rope_scaling": null'))
    assert open_folder(copy).spec.rope is None
