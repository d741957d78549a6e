"""Golden curves: ten-step losses on a committed token file. Same key, every digit; another key, 1e-4 relative.

The key is (torch version, CPU capability, threads, processor). After a change that is meant to move digits, `python
tests/golden/test_golden_curves.py` writes the curves anew; a refactor changes no digit.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2lab import specs
from k2lab.core.rng import rng
from k2lab.core.slots import load
from k2lab.core.types import Sample
from k2lab.data.feed import PackedFeed
from k2lab.engine.step import coefficient, forward_backward, means
from k2lab.models import build
from k2lab.models.router import update_router_bias

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # for running this file
from made_up import items  # noqa: E402

STEPS = 10
STAGES = {"pretrain": ("split", "muonclip"), "sft": ("whole", "adamw")}
# Objectives on made-up streams: their settings, and the largest share of the first loss that may be left after ten steps.
OBJECTIVES = {
    "dpo": ({"beta": 0.1, "sft_weight": 0.1}, 0.6),
    "kimi": ({"tau": 0.03, "ptx_weight": 0.5}, 0.6),
    "distill": ({"lm_weight": 0.5}, 0.8),
}
MODELS = ("tiny-k2", "tiny-linear")


def key() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    # Names such as "AMD EPYC" cover several generations; family, model and stepping tell them apart.
    fields = dict(part.split(":", 1) for part in lines[:30] if ":" in part)
    facts_of = {name.strip(): value.strip() for name, value in fields.items()}
    cpu = " ".join(facts_of.get(name, "") for name in ("model name", "cpu family", "model", "stepping"))
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, 1 thread, {platform.machine()} {cpu}"


def plain_samples(stage: str) -> list[Sample]:
    tokens = np.load(HERE / "tokens.npy").astype(np.int32)
    samples = []
    for n, start in enumerate(range(0, 4096, 48)):
        piece = tokens[start : start + 48]
        weight = np.ones(len(piece), dtype=np.float32)
        weight[: 20 if stage == "sft" else 1] = 0  # fine-tuning trains on the answer only
        samples.append(Sample(tokens=piece, weight=weight, key=f"s{n}"))
    return samples


def streamed_samples(objective: Any) -> list:
    """Samples or pairs of committed tokens with fixed made-up streams, as many as one step takes: all steps see the same."""
    tokens = np.load(HERE / "tokens.npy")
    return items(objective.needs, [tokens[start : start + 32] for start in range(0, 256, 32)], vocab=320)


def curve(model_name: str, stage: str) -> list[float]:
    """Losses of ten steps in fp32 on one thread: the trained terms, each times its coefficient."""
    fill, optimizer = STAGES.get(stage, ("whole", "adamw"))
    objective = load("objective", stage if stage in OBJECTIVES else "lm")(**OBJECTIVES.get(stage, ({},))[0])
    samples = streamed_samples(objective) if stage in OBJECTIVES else plain_samples(stage)
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
        losses = []
        for step in range(STEPS):
            micro = feed.take()
            counts = Counter()
            for batch in micro:
                counts.update(objective.counts(batch))
            sums, metrics = forward_backward(model, objective, micro, counts)
            optim.clip(1.0)
            optim.step(step, STEPS, metrics.max_logits)
            optim.zero_grad()
            update_router_bias(model, metrics.expert_counts)
            trained, _ = means(objective, sums, counts)
            losses.append(sum(coefficient(objective, name) * mean for name, mean in trained.items()))
        return losses
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [*STAGES, *OBJECTIVES])
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
    assert losses[-1] < losses[0] * OBJECTIVES.get(stage, (None, 1.0))[1]


if __name__ == "__main__":
    names = [(model, stage) for stage in (*STAGES, *OBJECTIVES) for model in MODELS]
    curves = {f"{model}/{stage}": [loss.hex() for loss in curve(model, stage)] for model, stage in names}
    (HERE / "curves.json").write_text(json.dumps({"key": key(), "curves": curves}, indent=1) + "\n")
