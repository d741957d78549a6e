"""Small tasks whose right answer is computed: what `general_instructions` is made of.

Each maker takes a generator and returns (what the task is about, instruction, input, output). The first is the same for all
wordings of one question, so that hold-out never puts two wordings on both sides.
"""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Maker = Callable[[np.random.Generator], tuple[str, str, str, str]]

_TEXT = """
    apple river stone cloud garden window bridge candle forest harbor island jacket kettle ladder meadow needle orange
    pencil quiet rabbit silver table umbrella valley winter yellow zebra anchor basket copper dragon engine feather guitar
    hammer insect jungle kitten lemon mirror north ocean planet queen rocket sunset tiger under violin wagon young bottle
    circle desert eagle flower glass honey iron jewel king lamp mountain night olive paper road sugar train uncle voice
    water box year zero arrow bread chair door earth field green house idea joke key light music name open path question
    rain salt tree unit view wind x-ray yard zone book code data error file graph hash index list module number object
    python string value
"""
WORDS = tuple(_TEXT.split())


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _phrase(rng: np.random.Generator, low: int, high: int) -> list[str]:
    """Different words, `low` to `high` of them."""
    count = int(rng.integers(low, high + 1))
    return [WORDS[int(i)] for i in rng.choice(len(WORDS), size=count, replace=False)]


def _on_phrase(low: int, high: int, asks: tuple[str, ...], answer: Callable[[list[str]], str], sep: str = " ") -> Maker:
    def make(rng: np.random.Generator) -> tuple[str, str, str, str]:
        words = _phrase(rng, low, high)
        return sep.join(words), _pick(rng, asks), sep.join(words), answer(words)

    return make


def _arithmetic(rng: np.random.Generator) -> tuple[str, str, str, str]:
    sign = _pick(rng, ("+", "-", "*"))
    a, b = (int(v) for v in rng.integers(0, 13 if sign == "*" else 100, size=2))
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    ask = _pick(rng, ("What is {}?", "Compute {}.", "Calculate {}.", "How much is {}?"))
    # a + b and b + a are one question.
    about = f"{min(a, b)} {sign} {max(a, b)}" if sign != "-" else f"{a} - {b}"
    return about, ask.format(f"{a} {sign} {b}"), "", f"{a} {sign} {b} = {result}"


def _compare(rng: np.random.Generator) -> tuple[str, str, str, str]:
    a, b = (int(v) for v in rng.choice(1000, size=2, replace=False))
    bigger = bool(rng.integers(2))
    ask = f"Which number is {'larger' if bigger else 'smaller'}, {a} or {b}?"
    return f"{min(a, b)} {max(a, b)}", ask, "", str(max(a, b) if bigger else min(a, b))


def _keyword(rng: np.random.Generator) -> tuple[str, str, str, str]:
    others = [n for n in vars(builtins) if n.isalpha() and n.islower() and not keyword.iskeyword(n)]
    word = _pick(rng, list(keyword.kwlist) if rng.integers(2) else sorted(others) + [w for w in WORDS if w.isalpha()])
    ask = _pick(rng, ("Is `{}` a Python keyword?", "Is the word `{}` reserved in Python?", "Yes or no: is `{}` a keyword?"))
    is_one = keyword.iskeyword(word)
    tail = "is a Python keyword." if is_one else "is not a Python keyword."
    return word, ask.format(word), "", f"{'Yes' if is_one else 'No'}, `{word}` {tail}"


def _letters(rng: np.random.Generator) -> tuple[str, str, str, str]:
    word = _pick(rng, [w for w in WORDS if w.isalpha()])
    return word, _pick(rng, ("How many letters are in the word?", "Count the letters of this word.")), word, str(len(word))


def _spell(rng: np.random.Generator) -> tuple[str, str, str, str]:
    word = _pick(rng, [w for w in WORDS if w.isalpha()])
    asks = ("Spell the word.", "Spell this word letter by letter.", "Write the letters of the word one by one.")
    return word, _pick(rng, asks), word, "-".join(word)


def _sort_numbers(rng: np.random.Generator) -> tuple[str, str, str, str]:
    numbers = [int(v) for v in rng.choice(100, size=int(rng.integers(3, 6)), replace=False)]
    asks = ("Sort the numbers from small to large.", "Put these numbers in ascending order.")
    given = ", ".join(map(str, numbers))
    return ", ".join(map(str, sorted(numbers))), _pick(rng, asks), given, ", ".join(map(str, sorted(numbers)))


def _even(rng: np.random.Generator) -> tuple[str, str, str, str]:
    number, even = int(rng.integers(0, 1000)), bool(rng.integers(2))
    right = (number % 2 == 0) == even
    actual = "even" if number % 2 == 0 else "odd"
    return str(number), f"Is {number} {'even' if even else 'odd'}?", "", f"{'Yes' if right else 'No'}, {number} is {actual}."


_GREETINGS = ("Hello!", "Hi!", "Hello there!", "Good morning!", "Hey!", "Good evening!", "Hi there!", "Good day!", "Hello.")
_IDENTITY = {
    "Who are you?": "I am a small language model trained with K2 Lab.",
    "What are you?": "I am a small language model trained with K2 Lab.",
    "What is your name?": "I have no name. I am a small language model trained with K2 Lab.",
    "Are you a human?": "No, I am a small language model.",
    "Are you an AI?": "Yes, I am a small language model.",
    "How were you trained?": "I was trained with K2 Lab: first on texts, then on instructions.",
    "What can you do?": "I can say what objects of Python's standard library do and solve small text tasks.",
    "Can you help me?": "Yes. What would you like to know?",
    "Thank you!": "You are welcome!",
    "Thanks!": "You are welcome!",
    "Goodbye!": "Goodbye!",
    "Bye!": "Goodbye!",
}


def _small_talk(rng: np.random.Generator) -> tuple[str, str, str, str]:
    talk = {**dict.fromkeys(_GREETINGS, "Hello! How can I help you?"), **_IDENTITY}
    said = _pick(rng, list(talk))
    return said, said, "", talk[said]


TASKS: dict[str, Maker] = {
    "repeat": _on_phrase(2, 5, ("Repeat the phrase.", "Say exactly this.", "Copy the text."), " ".join),
    "spell": _spell,
    "uppercase": _on_phrase(1, 4, ("Write in upper case.", "Convert to capital letters."), lambda w: " ".join(w).upper()),
    "capitalize": _on_phrase(2, 4, ("Capitalize every word.",), lambda w: " ".join(x.capitalize() for x in w)),
    "first_word": _on_phrase(2, 6, ("What is the first word?", "Give the first word of the text."), lambda w: w[0]),
    "last_word": _on_phrase(2, 6, ("What is the last word?", "Give the last word of the text."), lambda w: w[-1]),
    "count_words": _on_phrase(1, 8, ("How many words are there?", "Count the words."), lambda w: str(len(w))),
    "reverse_list": _on_phrase(2, 5, ("Reverse the list.", "Write the list backwards."), lambda w: ", ".join(w[::-1]), ", "),
    "sort_words": _on_phrase(2, 5, ("Sort the words alphabetically.",), lambda w: ", ".join(sorted(w)), ", "),
    "join_words": _on_phrase(2, 4, ("Join the words with hyphens.",), "-".join),
    "letters": _letters,
    "sort_numbers": _sort_numbers,
    "arithmetic": _arithmetic,
    "compare": _compare,
    "even": _even,
    "keyword": _keyword,
    "small_talk": _small_talk,
}
