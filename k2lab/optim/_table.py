"""Which parameter is trained by what: explicit rules by name and shape, a table to print and a hash to compare on resume.

A fused or renamed tensor must never slide from Muon to AdamW unseen, so every rule has a note, unknown shapes say that they are
unknown, and a checkpoint of another table is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from k2lab.core.errors import RecipeError
from k2lab.core.types import RowLayout

# Last part of a parameter's name (without `.weight`) of routed experts that are kept as one tensor [E, out, in].
EXPERT_TENSORS = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj", "w13", "w1", "w2", "w3"})
# Two matrices of equal height stacked by rows: gate first, then up.
FUSED_PAIRS = frozenset({"gate_up_proj", "w13"})
HEADS = frozenset({"lm_head", "score", "classifier", "value_head", "v_head"})
EMBEDDINGS = frozenset({"wte", "wpe", "tok_embeddings", "word_embeddings", "position_embeddings", "embeddings", "embedding"})
GATE_VECTORS = frozenset({"A_log", "dt_bias"})


@dataclass(frozen=True)
class TableRow:
    """One parameter: `optimizer` is "muon", "adamw" or "frozen"; its update is scaled by `lr_scale` x lr.

    For Muon `lr_scale` is 0.2 sqrt(max(rows, cols)) of one of its matrices; the decay uses the raw lr. `split` = row blocks into
    which each matrix is cut before it is orthogonalised (heads, or gate and up).
    """

    name: str
    shape: tuple[int, ...]
    optimizer: str
    lr_scale: float
    weight_decay: float
    note: str = ""
    split: int = 1


def route(name: str, shape: tuple[int, ...], heads: dict[str, int]) -> tuple[str, int, bool, str]:
    """(optimizer, split, decayed, note) of one trainable parameter under MuonClip. `heads` {name: H} are split per head.

    Muon: 2-D matrices (router gates included) and experts [E, out, in]. AdamW: embeddings, output heads, norms, biases,
    convolution kernels, decay gates of KDA, low-rank adapters (whose product, not the factors, is the matrix), and whatever is
    neither 2-D nor known experts.
    """
    parts = name.removesuffix(".weight").split(".")
    leaf = parts[-1]
    if leaf in GATE_VECTORS:
        return "adamw", 1, False, "KDA decay gate"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "adamw", 1, False, "bias"
    if "norm" in leaf:
        return "adamw", 1, False, "norm"
    if len(shape) < 2:
        return "adamw", 1, False, "vector"
    if leaf.endswith(("lora_A", "lora_B")):
        return "adamw", 1, True, "LoRA factor"
    if leaf in HEADS:
        return "adamw", 1, True, "output head"
    if any(part.startswith("embed_") or part in EMBEDDINGS for part in parts):
        return "adamw", 1, True, "embedding"
    if "conv" in leaf:
        return "adamw", 1, True, "convolution kernel"
    if len(shape) == 2 and min(shape) > 1:
        return ("muon", *_matrix_split(name, leaf, shape, heads))
    if len(shape) == 2:
        return "adamw", 1, True, "a vector in the shape of a matrix"
    if len(shape) == 3 and "experts" in parts[:-1] and leaf in EXPERT_TENSORS:
        split, decayed, note = _matrix_split(name, leaf, shape, heads)
        return "muon", split, decayed, f"{shape[0]} experts" + (f", {note}" if note else "")
    return "adamw", 1, True, f"unknown tensor of {len(shape)} dims: not a matrix, not known experts"


def _matrix_split(name: str, leaf: str, shape: tuple[int, ...], heads: dict[str, int]) -> tuple[int, bool, str]:
    split, note = 1, ""
    if name in heads:
        split, note = heads[name], f"{heads[name]} heads"
    elif leaf in FUSED_PAIRS:
        split, note = 2, "gate and up apart"
    if shape[-2] % split:
        raise RecipeError(f"{name} with {shape[-2]} rows cannot be cut into {split} equal blocks", got=list(shape))
    return split, True, note


def matrix_shape(shape: tuple[int, ...], split: int) -> tuple[int, int]:
    """Rows and columns of one matrix of a Muon parameter."""
    return shape[-2] // split, shape[-1]


def muon_scale(rows: int, cols: int) -> float:
    """Moonshot's factor that gives Muon the update RMS of AdamW, 0.2 sqrt(max(rows, cols)) (arXiv 2502.16982, eq. 4)."""
    return 0.2 * max(rows, cols) ** 0.5


def make(
    shapes: Iterable[tuple[str, tuple[int, ...], bool]],
    *,
    muon: bool,
    weight_decay: float,
    adamw_scale: float = 1.0,
    heads: dict[str, int] | None = None,
) -> list[TableRow]:
    """The table of (name, shape, trainable) triples, in their order. Raises ValueError for a name given twice."""
    rows: list[TableRow] = []
    seen: set[str] = set()
    for name, shape, trainable in shapes:
        if name in seen:
            raise ValueError(f"parameter {name!r} was given twice")
        seen.add(name)
        if not trainable:
            rows.append(TableRow(name, shape, "frozen", 0.0, 0.0, "requires_grad is False"))
            continue
        optimizer, split, decayed, note = route(name, shape, heads or {})
        if not muon:
            optimizer, split = "adamw", 1
            note = "" if decayed and not note.startswith("LoRA") else note
        scale = muon_scale(*matrix_shape(shape, split)) if optimizer == "muon" else adamw_scale
        rows.append(TableRow(name, shape, optimizer, scale, weight_decay if decayed else 0.0, note, split))
    return rows


def table_hash(rows: Iterable[TableRow]) -> str:
    """sha256 hex of everything in the table that decides an update; notes don't count."""
    plain = [[r.name, list(r.shape), r.optimizer, r.lr_scale, r.weight_decay, r.split] for r in rows]
    return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()


def head_splits(layouts: Iterable[RowLayout]) -> dict[str, int]:
    """{name: heads} of what `per_head` cuts: queries into [nope | rope] blocks, keys/values into [k_nope | v] blocks."""
    found: dict[str, int] = {}
    for layout in layouts:
        found[layout.q] = found[layout.kv] = layout.num_heads
    return found


def table_text(rows: list[TableRow]) -> str:
    """The table for people: equal rows of several layers folded into one (`model.layers.{1-60}.mlp.gate.weight`), totals."""
    folded: dict[tuple, list[int]] = {}
    for row in rows:
        match = re.search(r"\blayers\.(\d+)\.", row.name)
        name = row.name[: match.start(1)] + "{}" + row.name[match.end(1) :] if match else row.name
        key = (name, row.shape, row.optimizer, row.lr_scale, row.weight_decay, row.note)
        folded.setdefault(key, []).append(int(match.group(1)) if match else -1)
    lines = [("parameter", "shape", "optimizer", "lr scale", "decay", "note")]
    for (name, shape, optimizer, scale, decay, note), layers in folded.items():
        shown = name.replace("{}", _ranges(layers), 1) if layers[0] >= 0 else name
        lines.append((shown, "x".join(map(str, shape)) or "scalar", optimizer, f"{scale:.4g}", f"{decay:g}", note))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    for optimizer in ("muon", "adamw", "frozen"):
        own = [row for row in rows if row.optimizer == optimizer]
        if own:
            text.append(f"{optimizer}: {len(own)} tensors, {sum(_numel(row.shape) for row in own):,} parameters")
    return "\n".join(text)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `{0-2,5}`; one number stands alone."""
    if len(numbers) == 1:
        return str(numbers[0])
    pieces: list[list[int]] = []
    for number in sorted(numbers):
        if pieces and number == pieces[-1][1] + 1:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in pieces) + "}"
