"""Teacher and student in an evaluation: who learnt from whom, how large both are, and what the student keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2lab.core.artifacts import Artifact, beside
from k2lab.core.errors import K2Error

if TYPE_CHECKING:
    from k2lab.eval.measured import Measured, Metrics
    from k2lab.eval.results import Results


def teacher_of(artifact: Artifact) -> str | None:
    """Identity of the model whose answers a distilled one learnt from, by the data set between them, which must lie beside it.
    None for other models, and where the data set cannot be found."""
    data = beside(artifact, "data") if artifact.manifest.get("type") == "distill" else None
    if data is None:
        return None
    teacher = data.manifest.get("parents", {}).get("teacher")
    return teacher["identity"] if teacher is not None else None


def active_parameters(folder: Path) -> int | None:
    """Parameters that work on one token, embeddings left out, by a checkpoint's config.json; None for a shape that is none of
    ours."""
    from k2lab.specs import ModelSpec

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(ModelSpec.from_config(config).active(with_embeddings=False))
    except (OSError, ValueError, TypeError, K2Error):
        return None


def compare(results: Results, models: list[Artifact], metrics: Mapping[str, Metrics]) -> None:
    """Adds every student whose teacher was measured, too: sizes, and paired differences on the same items."""
    named = {artifact.identity: artifact for artifact in models}
    for student in models:
        teacher = named.get(teacher_of(student) or "")
        if teacher is None:
            continue
        results.add_student(teacher.name, student.name, (active_parameters(teacher.path), active_parameters(student.path)))
        for metric, own in metrics[student.name].items():
            theirs = metrics[teacher.name].get(metric)
            change = own.change_from(theirs) if theirs is not None and theirs.settings == own.settings else None
            if theirs is not None and change is not None:
                values = (theirs.estimate.value, own.estimate.value)
                results.add_student_change(metric, own.settings, values, change, _ratio(theirs, own))


def _ratio(theirs: Measured, own: Measured) -> Any:
    """Student / teacher of a score, None for what is no score of items or where the teacher has none."""
    from k2lab.eval import stats

    if own.unit != "fraction" or own.better != "higher" or own.bottom is not None or not any(theirs.top):
        return None
    return stats.paired_share(theirs.top, own.top, 0, "student")
