"""The same models on a GPU and on the CPU: logits, gradients, maxima, decoding, half precision; no waiting for the device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_samples import K2, LINEAR, alone, gradient_errors, logits, make, pack, relative

from k2lab import specs
from k2lab.core.types import Batch
from k2lab.engine.objectives.dpo import DPO
from k2lab.engine.objectives.lm import LM
from k2lab.engine.step import forward_backward, to_device
from k2lab.models.losses import linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BOTH = pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])


@BOTH
def test_gpu_equals_cpu_in_fp32(spec) -> None:
    on_cpu, on_gpu, batch = make(spec).train(), make(spec).to("cuda").train(), pack()
    on_gpu.capture_max_logits(tau=0.0)  # below every bound, so maxima are exact
    found = []
    for model in (on_cpu, on_gpu):
        targets, weight = batch.targets_T.to(model.device), batch.weight_T.to(model.device)
        loss, _ = linear_cross_entropy(model.hidden(batch), model.head(), targets, weight)
        loss.backward()
        found.append(loss.detach().cpu())
    assert float((found[0] - found[1]).abs() / found[0]) < 1e-5
    grads = dict(on_cpu.named_parameters())
    for name, parameter in on_gpu.named_parameters():
        assert relative(parameter.grad.cpu(), grads[name].grad) < 1e-3, name
    for layer, values in on_gpu.max_logits().items():
        torch.testing.assert_close(values.cpu(), on_cpu.max_logits()[layer], rtol=1e-3, atol=1e-4)
    assert all(on_gpu.max_logits_exact().values())
    counts = on_cpu.expert_counts()
    assert all(int((c.cpu() - counts[name]).abs().sum()) <= 2 for name, c in on_gpu.expert_counts().items())


@BOTH
@torch.no_grad()
def test_packed_equals_alone_on_a_gpu(spec) -> None:
    model, batch = make(spec).to("cuda"), pack()
    apart = torch.cat([logits(model, part) for part in alone(batch)])
    assert float((logits(model, batch) - apart).abs().max()) < 1e-4


@BOTH
def test_half_precision_trains_and_bounds_hold(spec) -> None:
    model, batch = make(spec, dtype=torch.bfloat16).to("cuda").train(), pack()
    model.capture_max_logits(tau=1e9)
    exact = make(spec).to("cuda").train()
    exact.capture_max_logits(tau=0.0)
    exact.hidden(batch)
    out = logits(model, batch)
    out.float().square().mean().backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for _, parameter in model.named_parameters())
    for layer, bound in model.max_logits().items():
        assert bool((bound >= exact.max_logits()[layer] * 0.97).all())
    assert not any(model.max_logits_exact().values())


@BOTH
def test_generation_on_a_gpu(spec) -> None:
    model = make(spec).to("cuda").eval()
    prompt = pack((10,)).tokens_T[None].cuda()
    out = model.hf.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    full = logits(model, pack((10,)))
    assert int(out[0, 10]) == int(full[-1].argmax())


# Kimi's head widths and tile-sized rest: the shapes that the fast kernels take.
TRUE_HEADS = {
    "hidden_size": 256,
    "vocab_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
}
WIDE = {
    "k2": specs.get("mini-k2").replace(**TRUE_HEADS, num_layers=2, local_heads=()),
    "linear": specs.get("mini-linear").replace(**TRUE_HEADS, num_layers=4, linear_num_heads=2),
}
DOCUMENTS = (300, 17, 512, 1, 64, 130)


@pytest.mark.parametrize("name", WIDE)
def test_bf16_at_true_head_widths_is_near_fp32_on_the_cpu(name: str) -> None:
    wide, batch = make(WIDE[name]), pack(DOCUMENTS, vocab=512, numpy=True)
    half = make(WIDE[name]).to("cuda", torch.bfloat16)
    counts = {"lm": float(batch.num_tokens)}
    expected, seen = forward_backward(wide, LM(), [batch], counts)
    found, on_gpu = forward_backward(half, LM(), [batch], counts)
    assert abs(found["lm"] - expected["lm"]) / expected["lm"] < 5e-3
    for parameter_name, error in gradient_errors(half, wide).items():
        # a token near the border goes to another expert in bf16, so experts and routers differ more than the rest
        assert error < (0.4 if "mlp" in parameter_name else 0.25), (parameter_name, error)
    for layer, values in on_gpu.max_logits.items():
        assert bool((values.cpu() >= seen.max_logits[layer] * 0.95).all()), "neither exact maxima nor bounds lie below"
    for router, count in on_gpu.expert_counts.items():
        assert int(count.sum()) == int(seen.expert_counts[router].sum()) == 2 * len(batch.tokens_T)


@pytest.mark.parametrize("name", WIDE)
def test_a_document_in_a_bf16_pack_does_not_see_its_neighbours(name: str) -> None:
    model, batch = make(WIDE[name]).to("cuda", torch.bfloat16).train(), pack(DOCUMENTS, vocab=512)
    changed = batch.tokens_T.clone()
    changed[:300] = (changed[:300] + 1) % 512
    one = model.hidden(batch)
    other = model.hidden(replace(batch, tokens_T=changed))
    # Rounding may differ where experts' loads differ, so not bit by bit; a leak would be of the order of 1.
    assert relative(other[300:].float(), one[300:].float()) < 2e-2
    assert relative(other[:300].float(), one[:300].float()) > 0.3
    embedding = model.hf.get_input_embeddings()
    seen = []
    handle = embedding.register_forward_hook(lambda module, inputs, out: seen.append(out.retain_grad() or out))
    model.hidden(batch)[317:829].float().square().sum().backward()
    handle.remove()
    grad = seen[0].grad[0]
    assert float(grad[:317].abs().max()) == 0
    assert float(grad[829:].abs().max()) == 0
    assert float(grad[317:829].abs().amax()) > 0


def in_pairs(batch: Batch) -> Batch:
    """Neighbours are a pair; a last document without a neighbour is none."""
    S, zero_T = len(batch.starts_S1) - 1, np.zeros(len(batch.tokens_T), np.float32)
    pair_S, sign_S = np.arange(S) // 2, np.where(np.arange(S) % 2, -1.0, 1.0).astype(np.float32)
    if S % 2:
        pair_S[-1], sign_S[-1] = -1, 0
    return replace(batch, pair_S=pair_S, sign_S=sign_S, streams_T={"ref_logprobs": zero_T})


@pytest.mark.parametrize("objective", [LM(), DPO(sft_weight=0.5)], ids=["lm", "dpo"])
@pytest.mark.parametrize("name", WIDE)
def test_micro_batches_run_without_waiting_for_the_device(name: str, objective: LM | DPO) -> None:
    model = make(WIDE[name]).to("cuda", torch.bfloat16).train()
    model.capture_max_logits(100.0)
    lengths = (DOCUMENTS, (512, 300, 64, 130, 17, 1), (200, 800, 24))
    batches = [in_pairs(pack(each, vocab=512, numpy=True)) for each in lengths]

    def micro(batch: Batch) -> None:
        sums = objective.sums(model, to_device(batch, model.device))
        (sum(sums[term] for term in ("lm", "dpo") if term in sums) / 1000).backward()

    for batch in batches[:2]:  # compiles and plans
        micro(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro(batches[1])
        micro(batches[2])  # lengths not seen before
    finally:
        torch.cuda.set_sync_debug_mode("default")
