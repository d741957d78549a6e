"""The same update on a GPU as on the CPU, and the choices that a GPU makes by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from k2lab.core.rng import derive
from k2lab.core.types import RowLayout
from k2lab.optim.muonclip import MuonClip
from k2lab.optim.schedules.constant import Constant

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    "a.q_b_proj.weight": (48, 32),
    "a.kv_b_proj.weight": (64, 16),
    "mlp.experts.gate_up_proj": (4, 64, 32),
    "norm.weight": (32,),
}
LAYOUT = RowLayout(0, "a.q_b_proj.weight", "a.kv_b_proj.weight", 2, 16, 8, 16)


def run(device: str, dtype: torch.dtype, ns_dtype: str) -> tuple[dict[str, torch.Tensor], object]:
    weights = {}
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(derive(3, name) % 2**63)
        weights[name] = nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(device, dtype))
    optim = MuonClip(lr=0.01, schedule=Constant(), ns_dtype=ns_dtype).build(weights.items(), [LAYOUT])
    for step in range(3):
        for name, param in weights.items():
            generator = torch.Generator().manual_seed(derive(4, name, step) % 2**63)
            param.grad = torch.randn(SHAPES[name], generator=generator).to(device, dtype)
        optim.clip(1.0)
        assert optim.step(step, 3, {0: torch.tensor([250.0, 3.0], device=device)}).clipped == {0: [0]}
    return {name: param.detach().cpu().float() for name, param in weights.items()}, optim


def test_gpu_equals_cpu_in_fp32():
    cpu, gpu = run("cpu", torch.float32, "fp32")[0], run("cuda", torch.float32, "fp32")[0]
    for name in SHAPES:
        torch.testing.assert_close(gpu[name], cpu[name], atol=1e-5, rtol=0)


def test_auto_is_bf16_where_native_and_bfloat16_weights_have_masters():
    _, optim = run("cuda", torch.bfloat16, "auto")
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert optim.scalars()["ns_dtype"] == ("bf16" if native else "fp32")
    assert set(optim.masters) == set(SHAPES)
    for name, master in optim.masters.items():
        assert master.device.type == "cuda"
        assert torch.equal(optim.params[name], master.to(torch.bfloat16))
