"""What a stage is: recipe schema, help text, planner input and program in one frozen dataclass.

A stage file in `k2lab/stages/` holds one public dataclass derived from `Stage`. It reads artifacts (its parents) and writes one.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from k2lab.core.artifacts import Artifact
from k2lab.core.slots import Slot

if TYPE_CHECKING:
    from k2lab.core.events import EventWriter
    from k2lab.core.types import PlanInput


@dataclass(frozen=True)
class Parent:
    """Marks a stage field that names an earlier stage (or an artifact or model directory) of the given artifact kinds."""

    kind: str


@dataclass(frozen=True)
class RunFlag:
    """Marks a field that does not change what is computed (paths, frequencies of saving); it is left out of the identity."""


Dataset = Annotated[str, Parent("dataset")]
Tokens = Annotated[str, Parent("tokens")]
TokenizerRef = Annotated[str, Parent("tokenizer")]
CheckpointRef = Annotated[str, Parent("checkpoint")]


@dataclass
class StageContext:
    """What a running stage is given.

    `work` is its unfinished directory (it survives a kill; a resumed stage finds it as it was), `parents` its finished
    parents by field name (lists for list fields), `model` the recipe's model table, `rank`/`world` the process group.
    """

    name: str
    identity: str
    seed: int
    work: Path
    model: Any
    parents: dict[str, Any]
    events: EventWriter
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)  # goes into the manifest: licences, counts, settings

    def parent(self, role: str) -> Artifact:
        """The parent artifact in field `role`."""
        return self.parents[role]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of all stages. Class attributes: `kind` of the artifact written, `version` of the stage's code (part of the
    identity: raise it when the same table would compute something else), `uses_model` if the recipe's model enters the
    identity, `distributed` if all ranks take part."""

    kind: ClassVar[str] = ""
    version: ClassVar[int] = 1
    uses_model: ClassVar[bool] = False
    distributed: ClassVar[bool] = False
    slot_name: ClassVar[str] = ""

    def run(self, ctx: StageContext) -> None:
        """Does the work and leaves the artifact's files in `ctx.work`. Called again after a kill, it continues."""
        raise AssertionError(f"{type(self).__name__} has no run()")

    def plan_inputs(self, name: str, model: Any, gpus: int = 1) -> PlanInput:
        """What the planner needs to know; `model` is the recipe's ModelSpec."""
        from k2lab.core.types import PlanInput

        return PlanInput(stage=name, type=self.slot_name, kind="cpu")

    def check(self, where: str) -> None:
        """Raises RecipeError for values that contradict each other; called before anything runs."""

    def check_ranks(self, where: str, world: int) -> None:
        """Raises RecipeError if the stage can't be split over `world` processes; called before anything runs."""


def parent_fields(cls: type) -> dict[str, Parent]:
    """Fields of a stage class that name parents, with the artifact kind asked for."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for item in dataclasses.fields(cls):
        marker = find_marker(hints[item.name], Parent)
        if marker is not None:
            found[item.name] = marker
    return found


def find_marker(annotation: Any, kind: type) -> Any:
    """The first marker of class `kind` anywhere inside an annotation, or None."""
    for extra in getattr(annotation, "__metadata__", ()):
        if isinstance(extra, kind):
            return extra
    for inner in typing.get_args(annotation):
        if inner is not annotation:
            marker = find_marker(inner, kind)
            if marker is not None:
                return marker
    return None


def identity_table(value: Any) -> Any:
    """The part of a configured value that decides what is computed: fields without paths, run flags and parents; a slot
    with a `fingerprint()` adds it, so that an edited data file makes a new artifact."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value), include_extras=True)
        table: dict[str, Any] = {}
        name = getattr(type(value), "slot_name", "")
        if name:
            table["type"] = name
        for item in dataclasses.fields(value):
            annotation = hints[item.name]
            if item.name in ("path", "paths") or find_marker(annotation, RunFlag) or find_marker(annotation, Parent):
                continue
            table[item.name] = identity_table(getattr(value, item.name))
        if hasattr(value, "fingerprint"):
            table["fingerprint"] = value.fingerprint()
        return table
    if isinstance(value, (list, tuple)):
        return [identity_table(item) for item in value]
    if isinstance(value, dict):
        return {key: identity_table(item) for key, item in value.items()}
    return value


__all__ = [
    "CheckpointRef",
    "Dataset",
    "Parent",
    "RunFlag",
    "Slot",
    "Stage",
    "StageContext",
    "TokenizerRef",
    "Tokens",
    "find_marker",
    "identity_table",
    "parent_fields",
]
