"""Log-probabilities of given samples under a fixed model, computed once, kept in a file, continued after a kill.

Legend: `T` tokens of a sample, `N` tokens of all samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from k2lab.core.artifacts import disk_errors, write_json
from k2lab.core.stage import StageContext


def logprobs_of(
    ctx: StageContext, name: str, folder: Path, samples: Sequence[Any], *, batch_tokens: int, dtype: Any
) -> list[np.ndarray]:
    """f32[T] per sample: log p(token t | tokens < t) under the model in `folder`; index 0 is 0.

    `ctx.work/<name>.npy` f32[N] holds all samples' values one after the other and `<name>.json` their keys and lengths. While
    it is made, each rank appends whole batches to a file of its own, and a resumed stage goes on behind the last whole one.
    """
    from k2lab.dist import mesh

    path = ctx.work / f"{name}.npy"
    batches = batches_of(samples, batch_tokens)
    rank, world, device = mesh.init(ctx.device)
    mesh.barrier()  # the model may have been written by rank 0 just now
    if not path.exists():
        mine = [(number, batch) for number, batch in enumerate(batches) if number % world == rank]
        _compute(ctx, name, folder, samples, mine, _part(ctx, name, rank, world), (device, dtype))
        mesh.barrier()
        if rank == 0:
            _merge(ctx, name, samples, batches, world)
        mesh.barrier()
    flat_N = np.load(path)
    ends = np.cumsum([len(sample.tokens) for sample in samples])
    assert len(flat_N) == (ends[-1] if len(ends) else 0), "one value per token"
    return np.split(flat_N, ends[:-1])


def batches_of(samples: Sequence[Any], batch_tokens: int) -> list[list[int]]:
    """Places of the samples in batches of at most `batch_tokens` tokens (a longer sample is a batch of its own), in order."""
    batches: list[list[int]] = []
    size = 0
    for place, sample in enumerate(samples):
        length = len(sample.tokens)
        if not batches or size + length > batch_tokens:
            batches.append([])
            size = 0
        batches[-1].append(place)
        size += length
    return batches


def _part(ctx: StageContext, name: str, rank: int, world: int) -> Path:
    return ctx.work / f"{name}.{rank}of{world}.part"


def _compute(
    ctx: StageContext, name: str, folder: Path, samples: Sequence[Any], mine: list[tuple[int, list[int]]], part: Path, how: Any
) -> None:
    import torch

    from k2lab.data.pack import pack
    from k2lab.engine.step import to_device
    from k2lab.models.losses import token_logprobs
    from k2lab.stages._models import load_model

    sizes = np.cumsum([0, *(4 * sum(len(samples[place].tokens) for place in batch) for _, batch in mine)])
    have = part.stat().st_size if part.exists() else 0
    done = int(np.searchsorted(sizes, have, side="right")) - 1
    device, dtype = how
    if done == len(mine):
        return
    model = load_model(folder, dtype=dtype, device=device).eval()
    with disk_errors(part), part.open("ab") as file, torch.no_grad():
        file.truncate(int(sizes[done]))  # a torn batch is computed again
        for count, (_, places) in enumerate(mine[done:], start=done + 1):
            batch = to_device(pack([_bare(samples[place]) for place in places]), device)
            values_T = token_logprobs(model.hidden(batch), model.head(), batch.targets_T).float().cpu().numpy()
            # Position i of a document speaks of token i + 1; its last position of no token at all.
            shifted_T = np.roll(values_T, 1)
            shifted_T[np.asarray(batch.starts_S1.cpu())[:-1]] = 0
            file.write(shifted_T.astype("<f4").tobytes())
            file.flush()
            ctx.events.emit("progress", done=count, total=len(mine), unit=f"batches ({name} log-probabilities)")


def _bare(sample: Any) -> Any:
    """The sample without streams and pair: only its tokens matter here."""
    from k2lab.core.types import Sample

    return Sample(tokens=sample.tokens, weight=sample.weight, key=sample.key)


def _merge(ctx: StageContext, name: str, samples: Sequence[Any], batches: list[list[int]], world: int) -> None:
    """Puts the ranks' parts together in the samples' order."""
    parts = [np.fromfile(_part(ctx, name, rank, world), dtype="<f4") for rank in range(world)]
    at = [0] * world
    pieces = []
    for number, batch in enumerate(batches):
        rank, size = number % world, sum(len(samples[place].tokens) for place in batch)
        pieces.append(parts[rank][at[rank] : at[rank] + size])
        at[rank] += size
    write_json(ctx.work / f"{name}.json", {"keys": [s.key for s in samples], "lengths": [len(s.tokens) for s in samples]})
    unfinished = ctx.work / f"{name}.tmp.npy"
    with disk_errors(unfinished):
        np.save(unfinished, np.concatenate(pieces) if pieces else np.zeros(0, np.float32))
        unfinished.replace(ctx.work / f"{name}.npy")
    for part in ctx.work.glob(f"{name}.*of*.part"):  # also those of an attempt with another number of ranks
        part.unlink()
