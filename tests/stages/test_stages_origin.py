"""From a released INT4 checkpoint through training and back: what training left alone is exported with its original bytes."""

from __future__ import annotations

import made_up_checkpoints as made
import pytest
import torch
from small_run import INSTRUCTIONS, k2, write

from k2lab.ckpt import origin
from k2lab.ckpt.folder import open_folder
from k2lab.ckpt.safefile import SafeFile, Writer
from k2lab.quant import int4

RECIPE = (
    """
model = {{ spec = "tiny-k2" }}
seed = 3
description = "adapters on the attention of a packed checkpoint"
"""
    + INSTRUCTIONS
    + """
[[stage]]
type = "sft"
start = "{start}"
steps = 2
seq_len = 192
global_batch = 2
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-3 }}
valid_every = 0
precision = "{precision}"
lora = {{ rank = 4, alpha = 8.0, targets = ["attention"] }}
"""
)


def odd_scales(folder) -> None:
    """Scales and codes that our grid would not give: a release made by another rule."""
    (file,) = folder.glob("*.safetensors")
    with SafeFile(file) as opened:
        tensors = {name: opened.tensor(name) for name in opened.entries}
        entries = dict(opened.entries)
    for name, tensor in tensors.items():
        if name.endswith("_scale"):
            tensors[name] = (tensor.float() * 1.2).to(torch.bfloat16)
        if name.endswith("_packed"):
            codes = int4.unpack(tensor)
            tensors[name] = int4.pack(torch.where(codes == -7, -8, codes).to(torch.int8))
    with Writer(file, entries, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_that_an_adapter_left_alone_keep_their_bytes(tmp_path, precision):
    write(tmp_path / "data")
    released = made.make(tmp_path / "released", "small-k2", "int4")
    odd_scales(released)
    recipe = tmp_path / "lora.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path / "data", start=released, precision=precision))
    k2("run", str(recipe), "--run-dir", str(tmp_path / "run"), "--quiet", "--device", "cpu")
    (trained,) = (tmp_path / "run" / "stages").glob("sft-*")
    assert origin.read(trained) == origin.Origin(str(released), "int4_group")
    k2("convert", str(tmp_path / "run" / "sft"), str(tmp_path / "out"), "--to", "int4", "--quiet")
    before, after = open_folder(released), open_folder(tmp_path / "out", deep=True)
    changed = []
    for name in before.names():
        (one, other) = ([bytes(data) for _, _, data in folder.raw(name).values()] for folder in (before, after))
        assert before.info(name).format == after.info(name).format
        if one != other:
            changed.append(name)
    assert changed and all(".self_attn." in name for name in changed)
    # merging the adapter into the release itself, without the trained copy, leaves the same
    arguments = ["--to", "int4", "--adapter", str(tmp_path / "run" / "sft"), "--quiet"]
    k2("convert", str(released), str(tmp_path / "merged"), *arguments)
    merged = open_folder(tmp_path / "merged")
    for name in before.names():
        (one, other) = ([bytes(data) for _, _, data in folder.raw(name).values()] for folder in (merged, after))
        assert one == other or (name in changed and precision == "bf16"), name
