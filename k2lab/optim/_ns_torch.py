"""The fused products of Newton-Schulz (see `_ns_triton`) by torch alone: for CPUs, for other GPUs, and as their reference.

Legend: `B` matrices in a stack, `M` rows, `N` columns: `x_BMN`, `gram_BMM`. Both halves of a symmetric product are computed and
one is mirrored, as in the kernels: the Gram form needs its matrices symmetric to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fits(rows: int, cols: int) -> bool:
    """Any shape."""
    return True


def symmetric(
    left_BMK: Tensor,
    right_BMK: Tensor,
    out_BMM: Tensor,
    alpha: float,
    *,
    plus: tuple[float, Tensor] | None = None,
    scale_B: Tensor | None = None,
    diagonal: float = 0.0,
) -> Tensor:
    """out = (alpha left right^T + beta C) scale^2 + diagonal I; `plus`: (beta, C). Returns `out_BMM`."""
    sums_BMM = _sums(left_BMK, right_BMK.mT, alpha, plus, None if scale_B is None else scale_B.square())
    if diagonal:
        sums_BMM.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return out_BMM.copy_(sums_BMM.triu() + sums_BMM.triu(1).mT)


def times(
    left_BMM: Tensor,
    x_BMN: Tensor,
    out_BMN: Tensor,
    alpha: float,
    *,
    plus: tuple[float, Tensor] | None = None,
    scale_B: Tensor | None = None,
) -> Tensor:
    """out = (alpha left x + beta C) scale. Returns `out_BMN`."""
    return out_BMN.copy_(_sums(left_BMM, x_BMN, alpha, plus, scale_B))


def _sums(
    left: Tensor,
    right: Tensor,
    alpha: float,
    plus: tuple[float, Tensor] | None,
    scale_B: Tensor | None,
) -> Tensor:
    sums = torch.bmm(left.float(), right.float()).mul_(alpha)
    if plus is not None:
        sums.add_(plus[1], alpha=plus[0])
    return sums if scale_B is None else sums.mul_(scale_B[:, None, None])
