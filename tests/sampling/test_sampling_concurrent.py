import asyncio

import pytest
from sampling_models import tiny_k2

from k2lab.core.errors import DataError
from k2lab.core.types import Completion, SampleParams, StopReason
from k2lab.sampling.concurrent import ConcurrentSampler
from k2lab.sampling.local import LocalSampler
from k2lab.sampling.scripted import ScriptedSampler


class Counting(ScriptedSampler):
    def __init__(self, replies):
        super().__init__(replies)
        self.sizes = []

    def sample(self, prompts, params, keys):
        self.sizes.append(len(prompts))
        return super().sample(prompts, params, keys)


def test_requests_made_together_are_decoded_together():
    inner = Counting(lambda prompt, key: [*prompt, 9])
    params, other = SampleParams(max_tokens=4), SampleParams(max_tokens=2)

    async def main():
        sampler = ConcurrentSampler(inner)
        requests = [sampler.sample([n], params, f"k{n}") for n in range(5)]
        requests += [sampler.sample([7], other, "k7"), sampler.sample([8], params, "k0")]
        return await asyncio.gather(*requests), await sampler.sample([3], params, "later")

    done, later = asyncio.run(main())
    assert [completion.tokens for completion in done] == [(n, 9) for n in (0, 1, 2, 3, 4, 7, 8)]
    assert later.tokens == (3, 9)
    assert inner.sizes == [5, 1, 1, 1]  # equal settings together; the repeated key and the other settings by themselves


def test_concurrent_gives_what_the_batch_gives():
    local = LocalSampler(tiny_k2(), pad_id=0)
    prompts, keys = [[1, 2, 3], [4], [5, 6]], ["a", "b", "c"]
    params = SampleParams(max_tokens=5, temperature=1.0)

    async def main():
        sampler = ConcurrentSampler(local)
        return await asyncio.gather(*(sampler.sample(p, params, k) for p, k in zip(prompts, keys)))

    assert [c.tokens for c in asyncio.run(main())] == [c.tokens for c in local.sample(prompts, params, keys)]


def test_an_error_reaches_every_request_of_the_batch_and_the_next_one_works():
    inner = ScriptedSampler({"good": [1]})

    async def main():
        sampler = ConcurrentSampler(inner)
        results = await asyncio.gather(
            sampler.sample([1], SampleParams(), "good"), sampler.sample([1], SampleParams(), "bad"), return_exceptions=True
        )
        return results, await sampler.sample([1], SampleParams(), "good")

    results, after = asyncio.run(main())
    assert all(isinstance(result, DataError) for result in results)
    assert after.tokens == (1,)


def test_scripted_replies_stop_as_a_sampler_does():
    params = SampleParams(max_tokens=3, stop_tokens=(8, 9))
    ready = Completion((1,), (-0.5,), StopReason.ERROR)
    sampler = ScriptedSampler([[1, 8, 2], [1, 9], [1, 2, 3, 4], ready])
    done = sampler.sample([[0]] * 4, params, list("abcd"))
    assert [(c.tokens, c.stop) for c in done] == [
        ((1, 8), StopReason.EOS),
        ((1, 9), StopReason.STOP_TOKEN),
        ((1, 2, 3), StopReason.LENGTH),
        ((1,), StopReason.ERROR),
    ]
    assert [request[2] for request in sampler.requests] == list("abcd")
    with pytest.raises(DataError, match="no reply"):
        sampler.sample([[0]], params, ["e"])
