"""Sections about how the numbers came to be: header, data funnel, lineage, time and memory, recipe, licences, footer."""

from __future__ import annotations

import json
import shlex
from typing import Any

from k2lab.report import figures
from k2lab.report.collect import RunView, StageView
from k2lab.report.lineage import lineage_svg
from k2lab.report.markup import esc, flatten, section, shorten
from k2lab.report.tools import sandboxes
from k2lab.report.verdict import DETAIL
from k2lab.report.words import stage_help

_STATUS = {
    "done": ("\u2713", "done"),
    "failed": ("\u2717", "failed"),
    "unfinished": ("\u2026", "unfinished"),
    "waiting": ("\u25cb", "not started"),
    "skipped": ("\u2013", "not run"),
}


def header(run: RunView, said: list[str]) -> str:
    """Name, verdict, facts and the strip of stages. `said` are plain sentences, the first of which leads."""
    more = "".join(f'<p class="more">{esc(text)}</p>' for text in said[1:] if not text.startswith(DETAIL))
    each = "".join(f"<li>{esc(text.removeprefix(DETAIL))}</li>" for text in said if text.startswith(DETAIL))
    more += f'<details class="stages"><summary>Stage by stage</summary><ol class="story">{each}</ol></details>' if each else ""
    about = f'<p class="about">{esc(run.recipe["description"])}</p>' if run.recipe.get("description") else ""
    facts = "".join(f"<div><dt>{esc(dt)}</dt><dd>{dd}</dd></div>" for dt, dd in _facts(run))
    return (
        f'<header><p class="over">K2 Lab run report</p><h1>{esc(run.name)}</h1>'
        f'{about}<p class="lead">{esc(said[0])}</p>{more}{_banner(run)}'
        f'<dl class="facts">{facts}</dl>{_flow(run)}</header>'
    )


def _banner(run: RunView) -> str:
    lines = []
    for stage in run.stages:
        if stage.status == "failed":
            lines.append(f"<p><b>The stage {esc(stage.name)} failed.</b> {shorten(stage.error, 600)}</p>")
        elif stage.status == "unfinished":
            lines.append(f"<p><b>The stage {esc(stage.name)} is not finished</b>{_reached(stage)}.</p>")
        elif stage.status == "skipped":
            lines.insert(0, f"<p><b>The stage {esc(stage.name)} was not run.</b> {shorten(stage.error, 600)}</p>")
    waiting = [stage.name for stage in run.stages if stage.status == "waiting"]
    if waiting:
        lines.append(f"<p>Not started: {esc(', '.join(waiting))}.</p>")
    if lines:
        lines.append("<p>Give the same command again to go on; finished stages are kept.</p>")
    lines += [f"<p>{esc(problem)}.</p>" for problem in run.problems]
    return f'<div class="banner" role="status">{"".join(lines)}</div>' if lines else ""


def _reached(stage: StageView) -> str:
    if stage.reached is None:
        return ""
    of = f" of {figures.count(stage.total)}" if stage.total else ""
    return f": it reached {esc(stage.unit.removesuffix('s'))} {figures.count(stage.reached)}{of}"


def _facts(run: RunView) -> list[tuple[str, str]]:
    """(name, HTML) of the figures under the verdict."""
    env, facts = run.env, []
    count = sum(stage.seconds is not None for stage in run.stages)
    small = f"<small>{count} of {len(run.stages)} stages, measured</small>"
    facts.append(("Total time" if run.finished else "Time so far", figures.duration(run.total_seconds) + small))
    peaks = [(stage.peak_rss_mb, stage.name) for stage in run.stages if stage.peak_rss_mb is not None]
    if peaks:
        peak, name = max(peaks)
        facts.append(("Peak memory", f"{figures.size(peak * 1e6)}<small>in {esc(name)}</small>"))
    facts += [("Model", text) for text in _model(run)] + [("Machine", text) for text in _machine(run)]
    versions = env.get("versions") if isinstance(env.get("versions"), dict) else run.run_start.get("versions")
    if isinstance(versions, dict) and versions:
        order = [key for key in ("k2lab", "python", "torch", "transformers") if key in versions]
        first, rest = (order or list(versions))[0], (order or list(versions)[:4])[1:]
        small = ", ".join(f"{key} {versions[key]}" for key in rest)
        facts.append(("Software", f"{esc(first)} {esc(versions[first])}<small>{esc(small)}</small>"))
    for text in sandboxes(run):
        tool, _, box = text.partition(": ")
        kind, _, limits = box.partition("; ")
        small = f"in it runs the tool {esc(tool)}" + ("; its limits stand under Tools" if limits else "")
        facts.append(("Sandbox", f"{esc(kind)}<small>{small}</small>"))
    if run.started:
        day, _, clock = figures.when(run.started).partition(", ")
        facts.append(("Started", f"{esc(day)}<small>{esc(clock)}</small>"))
    return facts


def _model(run: RunView) -> list[str]:
    """The model's name and size, if the recipe and a manifest tell."""
    model = run.recipe.get("model")
    name = model.get("name") or model.get("spec") or model.get("type") if isinstance(model, dict) else model
    sizes = (figures.number(stage.manifest.get("parameters")) for stage in run.stages)
    num = next((size for size in sizes if size), None)
    if not name and not num:
        return []
    small = f"<small>{figures.count(num)} parameters</small>" if num else ""
    return [f"{esc(name or 'unnamed')}{small}"]


def _machine(run: RunView) -> list[str]:
    """Where it ran: the device of the trained stages as their manifests say, else what env.json says."""
    env = run.env
    used = [_words(stage.manifest.get("device")) for stage in run.stages if stage.kind == "checkpoint"]
    device = next((text for text in used if text), "") or _words(env.get("gpu")) or _words(env.get("device"))
    cpu = _words(env.get("cpu"))
    if device.lower() in ("", "cpu", "auto"):
        device, cpu = cpu or "CPU", ""
    parts = [cpu]
    for key, text in (("cores", "CPU cores"), ("threads", "threads"), ("memory_gb", "GB of memory")):
        num = figures.number(env.get(key))
        parts.append(f"{num:.0f} {text}" if num else "")
    small = ", ".join(part for part in parts if part)
    return [f"{esc(device)}<small>{esc(small)}</small>"] if device != "CPU" or small else []


def _words(value: Any) -> str:
    """A device or processor as text, whether recorded as a name or as a table."""
    if isinstance(value, dict):
        for key in ("name", "model", "type"):
            if value.get(key):
                return str(value[key])
        return ", ".join(f"{key} {text}" for key, text in flatten(value))
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    return "" if value is None else str(value)


def _flow(run: RunView) -> str:
    items = []
    for stage in run.stages:
        mark, word = _STATUS[stage.status]
        seconds = f" in {figures.duration(stage.seconds)}" if stage.seconds is not None and stage.status == "done" else ""
        title = f' title="{esc(stage_help(stage.type))}"' if stage_help(stage.type) else ""
        items.append(f'<li class="{stage.status}"{title}><b>{esc(stage.name)}</b><span>{mark} {word}{seconds}</span></li>')
    return f'<ol class="flow" aria-label="Stages of the run">{"".join(items)}</ol>' if items else ""


# ---------------------------------------------------------------- data


def funnel(run: RunView) -> str:
    """What every filter saw, kept, dropped and changed, with examples."""
    body = ""
    for stage in run.stages:
        if stage.funnel:
            rows = "".join(_filter(event) for event in stage.funnel)
            body += (
                f'<h3>{esc(stage.name)}</h3><table class="cards funnel"><thead><tr><th scope="col">Filter</th>'
                '<th scope="col" class="num">Seen</th>'
                '<th scope="col" class="num">Kept</th><th scope="col" class="num">Dropped</th><th scope="col" class="num">'
                "Changed</th>"
                f'<th scope="col">Examples</th></tr></thead><tbody>{rows}</tbody></table>'
            )
    if body:
        body += (
            '<p class="legend"><span><i class="key box c0"></i>kept as it was</span><span><i class="key box c4"></i>'
            "kept, but changed</span>"
            '<span><i class="key box c1"></i>dropped</span></p>'
        )
    text = "What went in and what came out. Every filter says what it removed, and shows it."
    return section("data", "What happened to the data", text, body)


def _filter(event: dict[str, Any]) -> str:
    seen, kept, dropped, changed = (figures.number(event.get(key)) for key in ("seen", "kept", "dropped", "changed"))
    whole = seen or (kept or 0) + (dropped or 0)
    split = ""
    if whole:
        touched = min(changed or 0, kept or 0)
        parts = (("b", (kept or 0) - touched), ("i", touched), ("u", dropped or 0))
        split = "".join(f'<{tag} style="width:{num / whole * 100:.2f}%"></{tag}>' for tag, num in parts if num > 0)
        split = f'<div class="split" aria-hidden="true">{split}</div>'
    share = f' <span class="unit">({dropped / whole * 100:.1f}\u00a0%)</span>' if whole and dropped else ""
    found = event.get("examples")
    examples = [item for item in found if isinstance(item, (dict, str))][:3] if isinstance(found, list) else []
    shown = ""
    for item in examples:
        why, text = (item.get("why", ""), item.get("text", "")) if isinstance(item, dict) else ("", item)
        shown += f'<div class="ex"><p>{shorten(why, 200)}</p><pre>{shorten(text, 400)}</pre></div>'
    if shown:
        shown = f"<details><summary>{len(examples)} example{'s' if len(examples) > 1 else ''}</summary>{shown}</details>"
    source = f' <span class="unit">{esc(event["source"])}</span>' if event.get("source") else ""
    return (
        f'<tr><th scope="row">{esc(event.get("filter", ""))}{source}{split}</th><td class="num" data-h="Seen">'
        f"{figures.count(seen)}</td>"
        f'<td class="num" data-h="Kept">{figures.count(kept)}</td><td class="num" data-h="Dropped">'
        f"<span>{figures.count(dropped)}{share}</span></td>"
        f'<td class="num" data-h="Changed">{figures.count(changed)}</td><td class="{"" if shown else "empty"}">{shown}</td></tr>'
    )


# ---------------------------------------------------------------- lineage, cost


def lineage(run: RunView) -> str:
    """Drawing and table of the artifacts."""
    drawing = lineage_svg(run)
    rows = []
    for stage in run.stages:
        if stage.status != "done":
            continue
        parents = ", ".join(f"{name} {identity[:8]}".strip() for _, name, identity in stage.parents()) or figures.DASH
        seed = stage.manifest.get("seed")
        rows.append(
            f'<tr><th scope="row">{esc(stage.name)}</th><td data-h="Kind">{esc(stage.kind)}</td>'
            f'<td class="mono" data-h="Identity">{esc(stage.identity[:16])}</td>'
            f'<td data-h="Made from" class="mono">{esc(parents)}</td><td class="num" data-h="Files">'
            f"{len(stage.manifest.get('files') or {})}</td>"
            f'<td class="num" data-h="Size">{figures.size(stage.num_bytes)}</td><td class="num" data-h="Seed">'
            f"{esc(figures.DASH if seed is None else seed)}</td></tr>"
        )
    table = ""
    if rows:
        heads = "<th>Artifact</th><th>Kind</th><th>Identity</th><th>Made from</th>" + "".join(
            f'<th class="num">{name}</th>' for name in ("Files", "Size", "Seed")
        )
        heads = heads.replace("<th", '<th scope="col"')
        table = f'<table class="cards"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        table = f"<details><summary>The same as a table</summary>{table}</details>"
    if run.others and drawing:
        names = ", ".join(run.others[:8]) + (", \u2026" if len(run.others) > 8 else "")
        table += f'<p class="note">Also here, made by other versions of the recipe and not used now: {esc(names)}.</p>'
    text = (
        "Every stage reads finished artifacts and writes one. The identity is a hash of its settings, "
        "its parents, its code version and the "
        "seed: the same identity means the same recipe, all the way back to the data."
    )
    return section("lineage", "Where everything came from", text, drawing + table if drawing else "")


def cost(run: RunView) -> str:
    """Bars of time and memory per stage."""
    timed = [stage for stage in run.stages if stage.seconds is not None or stage.peak_rss_mb is not None]
    if not timed:
        return ""
    longest = max((stage.seconds or 0 for stage in timed), default=0) or 1
    largest = max((stage.peak_rss_mb or 0 for stage in timed), default=0) or 1
    time = memory = ""
    for stage in timed:
        seconds, peak = stage.seconds or 0.0, stage.peak_rss_mb
        percent = seconds / (run.total_seconds or 1) * 100
        small = "under 1\u00a0%" if percent < 0.5 else f"{percent:.0f}\u00a0%"
        time += _bar(stage, seconds / longest, figures.duration(stage.seconds), small, "")
        if peak is not None:
            memory += _bar(stage, peak / largest, figures.size(peak * 1e6), "", " mem")
    right = f'<div><h3>Peak memory</h3><div class="bars">{memory}</div></div>' if memory else ""
    text = "Wall-clock time of each stage, and the most memory that its process held at once."
    body = f'<div class="grid2"><div><h3>Time</h3><div class="bars">{time}</div></div>{right}</div>'
    return section("cost", "Time and memory", text, body)


def _bar(stage: StageView, share: float, text: str, small: str, style: str) -> str:
    status = "" if stage.status == "done" else f"<small>{_STATUS[stage.status][1]}</small>"
    return (
        f'<div class="who">{esc(stage.name)}{status}</div><div class="bar{style}"><b style="width:{share * 100:.2f}%"></b>'
        f'<em style="left:{share * 100:.2f}%">{text} <span>{small}</span></em></div>'
    )


# ---------------------------------------------------------------- recipe, licences, footer


def settings(run: RunView) -> str:
    """Recipe as given and as resolved, environment, notes of the run."""
    body = ""
    notes = [(stage.name, note) for stage in run.stages for note in stage.notes]
    notes += [
        (s.name, "The log on disk belongs to another version of this stage, so no curves are shown.")
        for s in run.stages
        if not s.log_matches and s.kind == "checkpoint"
    ]
    if notes:
        items = "".join(f"<dt>{esc(name)}</dt><dd>{shorten(note, 400)}</dd>" for name, note in notes[:40])
        body += f'<details open><summary>Notes of the run ({len(notes)})</summary><dl class="words">{items}</dl></details>'
    if run.recipe_text:
        body += (
            f"<details><summary>Recipe as written (recipe.toml)</summary><pre>{shorten(run.recipe_text, 60_000)}</pre></details>"
        )
    if run.resolved_text:
        label = "Recipe with every default filled in (recipe.resolved.toml)"
        body += f"<details><summary>{label}</summary><pre>{shorten(run.resolved_text, 120_000)}</pre></details>"
    if run.env:
        items = "".join(f"<dt>{esc(key)}</dt><dd>{shorten(value, 400)}</dd>" for key, value in flatten(run.env))
        body += f'<details><summary>Machine and software (env.json)</summary><dl class="words">{items}</dl></details>'
    return section("recipe", "Recipe and environment", "The recipe decides everything that was computed.", body)


def licences(run: RunView) -> str:
    """Licences and attribution of everything that went in, as the manifests record them."""
    users: dict[str, list[str]] = {}
    for stage in run.stages:
        listed = stage.manifest.get("licences") or stage.manifest.get("licenses") or []
        for item in listed if isinstance(listed, list) else [listed]:
            names = users.setdefault(json.dumps(item, sort_keys=True, default=str), [])
            if stage.name not in names:
                names.append(stage.name)
    found = [(*_licence(run, json.loads(text), names), ", ".join(names)) for text, names in users.items()]
    if not found:
        return ""
    heads = ["Data or weights", "Licence", "Source and attribution", "Carried by"]
    if not any(row[2] for row in found):  # manifests that record names of licences only
        heads.pop(2)
        found = [(row[0], row[1], row[3]) for row in found]  # type: ignore[misc]
    rows = ""
    for first, *rest in found:
        cells = "".join(f'<td data-h="{head}">{shorten(text, 600)}</td>' for head, text in zip(heads[1:], rest))
        rows += f'<tr><th scope="row">{shorten(first, 300)}</th>{cells}</tr>'
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    text = "Each artifact inherits the licences of what it was made from. A licence covers at least one record of the data named."
    table = f'<table class="cards"><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>'
    return section("licences", "Licences and attribution", text, table)


def _sources(run: RunView, names: list[str]) -> str:
    """The data sets among `names` with their sources; if there is none, the first stage that carries the licence."""
    found = []
    for stage in (stage for stage in run.stages if stage.name in names and stage.kind == "dataset"):
        listed = (stage.manifest.get("stage") or {}).get("sources")
        sources = [_words(item) for item in listed] if isinstance(listed, list) else []
        found.append(f"{stage.name} ({', '.join(sources)})" if sources else stage.name)
    return "; ".join(found) or names[0]


def _licence(run: RunView, item: Any, names: list[str]) -> tuple[str, str, str]:
    """(what it covers, licence, source and attribution) of one entry of a manifest's list: a name, or a table."""
    if not isinstance(item, dict):
        return _sources(run, names), str(item), ""
    left = dict(item)

    def take(*keys: str) -> str:
        found = next((key for key in keys if left.get(key)), None)
        return str(left.pop(found)) if found else ""

    what = take("name", "title", "what", "source", "dataset") or _sources(run, names)
    licence = take("licence", "license", "spdx", "id") or "not recorded"
    plain = ("attribution", "source", "url", "authors")
    rest = "; ".join(value if key in plain else f"{key}: {value}" for key, value in flatten(left) if value)
    return what, licence, rest


def command(run: RunView) -> str:
    """The `k2 run` command as recorded; failing that, one that remakes the run from its resolved recipe."""
    found = run.env.get("command")
    text = shlex.join(str(part) for part in found) if isinstance(found, list) else str(found or "")
    if text.split()[1:2] == ["run"]:
        return text
    return f"k2 run {shlex.quote(run.path.resolve().name + '/recipe.resolved.toml')} --run-dir again"


_HOW = (
    """Measured on the machine named above: time, memory, speed, every curve and every metric. Nothing on this page is an estimate
    or copied from elsewhere; the sentences at the top are computed from the table below them.""",
    """Metrics, their 95 % intervals and the intervals of changes were computed by the stages that measure models, over n
    examples, with the settings given in each row. An interval says how far other examples of the same kind could move a figure,
    not what another seed would do.""",
    """Before is the value of the model that the stage started from, on the same examples.""",
    """The rows that lead a stage are chosen by a rule, not by hand: how well it predicts text, its answers over all tasks, the
    kinds of tasks that gained and lost most, what preference tuning moved; and always what became most clearly worse. All other
    measures are one click away, and all of them are in k2 report RUN --json.""",
    """Total time is the sum over stages, each counted once, also if an earlier command made it. Time between an interruption and
    the command that went on is not counted.""",
    """Curves come from the event log. With more than 160 steps, each drawn point is the mean of a run of steps, and the shaded
    band spans their extremes. Steps of an interrupted attempt that were trained again are left out.""",
    """Sizes use SI prefixes (1 MB = 1,000,000 bytes) and come from the manifests, which also hold the sha256 of every file.""",
)


def footer(run: RunView) -> str:
    """How the numbers were made, and how to make them again."""
    items = "".join(f"<li>{esc(' '.join(text.split()))}</li>" for text in _HOW)
    remake = esc("k2 report " + shlex.quote(run.path.resolve().name))
    return (
        f'<footer><div><h2>How these numbers were made</h2><ul class="fine">{items}</ul><p>To remake the run:</p>'
        f'<pre class="cmd">{esc(command(run))}</pre><p>To remake this page from the run directory:</p>'
        f'<pre class="cmd">{remake}</pre></div></footer>'
    )
