"""Gather records from sources, filter them and hold some out: the data set that later stages read."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.stage import Dataset, Slot, Stage, StageContext


@dataclass(frozen=True, kw_only=True)
class Corpus(Stage):
    """Gather records from sources, filter them, hold whole groups (modules, topics) out; every filter shows what it dropped."""

    kind: ClassVar[str] = "dataset"
    version: ClassVar[int] = 1

    # Where records come from, in this order.
    sources: list[Annotated[Any, Slot("source")]]
    # Applied in this order to all records; `contamination` to the training part only.
    filters: list[Annotated[Any, Slot("filter")]] = field(default_factory=tuple)  # type: ignore[assignment]
    # Share of groups (modules, topics, records without group) held out for validation and evaluation.
    valid_share: float = 0.05
    # Data sets whose held-out records must not occur in this one's training part (needs the `contamination` filter).
    against: list[Dataset] = field(default_factory=tuple)  # type: ignore[assignment]

    def check(self, where: str) -> None:
        if not self.sources:
            raise RecipeError("a corpus needs at least one source", where=f"{where}.sources")
        if not 0 < self.valid_share < 1:
            raise RecipeError("must lie between 0 and 1", where=f"{where}.valid_share", got=self.valid_share)
        if self.against and not any(hasattr(item, "with_targets") for item in self.filters):
            raise RecipeError("`against` needs the filter `contamination`", where=f"{where}.filters")

    def run(self, ctx: StageContext) -> None:
        from k2lab.data import shards
        from k2lab.data.filtering import run_filters

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            records = list(self._gather(ctx))
        for warning in said:  # what a source has to say stands in the run's own output and report
            if issubclass(warning.category, UserWarning):
                ctx.events.emit("note", text=str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        general = [item for item in self.filters if not hasattr(item, "with_targets")]
        # Held-out records come first, so that of two duplicates the training copy is the one dropped.
        order = {"valid": [], "train": []}
        for record in records:
            order[shards.split_of(record, self.valid_share, ctx.seed)].append(record)
        kept, rows = run_filters([*order["valid"], *order["train"]], general)
        parts: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
        for record in kept:
            parts[shards.split_of(record, self.valid_share, ctx.seed)].append(record)
        special = [self._armed(item, ctx) for item in self.filters if hasattr(item, "with_targets")]
        if special:
            parts["train"], more = run_filters(parts["train"], special)
            rows += more
        for row in rows:
            ctx.events.emit("funnel", **row.as_event())
        for split, chosen in parts.items():
            if not chosen:
                raise DataError(
                    f"the {split} part is empty: {len(kept)} records are left after the filters",
                    where=ctx.name,
                    next="Give more data, loosen the filters or change valid_share",
                )
            shards.write_records(ctx.work, chosen, split)
        ctx.facts["counts"] = {split: len(chosen) for split, chosen in parts.items()}
        ctx.facts["licences"] = sorted({str(r["license"]) for r in kept if r.get("license")})

    def _gather(self, ctx: StageContext) -> Iterator[dict[str, Any]]:
        count, last = 0, 0.0
        seen: set[str] = set()
        for source in self.sources:
            for record in source.records():
                count += 1
                if record["key"] in seen:
                    raise DataError(
                        "two records have the same key",
                        where=f"{ctx.name}: {type(source).slot_name}",
                        got=record["key"],
                        next="Give one of the sources another `name`",
                    )
                seen.add(record["key"])
                if time.perf_counter() - last > 0.5:
                    ctx.events.emit("progress", done=count, total=None, unit="records")
                    last = time.perf_counter()
                yield record
        ctx.events.emit("progress", done=count, total=count, unit="records")

    def _armed(self, item: Any, ctx: StageContext) -> Any:
        from k2lab.data import shards
        from k2lab.data.records import text_of

        texts = [
            text_of(record) for parent in ctx.parents.get("against", []) for record in shards.read_records(parent.path, "valid")
        ]
        return item.with_targets(texts) if texts else item

    @staticmethod
    def examples() -> list[Corpus]:
        from k2lab.core.slots import load

        source = load("source", "general_instructions")
        return [Corpus(sources=(source(),))]  # type: ignore[arg-type]
