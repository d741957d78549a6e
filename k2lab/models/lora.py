"""Low-rank adapters (LoRA, arXiv:2106.09685): a frozen matrix W [out, in] acts as W + scale B A, with A [r, in] and B [out, r].

B starts at 0, so the first forward pass is the base model's; A is drawn as PyTorch draws a linear layer (Kaiming uniform with
a = sqrt(5): uniform within 1 / sqrt(in)), each from the counter of its own name. scale = alpha / r, or alpha / sqrt(r)
(rank-stabilised, arXiv:2312.03732). A and B have the model's number type; an optimizer keeps fp32 masters of them.

Routed experts have a pair per expert and matrix, all of a layer in one tensor: A [E, r, in], B [E, out, r].

Legend: `T` tokens, `I` in, `O` out, `E` experts, `D` width, `F` expert hidden width, `r` rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from k2lab.core.errors import CheckpointError, RecipeError, did_you_mean
from k2lab.core.rng import rng
from k2lab.models import packed, qat
from k2lab.models.gemm import grad_input, grad_weight, linear
from k2lab.models.swap import mixed
from k2lab.specs import pieces

TARGETS = ("attention", "shared_experts", "dense_mlp", "routed_experts")
FACTORS = ("lora_A", "lora_B")  # how names of adapters' parameters end
_PROJ = r"(gate|up|down)_proj"
_PLACES = {
    "attention": re.compile(r".*\blayers\.\d+\.self_attn\..+"),
    "shared_experts": re.compile(rf".*\blayers\.\d+\.mlp\.shared_experts\.{_PROJ}"),
    "dense_mlp": re.compile(rf".*\blayers\.\d+\.mlp\.{_PROJ}"),
    "routed_experts": re.compile(r".*\blayers\.\d+\.mlp\.experts"),
}


class Pair(NamedTuple):
    """The adapter of one matrix: A [r, in], B [out, r]; the matrix acts as W + scale B A."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    def delta(self) -> torch.Tensor:
        """scale B A, fp32[out, in]."""
        return delta(self.A, self.B, self.scale)


def delta(A: torch.Tensor, B: torch.Tensor, scale: float) -> torch.Tensor:
    """scale B A in fp32; the one formula of every merge."""
    return (B.float() @ A.float()).mul_(scale)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all adapters of a model share."""

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def is_factor(name: str) -> bool:
    """True for the name of an adapter's parameter."""
    return name.endswith(FACTORS)


# ---------------------------------------------------------------- linear layers


class LowRank(torch.autograd.Function):
    """x W^T + bias + scale (x A^T) B^T; x [T, I], W [O, I], bias [O] or None, A [r, I], B [O, r]."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        y = linear(x, weight) if bias is None else F.linear(x, weight, bias)
        inner = x @ A.t()
        ctx.save_for_backward(x, inner, weight, A, B)
        ctx.scale = scale
        return y.addmm_(inner, B.t(), alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        x, inner, weight, A, B = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad_inner = (grad @ B).mul_(ctx.scale)
        grad_x = grad_input(grad, weight).addmm_(grad_inner, A) if wants[0] else None
        grad_A = grad_weight(grad_inner, x) if wants[3] else None
        grad_B = grad_weight(grad, inner).mul_(ctx.scale) if wants[4] else None
        grad_w = grad_weight(grad, x) if wants[1] else None
        return grad_x, grad_w, grad.sum(0) if wants[2] else None, grad_A, grad_B, None


class LoRALinear(torch.nn.Module):
    """Mixed into linear layers by `attach`: parameters `lora_A`, `lora_B` and the number `k2_scale`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        if x.dtype == self.weight.dtype == self.lora_A.dtype and not plain:
            y = LowRank.apply(flat, self.weight, self.bias, self.lora_A, self.lora_B, self.k2_scale)
            return y.view(*x.shape[:-1], -1)
        low = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return super().forward(x) + self.k2_scale * low


# ---------------------------------------------------------------- which modules


def _places(hf: Any, targets: Collection[str]) -> Iterator[tuple[str, str, torch.nn.Module]]:
    """(target, name, module) of every module that a target names."""
    for name, module in hf.named_modules():
        for target in targets:
            if not _PLACES[target].fullmatch(name):
                continue
            if target == "routed_experts":
                if isinstance(module, packed.PackedExperts) or getattr(module, "gate_up_proj", None) is not None:
                    yield target, name, module
            elif isinstance(module, torch.nn.Linear):
                yield target, name, module


def matrices(name: str, module: torch.nn.Module, family: str) -> dict[str, tuple[str, int | None]]:
    """{released name of a matrix, without .weight: (its stem in the module: "gate", "up", "down" or "", its expert or None)}."""
    if isinstance(module, torch.nn.Linear):
        return {_released(f"{name}.weight", tuple(module.weight.shape), family): ("", None)}
    E, D, hidden = _sizes(module)
    fused = pieces(f"{name}.gate_up_proj", (E, 2 * hidden, D), family), pieces(f"{name}.down_proj", (E, D, hidden), family)
    found: dict[str, tuple[str, int | None]] = {}
    for expert in range(E):
        trio = (fused[0][2 * expert], fused[0][2 * expert + 1], fused[1][expert])
        for piece, stem in zip(trio, ("gate", "up", "down")):
            found[piece.name.removesuffix(".weight")] = (stem, expert)
    return found


def _released(name: str, shape: tuple[int, ...], family: str) -> str:
    (piece,) = pieces(name, shape, family)
    return piece.name.removesuffix(".weight")


def _sizes(module: torch.nn.Module) -> tuple[int, int, int]:
    """E, D, F of an experts module."""
    if isinstance(module, packed.PackedExperts):
        return module.num_experts, module.hidden_dim, module.intermediate_dim
    E, D, hidden = module.down_proj.shape
    return E, D, hidden


# ---------------------------------------------------------------- putting them on


def attach(model: Any, settings: Settings, targets: Collection[str], seed: int) -> dict[str, int]:
    """Freezes all parameters of a `TrainModel` and gives the target modules adapters; {target: number of matrices adapted}.

    Raises RecipeError for a rank below 1, unknown targets, experts of another build than SwiGLU, or if nothing is found.
    """
    for target in targets:
        if target not in TARGETS:
            raise RecipeError(
                f"there is no LoRA target {target!r}", allowed=", ".join(TARGETS), next=did_you_mean(target, TARGETS)
            )
    if settings.rank < 1:
        raise RecipeError("a rank is at least 1", got=settings.rank)
    counts = dict.fromkeys(targets, 0)
    _freeze(model)
    for target, name, module in list(_places(model.hf, targets)):
        factors = _begin(module, settings.rank)
        for leaf, tensor in factors.items():
            _draw(tensor, f"{name}.{leaf}", seed)
        _put(model, module, factors, settings.scale, name)
        counts[target] += len(factors) // 2 * (len(factors["gate_lora_A"]) if target == "routed_experts" else 1)
    if not any(counts.values()):
        raise RecipeError(
            "none of these LoRA targets is in the model", got=", ".join(targets) or "none", allowed=", ".join(TARGETS)
        )
    model.adapters = settings
    return {target: count for target, count in counts.items() if count}


def _freeze(model: Any) -> None:
    qat.settle(model.hf)
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)


def _begin(module: torch.nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """{parameter's name: zeros} of a module's adapters."""
    if isinstance(module, torch.nn.Linear):
        O, I = module.weight.shape  # noqa: E741
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, I), "lora_B": (O, rank)}
    else:
        E, D, hidden = _sizes(module)
        shapes = {}
        for stem, width, out in (("gate", D, hidden), ("up", D, hidden), ("down", hidden, D)):
            shapes |= {f"{stem}_lora_A": (E, rank, width), f"{stem}_lora_B": (E, out, rank)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def _draw(tensor: torch.Tensor, name: str, seed: int) -> None:
    """The first values of a factor: B stays 0. Experts are drawn one by one: a rank that has some of them draws only these."""
    if not name.endswith("lora_A"):
        return
    bound = tensor.shape[-1] ** -0.5
    if tensor.dim() == 2:
        tensor.copy_(torch.from_numpy(rng(seed, "lora", name).uniform(-bound, bound, tuple(tensor.shape))))
        return
    for expert, part in enumerate(tensor):
        part.copy_(torch.from_numpy(rng(seed, "lora", name, expert).uniform(-bound, bound, tuple(part.shape))))


def _put(model: Any, module: torch.nn.Module, factors: Mapping[str, torch.Tensor], scale: float, name: str) -> None:
    """Registers the factors in a module, in the model's number type, and makes its forward know them."""
    dtype = model.head().dtype
    if isinstance(module, torch.nn.Linear):
        device = module.weight.device
        if not isinstance(module, LoRALinear):
            module.__class__ = mixed(LoRALinear, type(module))
        parent = model.hf.get_submodule(name.rpartition(".")[0])
        if hasattr(type(parent), "k2_adapted"):
            parent.k2_adapted = True
    else:
        if not isinstance(module, packed.PackedExperts) and model.config.hidden_act != "silu":
            raise RecipeError("LoRA on experts needs SwiGLU", where=name, got=model.config.hidden_act, allowed="silu")
        device = (module.down_codes if isinstance(module, packed.PackedExperts) else module.down_proj).device
        _settle(module)
    for leaf, tensor in factors.items():
        module.register_parameter(leaf, torch.nn.Parameter(tensor.to(device=device, dtype=dtype)))
    module.k2_scale = scale


@torch.no_grad()
def _settle(module: torch.nn.Module) -> None:
    """Experts that multiply by INT4 values of their weights (quantisation-aware training) get these values as weights: what is
    multiplied by stays the same, and low-rank terms, which lie on no grid, can be added to it."""
    if getattr(module, "k2_qat", None) is not None:
        for weight in (module.gate_up_proj, module.down_proj):
            weight.copy_(qat.fresh(weight))
        module.k2_qat = None


def active(model: Any) -> float:
    """Parameters of adapters that meet a token."""
    share = model.spec.num_experts_per_tok / model.spec.n_routed_experts if model.spec.n_routed_experts else 0.0
    return sum(tensor.numel() * (1.0 if tensor.dim() == 2 else share) for tensor in model.state().values())


# ---------------------------------------------------------------- to and from adapter folders


def pairs(model: Any) -> Iterator[tuple[str, Pair]]:
    """(released name of a matrix without .weight, its adapter) of all adapters of a model, in the order of its modules."""
    for _, name, module in _places(model.hf, TARGETS):
        if isinstance(module, LoRALinear):
            (released,) = matrices(name, module, model.spec.family)
            yield released, Pair(module.lora_A.detach(), module.lora_B.detach(), module.k2_scale)
        elif packed.lora_of(module) is not None:
            for released, (stem, expert) in matrices(name, module, model.spec.family).items():
                A, B = (getattr(module, f"{stem}_{leaf}").detach()[expert] for leaf in FACTORS)
                yield released, Pair(A, B, module.k2_scale)


def load(model: Any, found: Mapping[str, Any], settings: Settings) -> None:
    """Freezes the model and gives it the adapters `found` {released name of a matrix without .weight: (A, B, scale)}.

    A matrix without one keeps its values; among a layer's experts it has factors of 0, which training leaves at 0. Raises
    CheckpointError for an adapter of a matrix that the model does not have or of another shape, and for experts of one layer with
    different scales.
    """
    homes = {
        released: (name, module, place)
        for _, name, module in _places(model.hf, TARGETS)
        for released, place in matrices(name, module, model.spec.family).items()
    }
    by_module: dict[str, tuple[torch.nn.Module, dict[tuple[str, int | None], str]]] = {}
    for released in found:
        if released not in homes:
            raise CheckpointError(
                "the adapter has a matrix that the model lacks", where=released, next=did_you_mean(released, homes)
            )
        name, module, place = homes[released]
        by_module.setdefault(name, (module, {}))[1][place] = released
    _freeze(model)
    for name, (module, own) in by_module.items():
        _load_module(model, name, module, {place: (released, found[released]) for place, released in own.items()})
    model.adapters = settings


def names(model: Any) -> list[str]:
    """Released names, without .weight, of all matrices that can have an adapter."""
    found = _places(model.hf, TARGETS)
    return [released for _, name, module in found for released in matrices(name, module, model.spec.family)]


def _load_module(model: Any, name: str, module: torch.nn.Module, own: Mapping[tuple[str, int | None], tuple[str, Any]]) -> None:
    scales = {pair.scale for _, pair in own.values()}
    if len(scales) > 1:
        raise CheckpointError("adapters of one layer's experts must have one scale", where=name, got=sorted(scales))
    rank = max(len(pair.A) for _, pair in own.values())
    factors = _begin(module, rank)
    for (stem, expert), (released, pair) in own.items():
        for leaf, tensor in zip(FACTORS, pair[:2]):
            target = factors[f"{stem}_{leaf}" if stem else leaf]
            target = target if expert is None else target[expert]
            # a smaller rank than the layer's largest is filled up with zeros
            target = target[: len(pair.A)] if leaf == "lora_A" else target[:, : len(pair.A)]
            if tensor.shape != target.shape:
                raise CheckpointError(
                    f"the adapter's {leaf} does not fit the model's matrix",
                    where=released, got=list(tensor.shape), allowed=str(list(target.shape)),
                )  # fmt: skip
            target.copy_(tensor)
    _put(model, module, factors, scales.pop(), name)


# ---------------------------------------------------------------- merging


class Weights(Mapping[str, torch.Tensor]):
    """A model's weights by transformers name as if it were dense and had no adapters, in the model's number type: references
    where the tensor is there, else computed when asked for (W + scale B A in fp32, rounded once; packed experts decoded)."""

    def __init__(self, model: Any) -> None:
        self.model = model
        tied = {"lm_head.weight"} if model.spec.tie_word_embeddings else set()
        self._tensors: dict[str, torch.Tensor | None] = {}
        for name, tensor in model.hf.state_dict().items():
            stem, _, leaf = name.rpartition(".")
            if name in tied or is_factor(leaf) or leaf in packed.SCALES:
                continue
            decoded = leaf.endswith("_codes")
            self._tensors[f"{stem}.{leaf.removesuffix('_codes')}_proj" if decoded else name] = None if decoded else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        stem, _, leaf = name.rpartition(".")
        module = self.model.hf.get_submodule(stem)
        if tensor is None:
            tensor = module.dense(leaf, self.model.head().dtype)
        if isinstance(module, LoRALinear) and leaf == "weight":
            return (tensor.float() + delta(module.lora_A, module.lora_B, module.k2_scale)).to(tensor.dtype)
        lora = packed.lora_of(module) if leaf in ("gate_up_proj", "down_proj") else None
        return tensor if lora is None else _merged(tensor, leaf, lora)


@torch.no_grad()
def merge(model: Any) -> Any:
    """Adds the adapters to the weights of a model with dense experts and takes them off; everything is trainable again."""
    weights = model.weights()
    for name, parameter in model.hf.named_parameters():
        if not is_factor(name) and name in weights:
            weight = weights[name]
            if weight.data_ptr() != parameter.data_ptr():
                parameter.copy_(weight)
    for module in model.hf.modules():
        if isinstance(module, LoRALinear):
            module.__class__ = next(each for each in type(module).__bases__ if each is not LoRALinear)
        if hasattr(module, "k2_adapted"):
            module.k2_adapted = False
        for leaf in [leaf for leaf in module._parameters if is_factor(leaf)]:
            delattr(module, leaf)
    for parameter in model.hf.parameters():
        parameter.requires_grad_(True)
    model.adapters = None
    return model


def _merged(tensor: torch.Tensor, leaf: str, lora: packed.ExpertLoRA) -> torch.Tensor:
    """An experts tensor with its low-rank terms, expert by expert."""
    merged = torch.empty_like(tensor)
    for expert, weight in enumerate(tensor):
        A, B = lora.factors[0::2], lora.factors[1::2]
        terms = (0, 1) if leaf == "gate_up_proj" else (2,)
        low = torch.cat([delta(A[n][expert], B[n][expert], lora.scale) for n in terms])
        merged[expert] = low.add_(weight.float())
    return merged
