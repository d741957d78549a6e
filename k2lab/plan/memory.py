"""Memory per GPU, term by term. Weights, gradients, masters and optimizer state are exact; activations follow a stated formula.

Legend: `D` width, `H` heads, `N` no-position head width, `R` rotary head width, `V` value head width, `Q` query latent,
`L` key-value latent, `E` experts, `K` experts per token, `F` expert hidden width, `W` vocabulary, `d` KDA head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from k2lab.core.errors import RecipeError, did_you_mean
from k2lab.core.types import PlanInput
from k2lab.plan.lines import Origin
from k2lab.plan.machines import Machine
from k2lab.specs import ModelSpec
from k2lab.specs.spec import KDA_CHUNK

# Bytes per parameter: weights, gradients (in the weights' type), fp32 master copy.
PRECISIONS = {"fp32": (4, 4, 0), "bf16": (2, 2, 4)}
# Bytes of state per parameter (matrices, everything else): AdamW keeps two fp32 moments, Muon one fp32 momentum for matrices.
OPTIMIZERS = {"adamw": (8, 8), "muonclip": (4, 8), "muon": (4, 8)}
OWN_OPTIMIZER = (8, 8)
LOGITS_CHUNK = 1024  # positions per piece of the chunked loss (the `lm` objective's default)
LOGITS_COPIES = 3  # logits, their softmax, their gradient, in fp32
MUON_STACK = {"cpu": 1 << 19, "cuda": 1 << 26}  # elements that Newton-Schulz works on at once
MUON_COPIES = 4  # the stack itself, its Gram matrix, a polynomial of it, the product
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

    def gpus_needed(self, limit: float) -> int | None:
        """The fewest GPUs of `limit` bytes that hold the state if it is divided over them; None if the rest alone is too much."""
        room = limit - self.other() - self.layer
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


def activation_elements(spec: ModelSpec) -> dict[str, float]:
    """Elements per token that autograd keeps for the backward pass with checkpointing off, by part of the model; every module
    runs as plain PyTorch and attention keeps no score matrix. Packing does not change them: a pack is one sequence of its length.

    norm of width n            3 n: input, normalised, output
    MLA                        norm(D) + norm(Q) + H (N+R) queries + L + R latent + norm(L) less its input + H (N+V) expanded
                               keys and values + H (N+R) keys + 2 H V output
    ordinary attention         norm(D) + 2 H d rotated queries + 3 Hkv d + 2 H d output (+ 2 H d where keys are repeated)
    KDA                        norm(D) + per head and channel 24 values (projections, convolutions, SiLU, L2 norms, decay, chunk
                               products, gate, norm) + per head 2 C + d^2 / C + 2 (chunk matrices and states, C = 64)
    MLP of width n             4 n: gate, up, activation, product
    experts                    K (2 D + 4 F): gathered input, 4 F, output before weighting; 3 E of the router
    end                        norm(D) after the last layer
    """
    D, H = spec.hidden_size, spec.num_attention_heads
    parts: dict[str, float] = {}
    mla = len(spec.layers_of("mla"))
    if mla:
        queries, latent = H * spec.qk_head_dim, spec.kv_lora_rank
        expanded = H * (spec.qk_nope_head_dim + spec.v_head_dim)
        each = 3 * D + 3 * (spec.q_lora_rank or 0) + 2 * queries + expanded + 2 * H * spec.v_head_dim
        parts["mla"] = mla * (each + latent + spec.qk_rope_head_dim + 2 * latent)
    full = len(spec.layers_of("attention"))
    if full:
        heads, kv_heads = H * spec.head_dim, spec.num_kv_heads * spec.head_dim
        repeated = 2 * heads if kv_heads != heads else 0
        parts["attention"] = full * (3 * D + 4 * heads + 3 * kv_heads + repeated)
    kda = len(spec.layers_of("kda"))
    if kda:
        h, d = spec.linear_num_heads, spec.linear_head_dim
        parts["kda"] = kda * (3 * D + 24 * h * d + 2 * d + h * (2 * KDA_CHUNK + d * d / KDA_CHUNK + 2))
    moe = len(spec.moe_layers())
    dense = spec.num_layers - moe
    parts["mlp"] = dense * (3 * D + 4 * spec.intermediate_size)
    if moe:
        F, K = spec.moe_intermediate_size, spec.num_experts_per_tok
        shared = 4 * F * spec.n_shared_experts
        parts["experts"] = moe * (3 * D + shared + K * (2 * D + 4 * F) + 3 * spec.n_routed_experts)
    parts["end"] = 3 * D
    return parts


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
    weight, grad, master = PRECISIONS[inp.precision]
    per_matrix, per_other, origin = optimizer_bytes(inp.optimizer, f"stage.{inp.stage}.optim")
    total, trainable, matrices = spec.total(), trainable_parameters(spec), matrix_parameters(spec)
    terms = [
        Term("weights", "weights", total * weight, f"{weight} B x {total:,} parameters", state=True),
        Term("gradients", "gradients", trainable * grad, f"{grad} B x {trainable:,}, in the weights' type", state=True),
    ]
    if master:
        terms.append(Term("master", "master weights", trainable * master, f"{master} B x {trainable:,}, fp32", state=True))
    state = matrices * per_matrix + (trainable - matrices) * per_other
    text = f"{per_matrix} B x {matrices:,} in matrices + {per_other} B x {trainable - matrices:,} others ({inp.optimizer})"
    terms.append(Term("optimizer", "optimizer state", state, text, origin, state=True))
    terms += _passing_terms(inp, spec, machine)
    per_layer: dict[int | None, int] = {}
    for tensor in spec.tensors():
        per_layer[tensor.layer] = per_layer.get(tensor.layer, 0) + tensor.numel * tensor.count
    layer = weight * max(number for index, number in per_layer.items() if index is not None)
    return Memory(tuple(terms), inp.gpus, layer, checkpointed_bytes(inp, spec))


def checkpointed_bytes(inp: PlanInput, spec: ModelSpec) -> float:
    """Activations with every layer checkpointed: one hidden state per layer and, while one layer is computed again, its
    elements (the dearest attention and the dearest MLP)."""
    element = 4 if inp.precision == "fp32" else 2
    parts = activation_elements(spec)
    layers = {"mla": "mla", "attention": "attention", "kda": "kda"}
    attention = max(parts[key] / len(spec.layers_of(kind)) for key, kind in layers.items() if key in parts)
    dense = spec.num_layers - len(spec.moe_layers())
    mlp = max(
        parts["mlp"] / dense if dense else 0.0,
        parts["experts"] / len(spec.moe_layers()) if "experts" in parts else 0.0,
    )
    return inp.per_device_batch * inp.seq_len * element * (spec.num_layers * spec.hidden_size + attention + mlp)


def _passing_terms(inp: PlanInput, spec: ModelSpec, machine: Machine) -> list[Term]:
    element = 4 if inp.precision == "fp32" else 2
    tokens = inp.per_device_batch * inp.seq_len
    elements = sum(activation_elements(spec).values())
    terms = [
        Term(
            "activations",
            "activations",
            tokens * elements * element,
            f"{inp.per_device_batch} x {inp.seq_len:,} tokens x {elements:,.0f} elements x {element} B; no checkpointing",
            "assumed",
        )
    ]
    chunk = min(LOGITS_CHUNK, tokens)
    logits = LOGITS_COPIES * chunk * spec.vocab_size * 4
    text = f"{LOGITS_COPIES} x {chunk:,} positions x {spec.vocab_size:,} x 4 B (chunked loss)"
    terms.append(Term("logits", "logits chunk", logits, text, "assumed"))
    if uses_muon(inp.optimizer):
        largest = max(t.numel for t in spec.tensors() if t.kind in ("linear", "expert", "router"))
        stack = max(MUON_STACK[machine.device], largest)
        text = f"{MUON_COPIES} x 4 B x {stack:,} elements of a Newton-Schulz stack"
        terms.append(Term("buffers", "optimizer buffers", MUON_COPIES * 4 * stack, text, "assumed"))
    if inp.gpus > 1:
        terms.append(Term("bucket", "gradient bucket", BUCKET_BYTES, "one bucket in flight between ranks", "assumed"))
    if machine.runtime_gb:
        terms.append(Term("runtime", "libraries", 1e9 * machine.runtime_gb, "machine table: runtime_gb", "assumed"))
    return terms
