"""Adapters and packed experts on a GPU: the same numbers as on the CPU, and as merged weights, through every fused path."""

from __future__ import annotations

import pytest
import torch
from model_samples import K2, LINEAR, logits, make, pack

from k2lab.models import decode, lora, packed
from k2lab.models.wrap import TrainModel
from k2lab.specs import ModelSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Widths that the fused kernels know; 2048 tokens, from which on MLPs are fused.
SIZES = {
    "hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "v_head_dim": 64,
}  # fmt: skip
WIDE = K2.replace(**SIZES, q_lora_rank=128)
WIDE_LINEAR = LINEAR.replace(**SIZES, linear_head_dim=64)
LENGTHS = (700, 1, 900, 300, 147)
# Of bf16 against fp32, where routers choose other experts for some tokens (on a CPU 0.04 for K2 and 0.11 for Kimi Linear); an
# adapter that a path forgets makes 0.45 and more.
ROUNDING = 0.25
SPECS = pytest.mark.parametrize("spec", [WIDE, WIDE_LINEAR], ids=["k2", "linear"])


def adapted(spec: ModelSpec, dtype: torch.dtype, device: str, pack_experts: bool) -> TrainModel:
    model = make(spec, dtype=dtype)
    if pack_experts:
        packed.pack_(model.hf)
    lora.attach(model, lora.Settings(rank=8, alpha=16.0), lora.TARGETS, seed=5)
    draw = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model.to(device=device)


def gradients(model: TrainModel) -> dict[str, torch.Tensor]:
    model.train()
    logits(model, pack(LENGTHS)).float().square().mean().backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.requires_grad}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float().cpu() - b.float().cpu()).norm() / b.float().norm().clamp(min=1e-12))


@SPECS
@pytest.mark.parametrize("pack_experts", [False, True], ids=["dense", "packed"])
def test_bf16_on_a_gpu_is_fp32_on_the_cpu_up_to_rounding(spec: ModelSpec, pack_experts: bool) -> None:
    exact = adapted(spec, torch.float32, "cpu", pack_experts)
    fast = adapted(spec, torch.bfloat16, "cuda", pack_experts)
    with torch.no_grad():
        assert relative(logits(fast, pack(LENGTHS)), logits(exact, pack(LENGTHS))) < ROUNDING
    want, found = gradients(exact), gradients(fast)
    assert want.keys() == found.keys()
    worst = {name: relative(found[name], want[name]) for name in want}
    assert sorted(worst.values())[len(worst) // 2] < ROUNDING, worst
    assert max(worst.values()) < 0.6, max(worst, key=lambda name: worst[name])


@SPECS
def test_adapters_act_as_merged_weights(spec: ModelSpec) -> None:
    model = adapted(spec, torch.bfloat16, "cuda", False)
    other = make(spec, dtype=torch.bfloat16)
    other.load_state({name: tensor.cpu() for name, tensor in model.weights().items()})
    other.to(device="cuda")
    with torch.no_grad():
        found, want = logits(model, pack(LENGTHS)), logits(other, pack(LENGTHS))
        before = logits(make(spec, dtype=torch.bfloat16).to(device="cuda"), pack(LENGTHS))
    assert relative(found, want) < ROUNDING < relative(before, want)


@SPECS
@torch.no_grad()
def test_packed_experts_are_the_dense_ones_with_decoded_weights(spec: ModelSpec) -> None:
    dense, other = make(spec, dtype=torch.bfloat16), make(spec, dtype=torch.bfloat16)
    packed.pack_(other.hf)
    dense.load_state(dict(other.weights()))
    found, want = (logits(model.to(device="cuda"), pack(LENGTHS)) for model in (other, dense))
    assert relative(found, want) < ROUNDING / 2


@SPECS
@torch.no_grad()
def test_our_decoder_knows_them_on_a_gpu(spec: ModelSpec) -> None:
    model = adapted(spec, torch.bfloat16, "cuda", True).eval()
    batch = pack((40,))
    want = logits(model, batch)
    decoder = decode.decoder(model.hf)
    tokens = batch.tokens_T.tolist()
    found = [decoder.start([tokens[:30]], [1])] + [decoder.step([token]) for token in tokens[30:]]
    assert relative(torch.cat(found), want[29:]) < ROUNDING
