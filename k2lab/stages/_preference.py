"""Preference records as units of samples, and how a model's own likelihood ranks held-out pairs before and after.

Legend: `P` pairs; columns of [P, 2] arrays are (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from k2lab.core.errors import DataError

Unit = tuple[Any, Any]


def units_of(stage: Any, ctx: Any, records: Iterable[dict[str, Any]], split: str, tokenizer: Any) -> list[Unit]:
    """(chosen, rejected) samples of each preference record; a model's own tokens are used where its tokenizer is this one.

    Raises DataError for a record of another kind, for sides that are equal, and (unless they are dropped) for a pair that does
    not fit into a row of seq_len tokens.
    """
    from k2lab.data.records import kind_of
    from k2lab.data.samples import preference_unit
    from k2lab.stages._asking import own_tokens, rendered_answer
    from k2lab.stages._fine_tuning import note_dropped

    units: list[Unit] = []
    dropped = 0
    for record in records:
        key = str(record.get("key"))
        if kind_of(record) != "preference":
            keys = "keys " + ", ".join(record)
            raise DataError("this is no preference record", where=key, got=keys, allowed='{"prompt","chosen","rejected"}')
        if record["chosen"].strip() == record["rejected"].strip():
            raise DataError(
                "the chosen and the rejected answer are equal: such a pair prefers nothing",
                where=f"stage.{ctx.name}: {key}",
                got=record["chosen"],
                next="Remove the record",
            )
        own = own_tokens(record, ("chosen_tokens", "rejected_tokens"), tokenizer)
        chosen, rejected = (
            rendered_answer(record, record[side], record[f"{side}_tokens"] if own else None, tokenizer, stage.default_system)
            for side in ("chosen", "rejected")
        )
        length = len(chosen.tokens) + len(rejected.tokens)
        if length > stage.seq_len:
            if stage.over_length == "error":
                raise DataError(
                    f"the two sides of a pair have {length} tokens together, more than seq_len = {stage.seq_len}",
                    where=f"stage.{ctx.name}: {key}",
                    next="Raise seq_len, or set over_length to drop",
                )
            dropped += 1
            continue
        units.append(preference_unit(chosen, rejected, key, record.get("domain", record.get("source", ""))))
    note_dropped(stage, ctx, dropped, split)
    if not units:
        raise DataError(f"no {split} pair is left", where=f"stage.{ctx.name}", next="Raise seq_len or look at the data")
    return units


def with_reference(units: Sequence[Unit], logprobs: Sequence[np.ndarray]) -> list[Unit]:
    """The units with the stream `ref_logprobs`; `logprobs` holds one array per side, in order."""
    from k2lab.data.samples import with_streams

    each = iter(logprobs)
    return [tuple(with_streams(side, ref_logprobs=next(each)) for side in unit) for unit in units]  # type: ignore[misc]


def judge_pairs(
    units: Sequence[Unit], start: Sequence[np.ndarray], end: Sequence[np.ndarray], reference: Sequence[np.ndarray] | None = None
) -> dict[str, Any]:
    """How the policy ranks the pairs, over all of them and over the half whose sides are closest in length.

    reward_accuracy          share of pairs whose chosen side gained more log-probability since the policy's own start than the
                             rejected one (the implicit reward of DPO, arXiv 2305.18290, with the start as reference; ties 1/2)
    reward_accuracy_reference  the same relative to the reference model, if that is another
    logprob_accuracy_before, _after  share of pairs whose chosen side has the higher log-probability per token
    reward_margin            mean gain of the chosen over the rejected side, in nats
    Each is {"value", "low", "high", "n"} with a 95 % interval; `logprob_accuracy_change` is paired.
    """
    sides = [side for unit in units for side in unit]
    lengths_P2 = np.array([np.count_nonzero(side.weight) for side in sides]).reshape(-1, 2)
    first, last = _sums(sides, start), _sums(sides, end)
    other = _sums(sides, reference) if reference is not None else None
    gap_P = np.abs(lengths_P2[:, 0] - lengths_P2[:, 1])
    close_P = np.sort(np.argsort(gap_P, kind="stable")[: max(1, len(units) // 2)])

    def measured(chosen_P: np.ndarray) -> dict[str, Any]:
        pick = (first[chosen_P], last[chosen_P], lengths_P2[chosen_P], other[chosen_P] if other is not None else None)
        return {**_measure(*pick), "mean_length_gap": round(float(gap_P[chosen_P].mean()), 3)}

    return {"format": 1, "pairs": len(units), "all": measured(np.arange(len(units))), "length_matched": measured(close_P)}


def _sums(sides: Sequence[Any], logprobs: Sequence[np.ndarray]) -> np.ndarray:
    """[P, 2] log-probability of each side's trained tokens."""
    return np.array(
        [float((lp * (side.weight != 0)).astype(np.float64).sum()) for side, lp in zip(sides, logprobs, strict=True)]
    ).reshape(-1, 2)


def _measure(
    first_P2: np.ndarray, last_P2: np.ndarray, lengths_P2: np.ndarray, reference_P2: np.ndarray | None
) -> dict[str, Any]:
    from k2lab.eval import stats

    gained = last_P2 - first_P2
    before, after = (_wins(sums / lengths_P2) for sums in (first_P2, last_P2))
    found: dict[str, Any] = {"reward_accuracy": stats.avg_at_k(_wins(gained)[:, None])}
    if reference_P2 is not None:
        found["reward_accuracy_reference"] = stats.avg_at_k(_wins(last_P2 - reference_P2)[:, None])
    found["logprob_accuracy_before"] = stats.avg_at_k(before[:, None])
    found["logprob_accuracy_after"] = stats.avg_at_k(after[:, None])
    found["reward_margin"] = stats.mean(gained[:, 0] - gained[:, 1])
    table = {name: {"value": e.value, "low": e.low, "high": e.high, "n": e.n} for name, e in found.items()}
    change = stats.paired_change(before, after)
    table["logprob_accuracy_change"] = {"value": change.change, "low": change.low, "high": change.high, "n": change.n}
    return {name: {key: _plain(number) for key, number in row.items()} for name, row in table.items()}


def _wins(values_P2: np.ndarray) -> np.ndarray:
    """[P] 1 where the chosen side is ahead, 1/2 for a tie, else 0."""
    return np.where(values_P2[:, 0] == values_P2[:, 1], 0.5, (values_P2[:, 0] > values_P2[:, 1]).astype(float))


def _plain(number: float) -> float | int | None:
    """JSON has no infinities: the bounds around a single pair are not known."""
    return (round(number, 6) if isinstance(number, float) else number) if np.isfinite(number) else None
