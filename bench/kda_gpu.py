"""Kimi Delta Attention on one GPU against bare flash-linear-attention, forward and backward.

Kernel: query, key, value, log-decay and beta given, 32 heads of 128, bf16, documents of log-normal lengths (median 600) or one
document, in turns. Layer: hidden 2304 in and out (projections, short convolution, gate, kernel, gated norm, out-projection); ours
computes a long pack in segments, the rival is the same layer in one piece from the library's own functions (at --layer-tokens if
it fits, else four times its time at a quarter of them). Both use the same choices for the library's kernels; those of the rival's
convolution and norms are tuned at the start, over all configurations or evenly spread --configurations of each. Peak memory is
above inputs and parameters; gradients of these are taken off in the second figure.

    python bench/kda_gpu.py [--tokens 65536] [--layer-tokens 262144] [--rounds 5] [--configurations 4] [--write-choices FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from k2lab.core.rng import rng
from k2lab.models import kda_gpu
from k2lab.models.delta import FastKDA
from k2lab.models.kernels import kda_choices
from k2lab.models.norm import FastGatedRMSNorm
from k2lab.models.pack import Pack

HEADS, WIDTH, HIDDEN = 32, 128, 2304


def documents(tokens: int, median: float = 600.0, spread: float = 1.0) -> list[int]:
    """Log-normal document lengths that sum to `tokens`."""
    draw, lengths = rng(0, "bench", "kda-lengths"), []
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(draw.lognormal(np.log(median), spread), 16, 8192)))
    lengths[-1] -= sum(lengths) - tokens
    return [n for n in lengths if n > 0]


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f_a_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.f_b_proj = nn.Linear(WIDTH, HEADS * WIDTH, bias=False)
        self.dt_bias = nn.Parameter(0.5 * torch.randn(HEADS * WIDTH) - 4)
        self.A_log = nn.Parameter(torch.empty(1, 1, HEADS, 1).uniform_(1, 16).log())


class GatedNorm(FastGatedRMSNorm):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.activation = nn.Parameter(torch.ones(WIDTH)), 1e-5, "sigmoid"


class Layer(FastKDA):
    """The parameters of transformers' `KimiLinearDeltaAttention` at Kimi-Linear-48B's size, without a model around it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.conv_kernel_size = HEADS, WIDTH, 4
        channels = HEADS * WIDTH
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(HIDDEN, channels, bias=False) for _ in range(3))
        self.conv1d = nn.Conv1d(3 * channels, 3 * channels, 4, groups=3 * channels, bias=False, padding=3)
        self.forget_gate, self.b_proj = Gate(), nn.Linear(HIDDEN, HEADS, bias=False)
        self.g_a_proj, self.g_b_proj = nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(WIDTH, channels, bias=False)
        self.o_norm, self.o_proj = GatedNorm(), nn.Linear(channels, HIDDEN, bias=False)

    def bare(self, x_TD: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The same in one piece, as the library's own layer does it."""
        from fla.modules.causal_conv1d import causal_conv1d
        from fla.modules.norm.fused_norm_gate import rms_norm_gated
        from fla.ops.kda import chunk_kda

        weights = self.conv1d.weight.squeeze(1).split(HEADS * WIDTH)
        x, heads = x_TD[None], (1, len(x_TD), HEADS, WIDTH)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (
            causal_conv1d(x=proj(x), weight=weight, activation="silu", cu_seqlens=starts)[0].view(heads)
            for proj, weight in zip(projections, weights)
        )
        gate = self.forget_gate
        out, _ = chunk_kda(
            q=q,
            k=k,
            v=v,
            g=gate.f_b_proj(gate.f_a_proj(x)).view(heads),
            beta=self.b_proj(x),
            A_log=gate.A_log.view(-1),
            dt_bias=gate.dt_bias,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            cu_seqlens=starts,
        )
        share = self.g_b_proj(self.g_a_proj(x)).view(heads)
        normed = rms_norm_gated(out, share, self.o_norm.weight, None, activation="sigmoid", eps=self.o_norm.variance_epsilon)
        return self.o_proj(normed.reshape(len(x_TD), -1))


def thin(count: int) -> None:
    """Leaves `count` configurations of every kernel of the library for which no choice is stored."""
    import fla.modules.causal_conv1d
    import fla.modules.norm.fused_norm_gate
    import fla.ops.kda  # noqa: F401
    from triton.runtime.autotuner import Autotuner

    for name in [name for name in sys.modules if name.startswith("fla.")]:
        for thing in list(vars(sys.modules[name]).values()):
            while hasattr(thing, "fn") and not isinstance(thing, Autotuner):
                thing = thing.fn
            if isinstance(thing, Autotuner) and not isinstance(thing.cache, kda_choices.Table):
                step = max(1, len(thing.configs) // count)
                thing.configs = thing.configs[step // 2 :: step][:count]


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak(run: Callable[[], Any]) -> float:
    """GB above what is allocated before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, alternating, after one round of warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            taken[name].append(timed(run))
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def kernel(tokens: int, lengths: list[int], rounds: int) -> None:
    from fla.ops.kda import chunk_kda as bare

    pack = Pack.of(np.cumsum([0, *lengths]), "cuda")
    starts = torch.tensor(pack.starts, device="cuda")
    inputs = [random(1, tokens, HEADS, WIDTH).requires_grad_() for _ in range(3)]
    inputs.append((-1.6 * torch.rand(1, tokens, HEADS, WIDTH, device="cuda")).requires_grad_())
    inputs.append(torch.rand(1, tokens, HEADS, device="cuda").requires_grad_())
    grad = random(1, tokens, HEADS, WIDTH)

    def ours() -> Any:
        out, _ = kda_gpu.chunk_kda(*inputs, use_qk_l2norm_in_kernel=True, pack=pack)
        return torch.autograd.grad(out, inputs, grad)

    def theirs() -> Any:
        out, _ = bare(*inputs, use_qk_l2norm_in_kernel=True, cu_seqlens=starts)
        return torch.autograd.grad(out, inputs, grad)

    far = max(float((a - b).float().norm() / b.float().norm()) for a, b in zip(ours(), theirs()))
    times = in_turns({"ours": ours, "bare": theirs}, rounds)
    ratio = times["ours"] / times["bare"]
    print(
        f"kernel        {tokens} tokens, {len(lengths)} documents: ours {times['ours']:.1f} ms, {peak(ours):.1f} GB; "
        f"bare fla {times['bare']:.1f} ms, {peak(theirs):.1f} GB; {ratio:.3f} of it (must <= 1.05); gradients {far:.1e} apart"
    )


def passes(module: Layer, name: str, tokens: int) -> Callable[[], Any]:
    """Forward and backward of the layer on random tokens, ours or the rival's."""
    pack = Pack.of(np.cumsum([0, *documents(tokens)]), "cuda")
    starts = torch.tensor(pack.starts, device="cuda")
    x, grad, weights = random(tokens, HIDDEN).requires_grad_(), random(tokens, HIDDEN), list(module.parameters())

    def run() -> Any:
        y = module.bare(x, starts) if name == "bare" else module(x[None], k2_pack=pack)[0]
        return torch.autograd.grad(y, [x, *weights], grad)

    return run


def layer(tokens: int, rounds: int) -> None:
    with torch.device("cuda"):
        module = Layer().to(torch.bfloat16)
    for parameter in (module.forget_gate.A_log, module.forget_gate.dt_bias):  # in fp32, as in the library's layer
        parameter.data = parameter.data.float()
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    times: dict[str, float] = {}
    for name, count in (("bare", tokens // 4), ("bare", tokens), ("ours", tokens)):
        run = passes(module, name, count)
        try:
            run()
            taken = statistics.median([timed(run) for _ in range(rounds)])
            most = peak(run)
        except torch.OutOfMemoryError:
            print(f"layer         {count} tokens: {name} does not fit")
            continue
        times[f"{name} {count}"] = taken
        gradients = (count * HIDDEN * 2 + weight_bytes) / 1e9
        print(
            f"layer         {count} tokens: {name} {taken:.1f} ms, peak {most:.2f} GB, {most - gradients:.2f} without gradients"
        )
    mine, whole, quarter = (times.get(key) for key in (f"ours {tokens}", f"bare {tokens}", f"bare {tokens // 4}"))
    if mine is not None and whole is not None:
        print(f"layer         {mine / whole:.2f} of bare fla's time in one piece (must <= 1.4)")
    if mine is not None and quarter is not None:
        print(f"layer         {mine / (4 * quarter):.2f} of four times bare fla's time at {tokens // 4} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 65536), ("layer-tokens", 262144), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--configurations", type=int, default=0, help="of each of the rival's kernels that are tuned; 0 = all")
    parser.add_argument("--write-choices", type=Path, help="write what the kernels' tuners chose on this device")
    options = parser.parse_args()
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "triton", "fla-core"))
    print(f"device        {torch.cuda.get_device_name()}\nversions      {versions}")
    torch.manual_seed(0)
    assert kda_gpu.kernels() is not None, "needs flash-linear-attention"
    if options.configurations:
        thin(options.configurations)
    kernel(options.tokens, documents(options.tokens), options.rounds)
    kernel(options.tokens, [options.tokens], options.rounds)
    layer(options.layer_tokens, options.rounds)
    if options.write_choices:
        options.write_choices.write_text(json.dumps(kda_choices.record(), indent=1) + "\n")


if __name__ == "__main__":
    main()
