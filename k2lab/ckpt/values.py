"""Reading all values of a checkpoint once, in pieces, to refuse what no training leaves behind: NaN, infinity, matrices of zeros,
scales that are no scales.

Legend: matrices are [out, in]. Types are judged by their bits, so that nothing is converted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from k2lab.core.errors import CheckpointError
from k2lab.core.types import TensorInfo

if TYPE_CHECKING:
    from k2lab.ckpt.folder import Folder

PIECE_BYTES = 8 << 20
# Kinds of `specs` tensors that may be zero all over: biases (a router's correction bias begins there), the log of a decay of 1.
_MAY_BE_ZERO = ("vector", "fp32_vector")
# A float is NaN or infinite if all bits of its exponent are set: the stand-in integer type and these bits.
_EXPONENT = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
}


def check_values(folder: Folder) -> None:
    """Raises CheckpointError, naming tensor and file, for the first tensor whose values cannot be those of a model. Memory: one
    piece of 8 MiB and what judging it takes."""
    for tensor in folder.spec.tensors():
        for expert in range(tensor.count):
            name = tensor.name.replace("{e}", str(expert)) if tensor.count > 1 else tensor.name
            info = folder.info(name)
            zero = _CHECKS[info.format](folder, name, info)
            if zero and tensor.kind not in _MAY_BE_ZERO:
                raise _wrong(folder, folder.stored(name)[0], "all values of this tensor are zero", "0 everywhere")


def _wrong(folder: Folder, stored: str, what: str, got: object, allowed: str | None = None) -> CheckpointError:
    return CheckpointError(
        what,
        where=f"{stored} in {folder.file_of(stored).path}",
        got=got,
        allowed=allowed,
        next="Fetch the file again, or take an earlier checkpoint",
    )


def _pieces(folder: Folder, stored: str) -> Iterator[torch.Tensor]:
    """The stored tensor in pieces of whole rows, each as a flat row-major tensor."""
    file = folder.file_of(stored)
    entry = file.entries[stored]
    rows = entry.shape[0] if entry.shape else 1
    step = max(1, PIECE_BYTES // max(1, entry.size // max(1, rows)))
    for first in range(0, rows, step):
        yield file.tensor(stored, slice(first, first + step) if entry.shape else None).reshape(-1)


def _unfinite(piece: torch.Tensor) -> bool:
    whole, mask = _EXPONENT[piece.dtype]
    return bool((piece.view(whole) & mask).eq_(mask).any())


def _refuse_unfinite(folder: Folder, stored: str, piece: torch.Tensor, what: str) -> None:
    if _unfinite(piece):
        kind = "NaN" if bool(piece.isnan().any()) else "infinity"
        raise _wrong(folder, stored, f"{what} that is not finite", kind)


def _plain(folder: Folder, name: str, info: TensorInfo) -> bool:
    (stored,) = folder.stored(name)
    zero = True
    for piece in _pieces(folder, stored):
        _refuse_unfinite(folder, stored, piece, "this tensor has a value")
        zero = zero and not bool(piece.any())
    return zero and math.prod(info.shape) > 0


def _scales(folder: Folder, stored: str) -> None:
    for piece in _pieces(folder, stored):
        _refuse_unfinite(folder, stored, piece, "this tensor has a scale")
        if not bool((piece > 0).all()):
            lowest = float(piece.min())
            raise _wrong(folder, stored, "a scale is zero or negative", lowest, "scales above 0")


def _fp8(folder: Folder, name: str, info: TensorInfo) -> bool:
    codes, scale = folder.stored(name)
    _scales(folder, scale)
    zero = True
    for piece in _pieces(folder, codes):
        bits = piece.view(torch.uint8) & 0x7F  # without the sign; E4M3 has no infinity, and this one NaN
        if bool((bits == 0x7F).any()):
            raise _wrong(folder, codes, "this tensor has a value that is not finite", "NaN")
        zero = zero and not bool(bits.any())
    return zero


def _int4(folder: Folder, name: str, info: TensorInfo) -> bool:
    codes, scale, _ = folder.stored(name)
    _scales(folder, scale)
    eights = -0x77777778  # the word of eight codes 0, each stored as 8
    return all(bool((piece == eights).all()) for piece in _pieces(folder, codes))


_CHECKS: dict[str, Any] = {"plain": _plain, "fp8_block": _fp8, "int4_group": _int4}
