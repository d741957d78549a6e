"""What the names of metrics, stages and stop reasons mean, in plain words."""

from __future__ import annotations

import re

# base name -> (label, explanation for a reader who has never trained a model)
_METRICS: dict[str, tuple[str, str]] = {
    "bits_per_byte": (
        "Bits per byte",
        "How many bits the model needs, on average, to encode one byte of text it has not seen. It "
        "measures surprise: random bytes "
        "need 8. It does not depend on the tokenizer, so different models can be compared. Lower is better.",
    ),
    "bits_per_token": (
        "Bits per token",
        "Average surprise per token of unseen text, in bits. Depends on the tokenizer. Lower is better.",
    ),
    "loss": (
        "Loss",
        "Average surprise per predicted token, in nats (natural logarithm). Depends on the tokenizer. Lower is better.",
    ),
    "nll": (
        "Loss",
        "Average surprise per predicted token, in nats (natural logarithm). Depends on the tokenizer. Lower is better.",
    ),
    "perplexity": (
        "Perplexity",
        "Among how many equally likely tokens the model hesitates, on average. Depends on the tokenizer. Lower is better.",
    ),
    "exact_match": ("Exact answers", "Share of answers that equal the expected answer character by character. Higher is better."),
    "accuracy": ("Accuracy", "Share of questions answered correctly. Higher is better."),
    "token_accuracy": (
        "Tokens guessed right",
        "Share of tokens for which the model's first guess is the true next token. Higher is better.",
    ),
    "f1": ("F1 score", "Harmonic mean of precision and recall; 1 is perfect. Higher is better."),
    "eos_rate": (
        "Answers that end by themselves",
        "Share of answers that the model finished itself, not cut at the token limit.",
    ),
    "stop_rate": (
        "Answers that end by themselves",
        "Share of answers that the model finished itself, not cut at the token limit.",
    ),
    "valid_json": ("Valid JSON", "Share of answers that parse as JSON. Higher is better."),
    "parses": ("Code that parses", "Share of answers that are syntactically valid code. It does not say that the code is right."),
    "syntax": ("Code that parses", "Share of answers that are syntactically valid code. It does not say that the code is right."),
    "format": ("Right format", "Share of answers in the form that was asked for. Higher is better."),
    "tool_call": (
        "Well-formed tool calls",
        "Share of answers whose tool call parses and names an offered tool. Higher is better.",
    ),
    "repetition": ("Repetition", "Share of an answer that repeats what the same answer said before. Lower is better."),
    "length": ("Answer length", "Average number of tokens of an answer."),
    "non_empty": ("Answers that say something", "Share of answers with any text in them, thoughts not counted."),
    "no_other_special": (
        "Answers without stray marks",
        "Share of answers without control tokens (such as a new turn of the user) in places where they do not belong.",
    ),
    "tool_used": ("Answers that used a tool", "Share of answers in which the model called a tool and got a result."),
    "tool_failed": ("Tool calls that failed", "Share of tool calls that ended in an error. Lower is better."),
    "response_loss": (
        "Surprise at good answers",
        "How surprised the model is by held-out reference answers, per token, in nats (natural logarithm). Lower is better.",
    ),
    "logprob_accuracy": (
        "Pairs ranked right",
        "Share of held-out pairs of a better and a worse answer in which the model finds the better one more likely, token by "
        "token. 50 % is what a coin would reach. Higher is better.",
    ),
    "reward_accuracy": (
        "Pairs moved the right way",
        "Share of held-out pairs in which preference tuning raised the better answer's probability more than the worse one's. "
        "At its own start a model stands at 50 % by definition. Higher is better.",
    ),
    "reward_accuracy_reference": (
        "Pairs ranked right against the reference",
        "Share of held-out pairs in which, compared with the reference model, the better answer gained more than the worse one. "
        "Higher is better.",
    ),
    "reward_margin": (
        "Margin between better and worse",
        "How much more the better answer\u2019s log-probability grew than the worse one\u2019s, in nats, on average. "
        "Higher is better.",
    ),
    "decode_time": (
        "Time per token",
        "How long it takes to write one token when many answers are written at once. Other work on the machine makes it longer. "
        "Lower is better.",
    ),
    "win_rate": ("Win rate", "Share of comparisons in which the answer was preferred. Higher is better."),
    "kl": ("Distance from the reference model", "Kullback-Leibler divergence per token: how far the model moved from its start."),
    "reward": ("Reward", "Average score that the reward function gave. Higher is better."),
    "pass_rate": ("Problems solved", "Share of problems for which the generated answer passes the check. Higher is better."),
    "ece": ("Calibration error", "Average gap between how sure the model is and how often it is right. Lower is better."),
}

_NO_DIRECTION = ("tool_used",)  # more of it is neither good nor bad

_STAGES = {
    "corpus": "Collects and filters the text",
    "tokenizer": "Learns how to cut text into tokens",
    "tokenise": "Turns text into tokens",
    "tokenize": "Turns text into tokens",
    "pretrain": "Learns to predict the next token of plain text",
    "sft": "Learns to answer, from example conversations",
    "reasoning_sft": "Learns to think in steps before it answers",
    "preference_data": "Lets the model answer, and pairs its right answers with its wrong ones",
    "dpo": "Learns which of two answers is the better one",
    "teacher_data": "Lets the best model answer, as lessons for a student",
    "distill": "A smaller model learns from the answers and probabilities of a larger one",
    "rl": "Learns from rewards for its own answers",
    "agent": "Measures the model with and without tools",
    "import_model": "Takes over a model that exists",
    "quantise": "Stores the weights in fewer bits",
    "quantize": "Stores the weights in fewer bits",
    "export": "Writes the model for other programs",
    "evaluate": "Measures every model of the run",
}

_DOING = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "reasoning_sft": "Training on worked-out solutions",
    "dpo": "Preference tuning",
    "distill": "Distillation",
    "rl": "Reinforcement learning",
    "agent": "A tool",
    "quantise": "Quantisation",
    "quantize": "Quantisation",
}

_STOPS = {
    "eos": ("ended by itself", "The model produced its end token."),
    "length": ("cut at the token limit", "The model had not finished when the allowed number of tokens was used up."),
    "stop_token": ("reached a stop token", "One of the listed stop tokens was produced."),
    "context": ("did not fit", "Prompt and limit together exceed the model's window."),
    "aborted": ("aborted", "Generation was aborted."),
    "error": ("failed", "Generation failed."),
}


# The last part of a task's metric, `chain_sum/avg@4`, tells what was measured; that of any other, `bits_per_byte/docs`, on what.
_TASK_MEASURE = re.compile(
    r"avg@\d+|pass@\d+|best of \d+|eos_rate|non_empty|no_other_special|tool_used|tool_failed|"
    r"logprob_accuracy|reward_accuracy|reward_accuracy_reference|reward_margin"
)
_PLACES = {"answered": "all tasks", "preference": "", "length_matched": "pairs of similar length"}


def split(metric: str) -> tuple[str, str, str]:
    """(measure, on what, settings told in the name): `chain_sum/avg@4 (k=4)` gives `avg@4`, `chain_sum`, `k=4`."""
    name, _, aside = metric.partition(" (")
    parts = name.split("/")
    place = next((i for i in range(1, len(parts)) if _TASK_MEASURE.fullmatch(parts[i])), 0)
    where = "/".join(part for i, part in enumerate(parts) if i != place and _PLACES.get(part) != "")
    return parts[place], where, aside.removesuffix(")")


def _place(where: str) -> str:
    return ", ".join(_PLACES.get(part, part.replace("_", " ")) for part in where.split("/"))


def metric_label(metric: str) -> str:
    """`bits_per_byte/docstrings` becomes `Bits per byte: docstrings`; `chain_sum/avg@1`, `Right answers: chain sum`."""
    base, where, aside = split(metric)
    text = _entry(base)[0]
    text += f": {_place(where)}" if where else ""
    return f"{text} ({aside})" if aside else text


def metric_help(metric: str, better: str | None = None) -> str:
    """What a metric measures, in a sentence or two."""
    base, where, _ = split(metric)
    text = _entry(base)[1]
    if not text:
        text = f"Recorded as \u201c{base}\u201d by the evaluation stage."
    if better in ("lower", "higher") and "is better" not in text and base not in _NO_DIRECTION:
        text += f" {better.capitalize()} is better."
    return f"{text} Here on \u201c{where}\u201d." if where else text


def _entry(base: str) -> tuple[str, str]:
    name = base.lower().replace("-", "_")
    if name in _METRICS:
        return _METRICS[name]
    mean = re.fullmatch(r"avg@(\d+)", name)
    if mean:
        num = int(mean[1])
        several = f" Each task is tried {num} times, and the tries are averaged." if num > 1 else ""
        return ("Right answers", f"Share of answers that a checker finds right.{several} Higher is better.")
    best = re.fullmatch(r"best of (\d+)", name)
    if best:
        return (f"Best of {best[1]} tries", f"Mean score of the best of {best[1]} answers, picked by the checker itself.")
    tries = re.fullmatch(r"pass@?_?(\d+)", name)
    if tries:
        num = int(tries[1])
        return (
            "Problems solved" + (f" in {num} tries" if num > 1 else ""),
            f"Share of problems for which {'the' if num == 1 else f'at least one of {num}'} generated answer"
            f"{'' if num == 1 else 's'} passes the check. Higher is better.",
        )
    for suffix in ("_loss", "_accuracy", "_rate"):
        if name.endswith(suffix) and suffix[1:] in _METRICS:
            return (base.replace("_", " ").capitalize(), _METRICS[suffix[1:]][1])
    return (base.replace("_", " ").strip().capitalize() or "Metric", "")


def stage_help(kind: str) -> str:
    """What a stage of this type does, or an empty text."""
    return _STAGES.get(kind, "")


def doing(name: str, kind: str) -> str:
    """A stage as the subject of a sentence: `Pretraining`, `Supervised fine-tuning (domain_sft)`."""
    word = _DOING.get(kind)
    if word is None:
        return f"The stage \u201c{name}\u201d"
    return word if name == kind else f"{word} ({name})"


def stop_words(stop: str) -> tuple[str, str]:
    """A stop reason as (short words, explanation)."""
    return _STOPS.get(stop, (stop.replace("_", " "), "Why generation ended, as recorded."))
