"""The same inputs through TRL's own loss functions: values and gradients of every parameter in fp64. Skipped without `trl`.

TRL's trainers are asked for their loss methods only; what these read of a trainer is put into a plain namespace, and its model is
the table model, padded.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_table import VOCAB, TableModel, assert_same, batch_of, loss_of, on_device, sequences
from made_up import items

from k2lab.core.slots import load
from k2lab.data.samples import teacher_sample, with_streams

pytest.importorskip("trl", reason="TRL is not installed")

DPO, GRPO, Distill = (load("objective", name) for name in ("dpo", "grpo", "distill"))
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, **_: x
)


def padded(samples: list, name: str) -> torch.Tensor:
    """[B, L] of the samples' `tokens`, `weight` or a stream, padded at the end with 0."""
    arrays = [getattr(s, name) if name in ("tokens", "weight") else s.streams[name] for s in samples]
    rows = [torch.from_numpy(array.astype(np.int64 if name == "tokens" else np.float64)) for array in arrays]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def compare(model: TableModel, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    worst = assert_same(model.grads(ours), model.grads(theirs))
    print(f"ours {float(ours.detach()):.15g}, TRL {float(theirs.detach()):.15g}, gradients {worst:.1e}")


# ---------------------------------------------------------------- DPO


def trl_dpo(model: TableModel, units: list, beta: float, smoothing: float = 0.0, **kinds: float) -> torch.Tensor:
    """TRL's DPO loss with the loss types and weights `kinds`."""
    from trl import DPOTrainer

    samples = [unit[0] for unit in units] + [unit[1] for unit in units]
    tokens, mask = padded(samples, "tokens"), padded(samples, "weight") != 0
    ref = (padded(samples, "ref_logprobs") * mask).sum(1).chunk(2)

    def forward(input_ids, labels, **_):
        logits = model.logits(input_ids)[:, :-1]
        logp = F.log_softmax(logits, -1).gather(-1, input_ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)
        return SimpleNamespace(log_probs=logp, entropy=logp, mean_logits=logp, is_top1=logp > 0)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, _metrics=defaultdict(lambda: defaultdict(list)),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False,
        loss_types=list(kinds), loss_weights=list(kinds.values()), beta=beta, label_smoothing=smoothing, _total_train_tokens=0,
        _tp_size=1,
    )  # fmt: skip
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "completion_mask": mask.long()}
    inputs |= {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
    return DPOTrainer._compute_loss(trainer, forward, inputs, return_outputs=False)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_is_trls_sigmoid(beta: float) -> None:
    model, units = TableModel(), items(DPO.needs, sequences(12), VOCAB)
    compare(model, loss_of(DPO(beta=beta), model, batch_of(units)), trl_dpo(model, units, beta, sigmoid=1.0))


def test_length_normalised_dpo_is_trls_sigmoid_norm() -> None:
    model, units = TableModel(), items(DPO.needs, sequences(12), VOCAB)
    ours = loss_of(DPO(beta=2.0, length_normalised=True), model, batch_of(units))
    compare(model, ours, trl_dpo(model, units, 2.0, sigmoid_norm=1.0))


def test_dpo_with_a_term_on_the_chosen_side_is_trls_sigmoid_and_sft() -> None:
    model, units = TableModel(), items(DPO.needs, sequences(12), VOCAB)
    compare(model, loss_of(DPO(sft_weight=0.4), model, batch_of(units)), trl_dpo(model, units, 0.1, sigmoid=1.0, sft=0.4))


def test_smoothed_dpo_is_trls_aot_of_single_pairs() -> None:
    """TRL's `sigmoid` has no smoothing; `aot` smooths the same way and, for one pair, sorts nothing."""
    model, units = TableModel(), items(DPO.needs, sequences(12), VOCAB)
    ours = loss_of(DPO(beta=0.5, label_smoothing=0.15), model, batch_of(units))
    compare(model, ours, torch.stack([trl_dpo(model, [unit], 0.5, 0.15, aot=1.0) for unit in units]).mean())


# ---------------------------------------------------------------- GRPO


def trl_grpo(model: TableModel, samples: list, objective, loss_type: str, max_length: int) -> torch.Tensor:
    from trl import GRPOTrainer

    tokens, mask = padded(samples, "tokens"), padded(samples, "weight")
    logp = F.pad(model.logprobs(tokens), (1, 0))
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None),
        model=SimpleNamespace(training=True), accelerator=ACCELERATOR, _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, vllm_importance_sampling_correction=False,
        importance_sampling_level=objective.importance, beta=objective.kl_weight, epsilon_low=objective.clip_low,
        epsilon_high=objective.clip_high, loss_type=loss_type, max_completion_length=max_length,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
    )  # fmt: skip
    empty = tokens[:, :0]
    inputs = {"prompt_ids": empty, "prompt_mask": empty, "completion_ids": tokens, "completion_mask": mask}
    inputs |= {"advantages": padded(samples, "advantages")[:, 0], "old_per_token_logps": padded(samples, "logprobs")}
    inputs["num_items_in_batch"] = mask.sum()
    if objective.kl_weight:
        inputs["ref_per_token_logps"] = padded(samples, "ref_logprobs")
    return GRPOTrainer._compute_loss(trainer, model, inputs)


@pytest.mark.parametrize(
    "loss_type, normalise", [("dapo", "tokens"), ("bnpo", "tokens"), ("grpo", "sequences"), ("dr_grpo", "constant")]
)
@pytest.mark.parametrize("importance", ["token", "sequence"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.2])
def test_grpo_is_trls(loss_type: str, normalise: str, importance: str, kl_weight: float) -> None:
    model = TableModel(scale=0.3)
    length = {"constant_length": 24} if normalise == "constant" else {}
    objective = GRPO(clip_low=0.1, clip_high=0.15, kl_weight=kl_weight, normalise=normalise, importance=importance, **length)
    samples = [s for s in items(objective.needs, sequences(12, seed=3), VOCAB) if not s.streams["ptx"][0]]
    host = batch_of(samples)
    assert 0 < float(objective.sums(model, on_device(host))["clip_share"]) < host.num_tokens
    compare(model, loss_of(objective, model, host), trl_grpo(model, samples, objective, loss_type, 24))


# ---------------------------------------------------------------- distillation


def full_teacher(samples: list, teacher: torch.Tensor) -> list:
    """The samples with all of the teacher's tokens, most probable first; teacher [W, W]: log-probabilities after a token."""
    found = []
    for sample in samples:
        rows = teacher[torch.from_numpy(np.concatenate([[0], sample.tokens[:-1]]).astype(np.int64))]
        values, ids = rows.sort(-1, descending=True)
        found.append(teacher_sample(sample, ids.numpy(), values.numpy()))
    return found


@pytest.fixture
def taught():
    model = TableModel(scale=0.5)  # TRL lifts remainders below 1e-7 to that; a tame student has none
    generator = torch.Generator().manual_seed(7)
    # Rounded to fp32, as streams are stored; sums of such probabilities miss 1 by 1e-7.
    teacher = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64).log_softmax(-1).float().double()
    return model, teacher, full_teacher(items((), sequences(6, seed=5), VOCAB), teacher)


def test_kl_over_the_whole_vocabulary_is_trls_gkd_and_distillation_loss(taught) -> None:
    from trl.experimental.gkd import GKDTrainer

    model, teacher, samples = taught
    host = batch_of(samples)
    ours = loss_of(Distill(lm_weight=0), model, host)
    batch = on_device(host)
    rows = batch.weight_T != 0
    student = (model.hidden(batch) @ model.head().t())[rows]
    labels = torch.zeros(1, int(rows.sum()), dtype=torch.long)
    theirs = GKDTrainer.generalized_jsd_loss(student[None], teacher[batch.tokens_T][rows][None], labels, beta=0.0)
    # their softmax makes the rounded teacher sum to 1 again: 1e-7 of difference
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    print("gkd gradients", assert_same(model.grads(ours), model.grads(theirs), rtol=1e-6))

    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    eye = torch.eye(VOCAB, dtype=torch.float64)
    fused, _, _ = _chunked_divergence_loss(
        model.hidden(batch)[None], teacher[batch.tokens_T][None], model.head(), eye, rows[None].long(), beta=0.0
    )
    assert float(ours.detach()) == pytest.approx(float(fused.detach()), rel=1e-6)
    print("distillation gradients", assert_same(model.grads(ours), model.grads(fused), rtol=1e-6))


@pytest.mark.parametrize("top_k", [1, 4, VOCAB - 1])
def test_topk_kl_with_a_remainder_is_trls_tail_bucket(taught, top_k: int) -> None:
    from trl.experimental.sdft.loss_utils import add_tail_bucket, compute_divergence

    model, _, samples = taught
    names = ("teacher_ids", "teacher_logprobs")
    short = [with_streams(s, **{name: s.streams[name][:, :top_k].copy() for name in names}) for s in samples]
    host = batch_of(short)
    batch = on_device(host)
    rows = batch.weight_T != 0
    student = F.log_softmax(model.hidden(batch) @ model.head().t(), -1).gather(1, batch.streams_T["teacher_ids"])[rows]
    named = batch.streams_T["teacher_logprobs"][rows]
    theirs = compute_divergence(add_tail_bucket(student), add_tail_bucket(named), 0.0).mean()
    compare(model, loss_of(Distill(lm_weight=0), model, host), theirs)
