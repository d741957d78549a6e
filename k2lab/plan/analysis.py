"""What two architecture decisions of Kimi K2 cost: the number of attention heads at long context, and sparsity.

Background: Kimi K2 report (arXiv 2507.20534), section on model architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from k2lab.core.errors import RecipeError
from k2lab.plan import lines
from k2lab.plan.lines import Section
from k2lab.specs import ModelSpec

# FLOPs saved at equal validation loss (1.5) by sparsity 48 against 8, 16 and 32, 8 active experts and 1 shared; Kimi K2 report.
PUBLISHED_SAVINGS = {8: 1.69, 16: 1.39, 32: 1.15}


@dataclass(frozen=True)
class HeadsRatio:
    """How much more one token costs with more heads, under one way of counting: `added` / `base` flops per token."""

    label: str
    base: float
    added: float
    formula: str

    @property
    def increase(self) -> float:
        """Share by which inference flops grow: 0.83 = +83 %."""
        return self.added / self.base


@dataclass(frozen=True)
class HeadsAnalysis:
    """Inference flops per token with `heads_from` against `heads_to` heads at `context` tokens, counted in three ways."""

    spec: str
    heads_from: int
    heads_to: int
    context: int
    expanded: HeadsRatio  # the published figure
    with_projections: HeadsRatio
    absorbed: HeadsRatio

    def section(self) -> Section:
        """As a table."""
        section = Section(
            f"Heads {self.heads_from} -> {self.heads_to} at {self.context:,} tokens of context ({self.spec}, inference)"
        )
        for key in ("expanded", "with_projections", "absorbed"):
            ratio: HeadsRatio = getattr(self, key)
            section.add(key, ratio.label, ratio.increase, f"+{100 * ratio.increase:.0f} %", "computed", ratio.formula)
        return section


def heads_analysis(spec: ModelSpec, heads: int | None = None, context: int = 128_000) -> HeadsAnalysis:
    """What `heads` instead of the spec's number of heads (default: twice as many) would cost per generated token that attends
    to `context` tokens, in three ways of counting. With M = 2 x matmul_active (all matrix work but scores and values), n
    MLA layers, h heads now and dh more:

    expanded          scores and values of expanded keys: a = 2 (N + R + V) x context per head and layer.
                      increase = n dh a / (M + n h a). Kimi K2, 64 -> 128, 128,000 tokens: +83 %, the published figure.
    with_projections  the added heads' rows of the query, key-value and output projections count too:
                      p = 2 x (rows of q_b x Q + (N + V) L + V D). increase = n dh (a + p) / (M + n h a): +86 %.
    absorbed          decoding on the latent cache (key and value projections folded into query and output):
                      b = 2 (L + R + L) x context. increase = n dh (b + p) / (M + n h b): +95 %.

    Raises RecipeError if the model has no MLA layers or `heads` is not larger than what it has.
    """
    layers = len(spec.layers_of("mla"))
    if not layers:
        raise RecipeError(f"{spec.name} has no latent attention to analyse", allowed="a spec with MLA layers")
    now = spec.num_attention_heads
    heads = 2 * now if heads is None else heads
    if heads <= now:
        raise RecipeError("more heads are compared with the spec's", where="heads", got=heads, allowed=f"more than {now}")
    if context < 1:
        raise RecipeError("a context has at least 1 token", where="context", got=context)
    query = (spec.q_lora_rank or spec.hidden_size) * spec.qk_head_dim
    key_value = spec.kv_lora_rank * (spec.qk_nope_head_dim + spec.v_head_dim)
    projections = 2.0 * (query + key_value + spec.v_head_dim * spec.hidden_size)
    wide = 2.0 * (spec.qk_head_dim + spec.v_head_dim) * context
    latent = 2.0 * (2 * spec.kv_lora_rank + spec.qk_rope_head_dim) * context
    matrix, more = 2.0 * spec.matmul_active(), layers * (heads - now)

    def ratio(label: str, core: float, added: float, formula: str) -> HeadsRatio:
        return HeadsRatio(label, matrix + layers * now * core, more * added, formula)

    shape = f"n = {layers} layers, h = {now}, dh = {heads - now}, M = 2 x {spec.matmul_active() / 1e9:.1f} B"
    return HeadsAnalysis(
        spec=spec.name,
        heads_from=now,
        heads_to=heads,
        context=context,
        expanded=ratio(
            "scores and values only, expanded keys",
            wide,
            wide,
            f"n dh a / (M + n h a), a = 2 (qk + v) context; {shape}; published for Kimi K2: +83 %",
        ),
        with_projections=ratio(
            "with projections", wide, wide + projections, "n dh (a + p) / (M + n h a), p = added projection rows"
        ),
        absorbed=ratio(
            "absorbed decode, with projections",
            latent,
            latent + projections,
            "n dh (b + p) / (M + n h b), b = 2 (2 L + R) context",
        ),
    )


@dataclass(frozen=True)
class SparsityRow:
    """A model of the same kind with another number of routed experts: sparsity = routed experts / experts per token."""

    sparsity: float
    experts: int
    total: int
    active: int
    published_saving: float | None  # flops that sparsity 48 saves against this one at equal loss, if published


@dataclass(frozen=True)
class SparsityAnalysis:
    """Sparsity of `spec`, and what others would mean at the same active experts."""

    spec: str
    sparsity: float
    total_over_active: float
    rows: tuple[SparsityRow, ...]

    def section(self) -> Section:
        """As a table."""
        section = Section(f"Sparsity ({self.spec})")
        section.add(
            "sparsity", "sparsity", self.sparsity, f"{self.sparsity:g}", "computed", "routed experts / routed experts per token"
        )
        ratio = self.total_over_active
        section.add("total_over_active", "parameters, total / active", ratio, f"{ratio:.1f}", "computed", "total / active")
        for row in self.rows:
            label = f"at sparsity {row.sparsity:g}: {row.experts} experts"
            note = "same widths, active experts unchanged"
            if row.published_saving:
                note += f"; published for Kimi K2: sparsity 48 needs {row.published_saving:g} x fewer FLOPs"
            section.add(f"total_at_{row.sparsity:g}", label, row.total, f"{lines.parameters(row.total)}", "computed", note)
        return section


def sparsity_analysis(spec: ModelSpec, others: tuple[int, ...] = (8, 16, 32, 48, 64)) -> SparsityAnalysis:
    """Total experts / active experts, and total and active parameters at `others` sparsities with the same experts per token.

    The published savings hold for Kimi K2's family (8 active experts and 1 shared, validation loss 1.5) and are given only for a
    model with 8 active experts. Raises RecipeError for a model without routed experts.
    """
    if not spec.n_routed_experts:
        raise RecipeError(f"{spec.name} has no routed experts", allowed="a spec with routed experts")
    rows = []
    for sparsity in others:
        other = spec.replace(n_routed_experts=sparsity * spec.num_experts_per_tok, n_group=1, topk_group=1)
        saving = PUBLISHED_SAVINGS.get(sparsity) if spec.num_experts_per_tok == 8 else None
        rows.append(SparsityRow(sparsity, other.n_routed_experts, other.total(), other.active(), saving))
    return SparsityAnalysis(
        spec=spec.name,
        sparsity=spec.n_routed_experts / spec.num_experts_per_tok,
        total_over_active=spec.total() / spec.active(),
        rows=tuple(rows),
    )


def sections(spec: Any) -> list[Section]:
    """Both tables for a large model with latent attention and experts; none for others."""
    if spec is None or spec.total() < 1e9 or not spec.n_routed_experts:
        return []
    return [heads_analysis(spec).section(), sparsity_analysis(spec).section()]
