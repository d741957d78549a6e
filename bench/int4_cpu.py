"""INT4 and FP8 grids on a CPU: packing, unpacking, quantising and dequantising one expert's matrix; ours against
compressed-tensors' functions, alternating in one process, same bits.

python bench/int4_cpu.py [--rows 2048] [--columns 7168] [--rounds 15] [--threads 2] [--keep-memory]

MB/s count bytes read and written. `--keep-memory` has the C library keep freed memory, as training does; without it large results
are mapped afresh each time, which is what a program by itself gets.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from train_step import device

from k2lab.models import cpu
from k2lab.quant import compiled, fp8, int4

ARGS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int4.GROUP)


def size(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def race(calls: list[Callable[[], object]], rounds: int) -> list[tuple[float, float]]:
    """(median, fastest) seconds of each call, alternating."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for times, call in zip(taken, calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [(statistics.median(times[1:]), min(times[1:])) for times in taken]


def told(seconds: tuple[float, float], moved: int) -> str:
    median, fastest = seconds
    return f"{median * 1e3:7.2f} ms (fastest {fastest * 1e3:6.2f}) {moved / median / 1e6:6.0f} MB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 2048), ("columns", 7168), ("rounds", 15), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep-memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_memory:
        cpu.keep_memory()
    w = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    codes, scales = int4.int4_grid(w)
    packed, values = int4.pack(codes), int4.values(w)
    codes8, scales8 = fp8.fp8_grid(w)
    assert torch.equal(pack_to_int32(codes, 4), packed) and torch.equal(unpack_from_int32(packed, 4, w.shape), codes)
    assert torch.equal(dequantize(codes, scales, args=ARGS, dtype=torch.bfloat16), values)

    def their_quantise() -> object:
        return pack_to_int32(quantize(w, scales, torch.zeros_like(scales), ARGS, dtype=torch.int8), 4)

    def their_dequantise() -> object:
        return dequantize(unpack_from_int32(packed, 4, w.shape), scales, args=ARGS, dtype=torch.bfloat16)

    rows: list[tuple[str, int, Callable[[], object], Callable[[], object] | None]] = [
        ("pack", size(codes, packed), lambda: int4.pack(codes), lambda: pack_to_int32(codes, 4)),
        ("unpack", size(codes, packed), lambda: int4.unpack(packed), lambda: unpack_from_int32(packed, 4, w.shape)),
        ("quantise", size(w, packed, scales), lambda: int4.quantise(w), their_quantise),
        ("dequantise", size(w, packed, scales), lambda: int4.dequantise(packed, scales), their_dequantise),
        ("grid values", size(w, values), lambda: int4.values(w), None),
        ("fp8 grid", size(w, codes8, scales8), lambda: fp8.fp8_grid(w), None),
        ("fp8 to bf16", size(w, codes8, scales8), lambda: fp8.dequantise(codes8, scales8, torch.bfloat16), None),
        ("copy", 2 * size(w), w.clone, None),
    ]
    print(f"device        {device()}")
    print(
        f"versions      python {platform.python_version()}, torch {torch.__version__}, "
        f"compressed-tensors {version('compressed-tensors')}, "
        + (f"numba {version('numba')}" if compiled.module("_loops") else "without numba")
    )
    print(
        f"problem       a matrix of {options.rows} x {options.columns}, {options.threads} threads, median of {options.rounds}"
        + (", freed memory kept" if options.keep_memory else "")
    )
    for name, moved, ours, theirs in rows:
        mine, *other = race([ours] if theirs is None else [ours, theirs], options.rounds)
        line = f"{name:13s} {told(mine, moved)}"
        for theirs_taken in other:
            ratios = [b / a for a, b in zip(mine, theirs_taken)]
            line += f"   compressed-tensors {told(theirs_taken, moved)}   {ratios[0]:.1f}x (fastest {ratios[1]:.1f}x)"
        print(line)
    print("bits          equal in packing, unpacking and dequantising; its quantising is given our scales and computes in bf16")


if __name__ == "__main__":
    main()
