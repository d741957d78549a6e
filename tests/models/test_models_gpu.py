"""The same models on a GPU and on the CPU: logits, gradients, maxima, decoding, half precision."""

from __future__ import annotations

import pytest
import torch
from model_samples import K2, LINEAR, alone, logits, make, pack, relative

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
