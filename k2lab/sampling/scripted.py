"""A sampler that answers from a script: for tests, and for trying out a loop without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from k2lab.core.errors import DataError
from k2lab.core.types import Completion, SampleParams, StopReason

Reply = Sequence[int] | Completion


class ScriptedSampler:
    """Replies from a list in the order of requests, from a mapping by request key, or from a function of (prompt, key).

    A reply is a `Completion`, or tokens: these are cut at the first of the request's stop tokens (`StopReason.EOS` for the first
    listed, which is the turn's end, else STOP_TOKEN) or at `max_tokens` (LENGTH), with log-probabilities 0. `requests` records
    every (prompt, params, key). Raises DataError when the script has no reply.
    """

    def __init__(
        self,
        replies: Sequence[Reply] | Mapping[str, Reply] | Callable[[Sequence[int], str], Reply],
        policy_version: int = 0,
    ) -> None:
        self.replies, self.policy_version = replies, policy_version
        self.requests: list[tuple[list[int], SampleParams, str]] = []

    def sample(self, prompts: Sequence[Sequence[int]], params: SampleParams, keys: Sequence[str]) -> list[Completion]:
        """One scripted completion per prompt."""
        return [self._one(list(prompt), params, key) for prompt, key in zip(prompts, keys, strict=True)]

    def _one(self, prompt: list[int], params: SampleParams, key: str) -> Completion:
        self.requests.append((prompt, params, key))
        place = len(self.requests) - 1
        reply: Reply | None
        if callable(self.replies):
            reply = self.replies(prompt, key)
        elif isinstance(self.replies, Mapping):
            reply = self.replies.get(key)
        else:
            reply = self.replies[place] if place < len(self.replies) else None
        if reply is None:
            raise DataError("the script has no reply to this request", where=f"request {place}", got=key)
        if isinstance(reply, Completion):
            return reply
        tokens: list[int] = []
        stop = StopReason.LENGTH
        for token in reply[: params.max_tokens]:
            tokens.append(token)
            if token in params.stop_tokens:
                stop = StopReason.EOS if token == params.stop_tokens[0] else StopReason.STOP_TOKEN
                break
        return Completion(tuple(tokens), (0.0,) * len(tokens), stop, self.policy_version)
