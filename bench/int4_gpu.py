"""INT4 and FP8 on one GPU, ours and the rivals' side by side in one run: decoding and coding against a copy, LoRA on packed
experts against LoRA on bf16 experts, quantisation-aware training against plain training.

    python bench/int4_gpu.py [--only codec lora qat few] [--repeats 20]

Every time is a median of calls that follow each other without waiting for the device; tensors are larger than its cache. A byte
counts where it is read and where it is written. Rivals: compressed-tensors (if it can be imported) and the same arithmetic in
PyTorch, plain and under torch.compile.

Legend: `T` tokens, `D` width, `F` expert hidden width, `E` experts, `K` choices, `r` rank.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _gpu import Clocks, about, clock, forget, peak_gb, reset_peak, timed

from k2lab.models import experts_gpu, packed_gpu, qat
from k2lab.models.gemm import adding_weight_gradients
from k2lab.models.packed import Dense, ExpertLoRA, Packed
from k2lab.quant import fp8, int4

DEVICE = torch.device("cuda")
# (name, T, D, F, E, K): a layer of mini-2b, and 16 experts of K2's widths.
LAYERS = (("mini-2b", 32_768, 2048, 1024, 64, 8), ("K2 widths", 8_192, 7168, 2048, 16, 8))


def median(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds."""
    for _ in range(3):
        call()
    return statistics.median(timed([call] * repeats, DEVICE)) * 1e3


def medians(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of each, taken in turns, so that all of them see the same clocks and the same power limit."""
    for call in calls.values():
        call()
    seconds = timed([*calls.values()] * (repeats + 1), DEVICE)[len(calls) :]
    return {name: statistics.median(seconds[n :: len(calls)]) * 1e3 for n, name in enumerate(calls)}


def peak_of(call: Callable[[], Any]) -> float:
    """GB."""
    reset_peak(DEVICE)
    call()
    return peak_gb(DEVICE)


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """bf16, normal."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16) * scale


# ---------------------------------------------------------------- decoding and coding


def plain_dequantise(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What a few lines of PyTorch do."""
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    codes = ((packed.unsqueeze(-1) >> shifts) & 15) - 8
    codes = codes.flatten(-2).unflatten(-1, (-1, int4.GROUP))
    return (codes.to(torch.bfloat16) * scales.unsqueeze(-1)).flatten(-2)


def plain_values(w: torch.Tensor) -> torch.Tensor:
    groups = w.unflatten(-1, (-1, int4.GROUP)).float()
    scales = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=2.0**-126).to(torch.bfloat16).float()
    return ((groups / scales).round().clamp(-7, 7) * scales).to(torch.bfloat16).flatten(-2)


def compressed_tensors() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """compressed-tensors' own decompression of one matrix, or None where it cannot be imported."""
    try:
        from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    except Exception as error:  # a wheel that does not fit this interpreter fails in many ways
        print(f"  compressed-tensors cannot be imported: {error!r:.200}")
        return None
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=int4.GROUP, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def decompress(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        shape = torch.tensor([packed.shape[0], packed.shape[1] * 8])
        held = {"weight_packed": packed, "weight_scale": scales, "weight_shape": shape}
        return PackedQuantizationCompressor.decompress(held, scheme)["weight"]

    return decompress


def codec(repeats: int) -> None:
    rows, columns = 131_072, 4096  # 537 M weights
    w = draw(rows, columns, scale=0.02)
    packed, scales = int4.quantise(w)
    target = torch.empty_like(w)
    copied = median(lambda: target.copy_(w), repeats)
    bandwidth = 2 * w.nbytes / copied / 1e9
    print(f"{clock()} copy of {w.nbytes / 1e9:.2f} GB: {copied:.3f} ms, {bandwidth:.2f} TB/s")

    def line(name: str, call: Callable[[], Any], moved: float, number: int = repeats) -> None:
        ms = median(call, number)
        print(f"  {name:52s} {ms:9.3f} ms {moved / ms / 1e9:6.2f} TB/s {100 * moved / ms / 1e9 / bandwidth:6.1f} % of the copy")

    read = packed.nbytes + scales.nbytes
    line("INT4 -> bf16, ours", lambda: int4.dequantise(packed, scales), read + w.nbytes)
    fused = torch.compile(plain_dequantise)
    assert torch.equal(fused(packed, scales), int4.dequantise(packed, scales))
    line("INT4 -> bf16, torch.compile", lambda: fused(packed, scales), read + w.nbytes)
    part = rows // 8  # plain operations need many times the memory
    eighth = (read + w.nbytes) / 8
    line("INT4 -> bf16, plain torch", lambda: plain_dequantise(packed[:part], scales[:part]), eighth, 5)
    theirs = compressed_tensors()
    if theirs is not None:
        found, ours = theirs(packed[:part], scales[:part]), int4.dequantise(packed[:part], scales[:part])
        differing = int((found != ours).sum())
        line("INT4 -> bf16, compressed-tensors", lambda: theirs(packed[:part], scales[:part]), eighth, 5)
        print(f"    {found.dtype}, {differing} of {ours.numel()} values differ from ours")
    from k2lab.quant import _int4_triton

    line("bf16 -> INT4, ours", lambda: _int4_triton.quantise(w, int4.GROUP), w.nbytes + read)
    line("unpack, ours", lambda: int4.unpack(packed), packed.nbytes + w.nbytes / 2)
    line("fake quantisation, ours", lambda: int4.values(w), 2 * w.nbytes)
    fused_values = torch.compile(plain_values)
    line("fake quantisation, torch.compile", lambda: fused_values(w), 2 * w.nbytes)
    codes8, scale8 = fp8.fp8_grid(w)
    line("FP8 -> bf16, ours", lambda: fp8.dequantise(codes8, scale8, torch.bfloat16), codes8.nbytes + w.nbytes)
    line("FP8 -> fp32, ours", lambda: fp8.dequantise(codes8, scale8), codes8.nbytes + 2 * w.nbytes)
    line("bf16 -> FP8, ours", lambda: fp8.fp8_grid(w), codes8.nbytes + w.nbytes)


# ---------------------------------------------------------------- layers


def layer(T: int, D: int, F: int, E: int, K: int) -> tuple[torch.Tensor, ...]:
    """x, chosen, weights, gate_up, down, gradient of the output."""
    torch.manual_seed(0)
    chosen = torch.rand(T, E, device=DEVICE).topk(K, dim=1)[1]
    weights = torch.rand(T, K, device=DEVICE)
    return draw(T, D), chosen, weights, draw(E, 2 * F, D, scale=D**-0.5), draw(E, D, F, scale=F**-0.5), draw(T, D)


def low_rank(D: int, F: int, E: int, r: int) -> ExpertLoRA:
    shapes = ((r, D), (F, r), (r, D), (F, r), (r, F), (D, r))
    return ExpertLoRA(*(draw(E, *shape, scale=0.02).requires_grad_() for shape in shapes), 2.0)


def step(x, chosen, weights, base, lora: ExpertLoRA | None, grad, many: int) -> Callable[[], Any]:
    """Forward and backward of the frozen layer; `many` rows per expert and more are decoded beforehand."""
    leaves = [x.detach().requires_grad_(), weights.detach().requires_grad_(), *(lora.factors if lora else ())]

    def call() -> Any:
        packed_gpu.MANY = many
        return torch.autograd.grad(packed_gpu.experts(leaves[0], chosen, leaves[1], base, lora), leaves, grad)

    return call


def steps(x, chosen, weights, base: Packed, dense: Dense, lora: ExpertLoRA | None, grad) -> dict[str, Callable[[], Any]]:
    """The same layer with bf16 weights and with codes."""
    return {
        "bf16": step(x, chosen, weights, dense, lora, grad, 0),
        "INT4, decoded beforehand": step(x, chosen, weights, base, lora, grad, 0),
        "INT4, decoded in tiles": step(x, chosen, weights, base, lora, grad, 1 << 30),
    }


def lora(repeats: int) -> None:
    for name, T, D, F, E, K in LAYERS:
        x, chosen, weights, gate_up, down, grad = layer(T, D, F, E, K)
        base = Packed(*int4.quantise(gate_up), *int4.quantise(down))
        dense = Dense(int4.values(gate_up), int4.values(down))
        held = [sum(t.nbytes for t in kind) for kind in (base, dense)]
        print(f"{clock()} LoRA, {name}: {T} tokens, {E} experts, top {K}, {D} x {F}")
        print(f"  weights {held[0] / 1e9:.3f} GB packed, {held[1] / 1e9:.3f} GB in bf16: {held[0] / held[1]:.3f}x")
        for r in (0, 16, 64):
            calls = steps(x, chosen, weights, base, dense, low_rank(D, F, E, r) if r else None, grad)
            with Clocks(DEVICE) as clocks:
                taken = medians(calls, repeats)
            for kind, ms in taken.items():
                print(f"  rank {r:3d} {kind:26s} {ms:8.2f} ms {ms / taken['bf16']:6.3f}x, peak {peak_of(calls[kind]):.2f} GB")
            print(f"  {clocks.said}")
        del base, dense, gate_up, down
        forget()


def few(repeats: int) -> None:
    """From how many rows per expert on decoding beforehand pays."""
    name, _, D, F, E, K = LAYERS[0]
    for T in (64, 512, 1024, 2048, 4096, 8192, 16_384):
        x, chosen, weights, gate_up, down, grad = layer(T, D, F, E, K)
        base = Packed(*int4.quantise(gate_up), *int4.quantise(down))
        dense = Dense(int4.values(gate_up), int4.values(down))
        taken = medians(steps(x, chosen, weights, base, dense, None, grad), repeats)
        said = ", ".join(f"{kind} {ms:.3f} ms" for kind, ms in taken.items())
        print(f"{clock()} {name}, {T} tokens, {T * K // E} rows per expert: {said}")


def training(leaves: list[torch.Tensor], chosen: torch.Tensor, grad: torch.Tensor, seen: qat.Seen | None) -> Callable[[], Any]:
    """Forward and backward of the layer, weight gradients included."""

    def call() -> None:
        out = experts_gpu.experts(leaves[0], chosen, *leaves[1:], seen)
        with adding_weight_gradients():
            out.backward(grad)

    return call


def qat_step(repeats: int) -> None:
    for name, T, D, F, E, K in LAYERS:
        x, chosen, weights, gate_up, down, grad = layer(T, D, F, E, K)
        leaves = [t.requires_grad_() for t in (x, weights, gate_up, down)]
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        print(f"{clock()} QAT, {name}: {T} tokens, {E} experts, top {K}, {D} x {F}; weight gradients are added in place")
        calls = {"bf16": training(leaves, chosen, grad, None), "values of the grid": training(leaves, chosen, grad, qat.fresh)}
        taken = medians(calls, repeats)
        for kind, ms in taken.items():
            print(f"  {kind:26s} {ms:8.2f} ms {ms / taken['bf16']:6.3f}x, peak {peak_of(calls[kind]):.2f} GB")
        del leaves, x, weights, gate_up, down
        forget()


PARTS = {"codec": codec, "lora": lora, "qat": qat_step, "few": few}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    print(about(DEVICE))
    for part in arguments.only:
        PARTS[part](arguments.repeats)
