"""How hard tasks are for a model: histograms of pass rates, and which of the tasks are used."""

from __future__ import annotations

from k2lab.report import charts, figures
from k2lab.report.collect import RunView, StageView
from k2lab.report.figures import number
from k2lab.report.markup import section

# Always and never are bins of their own; (from, below, label)
BINS = (
    (0.0, 0.0, "never"),
    (0.0, 0.2, "under 20"),
    (0.2, 0.4, "20\u201339"),
    (0.4, 0.6, "40\u201359"),
    (0.6, 0.8, "60\u201379"),
    (0.8, 1.0, "80\u201399"),
    (1.0, 1.0, "always"),
)


def difficulty(run: RunView) -> str:
    """The section: one histogram per stage that measured pass rates."""
    drawn = [_histogram(stage, i) for i, stage in enumerate(stage for stage in run.stages if stage.pass_rates)]
    text = (
        "The model answered each task several times; the share of right answers says how hard the task is for it. "
        "Tasks that are always or never solved have nothing to teach by comparison: pairs and rewards come from those in between."
    )
    return section("difficulty", "How hard the tasks were", text, f'<div class="grid2">{"".join(drawn)}</div>' if drawn else "")


def _histogram(stage: StageView, index: int) -> str:
    rates = stage.pass_rates
    bounds = _bounds(stage)
    bins = []
    for low, high, label in BINS:
        inside = [rate for rate in rates if (rate == low if low == high else low <= rate < high and rate > 0)]
        used = [rate for rate in inside if (bounds[0] <= rate <= bounds[1] if bounds else 0 < rate < 1)]
        bins.append(charts.Bin(label, len(inside), len(used)))
    mean = sum(rates) / len(rates)
    note = f"{figures.count(len(rates))} tasks; on average {mean * 100:.0f}{figures.THIN}% of the answers were right."
    if bounds is not None:
        num = sum(bounds[0] <= rate <= bounds[1] for rate in rates)
        span = " to ".join(f"{bound * 100:.0f}" for bound in bounds)
        note += f" Blue: the {figures.count(num)} tasks that were used, solved in {span}{figures.THIN}% of tries."
    else:
        some = sum(0 < rate < 1 for rate in rates)
        note += f" Blue: the {figures.count(some)} tasks that were solved sometimes, but not always."
    title = f"{stage.name}: tasks by share of right answers"
    return charts.histogram(title, "tasks", bins, f"pass{index}", x_name="% of tries that were right", note=note)


def _bounds(stage: StageView) -> tuple[float, float] | None:
    """The pass rates between which a stage uses tasks, if it chooses."""
    table = stage.manifest.get("stage") or stage.table
    given = table.get("pass_rate") if isinstance(table, dict) else None
    if not isinstance(given, list) or len(given) != 2:
        return None
    low, high = number(given[0]), number(given[1])
    return (low, high) if low is not None and high is not None else None
