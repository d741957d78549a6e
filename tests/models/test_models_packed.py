"""Experts that are INT4 in memory: the same numbers as the dense model with decoded weights, bounded memory, right gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_samples import K2, make, pack

from k2lab.models import packed
from k2lab.models.experts import ExpertsSwiGLU
from k2lab.quant import int4
from k2lab.specs import ModelSpec

WIDE: ModelSpec = K2.replace(hidden_size=64, moe_intermediate_size=32, n_routed_experts=5, num_experts_per_tok=2)


def twins(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(a dense model whose experts' weights lie on the grid, the same with packed experts)."""
    dense, other = make(WIDE, dtype=dtype), make(WIDE, dtype=dtype)
    with torch.no_grad():
        for module in dense.hf.modules():
            if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
                for weight in (module.gate_up_proj, module.down_proj):
                    weight.copy_(int4.values(weight))
    assert packed.pack_(other.hf)
    return dense, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_is_the_dense_one_bit_for_bit(dtype: torch.dtype) -> None:
    dense, other = twins(dtype)
    batch = pack((5, 40, 1, 64))
    with torch.no_grad():
        assert torch.equal(dense.hidden(batch), other.hidden(batch))


def test_gradients_of_what_is_before_packed_experts_are_those_of_the_dense_model() -> None:
    dense, other = twins()
    batch = pack((5, 40, 1, 64))
    for model in (dense, other):
        model.train()
        model.hidden(batch).square().sum().backward()
    grads = dict(other.named_parameters())
    assert "model.layers.1.mlp.experts.gate_up_proj" not in grads
    for name, parameter in dense.named_parameters():
        if name in grads and name != "lm_head.weight":  # routers among them
            assert torch.equal(parameter.grad, grads[name].grad), name


def test_one_matrix_is_decoded_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, other = twins()
    sizes: list[int] = []
    decode = int4.dequantise

    def watched(codes: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(codes.dim())
        return decode(codes, *args, **kwargs)

    monkeypatch.setattr(packed.int4, "dequantise", watched)
    batch = pack((30,))
    other.train()
    other.hidden(batch).sum().backward()
    assert sizes and set(sizes) == {2}


def test_packed_weights_take_less_than_a_third_of_bf16() -> None:
    dense, other = twins(torch.bfloat16)
    experts = [module for module in other.hf.modules() if isinstance(module, packed.PackedExperts)]
    held = sum(buffer.numel() * buffer.element_size() for module in experts for buffer in module.buffers())
    before = sum(
        p.numel() * p.element_size() for name, p in dense.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))
        and ".experts." in name
    )  # fmt: skip
    assert 0.28 < held / before <= 0.32


def test_scales_keep_their_type_when_the_model_changes_its() -> None:
    _, other = twins(torch.float32)
    other.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    scales = [buffer for name, buffer in other.hf.named_buffers() if name.endswith("_scales")]
    assert scales and all(buffer.dtype == torch.bfloat16 for buffer in scales)


def test_weights_of_a_packed_model_are_those_of_the_dense_one() -> None:
    dense, other = twins()
    want, have = dense.weights(), other.weights()
    assert set(want) == set(have) == set(dense.state())
    for name in want:
        assert torch.equal(want[name], have[name]), name


# ---------------------------------------------------------------- the function


def parts(seed: int = 3, tokens: int = 17) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    E, D, F, r = 4, 64, 32, 3

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64) * 0.3

    return {
        "x": normal(tokens, D), "weights": normal(tokens, 2).abs(), "gate_up": normal(E, 2 * F, D), "down": normal(E, D, F),
        "gate_A": normal(E, r, D), "gate_B": normal(E, F, r), "up_A": normal(E, r, D), "up_B": normal(E, F, r),
        "down_A": normal(E, r, F), "down_B": normal(E, D, r),
        "chosen": torch.stack([torch.randperm(E - 1, generator=draw)[:2] for _ in range(tokens)]),
    }  # fmt: skip


FACTORS = ("gate_A", "gate_B", "up_A", "up_B", "down_A", "down_B")


def test_low_rank_terms_and_their_gradients_are_those_of_merged_weights() -> None:
    scale = 0.7
    p = parts()  # the last expert is chosen by nobody
    leaves = {name: p[name].clone().requires_grad_() for name in ("x", "weights", *FACTORS)}
    lora = packed.ExpertLoRA(*(leaves[name] for name in FACTORS), scale)
    base = packed.Dense(p["gate_up"], p["down"])
    out = packed.frozen_experts(leaves["x"], p["chosen"], leaves["weights"], base, lora)
    twin = {name: p[name].clone().requires_grad_() for name in ("x", "weights", *FACTORS)}
    low = [scale * twin[f"{stem}_B"] @ twin[f"{stem}_A"] for stem in ("gate", "up", "down")]
    gate_up, down = p["gate_up"] + torch.cat(low[:2], 1), p["down"] + low[2]
    want = ExpertsSwiGLU.apply(twin["x"], p["chosen"], twin["weights"], gate_up, down)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(grad)
    want.backward(grad)
    for name in leaves:
        torch.testing.assert_close(leaves[name].grad, twin[name].grad, rtol=1e-11, atol=1e-11, msg=name)
    assert not leaves["gate_A"].grad[3].any()


@pytest.mark.parametrize("trained", [("x",), ("gate_up",), ("x", "down"), ("weights", "gate_up", "down")])
def test_frozen_dense_experts_are_the_trainable_ones(trained: tuple[str, ...]) -> None:
    """Gradients are those of the case in which everything is trained, and made for what wants one only."""
    p, names = parts(), ("x", "weights", "gate_up", "down")

    def run(wanted: tuple[str, ...]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        leaves = {name: p[name].clone().requires_grad_(name in wanted) for name in names}
        if set(wanted) & {"gate_up", "down"}:
            out = ExpertsSwiGLU.apply(leaves["x"], p["chosen"], leaves["weights"], leaves["gate_up"], leaves["down"])
        else:
            base = packed.Dense(leaves["gate_up"], leaves["down"])
            out = packed.frozen_experts(leaves["x"], p["chosen"], leaves["weights"], base, None)
        out.square().sum().backward()
        return out, {name: leaf.grad for name, leaf in leaves.items()}

    (out, grads), (want, all_grads) = run(trained), run(names)
    assert torch.equal(out, want)
    for name in names:
        assert torch.equal(grads[name], all_grads[name]) if name in trained else grads[name] is None
