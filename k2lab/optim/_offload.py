"""Optimizer state that lives in the host's memory and passes through the GPU while other state is being worked on.

Three streams: one brings the state of the next piece, the current one works, one takes the state of the last piece back. Host
memory is pinned, so that copies run beside the kernels. Four pieces are under way at most, which bounds the memory on the GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# What must be on the GPU for a piece of work, and the work, which changes the tensors it is given in place.
Job = tuple[list[Tensor], Callable[[list[Tensor]], None]]


def host_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the host's memory, pinned if `tensor` is on a GPU."""
    return torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.device.type == "cuda").copy_(tensor.detach())


def host_zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of `like`'s shape in the host's memory, pinned if `like` is on a GPU."""
    return torch.zeros(like.shape, dtype=dtype, pin_memory=like.device.type == "cuda")


class Ferry:
    """Runs jobs on `device` whose tensors are held on the host. One per optimizer."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            self.bring, self.take = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.under_way: deque[torch.cuda.Event] = deque()

    def run(self, jobs: Sequence[Job]) -> None:
        """All jobs in order. Returns when the last one is queued; `settle` waits for the host's copies."""
        if not self.cuda:
            for held, work in jobs:
                staged = [tensor.clone() for tensor in held]
                work(staged)
                for tensor, new in zip(held, staged):
                    tensor.copy_(new)
            return
        self.bring.wait_stream(self.take)  # the last update's state must have arrived before it is read again
        coming = self._fetch(jobs[0][0]) if jobs else None
        for index, (held, work) in enumerate(jobs):
            assert coming is not None
            staged, ready = coming
            if index + 1 < len(jobs):
                coming = self._fetch(jobs[index + 1][0])
            ours = torch.cuda.current_stream(self.device)
            ours.wait_event(ready)
            work(staged)
            self.take.wait_event(ours.record_event())
            with torch.cuda.stream(self.take):
                for tensor, new in zip(held, staged):
                    tensor.copy_(new, non_blocking=True)
                    new.record_stream(self.take)
                self.under_way.append(self.take.record_event())

    def _fetch(self, held: list[Tensor]) -> tuple[list[Tensor], torch.cuda.Event]:
        while len(self.under_way) > 2:
            self.under_way.popleft().synchronize()
        ours = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.bring):
            staged = [tensor.to(self.device, non_blocking=True) for tensor in held]
            for tensor in staged:
                tensor.record_stream(ours)
            return staged, self.bring.record_event()

    def settle(self) -> None:
        """Waits until the host's memory holds what the last update made."""
        while self.under_way:
            self.under_way.popleft().synchronize()
