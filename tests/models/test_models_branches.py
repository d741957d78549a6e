"""Packs in which the responses to a prompt share it give what copies of the prompt give: sums, gradients, observations."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from model_samples import LINEAR, VARIANTS, make
from test_models_attention import sample as random_qkv

from k2lab import specs
from k2lab.core.rng import rng
from k2lab.core.slots import load
from k2lab.core.types import Batch, Sample
from k2lab.data.branches import LEAST, LONG, branched, continues, stem_length
from k2lab.data.pack import pack
from k2lab.data.samples import ptx_sample, rl_sample
from k2lab.engine.step import forward_backward, to_device
from k2lab.models import attention
from k2lab.models import pack as packs
from k2lab.models.attention import LogitStats, PackedAttention
from k2lab.models.pack import Pack

STUDENT = {"hidden_size": 48, "vocab_size": 97, "intermediate_size": 80}
SHARING = {name: spec for name, spec in VARIANTS.items() if name.startswith("k2")}
SHARING |= {"llama": specs.get("tiny-dense").replace(**STUDENT), "qwen2": specs.get("tiny-qwen2").replace(**STUDENT)}


def response(prompt: np.ndarray, length: int, index: int, seed: int = 0) -> Sample:
    """A rollout: random tokens after the prompt, with log-probabilities and an advantage."""
    draws = rng(seed, "response", len(prompt), index)
    tokens = np.concatenate([prompt, draws.integers(0, 97, length)]).astype(np.int32)
    weight = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
    logprobs = np.where(weight != 0, draws.uniform(-5, -3, len(tokens)), 0).astype(np.float32)
    sample = Sample(tokens, weight, f"t{len(prompt)}#{index}", streams={"logprobs": logprobs})
    return rl_sample(sample, float(draws.normal()))


def group(prompt: int, lengths: tuple[int, ...], seed: int = 0) -> list[Sample]:
    tokens = rng(seed, "prompt", prompt).integers(0, 97, prompt)
    return [response(tokens, length, index) for index, length in enumerate(lengths)]


def plain(length: int, seed: int = 5) -> Sample:
    weight = np.ones(length, np.float32)
    weight[:2] = 0
    return ptx_sample(Sample(rng(seed, "plain", length).integers(0, 97, length).astype(np.int32), weight, f"p{length}"))


def rollouts() -> list[Sample]:
    """Groups of short and long prompts and responses, one prompt with a single response, one too short to share, PTX samples."""
    return [
        *group(20, (5, 1, 70, 33)),
        *group(90, (12, 12, 12)),
        *group(33, (9,)),
        *group(4, (6, 7)),
        *group(150, (3, 140)),
        plain(40),
        plain(101),
    ]


def step_of(model: Any, objective: Any, batches: list[Batch]) -> tuple[dict[str, float], Any, dict[str, torch.Tensor]]:
    counts: dict[str, float] = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            counts[name] = counts.get(name, 0) + count
    for _, parameter in model.named_parameters():
        parameter.grad = None
    sums, metrics = forward_backward(model, objective, batches, counts)
    return {**sums, **{f"count {name}": count for name, count in counts.items()}}, metrics, {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }  # fmt: skip


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("objective", ["grpo", "kimi"])
def test_shared_prompts_give_the_sums_gradients_and_counts_of_copies(name: str, objective: str) -> None:
    model = make(SHARING[name], dtype=torch.float64)
    assert model.shares_stems
    term = load("objective", objective)(ptx_weight=0.3)
    copies, shared = pack(rollouts()), branched(rollouts())
    close = 1e-5 if name == "k2, expert groups" else 1e-10  # transformers computes that router in fp32
    # stems of 19, 89 and 149 tokens are there once instead of 4, 3 and 2 times
    assert len(copies.tokens_T) - len(shared.tokens_T) == 3 * 19 + 2 * 89 + 149
    assert (shared.parent_S >= 0).sum() == 9 and shared.num_tokens == copies.num_tokens
    expected, seen, wanted = step_of(model, term, [copies])
    got, observed, gradients = step_of(model, term, [shared])
    assert got.keys() == expected.keys() and expected["count ptx"] > 0
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=close, abs=close), key
    assert gradients.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=close, atol=close * float(gradient.abs().max()), msg=key)
    for router, counts in seen.expert_counts.items():
        assert counts.sum() == len(copies.tokens_T) * model.spec.num_experts_per_tok
        assert torch.equal(observed.expert_counts[router], counts)
    for layer, maxima in seen.max_logits.items():
        torch.testing.assert_close(observed.max_logits[layer], maxima, rtol=1e-6, atol=0)


def test_each_response_has_the_log_probabilities_that_it_has_alone() -> None:
    from k2lab.models.losses import linear_logprobs

    model = make(SHARING["k2"], dtype=torch.float64).eval()

    def logprobs(batch: Batch) -> dict[str, np.ndarray]:
        batch = to_device(batch, torch.device("cpu"))
        with torch.no_grad():
            logp_T = linear_logprobs(model.hidden(batch), model.head(), batch.targets_T, batch.weight_T).numpy()
        bounds = batch.starts_S1.tolist()
        trained = batch.weight_T.numpy() != 0
        spans = {key: slice(a, b) for key, a, b in zip(batch.keys, bounds, bounds[1:])}
        return {key: logp_T[span][trained[span]] for key, span in spans.items() if trained[span].any()}

    together = logprobs(branched(rollouts()))
    assert len(together) == len(rollouts())
    for sample in rollouts():
        np.testing.assert_allclose(together[sample.key], logprobs(pack([sample]))[sample.key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("keep_bytes", [1 << 30, 0], ids=["kept", "computed again"])
@pytest.mark.parametrize("scores", [1 << 22, 1], ids=["together", "one by one"])
def test_attention_over_branches_equals_masked_softmax(keep_bytes: int, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEEP_BYTES", keep_bytes)
    monkeypatch.setattr(packs, "SCORES", scores)
    lengths, parents = (9, 4, 20, 1, 70, 150, 33, 280, 3), (-1, 0, 0, 0, -1, -1, 5, 5, -1)
    layout = Pack.of(np.cumsum([0, *lengths]), "cpu", parents)
    assert len(layout.branches) == (1 + 2 if scores > 1 else 3 + 2 * 2)  # two blocks of 140 queries
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    parent = torch.tensor(parents)[document]
    allowed = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    allowed |= parent[:, None] == document
    q, k, v = random_qkv(layout.num_tokens)
    stats = LogitStats(active=True)
    out = PackedAttention.apply(q, k, v, 0.3, layout, stats)
    masked = (torch.einsum("thc,shc->hts", q, k) * 0.3).masked_fill(~allowed, float("-inf"))
    expected = torch.einsum("hts,shv->thv", masked.softmax(-1), v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.max_H, masked.amax((1, 2)).float(), rtol=1e-6, atol=1e-6)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, expected))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_recurrent_models_take_no_branches() -> None:
    model = make(LINEAR)
    assert not model.shares_stems
    with pytest.raises(AssertionError, match="copy of the beginning"):
        model.hidden(branched(group(20, (5, 6))))


def test_only_equal_contexts_are_shared_and_only_where_it_pays() -> None:
    first, second = group(20, (5, 6))
    other = group(20, (5, 6), seed=1)[1]
    assert continues(second, first) and not continues(other, first)
    for prompt, length, stem in (
        (20, 5, 19),
        (LEAST, 5, 0),
        (LEAST + 1, 5, LEAST),
        (20, LONG - 1, 19),
        (20, LONG, 0),
        (201, 399, 200),
        (201, 400, 0),
    ):
        assert stem_length(group(prompt, (length,))[0]) == stem
    untrained = dataclasses.replace(first, weight=np.zeros_like(first.weight))
    assert stem_length(untrained) == 0
    alone = branched([first, other, untrained])
    assert type(alone) is Batch
    for name in ("tokens_T", "weight_T", "positions_T"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(pack([first, other, untrained]), name))
