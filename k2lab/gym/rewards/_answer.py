"""The part of a response, and of a task, that rewards about content compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k2lab.text.layout import IM_END, THINK, THINK_END


def answer_of(task: Any) -> str:
    """The right answer of a `Task`, or of a mapping with the key "answer"."""
    return task["answer"] if isinstance(task, Mapping) else task.answer


def final_answer(response: str) -> str:
    """The response without its end of turn, and only what follows the thoughts; "" while thoughts are unfinished."""
    text = response.removesuffix(IM_END)
    if THINK_END in text:
        text = text.rsplit(THINK_END, 1)[1]
    elif text.lstrip().startswith(THINK):
        return ""
    return text.strip()
