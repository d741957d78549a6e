"""Chunked Kimi Delta Attention, forward and backward on a CPU: ours against transformers' fallback, alternating in one process.

python bench/kda_cpu.py [--tokens 2048] [--heads 4] [--width 64] [--rounds 5] [--threads 2] [--documents 1]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from train_step import device
from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

from k2lab.core.rng import rng
from k2lab.models import cpu
from k2lab.models.kda import chunk_kda
from k2lab.models.pack import Pack


def inputs(tokens: int, heads: int, width: int) -> list[torch.Tensor]:
    """query, key, value, g, beta as a layer at initialisation would see them."""
    draw = rng(0, "bench", "kda")
    q, k, v = (torch.from_numpy(draw.standard_normal((1, tokens, heads, width), dtype="float32")) for _ in range(3))
    g = -torch.from_numpy(draw.uniform(0.001, 1.6, (1, tokens, heads, width)).astype("float32"))
    beta = torch.from_numpy(draw.uniform(0.0, 1.0, (1, tokens, heads)).astype("float32"))
    return [x.requires_grad_() for x in (q, k, v, g, beta)]


def timed(kernel: Callable[..., tuple[torch.Tensor, None]], tensors: list[torch.Tensor]) -> tuple[float, float, torch.Tensor]:
    """(wall seconds, CPU seconds, output) of forward and backward."""
    for tensor in tensors:
        tensor.grad = None
    wall, used = time.perf_counter(), time.process_time()
    out, _ = kernel(*tensors, use_qk_l2norm_in_kernel=True)
    out.sum().backward()
    return time.perf_counter() - wall, time.process_time() - used, out.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("heads", 4), ("width", 64), ("rounds", 5), ("threads", 2), ("documents", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu.keep_memory()
    tensors = inputs(options.tokens, options.heads, options.width)
    cuts = [options.tokens * n // options.documents for n in range(options.documents + 1)]
    pack = Pack(tuple(cuts), torch.device("cpu"))
    kernels = {"ours": lambda *x, **flags: chunk_kda(*x, **flags, pack=pack), "transformers": chunk_kimi_delta_attention}
    print(f"device        {device()}")
    print(f"versions      python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(
        f"problem       {options.tokens} tokens in {options.documents} documents, {options.heads} heads of {options.width}, fp32"
    )
    taken: dict[str, list[tuple[float, float, torch.Tensor]]] = {name: [] for name in kernels}
    gradients = {}
    for _ in range(options.rounds + 1):
        for name, kernel in kernels.items():
            taken[name].append(timed(kernel, tensors))
            gradients[name] = [tensor.grad.clone() for tensor in tensors]
    medians = {}
    for name, results in taken.items():
        wall, used = (statistics.median(r[i] for r in results[1:]) for i in (0, 1))
        medians[name] = wall
        fastest = min(r[0] for r in results) * 1e3
        print(f"{name:13s} {wall * 1e3:.1f} ms forward + backward (fastest {fastest:.1f}), {used * 1e3:.1f} CPU ms")
    print(f"ratio         {medians['transformers'] / medians['ours']:.2f}x")
    if options.documents == 1:
        a, b = taken["ours"][-1][2], taken["transformers"][-1][2]
        worst = max(float((x - y).norm() / y.norm()) for x, y in zip(gradients["ours"], gradients["transformers"]))
        apart, largest = float((a - b).abs().max()), float(b.abs().max())
        print(f"difference    {apart:.1e} of outputs up to {largest:.2f}; gradients {worst:.1e} relative")
    else:
        print("difference    not comparable: transformers' fallback has no document boundaries")


if __name__ == "__main__":
    main()
