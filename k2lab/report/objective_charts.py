"""Curves of what an objective reports besides its loss: preference accuracy, margins, log-probabilities, entropy, distances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from k2lab.report.charts import Band, LineChart, Series
from k2lab.report.collect import StageView
from k2lab.report.points import Points, field_points, known, moments, names_in, smooth, valid_points

MAX_OTHERS = 6  # charts of metrics that have no words of their own
SMOOTH = 10  # steps that a mean is taken over, where single steps scatter

# term -> (title, unit, explanation)
_LOSSES = {
    "lm": (
        "Loss on text",
        "nats per token",
        "How surprised the model is by the answers that it learns from (cross-entropy), and by held-out ones. Both should fall.",
    ),
    "kl": (
        "Distance from the teacher",
        "nats per token",
        "How far the student\u2019s probabilities for the next token are from the teacher\u2019s (KL divergence; 0 = the same).",
    ),
    "dpo": (
        "Preference loss",
        "per pair",
        "Small if the better answer of a pair has gained more than the worse one. It begins at 0.69, where nothing is preferred.",
    ),
    "kimi": (
        "Objective of reinforcement learning",
        "per response",
        "What the optimizer makes small. Its height says little: rewards above are what counts.",
    ),
    "grpo": (
        "Objective of reinforcement learning",
        "",
        "What the optimizer makes small. Its height says little: rewards above are what counts.",
    ),
    "ptx": (
        "Loss on examples mixed in",
        "nats per token",
        "Examples of earlier training (\u201cPTX\u201d) shown beside the model\u2019s own answers, so that it forgets less.",
    ),
    "ref_kl": ("Distance from the reference model", "nats", "How far the model has moved from its reference (KL divergence)."),
}


def loss_words(term: str, alone: bool) -> tuple[str, str, str]:
    """(title, unit, explanation) of a loss term; plain training on text has one term only."""
    if alone and (term == "lm" or term not in _LOSSES):
        text = "How surprised the model is by the text it learns from, and by held-out text. Both should fall."
        return "Loss in training", "nats per token" if term == "lm" else "", text
    return _LOSSES.get(term, (f"Loss: {term.replace('_', ' ')}", "", "One of the terms that the optimizer makes small."))


@dataclass(frozen=True)
class Words:
    """How metrics are drawn: those in `names` {metric: line's name} share a chart."""

    title: str
    unit: str
    names: dict[str, str]
    help: str
    percent: bool = False
    log: bool = False


_METRICS = (
    Words(
        "Pairs in which the better answer wins",
        "%",
        {"accuracy": "gained more than the other", "logprob_accuracy": "is the more likely one"},
        "Of pairs with a better and a worse answer: how often training has moved the model towards the better one, and how often "
        "the better one is now also the more likely one, token by token. 50 % is a coin.",
        percent=True,
    ),
    Words(
        "Margin between better and worse",
        "",
        {"margin": "margin"},
        "How much more the better answer gained than the worse one, in units of the implicit reward.",
    ),
    Words(
        "Log-probability of whole answers",
        "nats",
        {"chosen_logprob": "better answer", "rejected_logprob": "worse answer"},
        "How likely the model finds the two answers of a pair. If both sink, the model unlearns both; only their distance is "
        "trained.",
    ),
    Words(
        "Change by training on its own answers",
        "nats per token",
        {"kl": "KL estimate"},
        "How far the model is from the one that wrote the answers (KL divergence). Near 0 if each step trains on fresh answers.",
    ),
    Words(
        "Log-ratio of a response",
        "nats per response",
        {"log_ratio": "mean log-ratio"},
        "How much more likely a response is to the model in training than to the one that wrote it. Near 0 for fresh answers.",
    ),
    Words(
        "Trainer and sampler disagree by",
        "nats",
        {"mismatch": "mean over tokens", "mismatch_max": "largest of a token"},
        "The model that writes answers and the one that is trained must give the same probabilities. This is by how much they "
        "do not; rounding alone gives about 1e\u22126.",
        log=True,
    ),
    Words(
        "Variety of answers (entropy)",
        "nats per token",
        {"entropy": "entropy"},
        "How undecided the model is about its next token. If it falls to 0, all answers are alike and nothing new is tried.",
    ),
    Words(
        "Loss on the better answers",
        "nats per token",
        {"lm": "loss"},
        "How surprised the model is by the better answers of the pairs (cross-entropy). Watched here, not trained.",
    ),
    Words(
        "Loss on examples mixed in",
        "nats per token",
        {"ptx": "loss"},
        "Examples of earlier training. Watched here, not trained.",
    ),
    Words(
        "Tokens held back by clipping",
        "%",
        {"clip_share": "clipped"},
        "Share of tokens whose change is cut off because the model has moved too far from the one that wrote the answer.",
        percent=True,
    ),
)


def _metrics(stage: StageView) -> list[LineChart]:
    """Known metrics in charts with words, others each in a chart of its own."""
    trained, held_out = set(names_in(stage, "metrics")), valid_points(stage)
    drawn, seen = [], set()
    for words in _METRICS:
        seen |= set(words.names)
        drawn += _chart(stage, words, held_out)
    others = trained | {name.removeprefix("held_out/") for name in held_out if name.startswith("held_out/")}
    for name in sorted(others - seen)[:MAX_OTHERS]:
        label = name.replace("_", " ")
        text = f"Recorded as \u201c{name}\u201d by the objective."
        drawn += _chart(stage, Words(f"{label[:1].upper()}{label[1:]}", "", {name: label}, text), held_out)
    return drawn


def _chart(stage: StageView, words: Words, held_out: dict[str, Points]) -> list[LineChart]:
    lines: list[Series] = []
    bands: list[Band] = []
    factor = 100.0 if words.percent else 1.0
    both = any(known(held_out.get(f"held_out/{name}", [])) for name in words.names)
    for i, (name, label) in enumerate(words.names.items()):
        points = scaled(field_points(stage, "metrics", name), factor)
        tested = scaled(held_out.get(f"held_out/{name}", []), factor)
        alone = len(words.names) == 1
        if known(points):
            lines += trained_lines((f"training, {label}" if not alone else "training") if both else label, points, i, words.log)
        if known(tested):
            lines.append(Series(f"held out, {label}" if not alone else "held out", tested, i if not alone else 1, dots=True))
    if not lines:
        return []
    return [
        LineChart(
            words.title, words.unit, lines, bands, moments=moments(stage), help=words.help, log=words.log, from_zero=words.percent
        )
    ]


def trained_lines(name: str, points: Points, colour: int, steady: bool = False) -> list[Series]:
    """A curve of single steps, which scatter: faint, with the mean of the last steps drawn over it."""
    if steady or len(points) < 2 * SMOOTH:
        return [Series(name, points, colour)]
    return [
        Series("single steps", points, -1, quiet=True),
        Series(f"{name}, mean of {SMOOTH} steps", smooth(points, SMOOTH), colour),
    ]


def scaled(points: Points, factor: float) -> Points:
    """The points with their values times `factor`."""
    return [(x, None if value is None else value * factor) for x, value in points]


MAKERS: list[Callable[[StageView], list[LineChart]]] = [_metrics]
