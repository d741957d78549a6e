"""Batch arithmetic that recipe, planner and feed share."""

from __future__ import annotations

from k2lab.core.errors import RecipeError


def check_batch(global_batch: int, per_device_batch: int, world: int, where: str) -> None:
    """RecipeError unless `global_batch` rows can be dealt to `world` ranks in micro-batches of `per_device_batch` rows."""
    if global_batch < 1 or per_device_batch < 1:
        raise RecipeError(
            "batch sizes are positive", where=where, got=f"global_batch={global_batch}, per_device_batch={per_device_batch}"
        )
    unit = world * per_device_batch
    if global_batch % unit:
        lower, upper = global_batch // unit * unit, (global_batch // unit + 1) * unit
        raise RecipeError(
            f"global_batch = {global_batch} rows cannot be dealt to {world} rank(s) in micro-batches of {per_device_batch} rows",
            where=where,
            allowed=f"a multiple of {unit} (= {world} x {per_device_batch})",
            next=f"Set global_batch to {f'{lower} or ' if lower else ''}{upper}, or change per_device_batch",
        )
