"""Curves about the answers that reinforcement learning trains on: rewards, lengths, what carries no signal, errors,
temperature."""

from __future__ import annotations

from collections.abc import Callable

from k2lab.report import figures
from k2lab.report.charts import LineChart, Series
from k2lab.report.collect import StageView
from k2lab.report.objective_charts import scaled, trained_lines
from k2lab.report.points import Points, field_points, known, moments, names_in

FIELD = "rollout"
MAX_OTHERS = 6
_SHOWN = {"reward", "shaped_reward", "pass_rate", "length", "length_max", "truncated", "zero_signal", "errors", "too_long",
          "temperature", "lag"}  # fmt: skip
_UNITS = {"sample_seconds": "s", "rollouts": "per step", "groups": "per step"}
_NAMES = {"sample_seconds": "Time to write the answers", "rollouts": "Answers trained on", "groups": "Tasks asked"}


def _points(stage: StageView, name: str) -> Points:
    return field_points(stage, FIELD, name)


def _values(points: Points) -> list[float]:
    return [value for _, value in points if value is not None]


def _reward(stage: StageView) -> list[LineChart]:
    reward, shaped, passed = (_points(stage, name) for name in ("reward", "shaped_reward", "pass_rate"))
    drawn = []
    whole = known(reward) and _values(reward) == _values(passed)
    if known(reward):
        lines = trained_lines("reward", reward, 0)
        if known(shaped) and _values(shaped) != _values(reward):
            lines += trained_lines("after the price of length", shaped, 1)[-1:]
        note = "Every reward is 0 or 1, so this is also the share of answers that are right." if whole else ""
        text = "What a checker gave for the model\u2019s own answers to training tasks, on average over a step. It should rise."
        title = "Reward and pass rate" if whole else "Reward"
        drawn.append(LineChart(title, "mean of a step", lines, moments=moments(stage), note=note, help=text))
    if known(passed) and not whole:
        text = "Share of the model\u2019s own answers that were fully right."
        lines = trained_lines("right answers", scaled(passed, 100.0), 2)
        drawn.append(LineChart("Pass rate", "% of answers", lines, moments=moments(stage), help=text))
    return drawn


def _length(stage: StageView) -> list[LineChart]:
    mean, longest = _points(stage, "length"), _points(stage, "length_max")
    lines = [Series("mean", mean, 0)] if known(mean) else []
    lines += [Series("longest", longest, -1, quiet=True)] if known(longest) else []
    text = "How many tokens the model writes, thoughts included. Length that grows while rewards do not is padding."
    return [LineChart("Length of answers", "tokens", lines, moments=moments(stage), help=text, from_zero=True)] if lines else []


def _signal(stage: StageView) -> list[LineChart]:
    silent, cut = _points(stage, "zero_signal"), _points(stage, "truncated")
    lines = trained_lines("tasks without a signal", scaled(silent, 100.0), 0)[-1:] if known(silent) else []
    lines += trained_lines("answers cut off", scaled(cut, 100.0), 1)[-1:] if known(cut) else []
    if not lines:
        return []
    failed = sum(_values(_points(stage, "errors")))
    long = sum(_values(_points(stage, "too_long")))
    trained = sum(_values(_points(stage, "rollouts")))
    note = f"Left out: {figures.count(failed)} answers with an error and {figures.count(long)} that were too long"
    note += f", of {figures.count(trained + failed + long)}." if trained else "."
    text = "If all answers to a task are right, or all wrong, there is nothing to compare: such tasks teach nothing in that step."
    return [LineChart("What carries no signal", "%", lines, moments=moments(stage), note=note, help=text, from_zero=True)]


def _errors(stage: StageView) -> list[LineChart]:
    lines = []
    for i, (name, label) in enumerate((("errors", "with an error"), ("too_long", "too long"))):
        points = _points(stage, name)
        if any(_values(points)):
            lines.append(Series(label, points, i))
    text = "Answers that could not be judged (the checker or a tool failed) or did not fit. They are not trained on."
    return [LineChart("Answers left out", "per step", lines, moments=moments(stage), help=text, from_zero=True)] if lines else []


def _temperature(stage: StageView) -> list[LineChart]:
    points, lag = _points(stage, "temperature"), _points(stage, "lag")
    if not known(points):
        return []
    note = ""
    if any(_values(lag)):
        note = f"Answers were written by weights up to {max(_values(lag)):.0f} step behind those that they train."
    text = "How freely the model draws its words when it tries answers: 1 = as its probabilities say, lower = more careful."
    return [LineChart("Temperature", "", [Series("temperature", points, 3)], moments=moments(stage), note=note, help=text)]


def _others(stage: StageView) -> list[LineChart]:
    """Facts that are constant are left out: there is no curve to see."""
    drawn = []
    for name in names_in(stage, FIELD):
        points = _points(stage, name)
        if name in _SHOWN or len(set(_values(points))) < 2:
            continue
        label = _NAMES.get(name, name.replace("_", " ").capitalize())
        drawn.append(LineChart(label, _UNITS.get(name, ""), [Series(label.lower(), points, 4)], moments=moments(stage)))
    return drawn[:MAX_OTHERS]


MAKERS: list[Callable[[StageView], list[LineChart]]] = [_reward, _length, _signal, _errors, _temperature]
LAST: list[Callable[[StageView], list[LineChart]]] = [_others]
