"""Golden curves: ten-step losses on a committed token file. Same key, every digit; another key, 1e-4 relative.

The key is (torch version, CPU capability, threads, processor). After a change that is meant to move digits, `python
tests/golden/test_golden_curves.py` writes the curves anew; a refactor changes no digit.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from k2lab import specs
from k2lab.core.rng import rng
from k2lab.core.slots import load
from k2lab.core.types import Sample
from k2lab.data.feed import PackedFeed
from k2lab.engine.step import forward_backward
from k2lab.models import build
from k2lab.models.router import update_router_bias

HERE = Path(__file__).parent
STEPS = 10
STAGES = {"pretrain": ("split", "muonclip"), "sft": ("whole", "adamw")}
MODELS = ("tiny-k2", "tiny-linear")


def key() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    # Names such as "AMD EPYC" cover several generations; family, model and stepping tell them apart.
    fields = dict(part.split(":", 1) for part in lines[:30] if ":" in part)
    facts_of = {name.strip(): value.strip() for name, value in fields.items()}
    cpu = " ".join(facts_of.get(name, "") for name in ("model name", "cpu family", "model", "stepping"))
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, {platform.machine()} {cpu}"


def curve(model_name: str, stage: str) -> list[float]:
    """Losses of ten steps in fp32 on one thread."""
    fill, optimizer = STAGES[stage]
    tokens = np.load(HERE / "tokens.npy").astype(np.int32)
    samples = []
    for n, start in enumerate(range(0, 4096, 48)):
        piece = tokens[start : start + 48]
        weight = np.ones(len(piece), dtype=np.float32)
        weight[: 20 if stage == "sft" else 1] = 0  # fine-tuning trains on the answer only
        samples.append(Sample(tokens=piece, weight=weight, key=f"s{n}"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spec = specs.from_recipe({"spec": model_name, "vocab_size": 320, "hidden_size": 128, "intermediate_size": 128})
        model = build.from_spec(spec, seed=0)
        model.capture_max_logits(100.0)
        settings = {"ns_dtype": "fp32"} if optimizer == "muonclip" else {}
        optim = load("optimizer", optimizer)(lr=2e-3, **settings).build(model.named_parameters(), model.row_layouts())
        feed = PackedFeed(
            samples,
            lambda epoch: rng(0, "golden", epoch).permutation(len(samples)),
            seq_len=64,
            global_batch=4,
            per_device_batch=2,
            fill=fill,
        )
        objective = load("objective", "lm")()
        losses = []
        for step in range(STEPS):
            micro = feed.take()
            count = sum(batch.num_tokens for batch in micro)
            sums, metrics = forward_backward(model, objective, micro, {"lm": count})
            optim.clip(1.0)
            optim.step(step, STEPS, metrics.max_logits)
            optim.zero_grad()
            update_router_bias(model, metrics.expert_counts)
            losses.append(sums["lm"] / count)
        return losses
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", STAGES)
def test_curve_is_the_golden_one(model, stage, record_property):
    golden = json.loads((HERE / "curves.json").read_text())
    losses = curve(model, stage)
    same = golden["key"] == key()
    record_property("compared", "every digit" if same else "1e-4 relative")
    print(f"compared {'to every digit' if same else 'to 1e-4 relative: other key'}: {key()}")
    if same:
        assert [loss.hex() for loss in losses] == golden["curves"][f"{model}/{stage}"]
    else:
        assert losses == pytest.approx([float.fromhex(text) for text in golden["curves"][f"{model}/{stage}"]], rel=1e-4)
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    curves = {f"{model}/{stage}": [loss.hex() for loss in curve(model, stage)] for model in MODELS for stage in STAGES}
    (HERE / "curves.json").write_text(json.dumps({"key": key(), "curves": curves}, indent=1) + "\n")
