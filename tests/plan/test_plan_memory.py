"""Memory terms: exact for the state, close to what autograd keeps for activations."""

from dataclasses import replace

import pytest
import torch

from k2lab import specs
from k2lab.core.errors import RecipeError
from k2lab.core.types import Batch, PlanInput
from k2lab.models import build
from k2lab.models.losses import linear_cross_entropy
from k2lab.models.pack import Pack
from k2lab.optim.adamw import AdamW
from k2lab.optim.muonclip import MuonClip
from k2lab.plan import machines, state
from k2lab.plan.memory import activation_bytes, matrix_parameters, training_memory
from k2lab.specs import recomputation


def train(model="tiny-k2", **changes):
    values = {"seq_len": 256, "per_device_batch": 16, "steps": 10, "optimizer": "muonclip"} | changes
    return PlanInput(stage="s", type="pretrain", kind="train", model=specs.get(model) if model else None, **values)


def terms(inp, machine="laptop"):
    return {term.key: term.bytes for term in training_memory(inp, machines.get(machine)).terms}


def test_state_of_the_tiny_model():
    tiny = specs.get("tiny-k2")
    learnt = tiny.total() - 8
    found = terms(train())
    assert found["weights"] == 4 * tiny.total() and found["gradients"] == 4 * learnt and "master" not in found
    groups = tiny.parameters()
    others = groups["embedding"] + groups["head"] + groups["norms"]
    assert matrix_parameters(tiny) == learnt - others
    assert found["optimizer"] == 4 * (learnt - others) + 8 * others
    assert terms(train(optimizer="adamw"))["optimizer"] == 8 * learnt


def test_bf16_keeps_a_master():
    tiny = specs.get("tiny-k2")
    found = terms(train(precision="bf16"))
    assert found["weights"] == 2 * tiny.total() and found["master"] == 4 * (tiny.total() - 8)
    whole = terms(train())["activations"]
    assert whole / 2 < found["activations"] < whole  # what is kept in fp32 in any case does not shrink


def test_kda_convolutions_and_gates_are_not_muons():
    linear = specs.get("tiny-linear")
    excluded = [t for t in linear.tensors() if t.kind in ("embedding", "head", "norm", "conv", "fp32_vector")]
    assert matrix_parameters(linear) == linear.total() - sum(t.numel for t in excluded)
    assert any("conv1d" in t.name for t in excluded) and any("A_log" in t.name for t in excluded)


def test_published_bookkeeping_of_48b():
    """Weights 98, master 196 and momentum about 196 GB: what full training of the 48B model needs beside its gradients."""
    found = terms(train("kimi-linear-48b", precision="bf16"), "h100-x8")
    gigabytes = {key: round(value / 1e9) for key, value in found.items()}
    assert (gigabytes["weights"], gigabytes["master"], gigabytes["optimizer"]) == (98, 196, 200)


def test_division_over_gpus():
    limit = 80e9
    one = training_memory(train("moonlight-16b", precision="bf16", per_device_batch=1), machines.get("h100-x1"))
    eight = training_memory(train("moonlight-16b", precision="bf16", per_device_batch=1, gpus=8), machines.get("h100-x8"))
    assert one.state() == eight.state() and one.replicated() > limit > eight.sharded()
    needed = one.gpus_needed(limit)
    at = training_memory(train("moonlight-16b", precision="bf16", per_device_batch=1, gpus=needed), machines.get("h100-x8"))
    fewer = training_memory(
        train("moonlight-16b", precision="bf16", per_device_batch=1, gpus=needed - 1), machines.get("h100-x8")
    )
    assert needed > 1 and at.sharded() <= limit + 64 * 2**20 < fewer.sharded()


def test_nothing_helps_if_activations_are_too_much():
    memory = training_memory(train("kimi-linear-48b", precision="bf16", seq_len=1_000_000), machines.get("h100-x8"))
    assert memory.gpus_needed(80e9) is None
    assert memory.gpus_needed(80e9, checkpointed=True) is None
    assert memory.activations_checkpointed < 0.2 * next(t.bytes for t in memory.terms if t.key == "activations")


def kept_bytes(spec, starts, recompute="none", seq_len=4096):
    """Bytes that our model in fp32 on the CPU keeps for the backward pass of one pack, parameters excluded, and the hidden states
    that it hands out."""
    model = build.from_spec(spec, seed=0, dtype=torch.float32, device=torch.device("cpu"))
    model.train().recompute(recompute, seq_len)
    bounds = torch.tensor(starts)
    positions = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])
    tokens = torch.arange(starts[-1])
    batch = Batch(
        tokens_T=tokens,
        targets_T=tokens,
        weight_T=torch.ones(len(tokens)),
        positions_T=positions,
        starts_S1=bounds,
        num_tokens=len(tokens),
    )
    own = {parameter.untyped_storage().data_ptr() for _, parameter in model.named_parameters()}
    kept = {}

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(batch)
    assert hidden.requires_grad
    assert hidden.untyped_storage().data_ptr() not in kept
    return sum(kept.values()) + hidden.untyped_storage().nbytes()


# Variants reach the terms that the tiny models leave at one value: plain queries with positions, weights not normalised.
VARIANTS = {
    "plain": {"q_lora_rank": None, "norm_topk_prob": False, "n_shared_experts": 2, "num_experts_per_tok": 3},
    "heads": {"linear_num_heads": 2, "linear_head_dim": 128},
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [("tiny-k2", None), ("tiny-linear", None), ("tiny-dense", None), ("tiny-k2", "plain"), ("tiny-linear", "heads")],
)
def test_activations_are_what_autograd_keeps(name, variant):
    """To the byte for documents that fill their rows, with probabilities; KDA's copies of convolution weights (below 0.05 %) are
    not planned."""
    spec = specs.get(name)
    spec = spec.replace(**VARIANTS[variant]) if variant else spec
    found = terms(replace(train(seq_len=512, per_device_batch=2), model=spec))
    tolerance = 5e-4 if spec.layers_of("kda") else 0
    assert kept_bytes(spec, [0, 512, 1024]) == pytest.approx(found["activations"] + found["probabilities"], rel=tolerance, abs=0)


@pytest.mark.parametrize("name", ["tiny-k2", "tiny-linear", "tiny-dense"])
@pytest.mark.parametrize("mode", ["selective", "layers"])
def test_activations_with_recomputation(name, mode):
    """What is kept when the forward pass ends, and the dearest block that is computed again; as exact as without."""
    inp = train(model=name, seq_len=512, per_device_batch=2, recompute=mode)
    spec, found = inp.model, terms(inp)
    again = recomputation.recomputed(spec, mode, 512, 4)
    blocks = recomputation.blocks(spec, 512, 4)
    dearest = max(sum(getattr(layer, key).bytes for key in keys) for layer, keys in zip(blocks, again))
    softmax = [layer for layer, kind in enumerate(spec.layer_types) if kind != "kda"]
    kept = sum("mixer" not in again[layer] for layer in softmax)
    each = terms(replace(inp, recompute="none"))["probabilities"] / len(softmax)
    assert found["probabilities"] == each * (kept + (kept < len(softmax)))
    expected = found["activations"] - 1024 * dearest + each * kept
    if not kept:  # held as an argument of what is computed again, which the hooks do not see
        expected -= 1024 * activation_bytes(spec).get("rotation", 0)
    assert kept_bytes(spec, [0, 512, 1024], mode, 512) == pytest.approx(expected, rel=5e-3, abs=0)


@pytest.mark.parametrize("name", ["tiny-k2", "tiny-linear", "tiny-dense"])
def test_activations_of_ragged_documents(name):
    """Within 3 %, all of it KDA's padding, for a pack of documents of odd lengths; to the byte without KDA."""
    spec = specs.get(name)
    starts = [0, 100, 500, 1024]
    scores = sum((end - first) * (end - start) for start, first, end in Pack.of(starts, "cpu").blocks)
    probabilities = 4 * scores * spec.num_attention_heads * len(spec.layers_of("mla") + spec.layers_of("attention"))
    planned = 1024 * sum(activation_bytes(spec).values())
    tolerance = 0.03 if spec.layers_of("kda") else 0
    assert kept_bytes(spec, starts) - probabilities == pytest.approx(planned, rel=tolerance, abs=0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("tokens", [512, 1024, 4096])
def test_logits_of_the_loss(precision, dtype, tokens):
    """The peak of allocations in the chunked loss lies within 10 % of the planned logits and gradients."""
    spec = specs.get("tiny-k2").replace(vocab_size=4096, hidden_size=64)
    plan = terms(replace(train(seq_len=tokens, per_device_batch=1, precision=precision), model=spec))
    hidden = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(4096, 64, dtype=dtype, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, torch.arange(tokens) % 4096, torch.ones(tokens))
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert peak == pytest.approx(plan["logits"] + plan["loss"], rel=0.1)


def test_probabilities_only_on_the_cpu_and_up_to_a_limit():
    expected = 2 * 16 * 256 * (256 + 128) / 2 * 4 * 4  # layers x rows x half the square x heads x fp32
    assert terms(train())["probabilities"] == expected
    assert "probabilities" not in terms(train(), "h100-x1")
    assert "probabilities" not in terms(train(seq_len=65536, per_device_batch=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muonclp"}, "stage.s.optim.*Did you mean 'muonclip'"),
        ({"optimizer": ""}, "optimizer"),
        ({"precision": "fp8"}, "stage.s.precision"),
        ({"seq_len": 0}, "stage.s.seq_len"),
        ({"per_device_batch": -1}, "stage.s.per_device_batch"),
        ({"gpus": 0}, "stage.s.gpus"),
        ({"grad_acc": 1.5}, "stage.s.grad_acc"),
        ({"steps": 0}, "stage.s.steps"),
        ({"token_target": 100}, "steps and token_target"),
        ({"model": None}, "needs a model"),
    ],
)
def test_impossible_numbers(changes, message):
    with pytest.raises(RecipeError, match=message):
        terms(train(**changes))


def test_own_optimizer_file_is_assumed_to_keep_two_moments():
    memory = training_memory(train(optimizer="my/lion.py"), machines.get("laptop"))
    state = next(term for term in memory.terms if term.key == "optimizer")
    assert state.origin == "assumed" and state.bytes == 8 * (specs.get("tiny-k2").total() - 8)


def test_state_that_is_kept_otherwise():
    """bf16 momentum, no masters, state on the host: by the optimizer's own settings."""
    tiny = specs.get("tiny-k2")
    learnt, matrices = tiny.total() - 8, matrix_parameters(tiny)
    bf16 = train(precision="bf16")
    assert state.planned(MuonClip(lr=1e-3), bf16) is bf16
    found = {
        name: terms(state.planned(MuonClip(lr=1e-3, **settings), bf16), "h100-x8")
        for name, settings in {
            "usual": {},
            "half": {"momentum_dtype": "bf16"},
            "off": {"master": "off"},
            "chance": {"master": "stochastic"},
            "host": {"offload": "cpu"},
        }.items()
    }
    others = learnt - matrices
    assert found["half"]["optimizer"] == 2 * matrices + 8 * others and found["half"]["master"] == 4 * learnt
    assert "master" not in found["off"] and found["off"]["optimizer"] == 4 * matrices + 4 * others
    assert "master" not in found["chance"] and found["chance"]["optimizer"] == found["usual"]["optimizer"]
    assert "master" not in found["host"] and found["host"]["optimizer"] == 0 and found["host"]["ferry"] == 4 * 8 * matrices
    big = state.planned(MuonClip(lr=1e-3, offload="cpu"), train("kimi-linear-48b", precision="bf16"))
    assert terms(big, "h100-x8")["ferry"] == 4 * 8 * 2**28
    wide = state.planned(AdamW(lr=1e-3, master="off"), train(optimizer="adamw", precision="bf16"))
    assert terms(wide)["optimizer"] == 4 * learnt
    assert training_memory(state.planned(MuonClip(lr=1e-3, master="off"), train()), machines.get("laptop")).terms == (
        training_memory(train(), machines.get("laptop")).terms  # fp32 weights have no masters to leave out
    )


@pytest.mark.parametrize("settings", [{}, {"momentum_dtype": "bf16"}, {"master": "off"}, {"master": "stochastic"}])
def test_planned_state_is_what_the_optimizer_holds(settings):
    tiny = specs.get("tiny-k2")
    model = build.from_spec(tiny, seed=1, dtype=torch.bfloat16)
    optim = MuonClip(lr=1e-3, **settings).build(model.named_parameters(), model.row_layouts())
    held = sum(t.numel() * t.element_size() for name, t in optim.state_tensors().items() if "scalar" not in name)
    found = terms(state.planned(MuonClip(lr=1e-3, **settings), train(precision="bf16")))
    assert held == pytest.approx(found["optimizer"] + found.get("master", 0), rel=2e-3)
