"""Activation checkpointing in the planner: the rule, its numbers, memory and time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from k2lab import specs
from k2lab.core.errors import RecipeError
from k2lab.core.types import PlanInput
from k2lab.plan import compute, machines
from k2lab.plan.memory import activation_bytes, training_memory
from k2lab.plan.report import plan
from k2lab.specs import recomputation


def train(model: str = "kimi-k2", **values) -> PlanInput:
    known = {"optimizer": "muonclip", "precision": "bf16", "seq_len": 4096, "per_device_batch": 1, "grad_acc": 1, **values}
    return PlanInput(stage="s", type="pretrain", kind="train", model=specs.get(model), **known)


def term(inp: PlanInput, key: str, machine: str = "h100-x8"):
    return next((t for t in training_memory(inp, machines.get(machine)).terms if t.key == key), None)


def test_blocks_are_all_of_the_model():
    """Flops of all blocks and the head are the model's; bytes of all blocks are those of the model but for its ends."""
    for name in ("kimi-k2", "kimi-linear-48b", "tiny-dense"):
        spec = specs.get(name)
        blocks = [block for layer in recomputation.blocks(spec, 4096, 2) for block in layer]
        flops = sum(spec.flops_per_token(4096, training=False).values())
        assert sum(b.flops for b in blocks) + 2 * spec.vocab_size * spec.hidden_size == pytest.approx(flops, rel=1e-9)
        parts = activation_bytes(spec, 2)
        ends = sum(parts.get(key, 0) for key in ("embedding", "rotation", "end"))
        assert sum(b.bytes for b in blocks) + ends == pytest.approx(sum(parts.values()), rel=1e-9)


def test_the_rule_keeps_attention_where_contexts_are_long():
    spec = specs.get("kimi-k2")
    assert set(recomputation.choose(spec, 4096, 2)) == {"mixer"}
    assert set(recomputation.choose(spec, 32768, 2)) == {"feed_forward"}
    linear = specs.get("kimi-linear-48b")
    long = recomputation.choose(linear, 32768, 2)
    assert {long[layer] for layer in linear.layers_of("kda")} == {"mixer"}  # does not grow with the context
    assert {long[layer] for layer in linear.layers_of("mla")} == {"feed_forward"}


@pytest.mark.parametrize("name", ["kimi-k2", "kimi-linear-48b", "moonlight-16b", "tiny-dense"])
@pytest.mark.parametrize("length", [256, 32768])
def test_bytes_fall_and_flops_rise_with_what_is_computed_again(name, length):
    none, selective, layers = (train(name, seq_len=length, recompute=mode) for mode in recomputation.MODES[::2] + ("layers",))
    found = [term(inp, "activations").bytes for inp in (none, selective, layers)]
    assert found[0] > found[1] > found[2]
    flops = [sum(compute.executed_flops(inp)) for inp in (none, selective, layers)]
    assert flops[0] < flops[1] < flops[2]
    assert flops[1] - flops[0] <= (flops[2] - flops[0]) * 0.75


def test_layers_cost_one_forward_pass_more():
    inp = train()
    spec = inp.model
    forward = sum(spec.flops_per_token(4096, training=False).values()) - 2 * spec.vocab_size * spec.hidden_size
    more = sum(compute.executed_flops(replace(inp, recompute="layers"))) - sum(compute.executed_flops(inp))
    assert more == pytest.approx(forward, rel=1e-9)
    attention = compute.executed_flops(replace(inp, recompute="layers"))[1]
    assert attention == pytest.approx(compute.executed_flops(inp)[1] * 4.5 / 3.5, rel=1e-9)


def test_model_flops_do_not_count_what_is_computed_again():
    assert compute.model_flops(train(recompute="layers")) == compute.model_flops(train())


def test_probabilities_of_one_layer_at_a_time():
    inp = train("tiny-k2", precision="fp32", seq_len=256)
    number, all_of_them = inp.model.num_layers, term(inp, "probabilities", "laptop").bytes
    assert term(replace(inp, recompute="layers"), "probabilities", "laptop").bytes == all_of_them / number


def test_the_plan_shows_what_is_computed_again():
    text = plan([train(recompute="selective")], "h100-x8").text()
    assert "computed again: attention of 61 of 61 layers" in text
    assert "no checkpointing" in plan([train()], "h100-x8").text()


def test_unknown_modes_are_refused():
    with pytest.raises(RecipeError, match="no recomputation"):
        term(train(recompute="some"), "activations")
