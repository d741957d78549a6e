"""`k2 diff`: what it says of two checkpoints, held against differences that were made on purpose."""

from __future__ import annotations

import json
import shutil

import made_up_checkpoints as made
import pytest
import torch
from convert_cases import EXPERT, rewrite, run

from k2lab import cli
from k2lab.ckpt import diff
from k2lab.ckpt.folder import open_folder
from k2lab.core.errors import CheckpointError
from k2lab.quant import fp8, int4

ROUTER = "model.layers.1.mlp.gate.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {format: made.make(root / format, "small-k2", format, seed=6) for format in ("bf16", "fp32", "fp8", "int4")}


@pytest.fixture
def copy(folders, tmp_path):
    def make(format):
        shutil.copytree(folders[format], tmp_path / "copy")
        return tmp_path / "copy"

    return make


def of(report, name):
    return next(tensor for tensor in report.tensors if tensor.name == name)


def test_equal_checkpoints(folders, tmp_path):
    report = diff.compare(folders["int4"], folders["int4"])
    assert report.equal() and report.states() == {"bytes": 41} and report.codes() == (0, 0)
    report = diff.compare(folders["bf16"], folders["fp32"])
    assert report.equal() and report.states() == {"bits": 40, "bytes": 1} and report.codes() is None
    run(folders["fp8"], tmp_path / "dcp", "dcp")
    report = diff.compare(folders["fp8"], tmp_path / "dcp")
    assert report.equal() and report.states() == {"bits": 41} and report.codes() == (0, 0) and report.on_grid() == 1


def test_one_step_of_bf16_is_one_ulp(folders, copy):
    folder = copy("bf16")
    rewrite(folder, lambda name, t: (t.view(torch.int16) + (torch.arange(t.numel()).view(t.shape) == 9)).to(torch.int16)
            .view(torch.bfloat16) if name == ROUTER else t)  # fmt: skip
    report = diff.compare(folders["bf16"], folder)
    found = of(report, ROUTER)
    assert (found.state, found.ulps, found.unequal, found.count) == ("differs", 1, 1, 4 * 160)
    before, after = open_folder(folders["bf16"]).read(ROUTER).float(), open_folder(folder).read(ROUTER).float()
    assert found.max_abs == float((before - after).abs().max())
    assert found.rms == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-5)
    assert not report.equal() and [tensor.name for tensor in report.worst()] == [ROUTER]


def test_ulps_cross_zero_and_signs_of_zero_are_told_apart(folders, copy):
    folder = copy("bf16")
    tiny = torch.tensor([1, -32767], dtype=torch.int16).view(torch.bfloat16)  # the smallest number above 0, and that below

    def first(values):
        return lambda name, t: torch.cat([values, t.flatten()[len(values) :]]).view(t.shape) if name == ROUTER else t

    rewrite(folder, first(tiny[:1]))
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    rewrite(other, first(tiny[1:]))
    assert of(diff.compare(folder, other), ROUTER).ulps == 2
    rewrite(folder, first(torch.zeros(1, dtype=torch.bfloat16)))
    rewrite(other, first(-torch.zeros(1, dtype=torch.bfloat16)))
    report = diff.compare(folder, other)
    assert of(report, ROUTER).state == "values" and of(report, ROUTER).ulps == 0 and not report.equal()


def test_a_value_that_is_not_finite_is_told(folders, copy):
    folder = copy("bf16")
    rewrite(folder, lambda name, t: t.masked_fill(torch.arange(t.numel()).view(t.shape) == 5, torch.nan) if name == ROUTER else t)
    report = diff.compare(folders["bf16"], folder)
    found = of(report, ROUTER)
    assert found.ulps == -1 and found.max_abs == float("inf") and report.worst()[0] is found
    told = json.loads(json.dumps(report.json(), allow_nan=False))
    assert told["max_ulps"] == -1 and told["max_abs"] is None


def test_values_that_are_not_finite_and_the_same_are_no_difference(copy):
    folder = copy("bf16")
    odd = torch.tensor([torch.nan, torch.inf, 1.0], dtype=torch.bfloat16)

    def begin(values):
        return lambda name, t: torch.cat([values, t.flatten()[len(values) :]]).view(t.shape) if name == ROUTER else t

    rewrite(folder, begin(odd))
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    rewrite(other, begin(torch.tensor([torch.nan, torch.inf, 1.5], dtype=torch.bfloat16)))
    found = of(diff.compare(folder, other), ROUTER)
    assert (found.unequal, found.ulps, found.max_abs) == (1, 64, 0.5) and found.rms < 1


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_plain_weights_against_a_grid(folders, format):
    plain, packed = open_folder(folders["bf16"]), open_folder(folders[format])
    report = diff.compare(plain.path, packed.path)
    assert report.codes() == (0, 0)  # the export is what the grid makes of these weights
    weights = plain.read(EXPERT)
    on = int4.values(weights) if format == "int4" else fp8.dequantise(*fp8.quantise(weights)).to(torch.bfloat16)
    share = float((weights == on).double().mean())
    found = of(report, EXPERT)
    assert found.grid == "B" and found.on_grid == pytest.approx(share, abs=1e-6) and 0 < share < 1
    assert of(diff.compare(packed.path, plain.path), EXPERT).on_grid == found.on_grid


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_differing_codes_and_scales_are_counted(folders, copy, format):
    folder = copy(format)
    codes_name = EXPERT + ("_packed" if format == "int4" else "")
    scales_name = EXPERT + ("_scale" if format == "int4" else "_scale_inv")

    def change(name, t):
        if name == codes_name and format == "int4":
            codes = int4.unpack(t)
            codes[0, :3] = torch.where(codes[0, :3] > 0, -1, 1).to(torch.int8)
            return int4.pack(codes)
        if name == codes_name:
            t.view(torch.uint8)[0, :3] ^= 1
        if name == scales_name:
            t[-1, -1] *= 2
        return t

    rewrite(folder, change)
    for other in (folders[format], folders["bf16"]):  # against codes, and against the weights that they were made of
        report = diff.compare(other, folder)
        assert report.codes() == (3, 1)
        assert (of(report, EXPERT).codes, of(report, EXPERT).scales) == (3, 1)


def test_missing_extra_and_other_shapes_and_configs(folders, tmp_path):
    deeper = made.make(tmp_path / "deeper", made.spec_of("small-k2").replace(num_layers=3, rope_theta=10000.0), "bf16", seed=6)
    report = diff.compare(folders["bf16"], deeper)
    assert report.only_a == [] and len(report.only_b) == 26 and report.states()["bytes"] == 41
    assert report.config == {"num_layers": [2, 3], "rope_theta": [50000.0, 10000.0], "layer_types": [("mla",) * 2, ("mla",) * 3]}
    wider = made.make(tmp_path / "wider", made.spec_of("small-k2").replace(vocab_size=384), "bf16", seed=6)
    report = diff.compare(folders["bf16"], wider)
    assert {tensor.name for tensor in report.tensors if tensor.state == "shape"} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert not report.equal() and report.config["vocab_size"] == [352, 384]
    assert json.loads(json.dumps(report.json()))["states"]["shape"] == 2


@pytest.mark.filterwarnings("ignore:.*vision tensors")
def test_vision_tensors_are_compared_by_their_bytes(tmp_path):
    one = made.make(tmp_path / "one", "small-k2", "int4", vision=True)
    other = made.make(tmp_path / "other", "small-k2", "int4", vision=True)
    assert diff.compare(one, other).states() == {"bytes": 41 + len(made.VISION)}
    name = "mm_projector.proj.0.weight"
    rewrite(other, lambda stored, t: -t if stored == name else t)
    assert [tensor.name for tensor in diff.compare(one, other).worst()] == [name]


def test_files_beside_the_weights_are_compared(folders, copy):
    folder = copy("bf16")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").unlink()
    report = diff.compare(folders["bf16"], folder)
    assert report.files == ["chat_template.jinja", "tokenizer_config.json"] and report.equal()


def test_the_command(folders, tmp_path, capsys):
    plain, packed = str(folders["bf16"]), str(folders["int4"])
    assert cli.main(["diff", plain, plain, "--exit-code", "--quiet"]) == 0
    assert "equal: every value has the same bits" in capsys.readouterr().out
    assert cli.main(["diff", plain, packed, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "not equal" in text and "0 codes and 0 scales differ" in text and "experts.1.gate_proj" in text
    assert cli.main(["diff", plain, packed, "--exit-code", "--json"]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False and len(found["tensors"]) == 41 and found["codes"] == [0, 0]
    assert cli.main(["diff", plain, str(tmp_path / "nothing")]) == 2
    with pytest.raises(CheckpointError):
        diff.compare(plain, tmp_path)
