"""The curves of one training stage: rewards and losses first, then learning rate, gradient norm, attention logits, expert load,
speed."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from typing import Any

from k2lab.report import charts, figures, objective_charts, rollout_charts
from k2lab.report.charts import Band, LineChart, Series
from k2lab.report.collect import StageView
from k2lab.report.figures import number
from k2lab.report.objective_charts import loss_words
from k2lab.report.points import (
    Points,
    is_loss,
    known,
    moments,
    names_in,
    natural,
    points_of,
    table_of,
    valid_points,
    with_band,
)
from k2lab.report.words import metric_help, metric_label

MAX_HEADS = 16  # drawn one by one; with more, the range over all heads and the most extreme ones
MAX_ROUTERS = 6  # lines; heat maps are drawn for at most MAX_HEAT_MAPS of them
MAX_HEAT_MAPS = 4
MAX_EXPERTS = 64  # rows of a heat map
HEAT_COLUMNS = 60

Maker = Callable[[StageView], list[LineChart]]


def curves(stage: StageView, fold: bool = False) -> str:
    """All charts of a stage with optimizer steps, as one grid; empty if it has none. With `fold`, those about the machinery
    (learning rate, gradients, attention, experts, speed) are behind a click."""
    if not stage.steps:
        return ""
    key = f"s{sum(map(ord, stage.name))}{len(stage.name)}"
    machinery: list[Maker] = [_learning_rate, _grad_norm, _logits, _balance, _speed]
    makers: list[Maker] = [_loss, _valid, *objective_charts.MAKERS]
    if any(table_of(event, rollout_charts.FIELD) for event in stage.steps):  # rewards lead, the height of the loss says little
        makers = [*rollout_charts.MAKERS, *objective_charts.MAKERS, _loss, _valid, *rollout_charts.LAST]
    first = _drawn(stage, key, makers)
    second = _drawn(stage, key, machinery)
    maps = _heat_maps(stage, key)
    heat = ""
    if maps:
        heat = f'<h4>Which expert works how much, over time</h4>{charts.heat_legend()}<div class="grid2">{"".join(maps)}</div>'
    if not fold or not first:
        return f'<div class="grid2">{first}{second}</div>{heat}'
    inner = f'<div class="grid2">{second}</div>{heat}'
    words = "Learning rate, gradients, attention, experts, speed"
    return f'<div class="grid2">{first}</div><details><summary>{words}</summary>{inner}</details>'


def _drawn(stage: StageView, key: str, makers: list[Maker]) -> str:
    return "".join(
        charts.line_chart(chart, f"{key}-{maker.__module__.rpartition('.')[2]}{maker.__name__}{i}")
        for maker in makers
        for i, chart in enumerate(maker(stage))
    )


def _loss(stage: StageView) -> list[LineChart]:
    """One chart per loss term: their units differ."""
    terms = names_in(stage, "losses")
    valid = valid_points(stage)
    drawn = []
    for term in terms:
        points = points_of(stage, lambda event, term=term: table_of(event, "losses").get(term))  # type: ignore[misc]
        broken = [x for x, value in points if value is None]
        lines, bands = with_band("training", points, 0) if known(points) else ([], [])
        held_out = [name for name in valid if name == f"valid/{term}" or (len(terms) == 1 and is_loss(name))]
        lines += [Series("validation", valid[name], i + 1, dots=True) for i, name in enumerate(held_out)]
        if not lines:
            continue
        note = f"No finite value at {len(broken)} steps, first at step {min(broken):g}." if broken else ""
        title, unit, text = loss_words(term, alone=len(terms) == 1)
        drawn.append(LineChart(title, unit, lines, bands, moments=moments(stage), note=note, help=text))
    return drawn


def _valid(stage: StageView) -> list[LineChart]:
    shown = set(names_in(stage, "losses"))
    found = [
        (name, points)
        for name, points in valid_points(stage).items()
        if not name.startswith("held_out/") and not is_loss(name) and name.removeprefix("valid/") not in shown
    ]
    return [
        LineChart(
            f"Validation: {metric_label(name)[:1].lower()}{metric_label(name)[1:]}",
            "",
            [Series(name, points, i + 1, dots=True)],
            moments=moments(stage),
            help=metric_help(name),
        )
        for i, (name, points) in enumerate(found[:4])
    ]


def _learning_rate(stage: StageView) -> list[LineChart]:
    groups = names_in(stage, "lr")
    if groups:
        lines = [
            Series(name, points_of(stage, lambda e, name=name: table_of(e, "lr").get(name)), i)  # type: ignore[misc]
            for i, name in enumerate(groups[: charts.NUM_COLOURS])
        ]
    else:
        lines = [Series("learning rate", points_of(stage, lambda event: event.get("lr")))]
    lines = [line for line in lines if known(list(line.points))]
    if not lines:
        return []
    text = "How far each step may move the weights. A rise at the start and a fall at the end are planned."
    return [LineChart("Learning rate", "", lines, moments=moments(stage), help=text, from_zero=True)]


def _grad_norm(stage: StageView) -> list[LineChart]:
    points = points_of(stage, lambda event: event.get("grad_norm"))
    if not known(points):
        return []
    values = [value for _, value in points if value is not None and value > 0]
    series, band = with_band("gradient norm", points, 0)
    wide = bool(values) and max(values) > 30 * min(values)
    text = "How strongly the text pulls at the weights. Spikes are signs of instability; none should grow without end."
    return [LineChart("Gradient norm", "", series, band, moments=moments(stage), help=text, log=wide, from_zero=True)]


def _speed(stage: StageView) -> list[LineChart]:
    points = points_of(stage, lambda event: event.get("tokens_per_s"))
    if not known(points):
        return []
    series, band = with_band("tokens per second", points, 2)
    text = "Tokens trained on per second, all machines together."
    return [LineChart("Speed", "tokens/s", series, band, moments=moments(stage), help=text, from_zero=True)]


# ---------------------------------------------------------------- attention logits


def tau(table: Any) -> float | None:
    """The clipping bound of QK-Clip in a stage's table: the number under a key `tau` or `..._tau` of its optimizer."""
    if not isinstance(table, dict):
        return None
    for key, value in table.items():
        if (key == "tau" or key.endswith("_tau")) and number(value) is not None:
            return number(value)
    return next((found for found in (tau(value) for value in table.values()) if found is not None), None)


def _heads(stage: StageView) -> list[tuple[str, Points]]:
    """(`layer 2, head 0`, points) of every head."""
    found: dict[tuple[str, int], Points] = {}
    for event in stage.steps:
        for layer, heads in table_of(event, "max_logits").items():
            for head, value in enumerate(heads if isinstance(heads, list) else [heads]):
                found.setdefault((str(layer), head), []).append((float(event["step"]), number(value)))
    ordered = sorted(found, key=lambda item: (natural(item[0]), item[1]))
    return [(f"layer {layer}, head {head}", found[layer, head]) for layer, head in ordered if known(found[layer, head])]


def _logits(stage: StageView) -> list[LineChart]:
    heads = _heads(stage)
    if not heads:
        return []
    tops = {name: max(value for _, value in points if value is not None) for name, points in heads}
    biggest = max(tops.values())
    bands: list[Band] = []
    if len(heads) <= MAX_HEADS:
        layers = list(dict.fromkeys(name.partition(",")[0] for name, _ in heads))
        lines = [
            Series(name.partition(",")[0], points, layers.index(name.partition(",")[0]), quiet=True) for name, points in heads
        ]
        extra = f"{len(heads)} heads; one line each, coloured by layer."
    else:
        strongest = sorted(heads, key=lambda item: -tops[item[0]])[:4]
        lines = [Series(name, points, i + 1, quiet=True) for i, (name, points) in enumerate(strongest)]
        bands = [Band(f"all {len(heads)} heads", _range([points for _, points in heads]), 0)]
        extra = "The shaded range covers all heads; the four with the largest logits are drawn."
    clipped = [
        (float(e["step"]), sum(len(h) if isinstance(h, list) else 1 for h in table_of(e, "clipped").values()))
        for e in stage.steps
    ]
    clipped = [(step, num) for step, num in clipped if num]
    bound = tau(stage.table.get("optim")) or tau((stage.manifest.get("stage") or {}).get("optim"))
    note = extra
    levels = []
    if bound is not None and biggest >= bound / 6:
        levels = [(bound, f"\u03c4 = {figures.plain(bound)}")]
    elif bound is not None:
        note += f" The bound \u03c4 = {figures.plain(bound)} lies far above the largest value, {figures.plain(biggest)}."
    if clipped:
        note += f" Clipped {sum(num for _, num in clipped)} times, in {len(clipped)} of {len(stage.steps)} steps."
    elif bound is not None:
        note += " Never clipped."
    return [
        LineChart(
            "Largest attention logit per head",
            "",
            lines,
            bands,
            levels=levels,
            moments=moments(stage),
            events=[(step, f"{num} clipped") for step, num in clipped],
            events_name="step with a clipped head",
            note=note,
            help="Attention scores that grow without bound make training explode. MuonClip scales down any head above \u03c4.",
        )
    ]


def _range(heads: list[Points]) -> list[tuple[float, float, float]]:
    low: dict[float, float] = {}
    high: dict[float, float] = {}
    for points in heads:
        for x, value in points:
            if value is not None:
                low[x], high[x] = min(value, low.get(x, value)), max(value, high.get(x, value))
    lows = charts.thin([(x, low[x]) for x in sorted(low)])
    highs = charts.thin([(x, high[x]) for x in sorted(high)])
    return [(x, a, b) for (x, a), (_, b) in zip(lows, highs) if a is not None and b is not None]


# ---------------------------------------------------------------- expert load


def _shares(event: dict[str, Any], router: str) -> list[float] | None:
    """Load of every expert relative to an even share; None if the step has none. Counts and shares are both accepted."""
    values = table_of(event, "expert_load").get(router)
    if not isinstance(values, list) or not values:
        return None
    found = [number(value) or 0.0 for value in values]
    total = sum(found)
    return [value * len(found) / total for value in found] if total > 0 else None


def _balance(stage: StageView) -> list[LineChart]:
    routers = names_in(stage, "expert_load")
    found: list[tuple[str, Points, Points]] = []
    for router in routers:
        busiest: Points = []
        idlest: Points = []
        for event in stage.steps:
            ratios = _shares(event, router)
            busiest.append((float(event["step"]), max(ratios) if ratios else None))
            idlest.append((float(event["step"]), min(ratios) if ratios else None))
        if known(busiest):
            found.append((router, busiest, idlest))
    if not found:
        return []
    shown = found if len(found) <= MAX_ROUTERS else sorted(found, key=lambda item: -_mean_tail(item[1]))[:MAX_ROUTERS]
    lines = []
    for i, (router, busiest, idlest) in enumerate(shown):
        lines += [Series(_router(router), busiest, i), Series(_router(router), idlest, i, quiet=True)]
    note = "Upper lines: the busiest expert of each router; thin lower lines: its idlest."
    if len(shown) < len(found):
        note += f" The {len(shown)} most uneven of {len(found)} routers."
    return [
        LineChart(
            "Balance of the experts",
            "times an even share",
            lines,
            levels=[(1.0, "even share, 1/E")],
            moments=moments(stage),
            note=note,
            help="The model is a team of experts. Work should spread evenly: an expert without work learns nothing.",
            from_zero=True,
        )
    ]


def _mean_tail(points: Points) -> float:
    """Mean of the last tenth of the known values."""
    values = [value for _, value in points if value is not None]
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail)


def _router(name: str) -> str:
    """`3` and `model.layers.3.mlp.gate` are both the router of `layer 3`."""
    found = re.fullmatch(r"(?:.*\.)?layers?[. ]([0-9]+)(?:\..*)?|([0-9]+)", name)
    return f"layer {found[1] or found[2]}" if found else name


def _heat_maps(stage: StageView, key: str) -> list[str]:
    found = []
    for router in names_in(stage, "expert_load"):
        loads = [(float(event["step"]), ratios) for event in stage.steps if (ratios := _shares(event, router))]
        if not loads:
            continue
        num_experts = len(loads[-1][1])
        loads = [(step, ratios) for step, ratios in loads if len(ratios) == num_experts]
        if num_experts <= MAX_EXPERTS and len(loads) > 1:
            found.append((router, loads))
    most_uneven = sorted(found, key=lambda item: -_mean_tail([(step, max(ratios)) for step, ratios in item[1]]))[:MAX_HEAT_MAPS]
    drawn = []
    for i, (router, loads) in enumerate(item for item in found if item in most_uneven):
        num = min(HEAT_COLUMNS, len(loads))
        columns, steps = [], [loads[0][0]]
        for c in range(num):
            part = loads[c * len(loads) // num : (c + 1) * len(loads) // num]
            columns.append([sum(ratios[e] for _, ratios in part) / len(part) for e in range(len(part[0][1]))])
            steps.append(part[-1][0])
        drawn.append(charts.heat_map(f"Router of {_router(router)}", steps, columns, f"{key}-heat{i}"))
    if drawn and len(found) > len(drawn):
        drawn.append(f'<p class="note">The {len(drawn)} most uneven of {len(found)} routers.</p>')
    return drawn


def headline(stage: StageView) -> str:
    """One line above the charts: steps, tokens, resumes."""
    parts = [f"{figures.count(len(stage.steps))} optimizer steps"]
    tokens = sum(number(event.get("tokens")) or 0 for event in stage.steps)
    if tokens:
        parts.append(f"{figures.count(tokens)} tokens trained on")
    if stage.total and stage.steps and stage.reached is not None and stage.status != "done":
        parts[0] = f"step {figures.count(stage.reached)} of {figures.count(stage.total)}"
    for step in stage.resumed_at:
        parts.append(f"resumed at step {figures.count(step)}" if step else "restarted from the beginning")
    return escape(", ".join(parts))
