"""The family tree of artifacts as an SVG drawing: data, models and measurements in three lanes, one row per artifact in the order
in which they were made. Each artifact's children hang on a line of its own colour, so that many can be told apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from k2lab.report import figures
from k2lab.report.collect import RunView, StageView

LANES = ("Data", "Models", "Measurements")
BOX_W, BOX_H = 236, 46
GAP_Y, HEAD, PAD = 12, 26, 3
PORT, TRACK, SIDE = 9, 13, 18  # distance of arrow heads on a box, of lines in a gap, of the first line from a box
ROUND = 5
_LANE_OF_KIND = {"dataset": 0, "tokenizer": 0, "tokens": 0, "checkpoint": 1, "report": 2}
_LANE_OF_TYPE = {"corpus": 0, "tokenizer": 0, "tokenize": 0, "preference_data": 0, "teacher_data": 0, "evaluate": 2, "agent": 2}
_MODEL_ROLES = ("start", "model", "models", "reference", "teacher")


@dataclass
class _Box:
    """An artifact, or a stage still to come. `inlets` are its parents in the order of their arrow heads, per side."""

    key: str
    lines: tuple[str, ...]
    lane: int
    style: str = "box"
    x: float = 0.0
    y: float = 0.0
    height: float = BOX_H
    inlets: dict[str, list[str]] = field(default_factory=lambda: {"left": [], "right": []})

    def inlet(self, parent: str, side: str) -> float:
        """Height of the arrow head of the edge from `parent`."""
        ports = self.inlets[side]
        first = self.y + self.height / 2 - (len(ports) - 1) * PORT / 2
        if side == "right":  # the lower end of this side is where a box's own line begins
            first = self.y + 10
        return first + ports.index(parent) * PORT

    @property
    def outlet(self) -> float:
        return self.y + self.height - 9


@dataclass
class _Line:
    """The line on which a box's children hang: its gap (0 beside the data, 1 beside the models) and track in it."""

    gap: int
    colour: int
    track: int = 0
    x: float = 0.0


def lineage_svg(run: RunView) -> str:
    """All present artifacts of the run, stages still to come, and what they were made from; empty if there is nothing to draw."""
    boxes, edges = _graph(run)
    if not boxes:
        return ""
    lines = _lines(boxes, edges)
    for parent, child, _ in edges:
        side = _side(boxes[child], lines[parent])
        boxes[child].inlets[side].append(parent)
    height = _rows(boxes)
    width = _tracks(boxes, edges, lines)
    drawn = []
    for name, line in lines.items():  # a line's light rims lie under all of it, so that it is cut by other lines only
        own = [_edge(boxes[name], boxes[child], line, role) for parent, child, role in edges if parent == name]
        drawn += [rim for rim, _ in own] + [edge for _, edge in own]
    drawn += [_box(box) for box in boxes.values()]
    for lane in sorted({box.lane for box in boxes.values()}):
        x = next(box.x for box in boxes.values() if box.lane == lane)
        drawn.append(f'<text class="lane" x="{x:.0f}" y="14">{LANES[lane]}</text>')
    text = "; ".join(f"{child} comes from {', '.join(sorted(set(froms)))}" for child, froms in _spoken(boxes, edges).items())
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Lineage drawing; scrolls sideways">'
        f'<svg class="dag" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-labelledby="dag-t dag-d">'
        f'<title id="dag-t">Which artifact was made from which</title><desc id="dag-d">{escape(text)}</desc>'
        f"{''.join(drawn)}</svg></div>"
    )


def _graph(run: RunView) -> tuple[dict[str, _Box], list[tuple[str, str, str]]]:
    boxes: dict[str, _Box] = {}
    edges: list[tuple[str, str, str]] = []
    names = {stage.name for stage in run.stages}
    for stage in run.stages:
        for role, parent, identity in stage.parents():
            if parent not in names and parent not in boxes:
                lane = 1 if role.partition("[")[0] in _MODEL_ROLES else 0
                note = f"from outside this run{f', id {identity[:8]}' if identity else ''}"
                boxes[parent] = _Box(parent, (parent, note), lane, "box outside")
            edges.append((parent, stage.name, role))
        boxes[stage.name] = _stage_box(stage)
        if stage.status != "done":  # what the recipe says it will be made from
            values = [v for value in stage.table.values() for v in (value if isinstance(value, list) else [value])]
            edges += [(v, stage.name, "") for v in values if isinstance(v, str) and v in names and v != stage.name]
    return boxes, [
        edge for i, edge in enumerate(edges) if edge[:2] not in [other[:2] for other in edges[:i]] and edge[0] != edge[1]
    ]


def _stage_box(stage: StageView) -> _Box:
    if stage.status == "done":
        lane = _LANE_OF_KIND.get(stage.kind, 1)
        sub = f"{stage.kind or stage.type}, {figures.size(stage.num_bytes)}, id {stage.identity[:8] or 'unknown'}"
        return _Box(stage.name, (stage.name, sub), lane)
    words = {"waiting": "not started", "skipped": "not run"}.get(stage.status, stage.status)
    return _Box(stage.name, (stage.name, f"{stage.type}, {words}"), _LANE_OF_TYPE.get(stage.type, 1), "box open")


def _lines(boxes: dict[str, _Box], edges: list[tuple[str, str, str]]) -> dict[str, _Line]:
    """One line per parent: data hang theirs into the first gap, models and measurements into the second."""
    parents = {parent for parent, _, _ in edges}
    lines: dict[str, _Line] = {}
    for name in (key for key in boxes if key in parents):
        gap = min(boxes[name].lane, 1)
        lines[name] = _Line(gap, sum(line.gap == gap for line in lines.values()) % 6)
    return lines


def _side(child: _Box, line: _Line) -> str:
    """The side on which a line reaches a child: data have their gap on the right, measurements on the left."""
    if child.lane == 1:
        return "left" if line.gap == 0 else "right"
    return "right" if child.lane == 0 else "left"


def _rows(boxes: dict[str, _Box]) -> float:
    """Heights and places of the boxes from top to bottom; returns the drawing's height."""
    y = float(HEAD)
    for box in boxes.values():
        right = 10 + len(box.inlets["right"]) * PORT + 12
        box.height = max(BOX_H, 10 + len(box.inlets["left"]) * PORT, right)
        box.y = y
        y += box.height + GAP_Y
    return y - GAP_Y + PAD


def _tracks(boxes: dict[str, _Box], edges: list[tuple[str, str, str]], lines: dict[str, _Line]) -> float:
    """Gives each line a track that is free over its whole length, and everything its place sideways; returns the width."""
    used: list[list[list[tuple[float, float]]]] = [[], []]
    for name, line in lines.items():
        ends = [boxes[child].inlet(name, _side(boxes[child], line)) for parent, child, _ in edges if parent == name]
        low, high = min(boxes[name].outlet, *ends) - PORT, max(boxes[name].outlet, *ends) + PORT
        gap = used[line.gap]
        line.track = next((i for i, spans in enumerate(gap) if all(high < a or low > b for a, b in spans)), len(gap))
        if line.track == len(gap):
            gap.append([])
        gap[line.track].append((low, high))
    lanes = sorted({box.lane for box in boxes.values()})
    lefts, x = {}, float(PAD)
    starts = [0.0, 0.0]
    for lane in range(3):
        if lane in lanes:
            lefts[lane] = x
            x += BOX_W
        if lane < 2:
            starts[lane] = x + SIDE
            x += 2 * SIDE + max(0, len(used[lane]) - 1) * TRACK if used[lane] else SIDE * (lane in lanes)
    for box in boxes.values():
        box.x = lefts[box.lane]
    for line in lines.values():
        line.x = starts[line.gap] + line.track * TRACK
    return x + PAD


def _edge(parent: _Box, child: _Box, line: _Line, role: str) -> tuple[str, str]:
    """(light rim, edge) from a parent along its line to a child."""
    y0, side = parent.outlet, _side(child, line)
    y1 = child.inlet(parent.key, side)
    x0 = parent.x + BOX_W if parent.lane < 2 else parent.x
    x1 = child.x if side == "left" else child.x + BOX_W
    into = 1 if x1 > line.x else -1
    end = x1 - 7 * into
    down = 1 if y1 > y0 else -1
    bend = min(ROUND, abs(y1 - y0) / 2)
    away = 1 if line.x > x0 else -1
    path = (
        f"M{x0:.0f} {y0:.1f}H{line.x - away * bend:.1f}Q{line.x:.1f} {y0:.1f} {line.x:.1f} {y0 + down * bend:.1f}"
        f"V{y1 - down * bend:.1f}Q{line.x:.1f} {y1:.1f} {line.x + into * bend:.1f} {y1:.1f}H{end:.1f}"
    )
    arrow = f'<path class="head c{line.colour}" d="M{x1:.0f} {y1:.1f}l{-8 * into} -4v8z"/>'
    title = f"<title>{escape(child.key)}: {escape(role or 'made from')} = {escape(parent.key)}</title>"
    return f'<path class="halo" d="{path}"/>', f'<g>{title}<path class="edge c{line.colour}" d="{path}"/>{arrow}</g>'


def _box(box: _Box) -> str:
    middle = box.y + box.height / 2
    texts = "".join(
        f'<text class="{"name" if i == 0 else "sub"}" x="{box.x + 11:.0f}" y="{middle - 4 + 17 * i:.1f}">'
        f"{escape(_cut(line, int((BOX_W - 20) / (8.2 if i == 0 else 6.4))))}</text>"
        for i, line in enumerate(box.lines)
    )
    title = f"<title>{escape(' | '.join(line for line in box.lines if line))}</title>"
    place = f'x="{box.x:.0f}" y="{box.y:.0f}" width="{BOX_W:.0f}" height="{box.height:.0f}" rx="7"'
    return f'<g>{title}<rect class="{box.style}" {place}/>{texts}</g>'


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def _spoken(boxes: dict[str, _Box], edges: list[tuple[str, str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for parent, child, _ in edges:
        found.setdefault(child, []).append(parent)
    return {child: found[child] for child in boxes if child in found}
