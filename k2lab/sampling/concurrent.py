"""An asynchronous front for a batched sampler: requests that arrive together are decoded together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from k2lab.core.types import Completion, SampleParams


class BatchSampler(Protocol):
    """What can be put behind `ConcurrentSampler`: `local.LocalSampler`, `scripted.ScriptedSampler`."""

    def sample(self, prompts: Sequence[Sequence[int]], params: SampleParams, keys: Sequence[str]) -> list[Completion]: ...


class ConcurrentSampler:
    """`await sample(tokens, params, key)` from many coroutines; one thread decodes them in batches of equal settings.

    Requests that come while a batch is being decoded wait for the next one. What a request gets does not depend on its company:
    draws are functions of (`params.seed`, `key`, position). Use one instance per event loop.
    """

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler
        self._waiting: list[tuple[Sequence[int], SampleParams, str, asyncio.Future[Completion]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def sample(self, tokens: Sequence[int], params: SampleParams, key: str) -> Completion:
        """The completion of one prompt. Raises what the sampler raises for the batch that the request was part of."""
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((tokens, params, key, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        await asyncio.sleep(0)  # lets every coroutine that is ready now add its request
        while self._waiting:
            # Equal settings only, and no key twice: a sampler refuses two requests whose draws would be the same.
            params, keys = self._waiting[0][1], set()
            batch, later = [], []
            for request in self._waiting:
                if request[3].cancelled():
                    continue
                if request[1] == params and request[2] not in keys:
                    batch.append(request)
                    keys.add(request[2])
                else:
                    later.append(request)
            self._waiting = later
            try:
                done = await asyncio.to_thread(
                    self.sampler.sample, [request[0] for request in batch], params, [request[2] for request in batch]
                )
            except Exception as error:
                for *_, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (*_, future), completion in zip(batch, done):
                if not future.done():
                    future.set_result(completion)
