"""A checkpoint held in memory as a `TensorSource` that counts what is read of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from k2lab.core.types import TensorInfo
from k2lab.models import export
from k2lab.models.wrap import TrainModel
from k2lab.quant import fp8, int4

NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
ALL = slice(None)


class Held:
    """`tensors` by released name, those that `format` ("plain", "fp8_block", "int4_group") quantises as codes and scales."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor], format: str = "plain") -> None:
        self._config, self.format = config, format
        self.plain = {name: tensor for name, tensor in tensors.items() if not self._quantised(name, tensor)}
        grid = int4.quantise if format == "int4_group" else fp8.quantise
        self.codes = {name: grid(tensor) for name, tensor in tensors.items() if name not in self.plain}
        self.order = list(tensors)
        self.bytes: Counter[str] = Counter()  # name: bytes read
        self.largest = 0  # elements of the largest part that was read

    @classmethod
    def of(cls, model: TrainModel, format: str = "plain") -> Held:
        """What a release of this model would hold."""
        state = model.state().items()
        tensors = {new: part.clone() for name, whole in state for new, part in export.released(name, whole, model.spec.family)}
        return cls(model.spec.config(), tensors, format)

    def _quantised(self, name: str, tensor: torch.Tensor) -> bool:
        if self.format == "int4_group":
            return ".experts." in name
        return self.format == "fp8_block" and name.endswith("_proj.weight") and tensor.ndim == 2

    def decoded(self) -> dict[str, torch.Tensor]:
        """All tensors as fp32."""
        grid = int4.dequantise if self.format == "int4_group" else fp8.dequantise
        return {n: self.plain[n].float() if n in self.plain else grid(*self.codes[n]).float() for n in self.order}

    def config(self) -> dict[str, Any]:
        return self._config

    def names(self) -> list[str]:
        return list(self.order)

    def info(self, name: str) -> TensorInfo:
        if name in self.plain:
            return TensorInfo(name, tuple(self.plain[name].shape), NAMES[self.plain[name].dtype], "plain", "file")
        codes = self.codes[name][0]
        int4s = self.format == "int4_group"
        shape = (codes.shape[0], codes.shape[1] * (8 if int4s else 1))
        return TensorInfo(name, shape, "BF16" if int4s else "F32", self.format, "file")

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> torch.Tensor:
        if name in self.plain:
            tensor = self.plain[name]
        else:
            grid = int4.dequantise if self.format == "int4_group" else fp8.dequantise
            tensor = grid(*self.codes[name])
        part = tensor[rows] if rows is not None else tensor
        part = part[..., columns] if columns is not None else part
        bits = {"plain": 8 * tensor.element_size(), "int4_group": 4, "fp8_block": 8}[self.info(name).format]
        self.bytes[name] += part.numel() * bits // 8
        self.largest = max(self.largest, part.numel())
        return part.clone()

    def read_into(self, target: torch.Tensor, name: str, rows: slice | None = None) -> None:
        assert target.dtype == self.plain[name].dtype and target.is_contiguous(), "a tensor of the stored type"
        part = self.plain[name][rows] if rows is not None else self.plain[name]
        assert target.shape == part.shape
        target.copy_(part)
        self.bytes[name] += part.numel() * part.element_size()

    def packed(self, name: str, rows: slice | None = None, columns: slice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = self.codes[name]
        tall, wide, codes_wide = (1, int4.GROUP, int4.PER_WORD) if self.format == "int4_group" else (fp8.BLOCK, fp8.BLOCK, 1)
        info = self.info(name)
        (a, b, _), (c, d, _) = ((part or ALL).indices(size) for part, size in zip((rows, columns), info.shape))
        assert not a % tall and not c % wide, "whole blocks"
        found = (
            codes[a:b, c // codes_wide : -(-d // codes_wide)].clone(),
            scales[a // tall : -(-b // tall), c // wide : -(-d // wide)].clone(),
        )
        self.bytes[name] += sum(part.numel() * part.element_size() for part in found)
        return found
