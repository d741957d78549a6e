"""Objectives against formulas written out sequence by sequence in fp64, and what each promises at special points."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_table import VOCAB, TableModel, assert_same, batch_of, loss_of, on_device, sequences
from made_up import items

from k2lab.core.errors import RecipeError
from k2lab.core.slots import load
from k2lab.data.samples import ptx_sample, rl_sample, with_streams
from k2lab.engine.objectives._sequences import sides
from k2lab.engine.step import coefficient, to_device

DPO, Kimi, GRPO, Distill = (load("objective", name) for name in ("dpo", "kimi", "grpo", "distill"))


def each(model: TableModel, samples: list):
    """(trained log-probs, their indices, sample) of every sample, by plain autograd."""
    for sample in samples:
        trained = torch.from_numpy(np.flatnonzero(sample.weight))
        yield model.logprobs(torch.from_numpy(sample.tokens.astype(np.int64)))[trained - 1], trained.numpy(), sample


def stream(sample, name: str, trained: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(sample.streams[name].astype(np.float64)[trained])


# ---------------------------------------------------------------- DPO


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("sft", [0.0, 0.7])
def test_dpo_by_hand(smoothing: float, normalised: bool, sft: float) -> None:
    model = TableModel()
    units = items(DPO.needs, sequences(10), VOCAB)
    objective = DPO(beta=0.3, label_smoothing=smoothing, length_normalised=normalised, sft_weight=sft)
    losses, nll, tokens, margins, wins = [], 0.0, 0, [], []
    for unit in units:
        rewards, means = [], []
        for logp, trained, sample in each(model, list(unit)):
            ratio = (logp - stream(sample, "ref_logprobs", trained)).sum()
            rewards.append(0.3 * (ratio / len(trained) if normalised else ratio))
            means.append(float(logp.detach().mean()))
            if sample.pair[1] > 0:
                nll, tokens = nll - logp.sum(), tokens + len(trained)
        margin = rewards[0] - rewards[1]
        losses.append(-(1 - smoothing) * torch.sigmoid(margin).log() - smoothing * (1 - torch.sigmoid(margin)).log())
        margins.append(float(margin.detach()))
        wins.append(means[0] > means[1])
    expected = torch.stack(losses).mean() + sft * nll / tokens
    host = batch_of(units)
    ours = loss_of(objective, model, host)
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert_same(model.grads(ours), model.grads(expected))
    sums = objective.sums(model, on_device(host))
    assert float(sums["margin"]) == pytest.approx(sum(margins), rel=1e-9)
    assert float(sums["accuracy"]) == sum(margin > 0 for margin in margins)
    assert float(sums["logprob_accuracy"]) == sum(wins)
    assert 0 < sum(wins) < 5 and objective.counts(host)["dpo"] == 5


def test_dpo_at_the_reference_is_log_two_with_ties_counted_half() -> None:
    model = TableModel()
    units = []
    for unit in items(DPO.needs, sequences(6), VOCAB):
        sides = []
        for sample in unit:
            logp = model.logprobs(torch.from_numpy(sample.tokens.astype(np.int64))).detach()
            sides.append(with_streams(sample, ref_logprobs=np.concatenate([[0.0], logp.numpy()])))
        units.append(tuple(sides))
    host = batch_of(units)
    batch = on_device(host)
    exact = np.concatenate([np.append(s.streams["ref_logprobs"][1:], 0.0) for unit in units for s in unit])
    batch.streams_T["ref_logprobs"] = torch.from_numpy(exact)
    sums = DPO().sums(model, batch)
    assert float(sums["dpo"].detach()) == pytest.approx(3 * math.log(2), rel=1e-12)
    assert float(sums["margin"]) == pytest.approx(0, abs=1e-12)
    # the gradient there is -beta / 2 x (gradient of log p chosen - gradient of log p rejected)
    by_hand = sum(
        -0.05 * sample.pair[1] * logp.sum() for logp, _, sample in each(model, [sample for unit in units for sample in unit])
    )
    assert_same(model.grads(sums["dpo"]), model.grads(by_hand))
    chosen = units[0][0]
    tie = on_device(batch_of([(chosen, dataclasses.replace(chosen, pair=(chosen.pair[0], -1)))]))
    assert float(DPO().sums(model, tie)["accuracy"]) == 0.5


def test_dpo_order_of_sides_and_of_pairs_does_not_matter() -> None:
    model = TableModel()
    units = items(DPO.needs, sequences(8), VOCAB)
    straight = loss_of(DPO(), model, batch_of(units))
    mixed = loss_of(DPO(), model, batch_of([unit[::-1] for unit in units[::-1]]))
    assert float(mixed.detach()) == pytest.approx(float(straight.detach()), rel=1e-13)


def test_dpo_reads_nothing_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device whatever asks for a value, or for a size that depends on values, raises."""
    device = torch.device("meta")
    batch = to_device(batch_of(items(DPO.needs, sequences(8), VOCAB)), device)
    logp_T = torch.empty(batch.tokens_T.shape, device=device, requires_grad=True)
    monkeypatch.setattr("k2lab.models.losses.linear_logprobs", lambda *given, **how: logp_T)
    sums = DPO(length_normalised=True, sft_weight=0.5).sums(TableModel(), batch)
    sum(sums.values()).backward()
    assert logp_T.grad.shape == logp_T.shape
    chosen, rejected = sides(batch)
    assert chosen.device == rejected.device == device and len(chosen) == len(rejected) == len(batch.pair_S) / 2


def test_sides_are_those_of_the_same_pair_and_may_be_none() -> None:
    units = items(DPO.needs, sequences(6), VOCAB)
    P = len(units)
    samples = [unit[n] for n in (1, 0) for unit in units] + [dataclasses.replace(side, pair=None) for side in units[0]]
    batch = to_device(batch_of(samples), torch.device("cpu"))
    chosen, rejected = sides(batch)
    assert sorted(chosen.tolist()) == list(range(P, 2 * P)) and torch.equal(rejected, chosen - P)
    plain = to_device(batch_of(samples[2 * P :]), torch.device("cpu"))
    assert [len(side) for side in sides(plain)] == [0, 0]


# ---------------------------------------------------------------- Kimi


def rollouts(count: int = 10):
    return items(Kimi.needs, sequences(count, seed=1), VOCAB)


def test_kimi_by_hand() -> None:
    model, tau, ptx_weight = TableModel(scale=0.5), 0.4, 0.3
    samples = rollouts()
    squares, nll, tokens, ratios, gaps = [], 0.0, 0, [], []
    for logp, trained, sample in each(model, samples):
        if sample.streams["ptx"][0]:
            nll, tokens = nll - logp.sum(), tokens + len(trained)
            continue
        delta = logp - stream(sample, "logprobs", trained)
        squares.append((float(sample.streams["advantages"][0]) - tau * delta.sum()) ** 2 / (2 * tau))
        ratios.append(float(delta.detach().sum()))
        gaps += delta.detach().tolist()
    expected = torch.stack(squares).mean() + ptx_weight * nll / tokens
    host, objective = batch_of(samples), Kimi(tau=tau, ptx_weight=ptx_weight)
    ours = loss_of(objective, model, host)
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert_same(model.grads(ours), model.grads(expected))
    sums, counts = objective.sums(model, on_device(host)), objective.counts(host)
    assert counts == {"kimi": 8, "ptx": tokens, "log_ratio": 8, "mismatch": len(gaps), "kl": len(gaps), "entropy": len(gaps)}
    assert float(sums["log_ratio"]) == pytest.approx(sum(ratios), rel=1e-10)
    assert float(sums["mismatch"]) == pytest.approx(sum(map(abs, gaps)), rel=1e-10)
    assert float(sums["mismatch_max"]) == pytest.approx(max(map(abs, gaps)), rel=1e-10)
    assert float(sums["kl"]) == pytest.approx(sum(math.exp(x) - 1 - x for x in gaps), rel=1e-10)


def at_old_policy(model: TableModel, advantages: list[float]):
    """Rollouts whose `logprobs` are the model's own, exact."""
    plain = items((), sequences(len(advantages), seed=2), VOCAB)
    samples = [rl_sample(with_streams(s, logprobs=np.zeros(len(s.tokens))), a) for s, a in zip(plain, advantages, strict=True)]
    host = batch_of(samples)
    batch = on_device(host)
    own = [np.append(model.logprobs(torch.from_numpy(s.tokens.astype(np.int64))).detach().numpy(), 0.0) for s in samples]
    batch.streams_T["logprobs"] = torch.from_numpy(np.concatenate(own))
    return samples, host, batch


@pytest.mark.parametrize("tau", [0.01, 0.1, 2.0])
def test_kimi_at_the_old_policy_is_reinforce_with_mean_baseline(tau: float) -> None:
    model = TableModel()
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    advantages = [r - sum(rewards) / 6 for r in rewards]
    samples, host, batch = at_old_policy(model, advantages)
    reinforce = -sum(a * logp.sum() for a, (logp, _, _) in zip(advantages, each(model, samples), strict=True)) / 6
    objective = Kimi(tau=tau)
    sums = objective.sums(model, batch)
    ours = model.grads(sums["kimi"] / objective.counts(host)["kimi"])
    assert_same(ours, model.grads(reinforce))
    assert float(sums["mismatch_max"]) < 1e-12
    # without the division by 2 tau it would be 2 tau times that: 1/50 at tau = 0.01
    ratios = [logp.sum() - logp.sum().detach() for logp, _, _ in each(model, samples)]
    gaps = [a - tau * ratio for a, ratio in zip(advantages, ratios, strict=True)]
    undivided = model.grads(torch.stack(gaps).square().mean())
    assert_same(undivided, {name: 2 * tau * grad for name, grad in ours.items()})


def test_kimi_without_ptx_samples_and_with_nothing_else() -> None:
    model = TableModel()
    only_rl = [sample for sample in rollouts() if not sample.streams["ptx"][0]]
    only_ptx = [ptx_sample(sample) for sample in items((), sequences(3), VOCAB)]
    assert Kimi().counts(batch_of(only_rl))["ptx"] == 0
    host = batch_of(only_ptx)
    assert Kimi().counts(host)["kimi"] == 0
    ours = loss_of(Kimi(ptx_weight=1.0), model, host)
    mean_nll = -torch.cat([logp for logp, _, _ in each(model, only_ptx)]).mean()
    assert float(ours.detach()) == pytest.approx(float(mean_nll.detach()), rel=1e-12)
    for objective in (Kimi(), GRPO()):
        assert float(objective.sums(model, on_device(host))["mismatch_max"]) == 0


# ---------------------------------------------------------------- GRPO


@pytest.mark.parametrize("normalise", ["tokens", "sequences", "constant"])
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_grpo_by_hand(normalise: str, importance: str, kl_weight: float) -> None:
    model, low, high = TableModel(scale=0.3), 0.1, 0.15
    length = {"constant_length": 20} if normalise == "constant" else {}
    kind = {"normalise": normalise, "importance": importance, **length}
    objective = GRPO(clip_low=low, clip_high=high, kl_weight=kl_weight, ptx_weight=0.2, **kind)
    samples = items(objective.needs, sequences(10, seed=3), VOCAB)
    total, count, clipped, tokens, nll, ptx_tokens = 0.0, 0, 0, 0, 0.0, 0
    for logp, trained, sample in each(model, samples):
        if sample.streams["ptx"][0]:
            nll, ptx_tokens = nll - logp.sum(), ptx_tokens + len(trained)
            continue
        delta = logp - stream(sample, "logprobs", trained)
        ratios = delta.exp() if importance == "token" else delta.mean().exp().expand(len(trained))
        a, per_token = float(sample.streams["advantages"][0]), []
        for t, ratio in enumerate(ratios):
            bound = 1 + high if a > 0 else 1 - low
            over = ratio > bound if a > 0 else ratio < bound
            clipped += bool(over)
            loss = torch.tensor(-a * bound, dtype=torch.float64) if over else -a * ratio
            if kl_weight:
                back = stream(sample, "ref_logprobs", trained)[t] - logp[t]
                loss = loss + kl_weight * (back.exp() - 1 - back)
            per_token.append(loss)
        tokens += len(trained)
        total = total + (torch.stack(per_token).mean() if normalise == "sequences" else torch.stack(per_token).sum())
        count += {"tokens": len(trained), "sequences": 1, "constant": 20}[normalise]
    expected = total / count + 0.2 * nll / ptx_tokens
    host = batch_of(samples)
    ours = loss_of(objective, model, host)
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert_same(model.grads(ours), model.grads(expected))
    sums, counts = objective.sums(model, on_device(host)), objective.counts(host)
    assert float(sums["clip_share"]) == clipped and 0 < clipped < tokens
    assert counts["grpo"] == count and counts["clip_share"] == tokens


def test_grpo_survives_ratios_that_overflow() -> None:
    model = TableModel()
    samples = [with_streams(s, logprobs=np.full(len(s.tokens), -2000.0, np.float32)) for s in rollouts(4)]
    loss = loss_of(GRPO(), model, batch_of(samples))
    assert all(bool(torch.isfinite(grad).all()) for grad in model.grads(loss).values())


# ---------------------------------------------------------------- distillation


def test_distill_by_hand_with_plain_samples_mixed_in() -> None:
    model = TableModel()
    samples = items(Distill.STREAMS, sequences(8, seed=4), VOCAB)
    nll, tokens, kl, taught = 0.0, 0, 0.0, 0
    for logp, trained, sample in each(model, samples):
        nll, tokens = nll - logp.sum(), tokens + len(trained)
        if not sample.streams["teacher"][0]:
            continue
        q = F.softmax(model.logits(torch.from_numpy(sample.tokens.astype(np.int64)))[:-1], -1)[trained - 1]
        q = q.gather(1, torch.from_numpy(sample.streams["teacher_ids"][trained]))
        log_p = stream(sample, "teacher_logprobs", trained)
        p, taught = log_p.exp(), taught + len(trained)
        r, s = 1 - p.sum(-1), 1 - q.sum(-1)
        kl = kl + (p * (log_p - q.log())).sum() + (r * (r / s).log()).sum()
    host = batch_of(samples)
    both = loss_of(Distill(lm_weight=0.6, kl_weight=1.7), model, host)
    expected = 0.6 * nll / tokens + 1.7 * kl / taught
    assert 0 < taught < tokens and Distill().counts(host) == {"lm": tokens, "kl": taught}
    assert float(both.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    assert_same(model.grads(both), model.grads(expected), rtol=1e-9)
    for objective, value in ((Distill(lm_weight=0), kl / taught), (Distill(kl_weight=0), nll / tokens)):
        alone = loss_of(objective, model, host)
        assert float(alone.detach()) == pytest.approx(float(value.detach()), rel=1e-10)
        assert_same(model.grads(alone), model.grads(value), rtol=1e-9)


def test_distill_without_kl_needs_no_teacher() -> None:
    assert Distill(kl_weight=0).needs == ()
    host = batch_of(items((), sequences(3), VOCAB))
    losses = [loss_of(objective, TableModel(), host) for objective in (Distill(kl_weight=0), load("objective", "lm")())]
    assert torch.equal(*losses)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPO(beta=0),
        lambda: DPO(label_smoothing=0.5),
        lambda: DPO(sft_weight=-1),
        lambda: Kimi(tau=0),
        lambda: Kimi(ptx_weight=-0.1),
        lambda: GRPO(clip_low=0),
        lambda: GRPO(kl_weight=-1),
        lambda: GRPO(normalise="constant"),
        lambda: GRPO(constant_length=5),
        lambda: Distill(lm_weight=0, kl_weight=0),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(make) -> None:
    with pytest.raises(RecipeError):
        make()


@pytest.mark.parametrize("name", ["dpo", "kimi", "grpo", "distill"])
def test_metrics_are_not_trained_and_terms_are(name: str) -> None:
    for objective in load("objective", name).examples():
        model = TableModel()
        batch = batch_of(items(objective.needs, sequences(10), VOCAB))
        for term, value in objective.sums(model, on_device(batch)).items():
            assert value.dim() == 0, term
            if coefficient(objective, term):
                assert any(bool(grad.abs().max() > 0) for grad in model.grads(value).values()), term
