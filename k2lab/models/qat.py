"""Quantisation-aware training: a mixture's routed experts multiply by the values that an INT4 export will hold.

The weights that the optimizer moves stay in the model's number type (fp32, or bf16 with masters in the optimizer). Every forward
pass, in training, evaluation and decoding, multiplies by `int4.values` of them: the same bits as `int4.dequantise` of
`int4.quantise`, which is what an export writes and an engine serves. The backward pass multiplies by the same values, and its
weight gradient is that of the weights themselves (straight-through).

What is in memory. On a GPU a training step computes one layer's values where it needs them and forgets them: once in the forward
pass and once more in the backward pass, 4 bytes of traffic per bf16 weight each; kept, they would cost as much memory as the
weights. On a CPU, where computing them costs about as much as multiplying a few rows, and everywhere when no gradients are taken
(evaluation, decoding), a layer keeps its values until a weight changes.

A changed weight is noticed by its version counter and its address. Operations of PyTorch raise the counter; who writes weights
by other means (kernels of one's own) calls `torch.autograd.graph.increment_version`. Writing through `tensor.data` is not
noticed, so `TrainModel.train` and `.eval` forget what was kept, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from k2lab.core.errors import CheckpointError, RecipeError, did_you_mean
from k2lab.quant import int4

FORMATS = ("int4_group",)
KEY = "k2_qat"  # in the config.json of a checkpoint that was trained so, and whose weights are not exported yet

Seen = Callable[[torch.Tensor], torch.Tensor]


def fresh(weight: torch.Tensor) -> torch.Tensor:
    """The values that are multiplied by, in the weight's own type."""
    return int4.values(weight.detach(), dtype=weight.dtype)


class Grid:
    """`fresh`, remembering what it gave until the weight changes. `keeps` False: remembers nothing."""

    def __init__(self, keeps: bool = True) -> None:
        self.keeps = keeps
        # {where the weight lies: (an alias, which keeps that memory from being used again, its version, values)}
        self._kept: dict[tuple[Any, ...], tuple[torch.Tensor, int, torch.Tensor]] = {}

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.keeps or weight.is_inference():
            return fresh(weight)
        place = (weight.data_ptr(), weight.device, weight.dtype, tuple(weight.shape), weight.stride())
        found = self._kept.get(place)
        if found is None or found[1] != weight._version:
            if found is None and len(self._kept) >= 2:  # a layer has two weights: others are no longer its own
                self._kept.clear()
            self._kept.pop(place, None)  # before the new values take memory
            with torch.inference_mode(False):  # the values may be asked for again in a training step
                found = self._kept[place] = weight.detach(), weight._version, fresh(weight)
        return found[2]

    def forget(self) -> None:
        self._kept.clear()

    def __getstate__(self) -> dict[str, Any]:  # copies of a module begin with nothing kept
        return {"keeps": self.keeps, "_kept": {}}


def seen_by(module: Any) -> Seen | None:
    """How an experts module's products see its weights in the pass that begins now; None = as they are."""
    grid = getattr(module, "k2_qat", None)
    if grid is None:
        return None
    if torch.is_grad_enabled() and module.gate_up_proj.requires_grad and module.gate_up_proj.device.type != "cpu":
        grid.forget()
        return fresh
    return grid


def weights(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate_up [E, 2F, D], down [E, D, F]) that an experts module multiplies by, without gradients if these are not the
    parameters themselves."""
    seen = seen_by(module)
    if seen is None:
        return module.gate_up_proj, module.down_proj
    return seen(module.gate_up_proj), seen(module.down_proj)


class Standing:
    """An experts module with grid values as its weights, for functions that read these from the module. Autograd keeps the values
    for the backward pass."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.gate_up_proj, self.down_proj = int4.fake_quant(module.gate_up_proj), int4.fake_quant(module.down_proj)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# ---------------------------------------------------------------- switching


def _experts(hf: Any) -> list[Any]:
    return [module for module in hf.modules() if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter)]


def switch(model: Any, format: str | None, where: str | None = None) -> None:
    """Lets the routed experts of a `TrainModel` multiply by values of this format, or (None) by their weights as they are.
    RecipeError for other formats, other models, and experts that are packed or have low-rank terms."""
    if format is None:
        for module in _experts(model.hf):
            module.k2_qat = None
        return
    if format not in FORMATS:
        raise RecipeError(
            f"there is no quantisation-aware training for {format!r}",
            where=where, allowed=", ".join(FORMATS), next=did_you_mean(format, FORMATS),
        )  # fmt: skip
    model.spec.require_int4(where)
    modules = _experts(model.hf)
    if not modules or any(hasattr(module, "gate_lora_A") for module in modules):
        raise RecipeError(
            "quantisation-aware training trains the experts' own weights",
            where=where, got="packed experts" if not modules else "experts with low-rank adapters",
            next='Load the model with experts = "dense", without adapters on experts',
        )  # fmt: skip
    # FSDP gathers a layer's weights into memory that it uses again, with the version as it was
    sharded = any(base.__name__ == "FSDPModule" for module in model.hf.modules() for base in type(module).__mro__)
    for module in modules:
        module.k2_qat = Grid(keeps=not sharded)


def format_of(hf: Any) -> str | None:
    """The format that `switch` was given."""
    return FORMATS[0] if any(getattr(module, "k2_qat", None) is not None for module in _experts(hf)) else None


def forget(hf: Any) -> None:
    """Frees kept values."""
    for module in _experts(hf):
        if getattr(module, "k2_qat", None) is not None:
            module.k2_qat.forget()


@torch.no_grad()
def settle(hf: Any) -> None:
    """Puts the values into the weights. What is multiplied by stays the same, bit for bit (the grid gives back its own values);
    low-rank terms that are trained beside the values may then be added to the weights."""
    for module in _experts(hf):
        if getattr(module, "k2_qat", None) is not None:
            for weight in (module.gate_up_proj, module.down_proj):
                weight.copy_(fresh(weight))


# ---------------------------------------------------------------- config.json


def mark(table: dict[str, Any], model: Any) -> None:
    """Writes into a config what `wanted` reads, if the model multiplies by grid values."""
    format = format_of(model.hf)
    if format is not None:
        table[KEY] = {"format": format, "group_size": int4.GROUP}


def wanted(table: dict[str, Any]) -> str | None:
    """The format in which a checkpoint with this config is to be multiplied, or None. CheckpointError if it is none of ours."""
    entry = table.get(KEY)
    if entry is None:
        return None
    if not isinstance(entry, dict) or entry.get("format") not in FORMATS or entry.get("group_size") != int4.GROUP:
        raise CheckpointError(
            f"{KEY} names a grid that we do not know",
            where="config.json", got=entry, allowed=f'{{"format": "{FORMATS[0]}", "group_size": {int4.GROUP}}}',
        )  # fmt: skip
    return entry["format"]
