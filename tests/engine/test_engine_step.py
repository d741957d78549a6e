"""What the step does with terms, metrics and maxima; what is recorded; and that streams are checked before a model is loaded."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_table import VOCAB, TableModel, assert_same, batch_of, on_device, sequences
from made_up import items

from k2lab.core.errors import NumericsError, RecipeError
from k2lab.core.events import EventWriter
from k2lab.core.progress import Progress
from k2lab.core.slots import load
from k2lab.core.trackers import scalars
from k2lab.data.feed import PackedFeed
from k2lab.engine.run import EarlyStop, TrainRun
from k2lab.engine.step import StepMetrics, forward_backward, forward_sums, means


class Terms:
    """Two trained terms, a metric with a gradient of its own, and a maximum."""

    needs = ()
    coefficients = {"half": 0.5, "metric": 0.0}
    maxima = ("longest",)

    def __init__(self, metric: float = 1.0) -> None:
        self.metric = metric

    def counts(self, batch):
        sequences = len(batch.starts_S1) - 1
        return {"full": batch.num_tokens, "half": sequences, "metric": batch.num_tokens}

    def sums(self, model, batch):
        hidden = model.hidden(batch)
        longest = batch.starts_S1.diff().max().double()
        head = model.head().square().sum() * (len(batch.starts_S1) - 1)
        return {"full": hidden.sum(), "half": head, "metric": self.metric * hidden.square().sum(), "longest": longest}


def micro(count: int = 3):
    samples = items((), sequences(3 * count, seed=8), VOCAB)
    return [batch_of(samples[3 * n : 3 * n + 3]) for n in range(count)]


def total_counts(objective, batches):
    found: dict = {}
    for batch in batches:
        for name, count in objective.counts(batch).items():
            found[name] = found.get(name, 0) + count
    return found


def test_terms_add_up_by_their_coefficients_and_metrics_are_not_trained():
    model, objective, batches = TableModel(), Terms(), micro()
    counts = total_counts(objective, batches)
    sums, _ = forward_backward(model, objective, batches, counts)
    parts = [objective.sums(model, on_device(batch)) for batch in batches]
    expected = sum(p["full"] for p in parts) / counts["full"] + 0.5 * sum(p["half"] for p in parts) / counts["half"]
    used = [model.parameters[name] for name in ("embed", "place", "head")]
    grads = dict(zip(model.parameters, torch.autograd.grad(expected, used), strict=True))
    assert_same({name: p.grad for name, p in model.parameters.items()}, grads)
    assert sums["metric"] == pytest.approx(float(sum(p["metric"] for p in parts).detach()))
    assert sums["longest"] == max(int(np.diff(batch.starts_S1).max()) for batch in batches)
    trained, metrics = means(objective, sums, counts)
    assert set(trained) == {"full", "half"} and set(metrics) == {"metric", "longest"}
    assert metrics["longest"] == sums["longest"] and trained["half"] == sums["half"] / counts["half"]


def test_validation_sums_the_same_without_gradients():
    model, objective, batches = TableModel(), Terms(), micro()
    sums, counts = forward_sums(model, objective, batches)
    assert counts == total_counts(objective, batches)
    again, _ = forward_backward(model, objective, batches, counts)
    assert sums == pytest.approx(again, rel=1e-14)


@pytest.mark.parametrize("name", ["dpo", "kimi", "grpo", "distill"])
def test_a_batch_that_counts_nothing_adds_nothing(name):
    objective = load("objective", name).examples()[0]
    batches = [batch_of(items(objective.needs, sequences(10), VOCAB))]
    idle = replace(batches[0], weight_T=np.zeros_like(batches[0].weight_T), num_tokens=0)
    idle = replace(idle, pair_S=np.full_like(idle.pair_S, -1), sign_S=np.zeros_like(idle.sign_S))
    counts = total_counts(objective, batches)
    assert not any(objective.counts(idle).values())
    alone, together = TableModel(), TableModel()
    sums, _ = forward_backward(alone, objective, batches, counts)
    both, _ = forward_backward(together, objective, [idle, *batches], counts)
    assert both == pytest.approx(sums, rel=1e-13)
    assert_same({n: p.grad for n, p in together.named_parameters()}, {n: p.grad for n, p in alone.named_parameters()})


def run_of(tmp_path, **kwargs) -> tuple[TrainRun, list[dict]]:
    events = EventWriter(tmp_path / "events")
    events.stage = "s"
    seen: list[dict] = []
    events.listeners.append(seen.append)
    events.listeners.append(Progress(quiet=False))
    return TrainRun(work=tmp_path, events=events, total_steps=1, microbatches=3, **kwargs), seen


@pytest.mark.parametrize("metric", [1.0, math.inf, math.nan])
def test_a_metric_that_is_not_finite_is_recorded_and_stops_nothing(tmp_path, metric):
    run, seen = run_of(tmp_path)
    model, objective, batches = TableModel(), Terms(metric), micro()
    counts = run.global_counts(objective, batches)
    sums, _ = forward_backward(model, objective, batches, counts)
    run.require_finite(sums, 1.0, 0, batches)
    info = SimpleNamespace(lr=1e-3, clipped={})
    run.record(0, 1.0, info, sums, counts, StepMetrics(), batches)
    event = seen[-1]
    assert set(event["losses"]) == {"full", "half"} and set(event["metrics"]) == {"metric", "longest"}
    assert event["tokens"] == counts["full"]
    value = event["metrics"]["metric"]
    assert isinstance(value, float) if math.isfinite(metric) else value == str(metric)
    assert {name for name, _ in scalars(event)} >= {"s/loss/full", "s/metric", "s/longest"}
    for bad in (math.inf, math.nan):
        with pytest.raises(NumericsError, match="half"):
            run.require_finite({**sums, "half": bad}, 1.0, 0, batches)
    with pytest.raises(NumericsError, match="gradient norm"):
        run.require_finite(sums, math.nan, 0, batches)


@pytest.mark.parametrize("metric", [1.0, math.inf])
def test_validation_names_losses_and_metrics_apart_and_early_stopping_weighs_terms(tmp_path, metric):
    run, seen = run_of(tmp_path, valid=micro(), valid_every=1, early_stop=EarlyStop(patience=9))
    model = TableModel()
    model.state = dict
    run.objective, run.done = Terms(metric), 1
    run._validate(0, model, None, SimpleNamespace(epoch=0.5), StepMetrics())
    found = seen[-1]["metrics"]
    assert set(found) == {"valid/full", "valid/half", "held_out/metric", "held_out/longest"}
    assert run.best == pytest.approx(found["valid/full"] + 0.5 * found["valid/half"])
    assert ("held_out/metric" in run.history["last_valid"]) == math.isfinite(metric)


def test_what_an_objective_needs_is_checked_before_a_model_is_loaded():
    from k2lab.stages._training import check_streams, execute

    samples = items((), sequences(4), VOCAB)
    feed = PackedFeed(samples, lambda _: np.arange(4), seq_len=32, global_batch=2, per_device_batch=1, fill="whole")
    wiring = {"valid": None, "tokens_in_data": 1, "tokenizer_source": None, "vocab_size": VOCAB}
    stage = load("stage", "sft").examples()[0]
    context = SimpleNamespace(device="cpu", name="mine")  # knows of no parent: a model cannot be loaded
    with pytest.raises(RecipeError, match="DPO needs ref_logprobs and pairs") as caught:
        execute(stage, context, make_feed=lambda *_: feed, objective=load("objective", "dpo")(), **wiring)
    assert "stage.mine" in str(caught.value)
    check_streams(load("objective", "lm")(), feed.gives, "here")
    check_streams(load("objective", "distill")(kl_weight=0), feed.gives, "here")
    for name in ("dpo", "kimi", "grpo", "distill"):
        for objective in load("objective", name).examples():
            data = items(objective.needs, sequences(4), VOCAB)
            full = PackedFeed(data, lambda _: np.arange(2), seq_len=64, global_batch=2, per_device_batch=1, fill="whole")
            check_streams(objective, full.gives, "here")
