"""Modules of compiled kernels: Triton's for CUDA tensors, and on a CPU numba's loops (`_loops`). When these compute in place of
PyTorch's operations, and what both sides need: the memory of tensors as flat arrays, block by block. The bits are the same either
way.

Importing numba takes a quarter of a second, and a loop that this machine has never compiled up to two. Small tensors, which
PyTorch is done with in a millisecond, do not wait for that; once the loops are there, they take those as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch

WORTH = 1 << 18  # elements of a tensor for which numba is imported
BLOCK = 1 << 18  # elements that a thread works on at once
_STORED = {
    torch.bfloat16: torch.uint16,
    torch.float8_e4m3fn: torch.uint8,
    torch.int32: torch.uint8,
}

Reader = Callable[[slice], "np.ndarray[Any, Any]"]


@cache
def module(name: str) -> ModuleType | None:
    """A module of this folder, or None where the library that it needs, numba or Triton, is not installed."""
    try:
        return import_module(f"k2lab.quant.{name}")
    except ImportError:
        return None


def wanted(tensor: torch.Tensor) -> bool:
    """True if the loops should compute this tensor. Those of other classes (which trace, or lie on several devices) have no
    memory to be read."""
    if tensor.device.type != "cpu" or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return tensor.numel() >= WORTH or "k2lab.quant._loops" in sys.modules


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The memory of a contiguous tensor, flat: bf16 as uint16, FP8 codes and words as bytes."""
    return tensor.detach().view(_STORED.get(tensor.dtype, tensor.dtype)).reshape(-1).numpy()


def reader(tensor_NI: torch.Tensor, dtype: torch.dtype, num: int) -> Reader:
    """A function that gives rows (at most `num`) of a matrix as a flat array of `dtype`: a view, or memory that its next call
    overwrites, where the matrix is of another type or does not lie in a row. One for each thread."""
    if tensor_NI.dtype == dtype and tensor_NI.is_contiguous():
        whole = array(tensor_NI)
        width = whole.size // len(tensor_NI)
        return lambda rows: whole[rows.start * width : rows.stop * width]
    room = torch.empty(num, tensor_NI.shape[1], dtype=dtype)

    def read(rows: slice) -> np.ndarray[Any, Any]:
        return array(room[: rows.stop - rows.start].copy_(tensor_NI[rows]))

    return read


def writer(out_NI: torch.Tensor, dtype: torch.dtype, num: int) -> tuple[Reader, Callable[[slice], None]]:
    """(a function that gives the array of `dtype` to write rows into, a function to be called when they are written)."""
    if out_NI.dtype == dtype:
        return reader(out_NI, dtype, num), lambda rows: None
    room = torch.empty(num, out_NI.shape[1], dtype=dtype)

    def written(rows: slice) -> None:
        out_NI[rows] = room[: rows.stop - rows.start]

    return (lambda rows: array(room[: rows.stop - rows.start])), written
