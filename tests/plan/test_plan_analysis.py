"""Head count and sparsity: the published figures and their definitions."""

import pytest

from k2lab import specs
from k2lab.core.errors import RecipeError
from k2lab.plan.analysis import heads_analysis, sections, sparsity_analysis


def test_three_ways_of_counting_heads():
    found = heads_analysis(specs.get("kimi-k2"), 128, 128_000)
    shown = {line.key: line.shown for line in found.section().lines}
    assert shown == {"expanded": "+83 %", "with_projections": "+86 %", "absorbed": "+95 %"}
    assert heads_analysis(specs.get("kimi-k2")) == found  # twice the heads at 128,000 tokens is the default
    assert all(line.formula for line in found.section().lines)


def test_heads_formula_by_hand():
    # a second way to the published figure: count the model with 128 heads, take away what 64 have
    k2 = specs.get("kimi-k2")
    context = 128_000
    more = k2.replace(num_attention_heads=128)

    def core(spec):
        return spec.num_attention_heads * 61 * 2 * (192 + 128) * context

    base = 2 * k2.matmul_active() + core(k2)
    found = heads_analysis(k2)
    assert found.expanded.increase == pytest.approx((core(more) - core(k2)) / base)
    whole = 2 * more.matmul_active() + core(more)
    assert found.with_projections.increase == pytest.approx(whole / base - 1)


def test_heads_matter_less_at_short_context():
    k2 = specs.get("kimi-k2")
    assert heads_analysis(k2, context=4096).expanded.increase < 0.2
    assert heads_analysis(k2, heads=96).expanded.increase == pytest.approx(heads_analysis(k2).expanded.increase / 2)


def test_impossible_head_questions():
    with pytest.raises(RecipeError, match="latent attention"):
        heads_analysis(specs.get("qwen2.5-7b"))
    with pytest.raises(RecipeError, match="more than 64"):
        heads_analysis(specs.get("kimi-k2"), 32)
    with pytest.raises(RecipeError, match="context"):
        heads_analysis(specs.get("kimi-k2"), context=0)


def test_sparsity():
    found = sparsity_analysis(specs.get("kimi-k2"))
    assert found.sparsity == 48
    rows = {row.sparsity: row for row in found.rows}
    assert rows[48].total == specs.get("kimi-k2").total() and rows[48].active == specs.get("kimi-k2").active()
    assert rows[8].experts == 64 and rows[8].total < rows[16].total < rows[64].total
    assert rows[8].active == pytest.approx(rows[64].active, rel=0.01)  # only the routers differ
    assert {row.sparsity: row.published_saving for row in found.rows if row.published_saving} == {8: 1.69, 16: 1.39, 32: 1.15}
    assert sparsity_analysis(specs.get("kimi-linear-48b")).sparsity == 32
    with pytest.raises(RecipeError, match="no routed experts"):
        sparsity_analysis(specs.get("smollm2-135m"))


def test_published_savings_only_for_eight_active_experts():
    assert not any(row.published_saving for row in sparsity_analysis(specs.get("moonlight-16b")).rows)


def test_tables_only_for_large_models():
    assert len(sections(specs.get("kimi-k2"))) == 2
    assert sections(specs.get("tiny-k2")) == sections(specs.get("qwen2.5-7b")) == sections(None) == []
