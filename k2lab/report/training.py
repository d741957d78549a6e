"""The curves of one training stage: loss, validation, learning rate, gradient norm, attention logits, expert load, speed."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from typing import Any

from k2lab.report import charts, figures
from k2lab.report.charts import Band, LineChart, Series
from k2lab.report.collect import StageView
from k2lab.report.figures import number
from k2lab.report.words import metric_help, metric_label

MAX_HEADS = 16  # drawn one by one; with more, the range over all heads and the most extreme ones
MAX_ROUTERS = 6  # lines; heat maps are drawn for at most MAX_HEAT_MAPS of them
MAX_HEAT_MAPS = 4
MAX_EXPERTS = 64  # rows of a heat map
HEAT_COLUMNS = 60

Points = list[tuple[float, float | None]]


def curves(stage: StageView) -> str:
    """All charts of a stage with optimizer steps, as one grid; empty if it has none."""
    if not stage.steps:
        return ""
    key = f"s{sum(map(ord, stage.name))}{len(stage.name)}"
    makers: list[Callable[[StageView], list[LineChart]]] = [_loss, _valid, _learning_rate, _grad_norm, _logits, _balance, _speed]
    drawn = [charts.line_chart(chart, f"{key}-{maker.__name__}{i}") for maker in makers for i, chart in enumerate(maker(stage))]
    maps = _heat_maps(stage, key)
    grid = f'<div class="grid2">{"".join(drawn)}</div>'
    if maps:
        grid += f'<h4>Which expert works how much, over time</h4>{charts.heat_legend()}<div class="grid2">{"".join(maps)}</div>'
    return grid


def _points(stage: StageView, pick: Callable[[dict[str, Any]], Any]) -> Points:
    return [(float(event["step"]), number(pick(event))) for event in stage.steps]


def _known(points: Points) -> bool:
    return any(value is not None for _, value in points)


def _moments(stage: StageView) -> list[tuple[float, str]]:
    return [(float(step), "resumed") for step in stage.resumed_at if step > 0]


def _table(event: dict[str, Any], name: str) -> dict[str, Any]:
    value = event.get(name)
    return value if isinstance(value, dict) else {}


def _names(stage: StageView, field: str) -> list[str]:
    """All keys that the table `field` has in any step, numbers in numeric order."""
    found = {str(name) for event in stage.steps for name in _table(event, field)}
    return sorted(found, key=_natural)


def _natural(name: str) -> list[tuple[str, int]]:
    """Sorts `layer 9` before `layer 10`."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]


def _with_band(name: str, points: Points, colour: int) -> tuple[list[Series], list[Band]]:
    band = charts.envelope(points)
    return [Series(name, points, colour)], [Band(f"range of {name}", band, colour)] if band else []


def _is_loss(name: str) -> bool:
    """Validation of a loss term is recorded as `valid/<term>`; other names are metrics with a chart of their own."""
    return name.startswith("valid/") or any(word in name.lower() for word in ("loss", "nll", "cross_entropy"))


def _valid_points(stage: StageView) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for event in stage.valid:
        for name, value in _table(event, "metrics").items():
            found.setdefault(str(name), []).append((float(event["step"]), number(value)))
    return {name: points for name, points in found.items() if _known(points)}


def _loss(stage: StageView) -> list[LineChart]:
    lines: list[Series] = []
    bands: list[Band] = []
    broken: set[float] = set()
    terms = _names(stage, "losses")
    alone = len(terms) == 1
    for term in terms:
        points = _points(stage, lambda event, term=term: _table(event, "losses").get(term))  # type: ignore[misc]
        broken |= {x for x, value in points if value is None}
        if _known(points):
            series, band = _with_band("training" if alone else f"training {term}", points, len(lines))
            lines, bands = lines + series, bands + band
    for name, points in _valid_points(stage).items():
        if _is_loss(name):
            label = "validation" if alone else f"validation {name.removeprefix('valid/')}"
            lines.append(Series(label, points, len(lines), dots=True))
    if not lines:
        return []
    note = f"No finite value at {len(broken)} steps, first at step {min(broken):g}." if broken else ""
    return [
        LineChart(
            "Loss in training",
            "nats per token" if alone else "",
            lines,
            bands,
            moments=_moments(stage),
            note=note,
            help="How surprised the model is by the text it learns from, and by held-out text. Both should fall.",
        )
    ]


def _valid(stage: StageView) -> list[LineChart]:
    found = [(name, points) for name, points in _valid_points(stage).items() if not _is_loss(name)]
    return [
        LineChart(
            f"Validation: {metric_label(name)[:1].lower()}{metric_label(name)[1:]}",
            "",
            [Series(name, points, i + 1, dots=True)],
            moments=_moments(stage),
            help=metric_help(name),
        )
        for i, (name, points) in enumerate(found[:4])
    ]


def _learning_rate(stage: StageView) -> list[LineChart]:
    groups = _names(stage, "lr")
    if groups:
        lines = [
            Series(name, _points(stage, lambda e, name=name: _table(e, "lr").get(name)), i)  # type: ignore[misc]
            for i, name in enumerate(groups[: charts.NUM_COLOURS])
        ]
    else:
        lines = [Series("learning rate", _points(stage, lambda event: event.get("lr")))]
    lines = [line for line in lines if _known(list(line.points))]
    if not lines:
        return []
    text = "How far each step may move the weights. A rise at the start and a fall at the end are planned."
    return [LineChart("Learning rate", "", lines, moments=_moments(stage), help=text, from_zero=True)]


def _grad_norm(stage: StageView) -> list[LineChart]:
    points = _points(stage, lambda event: event.get("grad_norm"))
    if not _known(points):
        return []
    values = [value for _, value in points if value is not None and value > 0]
    series, band = _with_band("gradient norm", points, 0)
    wide = bool(values) and max(values) > 30 * min(values)
    text = "How strongly the text pulls at the weights. Spikes are signs of instability; none should grow without end."
    return [LineChart("Gradient norm", "", series, band, moments=_moments(stage), help=text, log=wide, from_zero=True)]


def _speed(stage: StageView) -> list[LineChart]:
    points = _points(stage, lambda event: event.get("tokens_per_s"))
    if not _known(points):
        return []
    series, band = _with_band("tokens per second", points, 2)
    text = "Tokens trained on per second, all machines together."
    return [LineChart("Speed", "tokens/s", series, band, moments=_moments(stage), help=text, from_zero=True)]


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
        for layer, heads in _table(event, "max_logits").items():
            for head, value in enumerate(heads if isinstance(heads, list) else [heads]):
                found.setdefault((str(layer), head), []).append((float(event["step"]), number(value)))
    ordered = sorted(found, key=lambda item: (_natural(item[0]), item[1]))
    return [(f"layer {layer}, head {head}", found[layer, head]) for layer, head in ordered if _known(found[layer, head])]


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
        (float(e["step"]), sum(len(h) if isinstance(h, list) else 1 for h in _table(e, "clipped").values())) for e in stage.steps
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
            moments=_moments(stage),
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
    values = _table(event, "expert_load").get(router)
    if not isinstance(values, list) or not values:
        return None
    found = [number(value) or 0.0 for value in values]
    total = sum(found)
    return [value * len(found) / total for value in found] if total > 0 else None


def _balance(stage: StageView) -> list[LineChart]:
    routers = _names(stage, "expert_load")
    found: list[tuple[str, Points, Points]] = []
    for router in routers:
        busiest: Points = []
        idlest: Points = []
        for event in stage.steps:
            ratios = _shares(event, router)
            busiest.append((float(event["step"]), max(ratios) if ratios else None))
            idlest.append((float(event["step"]), min(ratios) if ratios else None))
        if _known(busiest):
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
            moments=_moments(stage),
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
    for router in _names(stage, "expert_load"):
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
