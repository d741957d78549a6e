"""`k2 new`: a commented starting point for a recipe or a slot file of the user's own."""

from __future__ import annotations

import re
from pathlib import Path

from k2lab.core import recipe as recipes
from k2lab.core.errors import RecipeError, did_you_mean

RECIPE = """\
# A recipe of your own, on top of {base!r}. Try it:  k2 run {file} --dry-run   and   k2 run {file}
# `k2 run {file} --print` shows every value and where it comes from; `k2 list` what can stand here.
base = "{base}"
description = "{name}"

# A [[stage]] with the name of one of the base's stages changes it; a new name is appended (or placed by `after = "..."`);
# `skip = true` drops it. For example your own text instead of the shipped corpus:
#
# [[stage]]
# name = "corpus"
# sources = [{{ type = "jsonl", path = "my_text.jsonl" }}]      # one {{"text": "...", "source": "..."}} a line
#
# [[stage]]
# name = "sft"
# data = {{ type = "jsonl", path = "my_instructions.jsonl" }}   # {{"instruction", "input", "output"}} or {{"messages": [...]}}
"""

SLOTS = {
    "source": '''\
"""{Title}: one line that `k2 list` shows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class {Class}:
    """{Title}: where its records come from. Use it with `sources = [{{ type = "{file}" }}]`."""

    domain: str = "{name}"

    def records(self) -> Iterator[dict]:
        """Records with a stable `key`; {{"text"}} for pretraining, {{"instruction", "input", "output"}} for fine-tuning."""
        for number, text in enumerate(["First document.", "Second document."]):
            yield {{"key": f"{name}:{{number}}", "text": text, "source": "{name}", "domain": self.domain}}

    def fingerprint(self) -> str:
        """Changes when the content does, so that a run makes new artifacts."""
        return hashlib.sha256(repr(list(self.records())).encode()).hexdigest()

    @staticmethod
    def examples() -> list[{Class}]:
        return [{Class}()]
''',
    "filter": '''\
"""{Title}: one line that `k2 list` shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class {Class}:
    """{Title}: drops records that hold the word. Use it with `filters = [{{ type = "{file}" }}]`."""

    word: str = "lorem"

    def apply(self, records: Iterator[dict], log: Any) -> Iterator[dict]:
        """Yields what is kept; every other record is logged exactly once."""
        for record in records:
            if self.word in record.get("text", ""):
                log.drop(record, f"holds {{self.word!r}}")
            else:
                yield record

    @staticmethod
    def examples() -> list[{Class}]:
        return [{Class}()]
''',
    "schedule": '''\
"""{Title}: one line that `k2 list` shows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class {Class}:
    """{Title}: the learning rate's factor as a pure function of the step. Use it with `schedule = "{file}"`."""

    warmup: int = 10

    def factor(self, step: int, total_steps: int) -> float:
        """Factor on the learning rate of optimizer step `step` (from 0)."""
        return min(1.0, (step + 1) / max(1, self.warmup))

    @staticmethod
    def examples() -> list[{Class}]:
        return [{Class}()]
''',
    "reward": '''\
"""{Title}: one line that `k2 list` shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class {Class}:
    """{Title}: 1.0 if the response holds the task's answer, else 0.0."""

    def score(self, task: Any, response: str) -> float:
        """A number in [0, 1]; the gold answer must score 1."""
        return float(str(task.answer) in response)

    @staticmethod
    def examples() -> list[{Class}]:
        return [{Class}()]
''',
    "task": '''\
"""{Title}: one line that `k2 list` shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class {Class}:
    """{Title}: turns records into tasks with a verifiable answer."""

    limit: int = 100

    def tasks(self, records: Iterable[dict]) -> list[Any]:
        """At most `limit` tasks; the gold answer of each must score 1 (checked by the test suite through `examples`)."""
        from k2lab.core.types import Message
        from k2lab.gym.task import Task

        made = []
        for record in records:
            if "instruction" in record and len(made) < self.limit:
                messages = (Message.text("user", record["instruction"]),)
                made.append(Task(key=record["key"], messages=messages, answer=record["output"], rewards=("exact_match",)))
        return made

    @staticmethod
    def examples() -> list[{Class}]:
        return [{Class}()]
''',
    "stage": '''\
"""{Title}: one line that `k2 list` shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from k2lab.core.stage import Dataset, Stage, StageContext


@dataclass(frozen=True, kw_only=True)
class {Class}(Stage):
    """{Title}: reads a data set and writes another. Use it with `type = "{file}"`."""

    kind: ClassVar[str] = "dataset"

    corpus: Dataset = "corpus"

    def run(self, ctx: StageContext) -> None:
        """Leaves the artifact's files in `ctx.work`; called again after a kill, it continues."""
        from k2lab.data import shards

        for split in ("train", "valid"):
            records = [{{**r, "text": r["text"].strip()}} for r in shards.read_records(ctx.parent("corpus").path, split)]
            shards.write_records(ctx.work, records, split)

    @staticmethod
    def examples() -> list[{Class}]:
        return [{Class}()]
''',
}


def write(what: str, name: str, base: str = "tiny") -> Path:
    """Writes the starting point in the current directory and returns its path. Never overwrites."""
    known = ("recipe", *SLOTS)
    if what not in known:
        raise RecipeError(
            f"there is nothing to scaffold called {what!r}", allowed=", ".join(known), next=did_you_mean(what, known)
        )
    stem = name.removesuffix(".toml").removesuffix(".py")
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", stem) or (what != "recipe" and "-" in stem):
        raise RecipeError("names are lower-case letters, digits and _", got=name, next="For example: k2 new source my_notes")
    if what == "recipe":
        recipes.find(base)
        path = Path(f"{stem}.toml")
        text = RECIPE.format(name=stem, base=base, file=path)
    else:
        path = Path(f"{stem}.py")
        title = stem.replace("_", " ").capitalize()
        text = SLOTS[what].format(name=stem, file=path, Title=title, Class="".join(part.capitalize() for part in stem.split("_")))
    if path.exists():
        raise RecipeError(f"{path} exists already and is not overwritten", next="Choose another name")
    path.write_text(text, encoding="utf-8")
    return path
