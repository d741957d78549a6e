"""Numbers as text, thinning of curves, ticks, heat maps and the lineage drawing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import report_fixture as fixture

from k2lab.report import charts, figures, lineage, training
from k2lab.report.collect import RunView, StageView, collect


@pytest.mark.parametrize(
    "value, text",
    [
        (2.0513, "2.05"),
        (11.0, "11.0"),
        (0.000312, "3.12e\u22124"),
        (-1.5, "\u22121.50"),
        (12345.6, "12\u202f346"),
        (0, "0.00"),
        (None, "\u2013"),
    ],
)
def test_plain(value, text):
    assert figures.plain(value) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4249, "0.42 s"),
        (9.996, "10.0 s"),
        (59.96, "1 min 00 s"),
        (222, "3 min 42 s"),
        (3599.6, "1 h 00 min"),
        (3780, "1 h 03 min"),
        (400_000, "4 d 15 h"),
    ],
)
def test_duration(seconds, text):
    assert figures.duration(seconds).replace("\u202f", " ") == text


@pytest.mark.parametrize("value, text", [(999, "999 B"), (1_772_816, "1.77 MB"), (1.911e9, "1.91 GB")])
def test_size(value, text):
    assert figures.size(value).replace("\u202f", " ") == text


def test_interval_decides_the_digits():
    assert figures.decimals(2.0513, 0.04) == 3  # 2.051 with 2.031 to 2.071
    assert figures.decimals(8.3, 4.3) == 1
    assert figures.decimals(0.0, 0.6) == 2
    assert figures.decimals(2.05, 1e-9) == 4  # never more than two digits beyond three significant ones


def test_only_finite_numbers_are_numbers():
    assert [figures.number(v) for v in ("nan", "3", True, None, float("inf"), 10**400, 2)] == [None] * 6 + [2.0]


def test_times_are_universal():
    assert figures.when(1_763_770_000) == "22 Nov 2025, 00:06 UTC"
    assert figures.when("2025-11-22T01:06:40+01:00") == "22 Nov 2025, 00:06 UTC"
    assert figures.when("yesterday") == "yesterday"


def test_thinning_keeps_ends_means_and_extremes():
    points = [(float(x), float(x % 10)) for x in range(10_001)]
    thin = charts.thin(points)
    assert len(thin) == charts.MAX_POINTS and thin[0] == points[0] and thin[-1] == points[-1]
    inner = [value for _, value in thin[1:-1]]
    assert sum(inner) / len(inner) == pytest.approx(4.5, abs=0.05)
    assert [x for x, _ in thin] == sorted(x for x, _ in thin)
    band = charts.envelope(points)
    assert min(low for _, low, _ in band) == 0 and max(high for _, _, high in band) == 9
    assert charts.thin(points[:50]) == points[:50] and charts.envelope(points[:50]) == []


def test_one_spike_survives_thinning():
    points = [(float(x), 1.0) for x in range(5000)]
    points[2345] = (2345.0, 80.0)
    assert max(high for _, _, high in charts.envelope(points)) == 80.0


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 17), (1e-5, 2e-3), (0, 300), (2.9, 7.7), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    values = charts.ticks(low, high)
    assert 1 <= len(values) <= 9 and all(low - 1e-12 <= value <= high + 1e-12 for value in values)
    if high > low:
        assert len(values) >= 3
        digits = f"{values[1] - values[0]:.3e}"[0]
        assert digits in "125"


def test_gap_breaks_the_line():
    line = charts.Series("a", [(1, 1.0), (2, None), (3, 2.0), (4, 1.0)])
    path = re.search(r'class="line c0" d="([^"]+)"', charts.line_chart(charts.LineChart("t", "", [line]), "k"))[1]
    assert path.count("M") == 2 and path.count("L") == 1


def test_heat_levels_are_symmetric_around_an_even_share():
    svg = charts.heat_map("t", [0, 1, 2], [[0.1, 1.0, 5.0], [0.1, 1.0, 5.0]], "k")
    assert {"h0", "h3", "h6"} == set(re.findall(r'<path class="(h\d)"', svg))
    bounds = charts.HEAT_BOUNDS
    assert all(low * high == pytest.approx(1) for low, high in zip(bounds, reversed(bounds)))


def test_bound_of_clipping_is_found_anywhere_in_the_optimizer():
    assert training.tau({"type": "muonclip", "lr": 1.0, "tau": 100}) == 100
    assert training.tau({"clip": {"qk_tau": 30.0}}) == 30.0
    assert training.tau({"tau": "none"}) is None and training.tau("muonclip") is None


def test_clipped_heads_are_counted():
    steps = [{"step": s, "max_logits": {"0": [50.0, 90.0]}, **({"clipped": {"0": [1]}} if s % 2 else {})} for s in range(1, 11)]
    text = training.curves(StageView("p", "pretrain", "done", table={"optim": {"tau": 80.0}}, steps=steps))
    assert "Clipped 5 times, in 5 of 10 steps." in text and 'class="event"' in text and 'class="level"' in text


def test_far_bound_does_not_squeeze_the_curve():
    steps = [{"step": s, "max_logits": {"0": [5.0 + s / 10]}} for s in range(1, 11)]
    text = training.curves(StageView("p", "pretrain", "done", table={"optim": {"tau": 100.0}}, steps=steps))
    assert "lies far above the largest value, 6.00" in text and 'class="level"' not in text


def test_expert_loads_may_be_counts_or_shares():
    for loads in ([0.75, 0.25], [300, 100]):
        steps = [{"step": s, "expert_load": {"r": loads}} for s in (1, 2, 3)]
        text = training.curves(StageView("p", "pretrain", "done", steps=steps))
        assert "r: 1.50 at 1" in text and "r: 0.500 at 1" in text


def test_routers_are_named_by_layer_and_in_order():
    load = {f"model.layers.{i}.mlp.gate": [0.5, 0.5] for i in (10, 9, 1)}
    text = training.curves(StageView("p", "pretrain", "done", steps=[{"step": s, "expert_load": load} for s in (1, 2)]))
    assert re.findall(r"Router of (layer \d+) ", text) == ["layer 1", "layer 9", "layer 10"]


# ---------------------------------------------------------------- lineage


def boxes(svg):
    found = re.findall(r'<rect class="([\w ]+)" x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"', svg)
    return [(kind, *map(int, rest)) for kind, *rest in found]


def test_lineage_shows_every_artifact_and_parent(tmp_path):
    svg = lineage.lineage_svg(collect(fixture.make(tmp_path, steps={"pretrain": 5, "sft": 5})))
    drawn = boxes(svg)
    assert len(drawn) == len(fixture.ORDER)
    assert svg.count('class="edge ') == sum(
        len(set(parents.values())) for name, parents in fixture.PARENTS.items() if name != "again"
    )
    assert "evaluate comes from instructions, pretrain, sft, tokenize" in svg
    for i, (_, x, y, w, h) in enumerate(drawn):
        for _, x2, y2, w2, h2 in drawn[i + 1 :]:
            assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y


def test_lineage_of_an_unfinished_run_shows_what_is_to_come(tmp_path):
    svg = lineage.lineage_svg(collect(fixture.make(tmp_path, upto="pretrain", cut=10)))
    kinds = [kind for kind, *_ in boxes(svg)]
    assert kinds.count("box open") == 3 and "not started" in svg and "unfinished" in svg
    assert "sft comes from instructions, pretrain" in svg


def stage(name, *parents):
    manifest = {"kind": "checkpoint", "identity": name * 8, "parents": {f"p{i}": {"name": p} for i, p in enumerate(parents)}}
    return StageView(name, "sft", "done", manifest=manifest, directory=Path(name))


def draw(*stages):
    return lineage.lineage_svg(RunView(Path("r"), "r", {}, "", "", {}, {}, list(stages), [], []))


def test_artifacts_from_outside_are_drawn():
    assert "from outside" in draw(stage("a", "moonshotai/Kimi"))


def test_impossible_cycle_ends():
    assert len(boxes(draw(stage("a", "b"), stage("b", "a")))) == 2


def test_nothing_to_draw():
    assert draw() == ""
