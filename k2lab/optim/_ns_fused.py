"""Newton-Schulz in 16 bits from two fused products: which products, in which order, in which number types.

Legend: `B` matrices in a stack, `M` rows, `N` columns, M <= N: `x_BMN`, `gram_BMM`.

The products come from outside (`_ns_triton` on a GPU, plain torch in tests), so that the mathematics can be checked anywhere.

float16 resolves eight times finer than bfloat16 at almost the same speed (it draws more power) but has a short range. Entries
here are at most about 1.3 (X), 1.6 (Gram), 3 or 41 (polynomials), so each matrix is kept times a power of two that puts its
largest entries near the top: what float16 then loses is below 1e-9. Matrices as they come, their norm unknown, are bfloat16.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from k2lab.optim._newton_schulz import A, B, C

# Powers of two that entries are multiplied by in float16: X, Gram matrices, polynomials of them.
SCALE_X, SCALE_GRAM, SCALE_POLY = 2.0**10, 2.0**12, 2.0**8
# Steps between two Gram matrices formed from X itself: what 16 bits round away grows about 12-fold per step, into negative
# eigenvalues, which diverge. Over many spectra and shapes 2 + 3 steps had at most the error of the plain bfloat16 form.
GRAM_FIRST, GRAM_NEXT = 2, 3


@cache
def kernels(device: torch.device, wanted: str = "auto") -> tuple[ModuleType | None, str]:
    """(the GPU kernels for `device`, or None where torch's own products are taken; why). `wanted`: auto, torch."""
    if wanted == "torch":
        return None, "torch's products, as the recipe says"
    if device.type != "cuda":
        return None, "torch's products"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != 9:
        return None, f"torch's products: the kernels are for compute capability 9.x, this GPU has {capability[0]}.{capability[1]}"
    if find_spec("triton") is None:
        return None, "torch's products: triton is not installed"
    from k2lab.optim import _ns_triton

    return _ns_triton, "symmetric products in Triton"


def orthogonalise(x_BMN: Tensor, scale_B: Tensor, steps: int, half: torch.dtype, products: ModuleType) -> tuple[Tensor, float]:
    """Orthogonalises `scale_B` x `x_BMN` (bfloat16, M <= N, left unchanged; Frobenius norms <= 1 after scaling).

    `half`: number type from the first product on. On Gram matrices where that is cheaper and `half` is float16: bfloat16 cannot
    resolve them. Returns (U_BMN in `half`, factor): the result is factor x U, a power of two.
    """
    rows, cols = x_BMN.shape[-2:]
    form = gram if half == torch.float16 and symmetric_gram_is_cheaper(rows, cols, steps) else plain
    return form(x_BMN, scale_B, steps, half, products)


def symmetric_gram_is_cheaper(rows: int, cols: int, steps: int) -> bool:
    """Compares multiplications in units of rows^2 / 2 where symmetric products cost half."""
    small = large = 0
    for count in phases(steps):
        small += count + (count - 1) + 2 * (count - 1)
        large += 3
    return small * rows + large * cols < steps * (3 * cols + rows)


def phases(steps: int) -> list[int]:
    """Lengths of the runs of steps between two Gram matrices formed from X itself."""
    rest = max(0, steps - GRAM_FIRST)
    return [min(steps, GRAM_FIRST), *(min(GRAM_NEXT, rest - at) for at in range(0, rest, GRAM_NEXT))]


def plain(x_BMN: Tensor, scale_B: Tensor, steps: int, half: torch.dtype, products: ModuleType) -> tuple[Tensor, float]:
    """The iteration as published on `scale_B` x `x_BMN`; arguments and result as in `orthogonalise`.

    Two of its three products per step are symmetric. In float16 the third is P X with aI inside P; in bfloat16 aX is added to it,
    because P's rounded diagonal would cost as much as rounding X once more.
    """
    sx, sg, sp = _scales(half)
    count, rows, _ = x_BMN.shape
    gram_BMM = x_BMN.new_empty(count, rows, rows, dtype=half)
    at = 1.0  # what X is multiplied by at present
    for step in range(steps):
        inside, scale = x_BMN.dtype == torch.float16, scale_B if step == 0 else None
        products.symmetric(x_BMN, x_BMN, gram_BMM, sg / at**2, scale_B=scale)
        poly_BMM = torch.empty_like(gram_BMM, dtype=x_BMN.dtype)
        diagonal = sp * A if inside else 0.0
        products.symmetric(gram_BMM, gram_BMM, poly_BMM, sp * C / sg**2, plus=(sp * B / sg, gram_BMM), diagonal=diagonal)
        plus = None if inside else (A * sx / at, x_BMN)
        x_BMN = products.times(poly_BMM, x_BMN, torch.empty_like(x_BMN, dtype=half), sx / (sp * at), plus=plus, scale_B=scale)
        at = sx
    return x_BMN, 1.0 / at


def gram(x_BMN: Tensor, scale_B: Tensor, steps: int, half: torch.dtype, products: ModuleType) -> tuple[Tensor, float]:
    """The same iteration on Gram matrices, restarted more often than in float32 (`_newton_schulz.gram`); arguments as in `plain`.

    A step multiplies X by P = aI + bG + cG^2, all of which commute, so a phase's steps make one Q, and all products but those
    with X itself are symmetric. The first phase keeps Q - qI, with the q that small singular values get, and adds qX at the end:
    there Q is close to qI and would lose what differs, most of all since it is rounded to X's bfloat16.
    """
    sx, sg, sp = _scales(half)
    at = 1.0
    for index, count in enumerate(phases(steps)):
        scale = scale_B if index == 0 else None
        gram_BMM = x_BMN.new_empty(x_BMN.shape[0], x_BMN.shape[1], x_BMN.shape[1], dtype=half)
        products.symmetric(x_BMN, x_BMN, gram_BMM, sg / at**2, scale_B=scale)
        product_BMM = _phase(gram_BMM, count, x_BMN.dtype, index == 0, (sg, sp), products)
        plus = (A**count * sx / at, x_BMN) if index == 0 else None
        x_BMN = products.times(product_BMM, x_BMN, torch.empty_like(x_BMN, dtype=half), sx / (sp * at), plus=plus, scale_B=scale)
        at = sx
    return x_BMN, 1.0 / at


def _phase(
    gram_BMM: Tensor, count: int, dtype: torch.dtype, without_q: bool, scales: tuple[float, float], products: ModuleType
) -> Tensor:
    """Q of `count` steps from a Gram matrix, or Q - qI, in `dtype`, which is that of the X it will meet."""
    sg, sp = scales
    product_BMM: Tensor | None = None
    for step in range(count):
        last = step + 1 == count
        alone = last and product_BMM is None
        poly_BMM = torch.empty_like(gram_BMM, dtype=dtype if alone else gram_BMM.dtype)
        diagonal = 0.0 if alone and without_q else sp * A
        products.symmetric(gram_BMM, gram_BMM, poly_BMM, sp * C / sg**2, plus=(sp * B / sg, gram_BMM), diagonal=diagonal)
        if product_BMM is None:
            product_BMM = poly_BMM
        else:
            out_BMM = torch.empty_like(gram_BMM, dtype=dtype if last else gram_BMM.dtype)
            diagonal = -sp * A**count if last and without_q else 0.0
            product_BMM = products.symmetric(poly_BMM, product_BMM, out_BMM, 1.0 / sp, diagonal=diagonal)
        if not last:  # the next Gram matrix is P G P
            half_way_BMM = products.symmetric(gram_BMM, poly_BMM, torch.empty_like(gram_BMM), 1.0 / sp)
            gram_BMM = products.symmetric(half_way_BMM, poly_BMM, torch.empty_like(gram_BMM), 1.0 / sp)
    assert product_BMM is not None
    return product_BMM


def _scales(half: torch.dtype) -> tuple[float, float, float]:
    return (SCALE_X, SCALE_GRAM, SCALE_POLY) if half == torch.float16 else (1.0, 1.0, 1.0)
