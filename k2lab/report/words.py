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
    "win_rate": ("Win rate", "Share of comparisons in which the answer was preferred. Higher is better."),
    "kl": ("Distance from the reference model", "Kullback-Leibler divergence per token: how far the model moved from its start."),
    "reward": ("Reward", "Average score that the reward function gave. Higher is better."),
    "pass_rate": ("Problems solved", "Share of problems for which the generated answer passes the check. Higher is better."),
    "ece": ("Calibration error", "Average gap between how sure the model is and how often it is right. Lower is better."),
}

_STAGES = {
    "corpus": "Collects and filters the text",
    "tokenizer": "Learns how to cut text into tokens",
    "tokenise": "Turns text into tokens",
    "tokenize": "Turns text into tokens",
    "pretrain": "Learns to predict the next token of plain text",
    "sft": "Learns to answer, from example conversations",
    "dpo": "Learns which of two answers people prefer",
    "distill": "Learns from a larger model's probabilities",
    "rl": "Learns from rewards for its own answers",
    "quantise": "Stores the weights in fewer bits",
    "quantize": "Stores the weights in fewer bits",
    "export": "Writes the model for other programs",
    "evaluate": "Measures every model of the run",
}

_DOING = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "dpo": "Preference tuning",
    "distill": "Distillation",
    "rl": "Reinforcement learning",
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


def metric_label(metric: str) -> str:
    """`bits_per_byte/docstrings` becomes `Bits per byte: docstrings`."""
    base, _, part = metric.partition("/")
    label = _entry(base)[0]
    return f"{label}: {part.replace('_', ' ').replace('/', ', ')}" if part else label


def metric_help(metric: str, better: str | None = None) -> str:
    """What a metric measures, in a sentence or two."""
    base, _, part = metric.partition("/")
    text = _entry(base)[1]
    if not text:
        text = f"Recorded as \u201c{base}\u201d by the evaluation stage."
    if better in ("lower", "higher") and "is better" not in text:
        text += f" {better.capitalize()} is better."
    return f"{text} Here on \u201c{part}\u201d." if part else text


def _entry(base: str) -> tuple[str, str]:
    name = base.lower().replace("-", "_")
    if name in _METRICS:
        return _METRICS[name]
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
