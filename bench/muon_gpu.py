"""What MuonClip costs on one GPU: Newton-Schulz of stacks of experts, and the whole update of a 2.3 B parameter model.

Newton-Schulz: five quintic steps, ours against the same five steps by batched products under torch.compile, in one run, on the
same bfloat16 inputs; errors are relative Frobenius distances to the float32 quintic. TFLOP/s are counted with the operations of
the plain form, 5 (4 M^2 N + 2 M^3) per matrix, for both sides.

Update: the parameters of a K2-shaped model (hidden 2048, 6 layers of which one dense of width 8192, 16 heads, latents 1536 and
512, 64 experts of width 1024 and one shared, vocabulary 32,768 untied), bfloat16 with float32 masters and random gradients:
clipping, MuonClip and QK-Clip against AdamW, ours with masters and torch's fused one, which keeps its moments in bfloat16.

    python bench/muon_gpu.py [--rounds 8] [--experts 64] [--only ns|step] [--momentum bf16] [--offload]
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from k2lab.core.types import RowLayout
from k2lab.optim import _newton_schulz, _ns_fused, _table
from k2lab.optim.adamw import AdamW
from k2lab.optim.muonclip import MuonClip
from k2lab.optim.schedules.constant import Constant

LAYERS, WIDTH, HEADS, VOCAB, EXPERTS, EXPERT_WIDTH = 6, 2048, 16, 32768, 64, 1024
NOPE, ROPE, VALUE, QUERY_LATENT, LATENT = 128, 64, 128, 1536, 512


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's parameters."""
    yield "model.embed_tokens.weight", (VOCAB, WIDTH)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_a_proj.weight", (QUERY_LATENT, WIDTH)
        yield f"{at}.self_attn.q_a_layernorm.weight", (QUERY_LATENT,)
        yield f"{at}.self_attn.q_b_proj.weight", (HEADS * (NOPE + ROPE), QUERY_LATENT)
        yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", (LATENT + ROPE, WIDTH)
        yield f"{at}.self_attn.kv_a_layernorm.weight", (LATENT,)
        yield f"{at}.self_attn.kv_b_proj.weight", (HEADS * (NOPE + VALUE), LATENT)
        yield f"{at}.self_attn.o_proj.weight", (WIDTH, HEADS * VALUE)
        yield f"{at}.input_layernorm.weight", (WIDTH,)
        yield f"{at}.post_attention_layernorm.weight", (WIDTH,)
        if layer:
            yield f"{at}.mlp.gate.weight", (EXPERTS, WIDTH)
            yield f"{at}.mlp.experts.gate_up_proj", (EXPERTS, 2 * EXPERT_WIDTH, WIDTH)
            yield f"{at}.mlp.experts.down_proj", (EXPERTS, WIDTH, EXPERT_WIDTH)
        part, width = ("mlp.shared_experts", EXPERT_WIDTH) if layer else ("mlp", 8192)
        yield f"{at}.{part}.gate_proj.weight", (width, WIDTH)
        yield f"{at}.{part}.up_proj.weight", (width, WIDTH)
        yield f"{at}.{part}.down_proj.weight", (WIDTH, width)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCAB, WIDTH)


def layouts() -> list[RowLayout]:
    names = [f"model.layers.{layer}.self_attn.{part}_b_proj.weight" for layer in range(LAYERS) for part in ("q", "kv")]
    return [RowLayout(n, names[2 * n], names[2 * n + 1], HEADS, NOPE, ROPE, VALUE) for n in range(LAYERS)]


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Median of `rounds` timings by CUDA events after two to warm up."""
    for _ in range(2):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in zip(marks, marks[1:]))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def newton_schulz(count: int, rows: int, cols: int, rounds: int) -> None:
    """One table: the rival, then ours in each number type."""
    x_BMN = torch.randn(count, rows, cols, device="cuda")
    norms_B = torch.linalg.vector_norm(x_BMN, dim=(1, 2))
    exact_BMN = _newton_schulz.newton_schulz(x_BMN[:8], 5, bf16=False)
    unit_BMN = (x_BMN / (norms_B[:, None, None] + _newton_schulz.EPS)).to(torch.bfloat16)
    x_BMN, scale_B = x_BMN.to(torch.bfloat16), 1.0 / (norms_B + _newton_schulz.EPS)
    flops = 5 * count * (4 * rows * rows * cols + 2 * rows**3)
    kernels, why = _ns_fused.kernels(x_BMN.device)
    print(f"Newton-Schulz of {count} matrices {rows} x {cols}, five quintic steps ({why})")
    compiled = torch.compile(_newton_schulz.plain)
    base = milliseconds(lambda: compiled(unit_BMN, 5), rounds)
    plain_error = error(_newton_schulz.plain(unit_BMN[:8], 5), exact_BMN)
    print(f"  {'compiled quintic bf16':24s} {base:7.2f} ms  {flops / base / 1e9:5.0f} TFLOP/s  error {plain_error:.5f}")
    if kernels is None:
        return
    default = torch.float16 if _ns_fused.symmetric_gram_is_cheaper(rows, cols, 5) else torch.bfloat16
    for half in (torch.bfloat16, torch.float16):
        name = f"ours {'bf16' if half == torch.bfloat16 else 'fp16'}{' (default)' if half == default else ''}"
        work = lambda half=half: _ns_fused.orthogonalise(x_BMN, scale_B, 5, half, kernels)  # noqa: E731
        taken = milliseconds(work, rounds)
        update_BMN, factor = work()
        off = error(update_BMN[:8].float() * factor, exact_BMN)
        print(
            f"  {name:24s} {taken:7.2f} ms  {flops / taken / 1e9:5.0f} TFLOP/s  error {off:.5f} ({off / plain_error:.2f} x)  "
            f"{base / taken:.2f}x as fast"
        )


def counts(momentum: str) -> None:
    """What the update must hold, move and multiply: the floor under its time."""
    rows = _table.make(((name, shape, True) for name, shape in shapes()), muon=True, weight_decay=0.1)
    sizes = {kind: sum(math.prod(row.shape) for row in rows if row.optimizer == kind) for kind in ("muon", "adamw")}
    total, state = sum(sizes.values()), 4 if momentum == "fp32" else 2
    held = {"weights": 2 * total, "gradients": 2 * total, "masters": 4 * total}
    held |= {"momentum": state * sizes["muon"], "AdamW moments": 8 * sizes["adamw"]}
    # Norm: gradients once. Muon: gradient, momentum and master twice, stack twice, weight. AdamW: the like, a copied gradient.
    moved = 2 * total + sizes["muon"] * (2 + 2 * state + 2 + 2 + 8 + 2) + sizes["adamw"] * (2 + 8 + 24 + 6)
    flops = 0
    for row in rows:
        if row.optimizer == "muon":
            small, large = sorted(_table.matrix_shape(row.shape, row.split))
            flops += 5 * math.prod(row.shape) // (small * large) * (4 * small * small * large + 2 * small**3)
    print(
        f"  holds  {', '.join(f'{name} {size / 1e9:.1f} GB' for name, size in held.items())}: {sum(held.values()) / 1e9:.1f} GB"
    )
    print(f"  moves  {moved / 1e9:.1f} GB beside Newton-Schulz: {moved / 3e9:.1f} ms at 3.0 TB/s")
    print(f"  plain Newton-Schulz {flops / 1e12:.1f} TFLOP: {flops / 600e9:.1f} ms at 600 TFLOP/s")


class TorchAdamW:
    """torch's fused AdamW on the bfloat16 parameters themselves."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        self.params = list(params.values())
        self.optim = torch.optim.AdamW(self.params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def clip(self, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.params, max_norm))

    def step(self, step: int, total_steps: int, max_logits: object) -> None:
        self.optim.step()


def update(name: str, build: Callable[[dict[str, nn.Parameter]], object], rounds: int) -> float:
    """Times clipping and update of the whole model; prints one line and returns milliseconds."""
    params = {key: nn.Parameter(0.02 * torch.randn(shape, device="cuda", dtype=torch.bfloat16)) for key, shape in shapes()}
    for param in params.values():
        param.grad = 1e-4 * torch.randn_like(param)
    torch.cuda.reset_peak_memory_stats()
    optim = build(params)
    held = torch.cuda.memory_allocated()
    maxima = {layer: torch.full((HEADS,), 50.0, device="cuda") for layer in range(LAYERS)}
    maxima[1][3] = 120.0  # one head to clip
    clip = milliseconds(lambda: optim.clip(1e9), rounds)
    step = milliseconds(lambda: optim.step(0, 1000, maxima), rounds)
    whole = milliseconds(lambda: (optim.clip(1.0), optim.step(0, 1000, maxima)), rounds)
    print(
        f"  {name:32s} {whole:7.1f} ms (norm {clip:.1f}, update {step:.1f}); "
        f"held {held / 1e9:.1f} GB, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
    )
    return whole


def steps(rounds: int, momentum: str, offload: bool) -> None:
    total = sum(torch.Size(shape).numel() for _, shape in shapes())
    print(f"clip + update of {total:,} parameters, bfloat16")
    counts(momentum)
    constant = Constant()
    muonclip = {"lr": 1e-4, "schedule": constant, "momentum_dtype": momentum}
    sides: dict[str, Callable[[dict[str, nn.Parameter]], object]] = {
        "torch AdamW fused, bf16 state": TorchAdamW,
        "AdamW, fp32 masters": lambda p: AdamW(lr=1e-4, schedule=constant).build(p.items(), []),
        "MuonClip, torch's products": lambda p: MuonClip(**muonclip, ns_kernel="torch").build(p.items(), layouts()),
        "MuonClip, fp32 masters": lambda p: MuonClip(**muonclip).build(p.items(), layouts()),
        "MuonClip, stochastic rounding": lambda p: MuonClip(**muonclip, master="stochastic").build(p.items(), layouts()),
    }
    if offload:
        sides["MuonClip, state on the host"] = lambda p: MuonClip(**muonclip, offload="cpu").build(p.items(), layouts())
    for name, build in sides.items():
        try:
            update(name, build, rounds)
        except torch.OutOfMemoryError:
            print(f"  {name:32s} out of memory")
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--only", choices=("ns", "step"))
    parser.add_argument("--momentum", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--offload", action="store_true", help="also with the state in the host's memory (takes 20 GB of it)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/muon_gpu.py needs a CUDA device; on CPUs take bench/muonclip_step.py")
    import triton

    print(f"device    {torch.cuda.get_device_name()}")
    print(f"versions  torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}")
    if options.only != "step":
        for rows, cols, count in ((2048, 2048, options.experts), (1024, 2048, 2 * options.experts)):
            newton_schulz(count, rows, cols, options.rounds)
    if options.only != "ns":
        with torch.no_grad():
            steps(options.rounds, options.momentum, options.offload)


if __name__ == "__main__":
    main()
