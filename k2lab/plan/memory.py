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
from k2lab.specs import ModelSpec

# Bytes per parameter: weights, gradients (in the weights' type), fp32 master copy.
PRECISIONS = {"fp32": (4, 4, 0), "bf16": (2, 2, 4)}
# Bytes of state per parameter (matrices, everything else): AdamW keeps two fp32 moments, Muon one fp32 momentum for matrices.
OPTIMIZERS = {"adamw": (8, 8), "muonclip": (4, 8), "muon": (4, 8)}
OWN_OPTIMIZER = (8, 8)
LOGITS_CHUNK = 1024  # positions per piece of the chunked loss (the `lm` objective's default)
# Bytes per logit of a piece (one piece, more). Probabilities and gradients overwrite the fp32 logits; in bf16
# either is in the weights' type, too; and the gradients of a piece live until the next piece's logits are there.
LOGITS_BYTES = {"fp32": (4, 8), "bf16": (6, 8)}
KDA_MEMORY_CHUNK = 32  # chunk length of our KDA
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


def activation_bytes(spec: ModelSpec, element: int = 4) -> dict[str, float]:
    """Bytes per token that autograd keeps for the backward pass with checkpointing off, by part of the model. `element` is the
    size of the weights' type; what our modules keep in fp32 in any case is counted with 4 bytes (marked *). It follows our
    kernels for packs on the CPU in fp32; in bf16, and on a GPU, where other kernels run, it is an estimate. Packing changes
    nothing here (a pack is one sequence of its length), but that KDA pads every document to whole chunks of C = 32. Copies that
    do not grow with tokens are left out, and attention probabilities are a term of their own (`probability_bytes`).

    embedding                  8 token id
    rotation                   2 d cosines and sines, once for all layers; only with ordinary attention
    norm of width n            (n + 1)* normalised and scale, n output
    MLA                        norm(D) + norm(Q) if queries are compressed + norm(L) + 2 H (N+R) queries and keys
                               + H (N+V) expanded + H V output + R* rotation (none without positions)
    ordinary attention         norm(D) + 3 H d queries, keys and values (repeated to all heads) + H d output
    KDA                        norm(D) + 7 P inputs and sums of three convolutions, and output, P = heads x d channels
                               + 2 d low-rank gates + heads rates
                               + 18 P*: 2 decay gate, 2 unit queries and keys, 5 exponentials and what they multiply, 2 sides
                               and 2 solutions of the triangular systems, 3 of the scan over chunks and its output, 2 gated norm
                               + heads (3 C among a chunk's positions, d^2 / C states, 3 d / C decays of chunks, 5 scales)*
    MLP of width n             norm(D) + 3 n: gate, up, product; 4 n in dense models, where silu(gate) is kept, too
    experts                    norm(D) + 2 K F gate and up + 3 F per shared expert + router (`_router_bytes`)
    end                        norm(D) after the last layer
    """
    D, H = spec.hidden_size, spec.num_attention_heads

    def norm(width: int) -> float:
        return 4 * (width + 1) + element * width

    parts: dict[str, float] = {"embedding": 8}
    mla = len(spec.layers_of("mla"))
    if mla:
        wide = 2 * H * spec.qk_head_dim + H * (spec.qk_nope_head_dim + spec.v_head_dim) + H * spec.v_head_dim
        latents = norm(spec.kv_lora_rank) + (norm(spec.q_lora_rank) if spec.q_lora_rank else 0)
        parts["mla"] = mla * (norm(D) + latents + element * wide + (0 if spec.nope else 4 * spec.qk_rope_head_dim))
    full = len(spec.layers_of("attention"))
    if full:
        parts["rotation"] = 2 * spec.head_dim * element
        parts["attention"] = full * (norm(D) + 4 * H * spec.head_dim * element)
    kda = len(spec.layers_of("kda"))
    if kda:
        heads, d, C = spec.linear_num_heads, spec.linear_head_dim, KDA_MEMORY_CHUNK
        inside = 18 * heads * d + heads * (3 * C + d * d / C + 3 * d / C + 5)
        parts["kda"] = kda * (norm(D) + element * (7 * heads * d + 2 * d + heads) + 4 * inside)
    moe = len(spec.moe_layers())
    dense = spec.num_layers - moe
    if dense:
        parts["mlp"] = dense * (norm(D) + element * (4 if spec.family == "dense" else 3) * spec.intermediate_size)
    if moe:
        F, K = spec.moe_intermediate_size, spec.num_experts_per_tok
        parts["experts"] = moe * (norm(D) + element * F * (2 * K + 3 * spec.n_shared_experts) + _router_bytes(spec, element))
    parts["end"] = norm(D)
    return parts


def _router_bytes(spec: ModelSpec, element: int) -> float:
    """Bytes per token that one router and the sorting of tokens by expert keep:

    E* scores + K i64 chosen + 2 K i64 token and place in sorted order + K sorted weights + (K + 1)* weights and their sum where
    these are normalised + D* the input in fp32 where it is not fp32 already
    """
    K = spec.num_experts_per_tok
    normalised = 4 * (K + 1) if spec.norm_topk_prob else 0
    copied = 4 * spec.hidden_size if element < 4 else 0
    return 4 * spec.n_routed_experts + 3 * 8 * K + element * K + normalised + copied


def probability_bytes(inp: PlanInput, spec: ModelSpec, machine: Machine) -> float:
    """Attention probabilities that the CPU attention keeps for the backward pass, if every document fills its row: half of the
    square (in blocks of 128 queries) x heads per layer, but nothing in layers where this exceeds 256 MiB (they are computed
    again). On GPUs flash kernels keep none."""
    if machine.device != "cpu":
        return 0.0
    element = 4 if inp.precision == "fp32" else 2
    square = inp.per_device_batch * inp.seq_len * (inp.seq_len + PROBABILITY_BLOCK) / 2
    each = square * spec.num_attention_heads * element
    layers = len(spec.layers_of("mla")) + len(spec.layers_of("attention"))
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
    parts = activation_bytes(spec, element)
    moe = len(spec.moe_layers())
    layers = {kind: len(spec.layers_of(kind)) for kind in ("mla", "attention", "kda")}
    attention = max(parts[kind] / number for kind, number in layers.items() if number)
    numbers = {"mlp": spec.num_layers - moe, "experts": moe}
    mlp = max(parts[kind] / number for kind, number in numbers.items() if number)
    return inp.per_device_batch * inp.seq_len * (spec.num_layers * spec.hidden_size * element + attention + mlp)


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
    each = sum(activation_bytes(spec, element).values())
    low = adapters.of(inp)
    if low is not None:  # what comes between A and B
        each += element * sum(low.rank * tensor.active for _, tensor in adapters.adapted(low, spec))
    text = f"{inp.per_device_batch} x {inp.seq_len:,} tokens x {each:,.0f} B per token; no checkpointing"
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
