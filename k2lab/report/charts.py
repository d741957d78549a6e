"""Line charts and heat maps as inline SVG. Complete without JavaScript; data attributes carry the hover read-out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from k2lab.report import figures

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 18, 34
MAX_POINTS = 160  # per line; a chart is about 420 px wide, more points are not seen
NUM_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """One line: `points` are (step, value or None); None is a gap. `colour` indexes the palette, -1 is the quiet grey.

    `low`, `high` draw a band around it. `dots` marks each point; `quiet` draws it thin.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int = 0
    dots: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Band:
    """A filled range (step, low, high), drawn behind the lines."""

    name: str
    points: Sequence[tuple[float, float, float]]
    colour: int = 0


@dataclass(frozen=True)
class LineChart:
    """`levels` are horizontal reference lines (value, label); `moments` vertical ones (step, label), such as a resume;
    `events` are marks at the lower edge (step, what happened)."""

    title: str
    unit: str
    series: list[Series]
    bands: list[Band] = field(default_factory=list)
    levels: list[tuple[float, str]] = field(default_factory=list)
    moments: list[tuple[float, str]] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    events_name: str = ""
    note: str = ""
    help: str = ""
    log: bool = False
    x_name: str = "step"
    from_zero: bool = False
    whole_x: bool = False  # ticks only at the points: numbers of things, not a scale


def thin(points: Sequence[tuple[float, float | None]], limit: int = MAX_POINTS) -> list[tuple[float, float | None]]:
    """At most `limit` points: means over equal runs of points, each placed at its run's middle step; the ends stay exact."""
    if len(points) <= limit:
        return list(points)
    inner, kept = points[1:-1], limit - 2
    result = [points[0]]
    for i in range(kept):
        part = inner[i * len(inner) // kept : (i + 1) * len(inner) // kept]
        values = [value for _, value in part if value is not None]
        result.append((part[len(part) // 2][0], sum(values) / len(values) if values else None))
    return [*result, points[-1]]


def envelope(points: Sequence[tuple[float, float | None]], limit: int = MAX_POINTS) -> list[tuple[float, float, float]]:
    """(step, smallest, largest) per run of points that `thin` averages; empty if nothing is averaged."""
    if len(points) <= limit:
        return []
    result = []
    for i in range(limit):
        part = points[i * len(points) // limit : (i + 1) * len(points) // limit]
        values = [value for _, value in part if value is not None]
        if values:
            result.append((part[len(part) // 2][0], min(values), max(values)))
    return result


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart; as near to `about` of them as that allows."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    choices = []
    for step in (power, 2 * power, 5 * power, 10 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        choices.append([i * step for i in range(first, last + 1)])
    return min(choices, key=lambda values: abs(len(values) - about))


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, with 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    step = max(1, (last - first) // 6)
    values = [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]
    return [value for value in values if low * 0.999 <= value <= high * 1.001]


class _Frame:
    """Maps steps and values to the plot's pixels."""

    def __init__(self, chart: LineChart) -> None:
        xs = [x for line in chart.series for x, _ in line.points]
        ys = [y for line in chart.series for _, y in line.points if y is not None]
        for band in chart.bands:
            ys += [low for _, low, _ in band.points] + [high for _, _, high in band.points]
        ys += [value for value, _ in chart.levels]
        self.log = chart.log and min(ys, default=0) > 0
        self.x0, self.x1 = min(xs, default=0.0), max(xs, default=1.0)
        if self.x1 <= self.x0:
            self.x1 = self.x0 + 1
        low, high = min(ys, default=0.0), max(ys, default=1.0)
        if chart.from_zero and low > 0 and not self.log:
            low = 0.0
        if high - low <= 1e-9 * max(abs(high), abs(low)):  # equal but for rounding
            low, high = (low / 2, high * 2) if self.log else (low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5)
        if self.log:
            pad = (high / low) ** 0.05
            self.y0, self.y1 = low / pad, high * pad
        else:
            pad = (high - low) * 0.06
            self.y0, self.y1 = (0.0 if chart.from_zero and low == 0 else low - pad), high + pad

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.y0) / self.y0) / math.log(self.y1 / self.y0)
        else:
            share = (value - self.y0) / (self.y1 - self.y0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _colour(index: int) -> str:
    return "cq" if index < 0 else f"c{index % NUM_COLOURS}"


def line_chart(chart: LineChart, key: str) -> str:
    """A `<figure>` with title, SVG and legend. `key` makes ids unique on the page."""
    frame = _Frame(chart)
    lines = [(line, thin(line.points)) for line in chart.series]
    body = [_axes(frame, chart)]
    for band in chart.bands:
        upper = [f"{_px(frame.x(x))},{_px(frame.y(high))}" for x, _, high in band.points]
        lower = [f"{_px(frame.x(x))},{_px(frame.y(low))}" for x, low, _ in reversed(band.points)]
        body.append(f'<polygon class="band {_colour(band.colour)}" points="{" ".join(upper + lower)}"/>')
    for value, _ in chart.levels:
        y = _px(frame.y(value))
        body.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    for step, label in chart.moments:
        x = _px(frame.x(step))
        body.append(f'<line class="moment" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        body.append(f'<text class="lab" x="{x}" y="{TOP - 6}" text-anchor="middle">{escape(label)}</text>')
    body += [_line(frame, line, points) for line, points in lines]
    if chart.events:
        spots = sorted({_px(frame.x(step)) for step, _ in chart.events}, key=float)
        path = "".join(f"M{x} {HEIGHT - BOTTOM - 7}v7" for x in spots)
        body.append(f'<path class="event" d="{path}"/>')
    description = "; ".join(_spoken(line) for line in chart.series[:8])
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-t {key}-d" {_readout(chart, frame, lines)}>'
        f'<title id="{key}-t">{escape(chart.title)}</title><desc id="{key}-d">{escape(description)}</desc>{"".join(body)}</svg>'
    )
    unit = f' <span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    help_text = f'<p class="chart-help">{escape(chart.help)}</p>' if chart.help else ""
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    caption = f"<figcaption>{escape(chart.title)}{unit}</figcaption>"
    return f'<figure class="chart">{caption}{help_text}{svg}{_legend(chart)}{note}</figure>'


def _axes(frame: _Frame, chart: LineChart) -> str:
    parts = []
    values = log_ticks(frame.y0, frame.y1) if frame.log else ticks(frame.y0, frame.y1, 5)
    distance = values[1] - values[0] if len(values) > 1 else 0.0
    for value in values:
        y = frame.y(value)
        text = figures.compact(value) if frame.log else figures.tick(value, distance)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_px(y)}" y2="{_px(y)}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{_px(y + 4)}" text-anchor="end">{text}</text>')
    steps = sorted({x for line in chart.series for x, _ in line.points}) if chart.whole_x else ticks(frame.x0, frame.x1, 5)
    for value in steps:
        x = frame.x(value)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            f'<text class="tick" x="{_px(x)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{figures.compact(value)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{_px(middle)}" y="{HEIGHT - 4}" text-anchor="middle">{escape(chart.x_name)}</text>')
    return "".join(parts)


def _line(frame: _Frame, line: Series, points: list[tuple[float, float | None]]) -> str:
    path, pen_down, dots = [], False, []
    for x, value in points:
        if value is None or (frame.log and value <= 0):
            pen_down = False
            continue
        spot = f"{_px(frame.x(x))} {_px(frame.y(value))}"
        path.append(("L" if pen_down else "M") + spot)
        pen_down = True
        if line.dots or len(points) == 1:
            dots.append(f'<circle class="{_colour(line.colour)}" cx="{spot.split()[0]}" cy="{spot.split()[1]}" r="2.6"/>')
    style = "line quiet" if line.quiet else "line"
    return f'<path class="{style} {_colour(line.colour)}" d="{"".join(path)}"/>{"".join(dots)}'


def _spoken(line: Series) -> str:
    found = [(x, value) for x, value in line.points if value is not None]
    if not found:
        return f"{line.name}: no values"
    (x0, first), (x1, last) = found[0], found[-1]
    return f"{line.name}: {figures.plain(first)} at {figures.count(x0)}, {figures.plain(last)} at {figures.count(x1)}"


def _readout(chart: LineChart, frame: _Frame, lines: list[tuple[Series, list[tuple[float, float | None]]]]) -> str:
    """Data attributes for the hover read-out: steps once, then name, colour and values of every line on the same steps."""
    if not lines or any([x for x, _ in points] != [x for x, _ in lines[0][1]] for _, points in lines):
        longest = max((points for _, points in lines), key=len, default=[])
        lines = [(line, points) for line, points in lines if [x for x, _ in points] == [x for x, _ in longest]]
    if not lines:
        return ""
    steps = ",".join(f"{x:.10g}" for x, _ in lines[0][1])
    table = "|".join(
        f"{line.name.replace('|', ' ').replace('~', ' ')}~{_colour(line.colour)}~"
        + ",".join("" if value is None else f"{value:.4g}" for _, value in points)
        for line, points in lines[:8]
    )
    box = f"{LEFT},{WIDTH - RIGHT},{frame.x0:.10g},{frame.x1:.10g},{WIDTH},{TOP},{HEIGHT - BOTTOM}"
    return f'data-x="{steps}" data-s="{escape(table)}" data-b="{box}" data-n="{escape(chart.x_name)}"'


def _legend(chart: LineChart) -> str:
    items = []
    if len(chart.series) > 1 or chart.bands or chart.events or chart.levels:
        seen: set[tuple[str, int]] = set()
        for line in chart.series:
            if (line.name, line.colour) in seen:
                continue
            seen.add((line.name, line.colour))
            mark = "dot" if line.dots else "stroke"
            items.append(f'<span><i class="key {mark} {_colour(line.colour)}"></i>{escape(line.name)}</span>')
        items += [f'<span><i class="key area {_colour(band.colour)}"></i>{escape(band.name)}</span>' for band in chart.bands]
        items += [f'<span><i class="key dash"></i>{escape(label)}</span>' for _, label in chart.levels]
        if chart.events:
            items.append(f'<span><i class="key bar"></i>{escape(chart.events_name)}</span>')
    return f'<p class="legend">{"".join(items)}</p>' if items else ""


# ---------------------------------------------------------------- histogram


@dataclass(frozen=True)
class Bin:
    """One bar: its label, how many there are, and how many of them are used (drawn in colour, the others in grey)."""

    label: str
    count: int
    used: int


def histogram(title: str, unit: str, bins: list[Bin], key: str, x_name: str = "", note: str = "") -> str:
    """Vertical bars."""
    top, room = max(each.count for each in bins) or 1, HEIGHT - TOP - BOTTOM
    width, base = (WIDTH - LEFT - RIGHT) / len(bins), HEIGHT - BOTTOM
    body = []
    for value in ticks(0, top, 4):
        if float(value).is_integer():
            y = _px(base - value / top * room)
            body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            text = figures.compact(value)
            body.append(f'<text class="tick" x="{LEFT - 6}" y="{_px(float(y) + 4)}" text-anchor="end">{text}</text>')
    for i, each in enumerate(bins):
        x, centre = _px(LEFT + i * width + 4), _px(LEFT + (i + 0.5) * width)
        tall, used = each.count / top * room, each.used / top * room
        for style, low, high in (("bin", 0.0, used), ("bin idle", used, tall)):
            if high > low:
                place = f'x="{x}" y="{_px(base - high)}" width="{_px(width - 8)}" height="{_px(high - low)}"'
                body.append(f'<rect class="{style}" {place}/>')
        if each.count:
            text = figures.compact(each.count)
            body.append(f'<text class="lab" x="{centre}" y="{_px(base - tall - 4)}" text-anchor="middle">{text}</text>')
        body.append(f'<text class="tick" x="{centre}" y="{base + 15}" text-anchor="middle">{escape(each.label)}</text>')
    body.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) // 2
    body.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_name)}</text>')
    spoken = "; ".join(f"{each.label}: {each.count}" for each in bins)
    notes = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <span class="unit">{escape(unit)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{escape(title)}</title>'
        f'<desc id="{key}-d">{escape(spoken)}</desc>{"".join(body)}</svg>{notes}</figure>'
    )


# ---------------------------------------------------------------- heat map

# upper bounds of an expert's load relative to an even share, symmetric on a logarithmic scale around 1
HEAT_BOUNDS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
HEAT_NAMES = ("under \u00bc", "\u00bc\u2013\u00bd", "\u00bd\u20130.8", "about even", "1.25\u20132", "2\u20134", "over 4")


def heat_map(title: str, steps: list[float], rows_CE: list[list[float]], key: str, note: str = "") -> str:
    """Load of each expert over time, coloured by its ratio to an even share.

    `rows_CE` holds one list of E ratios (1 = even) per column C of time; `steps` the step at which each column ends.
    """
    num_columns, num_experts = len(rows_CE), len(rows_CE[0])
    height = max(60, min(150, num_experts * 14))
    cell_w, cell_h = (WIDTH - LEFT - RIGHT) / num_columns, height / num_experts
    paths: list[list[str]] = [[] for _ in range(len(HEAT_BOUNDS) + 1)]
    for expert in range(num_experts):
        column = 0
        while column < num_columns:
            level, start = _heat_level(rows_CE[column][expert]), column
            while column < num_columns and _heat_level(rows_CE[column][expert]) == level:
                column += 1
            x, y, width = LEFT + start * cell_w, TOP + expert * cell_h, (column - start) * cell_w
            paths[level].append(f"M{_px(x)} {_px(y)}h{_px(width)}v{_px(cell_h)}h{_px(-width)}z")
    body = [f'<path class="h{level}" d="{"".join(path)}"/>' for level, path in enumerate(paths) if path]
    every = max(1, math.ceil(num_experts / 8))
    for expert in range(0, num_experts, every):
        y = TOP + (expert + 0.5) * cell_h + 4
        body.append(f'<text class="tick" x="{LEFT - 6}" y="{_px(y)}" text-anchor="end">{expert}</text>')
    bottom = TOP + height
    span = steps[-1] - steps[0] or 1
    for value in ticks(steps[0], steps[-1], 5):
        x = LEFT + (value - steps[0]) / span * (WIDTH - LEFT - RIGHT)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        body.append(f'<text class="tick" x="{_px(x)}" y="{bottom + 15}" text-anchor="{anchor}">{figures.compact(value)}</text>')
    body.append(f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) // 2}" y="{bottom + 30}" text-anchor="middle">step</text>')
    most, least = figures.plain(max(rows_CE[-1])), figures.plain(min(rows_CE[-1]))
    text = f"{num_experts} experts; at the end the busiest has {most} times an even share, the idlest {least}"
    notes = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <span class="unit">expert number, top to bottom</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {bottom + 34}" role="img" aria-labelledby="{key}-t {key}-d">'
        f'<title id="{key}-t">{escape(title)}</title>'
        f'<desc id="{key}-d">{escape(text)}</desc>{"".join(body)}</svg>{notes}</figure>'
    )


def heat_legend() -> str:
    """The colour scale of heat maps, in words."""
    items = (f'<span><i class="key box h{i}"></i>{escape(name)}</span>' for i, name in enumerate(HEAT_NAMES))
    return f'<p class="legend heat">Load relative to an even share (1/E): {"".join(items)}</p>'


def _heat_level(ratio: float) -> int:
    return sum(ratio >= bound for bound in HEAT_BOUNDS)
