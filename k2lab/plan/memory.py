"""Memory per GPU, term by term. Weights, gradients, masters and optimizer state are exact; activations follow a stated formula.

Legend: `D` width, `H` heads, `N` no-position head width, `R` rotary head width, `V` value head width, `Q` query latent,
`L` key-value latent, `E` experts, `K` experts per token, `F` expert hidden width, `W` vocabulary, `d` KDA head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from k2lab.core.errors import RecipeError, did_you_mean
from k2lab.core.types import PlanInput
from k2lab.plan import adapters, state
from k2lab.plan.lines import Origin
from k2lab.plan.machines import Machine
from k2lab.specs import ModelSpec, activation_bytes, recomputation

# Bytes per parameter: weights, gradients (in the weights' type), fp32 master copy.
PRECISIONS = {"fp32": (4, 4, 0), "bf16": (2, 2, 4)}
# Bytes of state per parameter (matrices, everything else): AdamW keeps two fp32 moments, Muon one fp32 momentum for matrices.
OPTIMIZERS = {"adamw": (8, 8), "muonclip": (4, 8), "muon": (4, 8)}
OWN_OPTIMIZER = (8, 8)
LOGITS_CHUNK = 1024  # positions per piece of the chunked loss (the `lm` objective's default)
# Bytes per logit of a piece (one piece, more). Probabilities and gradients overwrite the fp32 logits; in bf16
# either is in the weights' type, too; and the gradients of a piece live until the next piece's logits are there.
LOGITS_BYTES = {"fp32": (4, 8), "bf16": (6, 8)}
PROBABILITY_BLOCK, PROBABILITY_LIMIT = 128, 256 << 20  # blocks of queries, and bytes per layer that the CPU attention keeps
MUON_STACK = {"cpu": 1 << 19, "cuda": 1 << 28}  # elements that Newton-Schulz works on at once
MUON_COPIES = 4  # the stack itself, its Gram matrix, a polynomial of it, the product
PIECES = 4  # of state that is kept on the host, on the GPU at a time: one worked on, one coming, two leaving
BUCKET_BYTES = 64 << 20  # one bucket of gradients in flight between ranks


@dataclass(frozen=True)
class Term:
    """One use of memory on one GPU. `state` terms (weights, gradients, masters, optimizer) can be divided over GPUs."""

    key: str
    label: str
    bytes: float
    formula: str
    origin: Origin = "computed"
    state: bool = False


@dataclass(frozen=True)
class Memory:
    """Terms of one training stage on one GPU if every GPU holds the whole state (plain data parallelism)."""

    terms: tuple[Term, ...]
    gpus: int
    layer: float  # weights of the largest layer, which divided state gathers to compute with
    activations_checkpointed: float  # instead of the activations term, if only layer inputs are kept

    def state(self) -> float:
        """Bytes of weights, gradients, masters and optimizer state."""
        return sum(term.bytes for term in self.terms if term.state)

    def other(self) -> float:
        """Bytes of everything that is not divided: activations, logits, buffers, libraries."""
        return sum(term.bytes for term in self.terms if not term.state)

    def replicated(self) -> float:
        """Per GPU, each holding the whole state."""
        return self.state() + self.other()

    def sharded(self) -> float:
        """Per GPU, the state divided over all GPUs (ZeRO-3, FSDP), and one layer gathered."""
        return self.state() / self.gpus + self.layer + self.other()

    def gpus_needed(self, limit: float, checkpointed: bool = False) -> int | None:
        """The fewest GPUs of `limit` bytes that hold the state if it is divided over them; None if the rest alone is too much.
        `checkpointed` counts activations with every layer checkpointed."""
        saved = 0.0
        if checkpointed:
            saved = sum(t.bytes for t in self.terms if t.key in ("activations", "probabilities")) - self.activations_checkpointed
        room = limit - self.other() - self.layer + saved
        return max(1, math.ceil(self.state() / room)) if room > 0 else None


def optimizer_bytes(name: str, where: str = "") -> tuple[int, int, Origin]:
    """Bytes of state per (matrix parameter, other parameter), and how sure that is: a user's own optimizer file is assumed to
    keep two moments. Raises RecipeError for unknown names."""
    if name in OPTIMIZERS:
        return (*OPTIMIZERS[name], "computed")
    if name.endswith(".py") or "/" in name:
        return (*OWN_OPTIMIZER, "assumed")
    raise RecipeError(
        "the planner does not know this optimizer",
        where=where or None,
        got=name or "none",
        allowed=", ".join(OPTIMIZERS) + ", or a path to your own .py file",
        next=did_you_mean(name, OPTIMIZERS),
    )


def uses_muon(name: str) -> bool:
    """True if the optimizer orthogonalises matrices (one of ours with Muon in its name)."""
    return name in OPTIMIZERS and name.startswith("muon")


def matrix_parameters(spec: ModelSpec) -> int:
    """Parameters that MuonClip gives to Muon: linear layers, routers and experts. The rest (embedding, head, norms, biases,
    convolutions, decay gates) is AdamW's. The router's correction bias has no gradient and is not counted."""
    return sum(t.numel * t.count for t in spec.tensors() if t.kind in ("linear", "expert", "router"))


def trainable_parameters(spec: ModelSpec) -> int:
    """All parameters with a gradient: everything but the routers' correction bias."""
    return spec.total() - len(spec.moe_layers()) * spec.n_routed_experts


def probability_bytes(inp: PlanInput, spec: ModelSpec, machine: Machine) -> float:
    """Attention probabilities that the CPU attention keeps for the backward pass, if every document fills its row: half of the
    square (in blocks of 128 queries) x heads per layer, but nothing in layers where this exceeds 256 MiB (they are computed
    again). On GPUs flash kernels keep none."""
    if machine.device != "cpu":
        return 0.0
    element = 4 if inp.precision == "fp32" else 2
    square = inp.per_device_batch * inp.seq_len * (inp.seq_len + PROBABILITY_BLOCK) / 2
    each = square * spec.num_attention_heads * element
    softmax = {*spec.layers_of("mla"), *spec.layers_of("attention")}
    names = recomputation.recomputed(spec, inp.recompute, inp.seq_len, element)
    again = {layer for layer in softmax if "mixer" in names[layer]}
    layers = len(softmax - again) + bool(again)  # of layers that are computed again, one's at a time
    return layers * each if each <= PROBABILITY_LIMIT else 0.0


def check_input(inp: PlanInput) -> ModelSpec:
    """The spec of a stage that trains or samples. Raises RecipeError for numbers that cannot be run."""
    where = f"stage.{inp.stage}"
    if not isinstance(inp.model, ModelSpec):
        raise RecipeError("this stage needs a model to be planned", where=where, got=inp.model, allowed="a recipe with `model`")
    for name in ("seq_len", "per_device_batch", "grad_acc", "gpus"):
        value = getattr(inp, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RecipeError("must be a positive integer", where=f"{where}.{name}", got=value)
    for name in ("steps", "token_target"):
        value = getattr(inp, name)
        if value is not None and value < 1:
            raise RecipeError("must be positive", where=f"{where}.{name}", got=value)
    if inp.steps is not None and inp.token_target is not None:
        raise RecipeError("steps and token_target are both given, and one follows from the other", where=where, next="Keep one")
    if inp.precision not in PRECISIONS:
        raise RecipeError(
            "there is no such precision",
            where=f"{where}.precision",
            got=inp.precision,
            allowed=", ".join(PRECISIONS),
            next=did_you_mean(str(inp.precision), PRECISIONS),
        )
    return inp.model


def training_memory(inp: PlanInput, machine: Machine) -> Memory:
    """Memory per GPU of a training stage. Raises RecipeError for impossible numbers, unknown precision or optimizer."""
    spec = check_input(inp)
    low = adapters.of(inp)
    if low is not None:
        return _adapter_memory(low, spec, machine)
    weight, grad, master = PRECISIONS[inp.precision]
    per_matrix, per_other, origin = optimizer_bytes(inp.optimizer, f"stage.{inp.stage}.optim")
    kept = state.of(inp)
    if uses_muon(inp.optimizer):
        per_matrix = kept.momentum
    if kept.master != "auto" and master:
        master = 0
        if kept.master == "off":  # AdamW's moments are of the type of what they update
            per_matrix = per_matrix if uses_muon(inp.optimizer) else per_matrix // 2
            per_other //= 2
    total, trainable, matrices = spec.total(), trainable_parameters(spec), matrix_parameters(spec)
    terms = [
        Term("weights", "weights", total * weight, f"{weight} B x {total:,} parameters", state=True),
        Term("gradients", "gradients", trainable * grad, f"{grad} B x {trainable:,}, in the weights' type", state=True),
    ]
    masters, moments = trainable * master, matrices * per_matrix + (trainable - matrices) * per_other
    text = f"{per_matrix} B x {matrices:,} in matrices + {per_other} B x {trainable - matrices:,} others ({inp.optimizer})"
    if kept.offload:
        text = f"{(masters + moments) / 1e9:,.1f} GB of masters and state ({text}) are in the host's memory"
        passing = PIECES * (master + per_matrix) * _stack(inp, spec, machine)
        terms.append(Term("optimizer", "optimizer state", 0.0, text, origin, state=True))
        text = f"{PIECES} x {master + per_matrix} B x elements of a stack, on their way"
        terms.append(Term("ferry", "state passing through", passing, text, "assumed"))
    else:
        if master:
            terms.append(Term("master", "master weights", masters, f"{master} B x {trainable:,}, fp32", state=True))
        terms.append(Term("optimizer", "optimizer state", moments, text, origin, state=True))
    terms += _passing_terms(inp, spec, machine)
    per_layer: dict[int | None, int] = {}
    for tensor in spec.tensors():
        per_layer[tensor.layer] = per_layer.get(tensor.layer, 0) + tensor.numel * tensor.count
    layer = weight * max(number for index, number in per_layer.items() if index is not None)
    return Memory(tuple(terms), inp.gpus, layer, checkpointed_bytes(inp, spec))


def _adapter_memory(inp: adapters.AdapterInput, spec: ModelSpec, machine: Machine) -> Memory:
    """As `training_memory`, of a frozen model with adapters: AdamW trains these whatever the optimizer."""
    weight, grad, master = PRECISIONS[inp.precision]
    *_, origin = optimizer_bytes(inp.optimizer, f"stage.{inp.stage}.optim")
    frozen, layer = adapters.frozen_bytes(inp, spec, weight)
    by_target = adapters.parameters(inp, spec)
    count, each = sum(by_target.values()), OPTIMIZERS["adamw"][1]
    if not count:
        raise RecipeError(
            "the model has none of the adapters' targets", where=f"stage.{inp.stage}.lora.targets", got=", ".join(inp.targets)
        )
    text = f"{weight} B x {spec.total():,} parameters"
    if inp.packed:
        text = f"routed experts as INT4 codes and scales, the rest {text.split(' x ')[0]} per parameter"
    parts = " + ".join(f"{number:,} {target}" for target, number in by_target.items())
    terms = [
        Term("weights", "frozen weights", frozen, text, state=True),
        Term("adapters", "adapters", count * weight, f"{weight} B x rank {inp.rank} x (out + in): {parts}", state=True),
        Term("gradients", "gradients of the adapters", count * grad, f"{grad} B x {count:,}", state=True),
    ]
    if master:
        terms.append(Term("master", "masters of the adapters", count * master, f"{master} B x {count:,}, fp32", state=True))
    text = f"{each} B x {count:,} (AdamW, for adapters)"
    terms.append(Term("optimizer", "optimizer state of the adapters", count * each, text, origin, state=True))
    terms += _passing_terms(inp, spec, machine)
    decoded = adapters.decoded_bytes(inp, spec, machine.device == "cpu", weight)
    if decoded:
        terms.append(Term("decoded", "decoded experts", decoded, "what is decoded at once of a layer's experts", "assumed"))
    return Memory(tuple(terms), inp.gpus, layer, checkpointed_bytes(inp, spec))


def checkpointed_bytes(inp: PlanInput, spec: ModelSpec) -> float:
    """Activations with every layer checkpointed: one hidden state per layer and, while one layer is computed again, what it keeps
    (the dearest attention and the dearest MLP)."""
    element = 4 if inp.precision == "fp32" else 2
    blocks = recomputation.blocks(spec, inp.seq_len, element)
    again = sum(max(getattr(layer, name).bytes for layer in blocks) for name in recomputation.NAMES)
    return inp.per_device_batch * inp.seq_len * (spec.num_layers * spec.hidden_size * element + again)


def kept_activations(inp: PlanInput, spec: ModelSpec, element: int) -> tuple[float, str]:
    """(bytes per token of activations under the stage's `recompute`, what is computed again).

    What is computed again leaves its input, one hidden state per layer, instead of what it keeps; the dearest of it is there
    whole while it is computed again. Raises RecipeError for an unknown mode."""
    again = recomputation.recomputed(spec, inp.recompute, inp.seq_len, element, f"stage.{inp.stage}.recompute")
    each = sum(activation_bytes(spec, element).values())
    if inp.recompute == "none":
        return each, "no checkpointing"
    freed = [
        sum(getattr(layer, name).bytes for name in names)
        for layer, names in zip(recomputation.blocks(spec, inp.seq_len, element), again)
    ]
    numbers = {label: sum(name in names for names in again) for name, label in RECOMPUTED.items()}
    text = " and ".join(f"{label} of {number}" for label, number in numbers.items() if number)
    text = f"computed again: {text} of {spec.num_layers} layers"
    return each - sum(freed) + spec.num_layers * spec.hidden_size * element + max(freed), text


RECOMPUTED = {"mixer": "attention", "feed_forward": "feed-forward blocks"}


def _stack(inp: PlanInput, spec: ModelSpec, machine: Machine) -> int:
    """Elements that an optimizer works on at once: a stack of Newton-Schulz, at most all matrices, at least the largest one; or,
    without Muon, the largest tensor."""
    if not uses_muon(inp.optimizer):
        return max(t.numel * t.count * (2 if t.kind == "expert" else 1) for t in spec.tensors())  # gate and up are one tensor
    largest = max(t.numel for t in spec.tensors() if t.kind in ("linear", "expert", "router"))
    return max(min(MUON_STACK[machine.device], matrix_parameters(spec)), largest)


def _passing_terms(inp: PlanInput, spec: ModelSpec, machine: Machine) -> list[Term]:
    element = 4 if inp.precision == "fp32" else 2
    tokens = inp.per_device_batch * inp.seq_len
    each, done = kept_activations(inp, spec, element)
    low = adapters.of(inp)
    if low is not None:  # what comes between A and B
        each += element * sum(low.rank * tensor.active for _, tensor in adapters.adapted(low, spec))
    text = f"{inp.per_device_batch} x {inp.seq_len:,} tokens x {each:,.0f} B per token; {done}"
    terms = [Term("activations", "activations", tokens * each, text, "assumed")]
    kept = probability_bytes(inp, spec, machine)
    if kept:
        text = "layers x rows x seq_len^2 / 2 x heads; less for shorter documents"
        terms.append(Term("probabilities", "attention probabilities", kept, text, "assumed"))
    chunk, width = min(LOGITS_CHUNK, tokens), LOGITS_BYTES[inp.precision][tokens > LOGITS_CHUNK]
    logits = width * chunk * spec.vocab_size
    text = f"{width} B x {chunk:,} positions x {spec.vocab_size:,} (chunked loss)"
    terms.append(Term("logits", "logits chunk", logits, text, "assumed"))
    head, text = tokens * spec.hidden_size * element, "one hidden state"
    if adapters.of(inp) is None:
        head, text = head + 8 * spec.vocab_size * spec.hidden_size, "2 x 4 B x the head's weight + one hidden state"
    terms.append(Term("loss", "loss gradients", head, text, "assumed"))
    if uses_muon(inp.optimizer) and adapters.of(inp) is None:
        stack = _stack(inp, spec, machine)
        text = f"{MUON_COPIES} x 4 B x {stack:,} elements of a Newton-Schulz stack"
        terms.append(Term("buffers", "optimizer buffers", MUON_COPIES * 4 * stack, text, "assumed"))
    if inp.gpus > 1:
        terms.append(Term("bucket", "gradient bucket", BUCKET_BYTES, "one bucket in flight between ranks", "assumed"))
    if machine.runtime_gb:
        terms.append(Term("runtime", "libraries", 1e9 * machine.runtime_gb, "machine table: runtime_gb", "assumed"))
    return terms
