"""Newton-Schulz orthogonalisation of stacks of matrices, and the choice of the number type it runs in.

Legend: `B` matrices in a stack, `M` rows, `N` columns, M <= N (the caller transposes): `x_BMN`, `gram_BMM`.

Quintic iteration X <- aX + (bA + cA^2)X with A = X X^T, five steps (Jordan et al. 2024, as used by Moonshot in arXiv 2502.16982).
Singular values end near 1, between about 0.7 and 1.2, and not at it: the coefficients maximise the slope at 0.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7
# The Gram form is exact only while the Gram matrix resolves the small singular values that the iteration amplifies. Its error
# grows about 12-fold per step, so it is formed anew after two steps; then it is as close to float64 as the plain form is.
GRAM_RESTART = 2


def newton_schulz(x_BMN: Tensor, steps: int, bf16: bool) -> Tensor:
    """Orthogonalises each matrix of `x_BMN` (M <= N, float32 or float64; left unchanged).

    Returns [B, M, N] in bfloat16 if `bf16`, else in x's own type. In full precision the iteration runs on the small Gram side
    where that needs fewer multiplications; bfloat16 cannot resolve a Gram matrix and always takes the plain form.
    """
    rows, cols = x_BMN.shape[-2:]
    assert rows <= cols, f"transpose first: {rows} x {cols}"
    norm_B11 = torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True)
    x_BMN = x_BMN / (norm_B11 + EPS)
    if bf16:
        return plain(x_BMN.to(torch.bfloat16), steps)
    return gram(x_BMN, steps) if gram_is_cheaper(rows, cols, steps) else plain(x_BMN, steps)


def plain(x_BMN: Tensor, steps: int) -> Tensor:
    """The iteration as published, on matrices of Frobenius norm <= 1."""
    for _ in range(steps):
        gram_BMM = torch.bmm(x_BMN, x_BMN.mT)
        poly_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=B, alpha=C)
        x_BMN = torch.baddbmm(x_BMN, poly_BMM, x_BMN, beta=A)
    return x_BMN


def gram(x_BMN: Tensor, steps: int) -> Tensor:
    """The same iteration on Gram matrices.

    Every step multiplies X from the left by P = aI + bG + cG^2, a polynomial in G = X X^T; all of them commute, so the next Gram
    matrix is G P^2 and the steps' product Q is applied to X once. Restarted after `GRAM_RESTART` steps.
    """
    for count in phases(steps):
        gram_BMM = torch.bmm(x_BMN, x_BMN.mT)
        product_BMM: Tensor | None = None
        for step in range(count):
            poly_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=B, alpha=C)
            poly_BMM.diagonal(dim1=-2, dim2=-1).add_(A)
            product_BMM = poly_BMM if product_BMM is None else torch.bmm(product_BMM, poly_BMM)
            if step + 1 < count:
                gram_BMM = torch.bmm(torch.bmm(gram_BMM, poly_BMM), poly_BMM)
        if product_BMM is not None:
            x_BMN = torch.bmm(product_BMM, x_BMN)
    return x_BMN


def phases(steps: int) -> list[int]:
    """Lengths of the runs of steps between two Gram matrices formed from X itself."""
    return [count for count in (min(steps, GRAM_RESTART), steps - GRAM_RESTART) if count > 0]


def gram_is_cheaper(rows: int, cols: int, steps: int) -> bool:
    """Compares multiplications in units of rows^2: plain needs 2 cols + rows per step."""
    small = big = 0  # products of M x M matrices, and of M x M with M x N (or M x N with N x M)
    for count in phases(steps):
        small += count + (count - 1) + 2 * (count - 1)  # G^2; Q P; G P P
        big += 2
    return small * rows + big * cols < steps * (2 * cols + rows)


@cache
def choose_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether `ns_dtype = "auto"` means bfloat16 on `device`, and why, in words.

    CUDA: yes where it is native. CPU: only with native bfloat16 products (avx512_bf16, AMX) and only if a short trial measures it
    clearly faster than float32. The trial can fall either way on a borderline machine, so the choice is part of the optimizer's
    saved state and is kept on resume.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return native, "bf16: native on this GPU" if native else "fp32: this GPU has no native bfloat16"
    if device.type != "cpu":
        return False, f"fp32: bfloat16 is not measured on {device.type}"
    unit = _native_bf16()
    if not unit:
        return False, "fp32: this CPU has no native bfloat16 products"
    ratio = _trial()
    if ratio < 0.8:
        return True, f"bf16: native ({unit}), measured {ratio:.2f} x the time of fp32"
    return False, f"fp32: bfloat16 ({unit}) measured {ratio:.2f} x the time of fp32"


def _native_bf16() -> str:
    for name, probe in (("amx", "_is_amx_tile_supported"), ("avx512_bf16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, probe, bool)() and torch.backends.mkldnn.is_available():
            return name
    return ""


def _trial() -> float:
    """Time of bfloat16 over time of float32 for a stack of expert-sized matrices; the best of several interleaved runs.

    One thread and its own CPU time, so that neighbours on a busy machine don't decide.
    """
    x_BMN = torch.ones(8, 128, 256)
    best = {False: float("inf"), True: float("inf")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for attempt in range(6):
            for bf16 in (False, True):
                began = time.thread_time()
                newton_schulz(x_BMN, 5, bf16)
                if attempt:  # the first run warms up
                    best[bf16] = min(best[bf16], time.thread_time() - began)
    finally:
        torch.set_num_threads(threads)
    return best[True] / best[False]
