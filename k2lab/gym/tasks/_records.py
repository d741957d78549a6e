"""What the task slots share: choosing records."""

from __future__ import annotations

from typing import Any

from k2lab.core.rng import derive


def choose(records: list[dict[str, Any]], limit: int, seed: int, purpose: str) -> list[dict[str, Any]]:
    """At most `limit` records (0 = all) in their given order. The choice depends on keys and seed, not on the order."""
    if not limit or len(records) <= limit:
        return records
    ranked = sorted(range(len(records)), key=lambda n: derive(seed, purpose, "choose", records[n]["key"]))
    return [records[n] for n in sorted(ranked[:limit])]
