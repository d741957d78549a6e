"""The family tree of artifacts as an SVG drawing: each in a column after its parents, long edges led around what lies between."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from k2lab.report import figures
from k2lab.report.collect import RunView

PAGE = 1032  # pixels across the page's text; wider drawings scroll
BOX_H, GAP_Y, LANE, PAD = 92, 20, 14, 2
BOX_W = (116, 176)  # narrowest and widest
GAP_X = (34, 62)


@dataclass
class _Node:
    """A box, or (with an empty `key`) a place where a long edge passes through a column."""

    key: str
    lines: tuple[str, ...] = ()
    style: str = "box"
    column: int = 0
    left: float = 0.0
    width: float = 0.0
    place: float = 0.0
    y: float = 0.0
    above: list[_Node] = field(default_factory=list)  # neighbours in the column before
    below: list[_Node] = field(default_factory=list)

    @property
    def height(self) -> float:
        return BOX_H if self.key else LANE


def lineage_svg(run: RunView) -> str:
    """All present artifacts of the run, stages still to come, and what they were made from; empty if there is nothing to draw."""
    nodes, edges = _graph(run)
    if not nodes:
        return ""
    _columns(nodes, edges)
    columns, chains = _lanes(nodes, edges)
    _order(columns)
    width, height = _place(columns)
    drawn = [_edge(chain, role) for chain, role in chains]
    drawn += [_box(node) for node in nodes.values()]
    text = "; ".join(
        f"{edges_to} comes from {', '.join(sorted(set(froms)))}" for edges_to, froms in _spoken(nodes, edges).items()
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Lineage drawing; scrolls sideways">'
        f'<svg class="dag" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-labelledby="dag-t dag-d">'
        f'<title id="dag-t">Which artifact was made from which</title><desc id="dag-d">{escape(text)}</desc>'
        f"{''.join(drawn)}</svg></div>"
    )


def _graph(run: RunView) -> tuple[dict[str, _Node], list[tuple[str, str, str]]]:
    nodes: dict[str, _Node] = {}
    edges: list[tuple[str, str, str]] = []
    names = {stage.name for stage in run.stages}
    for stage in run.stages:
        if stage.status == "done":
            lines = (stage.name, stage.kind or stage.type, figures.size(stage.num_bytes), f"id {stage.identity[:8] or 'unknown'}")
            nodes[stage.name] = _Node(stage.name, lines)
        else:
            words = {"waiting": "not started", "skipped": "not run"}.get(stage.status, stage.status)
            nodes[stage.name] = _Node(stage.name, (stage.name, stage.type, words), "box open")
        for role, parent, identity in stage.parents():
            if parent not in names and parent not in nodes:
                nodes[parent] = _Node(
                    parent, (parent, "from outside", "this run", f"id {identity[:8]}" if identity else ""), "box outside"
                )
            edges.append((parent, stage.name, role))
        if stage.status != "done":  # what the recipe says it will be made from
            values = [v for value in stage.table.values() for v in (value if isinstance(value, list) else [value])]
            edges += [(v, stage.name, "") for v in values if isinstance(v, str) and v in names and v != stage.name]
    return nodes, [
        edge for i, edge in enumerate(edges) if edge[:2] not in [other[:2] for other in edges[:i]] and edge[0] != edge[1]
    ]


def _columns(nodes: dict[str, _Node], edges: list[tuple[str, str, str]]) -> None:
    """Longest path from a node without parents; rounds are bounded, so that an impossible cycle cannot hang the report."""
    for _ in range(len(nodes)):
        for parent, child, _role in edges:
            nodes[child].column = min(max(nodes[child].column, nodes[parent].column + 1), len(nodes) - 1)


def _lanes(nodes: dict[str, _Node], edges: list[tuple[str, str, str]]) -> tuple[list[list[_Node]], list[tuple[list[_Node], str]]]:
    columns: list[list[_Node]] = [[] for _ in range(1 + max(node.column for node in nodes.values()))]
    for node in nodes.values():
        columns[node.column].append(node)
    chains = []
    for parent, child, role in edges:
        chain = [nodes[parent]]
        for column in range(nodes[parent].column + 1, nodes[child].column):
            lane = _Node("", column=column)
            columns[column].append(lane)
            chain.append(lane)
        chain.append(nodes[child])
        for left, right in zip(chain, chain[1:]):
            left.below.append(right)
            right.above.append(left)
        chains.append((chain, role))
    return columns, chains


def _order(columns: list[list[_Node]]) -> None:
    """Sorts every column by the mean place of its neighbours, sweeping forth and back (Sugiyama's barycentre rule)."""
    for column in columns:
        for i, node in enumerate(column):
            node.place = float(i)
    for sweep in range(8):
        forward = sweep % 2 == 0
        for column in columns if forward else reversed(columns):
            near = {id(node): (node.above if forward else node.below) for node in column}

            def mean(node: _Node, near: dict[int, list[_Node]] = near) -> float:
                others = near[id(node)]
                return sum(other.place for other in others) / len(others) if others else node.place

            column.sort(key=mean)
            for i, node in enumerate(column):
                node.place = i - (len(column) - 1) / 2


def _place(columns: list[list[_Node]]) -> tuple[float, float]:
    """Gives every node its place and returns the drawing's width and height.

    Columns keep their order; within it each node moves as near to the mean height of its neighbours as the others let it, so
    that long edges run straight.
    """
    num = len(columns)
    gap = min(GAP_X[1], max(GAP_X[0], (PAGE - 2 * PAD - num * BOX_W[0]) / max(1, num - 1)))
    box = min(BOX_W[1], max(BOX_W[0], (PAGE - 2 * PAD - (num - 1) * gap) / num))
    for i, column in enumerate(columns):
        for node in column:
            node.left, node.width, node.y = PAD + i * (box + gap), box, 0.0
        _settle(column, [0.0] * len(column))
    for sweep in range(60):
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wanted = []
            for node in column:
                # Two lanes side by side pull harder than a box does, so that edges bend at boxes only.
                near = [(o.y + o.height / 2, 8.0 if not (node.key or o.key) else 1.0) for o in (*node.above, *node.below)]
                total = sum(weight for _, weight in near)
                middle = sum(y * weight for y, weight in near) / total if total else node.y + node.height / 2
                wanted.append(middle - node.height / 2)
            _settle(column, wanted)
    top = min(node.y for column in columns for node in column) - PAD
    for column in columns:
        for node in column:
            node.y -= top
    height = max(node.y + node.height for column in columns for node in column) + PAD
    return num * box + (num - 1) * gap + 2 * PAD, height


def _settle(column: list[_Node], wanted: list[float]) -> None:
    """Heights nearest to the wanted ones (least squares) that keep order and distances: isotonic regression by pooling."""
    offsets = [0.0]
    for node in column[:-1]:
        offsets.append(offsets[-1] + node.height + GAP_Y)
    pools: list[tuple[float, int]] = []
    for want, offset in zip(wanted, offsets):
        mean, num = want - offset, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, num = (mean * num + before * size) / (num + size), num + size
        pools.append((mean, num))
    bases = [mean for mean, num in pools for _ in range(num)]
    for node, base, offset in zip(column, bases, offsets):
        node.y = base + offset


def _edge(chain: list[_Node], role: str) -> str:
    path = ""
    for left, right in zip(chain, chain[1:]):
        x0, y0 = left.left + left.width, left.y + left.height / 2
        x1, y1 = right.left, right.y + right.height / 2
        if not path:
            path = f"M{x0:.0f} {y0:.0f}"
        elif not left.key:
            path += f"L{x0:.0f} {y0:.0f}"
        bend = (x1 - x0) * 0.55
        end = x1 - 5 if right is chain[-1] else x1
        path += f"C{x0 + bend:.0f} {y0:.0f} {x1 - bend:.0f} {y1:.0f} {end:.0f} {y1:.0f}"
    last = chain[-1]
    x, y = last.left, last.y + last.height / 2
    arrow = f'<path class="head" d="M{x:.0f} {y:.0f}l-8 -4v8z"/>'
    title = f"<title>{escape(chain[-1].key)}: {escape(role or 'made from')} = {escape(chain[0].key)}</title>"
    return f'<g>{title}<path class="edge" d="{path}"/>{arrow}</g>'


def _box(node: _Node) -> str:
    x, y = node.left, node.y
    texts = "".join(
        f'<text class="{"name" if i == 0 else "sub"}" x="{x + 9:.0f}" y="{y + 24 + 18 * i + (i > 0):.0f}">'
        f"{escape(_cut(line, int((node.width - 16) / (8.2 if i == 0 else 7))))}</text>"
        for i, line in enumerate(node.lines)
    )
    title = f"<title>{escape(' | '.join(line for line in node.lines if line))}</title>"
    place = f'x="{x:.0f}" y="{y:.0f}" width="{node.width:.0f}" height="{BOX_H}" rx="7"'
    return f'<g>{title}<rect class="{node.style}" {place}/>{texts}</g>'


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


def _spoken(nodes: dict[str, _Node], edges: list[tuple[str, str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for parent, child, _ in edges:
        found.setdefault(child, []).append(parent)
    return {child: found[child] for child in nodes if child in found}
