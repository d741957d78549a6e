"""`write(run_dir)`: the run directory as one HTML file that loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path

from k2lab.core.artifacts import disk_errors
from k2lab.report import passes, record, results, tools
from k2lab.report.collect import RunView, collect
from k2lab.report.markup import esc, section
from k2lab.report.measures import evaluation
from k2lab.report.preferences import preferences
from k2lab.report.rows import rows
from k2lab.report.students import students
from k2lab.report.style import CSS, SCRIPT
from k2lab.report.training import curves, headline
from k2lab.report.verdict import sentences

OPEN_STAGES = 3  # trained stages up to which every curve is shown at once
_NAV = (
    ("gains", "Results"),
    ("students", "Teacher and student"),
    ("preferences", "Preferences"),
    ("tries", "Several tries"),
    ("tools", "Tools"),
    ("baselines", "Baselines"),
    ("samples", "Samples"),
    ("training", "Training"),
    ("difficulty", "Difficulty"),
    ("data", "Data"),
    ("lineage", "Lineage"),
    ("cost", "Time and memory"),
    ("recipe", "Recipe"),
    ("licences", "Licences"),
)


def write(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the report of `run_dir` to `out` (default: `report.html` in the run directory) and returns its path.

    The same run directory gives the same bytes. Raises DataError if `run_dir` is no run directory, MachineError if `out` cannot
    be written.
    """
    run_dir = Path(run_dir)
    target = Path(out) if out is not None else run_dir / "report.html"
    # A lone surrogate, which JSON can carry and UTF-8 cannot, becomes "?".
    data = page(collect(run_dir)).encode("utf-8", "replace")
    temporary = target.with_name(target.name + ".tmp")
    with disk_errors(target):
        temporary.write_bytes(data)
        os.replace(temporary, target)
    return target


def page(run: RunView) -> str:
    """The whole page as text."""
    found = evaluation(run)
    table = rows(run, found)
    said = sentences(run, found, table)
    body = "".join(
        (
            results.gains(run, found, table),
            students(run, found),
            preferences(run, table),
            results.tries(run, found),
            tools.tools(run, found),
            results.baselines(found),
            results.samples(found, apart=tools.stages(run)),
            _training(run),
            passes.difficulty(run),
            record.funnel(run),
            record.lineage(run),
            record.cost(run),
            record.settings(run),
            record.licences(run),
        )
    )
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in _NAV if f'<section id="{key}">' in body)
    # The policy forbids every request, and every script but ours: text of a model or a data set can start nothing.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<meta name="description" content="{esc(said[0])}"><title>{esc(run.name)} \u00b7 K2 Lab report</title>'
        f"<style>{CSS}</style></head>\n"
        f'<body>{record.header(run, said)}<main><nav aria-label="Sections">{links}</nav>\n{body}</main>\n{record.footer(run)}'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _training(run: RunView) -> str:
    body = ""
    fold = sum(bool(stage.steps) for stage in run.stages) > OPEN_STAGES
    for stage in run.stages:
        drawn = curves(stage, fold)
        if drawn:
            body += f'<h3>{esc(stage.name)} <span class="unit">{headline(stage)}</span></h3>{drawn}'
    text = "Recorded at every optimizer step. Move over a chart to read its values."
    return section("training", "How training went", text, body)
