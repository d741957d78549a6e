import pytest
import torch

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.types import Completion, SampleParams, StopReason
from k2lab.sampling.local import LocalSampler
from k2lab.sampling.scripted import ScriptedSampler
from k2lab.sampling.streaming import stream

PROMPT = [5, 9, 2, 14, 3]


def drained(generator):
    tokens = []
    try:
        while True:
            tokens.append(next(generator))
    except StopIteration as end:
        return tokens, end.value


@pytest.mark.parametrize("spec", ["tiny-k2", "tiny-linear"])
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_streamed_tokens_are_those_of_sample(spec, temperature, top_p):
    from k2lab import specs
    from k2lab.models import build

    model = build.from_spec(specs.get(spec), seed=1)
    sampler = LocalSampler(model.hf, pad_id=0, eos_id=7, policy_version=3)
    params = SampleParams(max_tokens=12, temperature=temperature, top_p=top_p, seed=4)
    (wanted,) = sampler.sample([PROMPT], params, ["a key"])
    tokens, completion = drained(stream(sampler, PROMPT, params, "a key"))
    assert tokens == list(completion.tokens) == list(wanted.tokens)
    assert completion.logprobs == pytest.approx(wanted.logprobs, abs=1e-6)
    assert (completion.stop, completion.policy_version) == (wanted.stop, 3)
    # the first token as the turn's end, and as another stop token
    for more, reason in (({"eos_id": tokens[0]}, StopReason.EOS), ({"eos_id": 7}, StopReason.STOP_TOKEN)):
        other = LocalSampler(model.hf, pad_id=0, **more)
        params = SampleParams(max_tokens=12, temperature=temperature, top_p=top_p, seed=4, stop_tokens=(tokens[0],))
        ended, completion = drained(stream(other, PROMPT, params, "a key"))
        assert ended == tokens[:1] and completion.stop is (reason if tokens[0] != 7 else StopReason.EOS)


def test_window_modes_and_bad_requests():
    from k2lab import specs
    from k2lab.models import build

    model = build.from_spec(specs.get("tiny-k2"), seed=1)
    model.hf.train()
    sampler = LocalSampler(model.hf, pad_id=0, window=8)
    generator = stream(sampler, PROMPT, SampleParams(max_tokens=9), "k")
    next(generator)
    assert not torch.is_inference_mode_enabled()  # the caller's code between tokens is not the decoder's
    tokens, completion = drained(generator)
    assert (len(tokens), completion.stop) == (2, StopReason.CONTEXT)
    assert model.hf.training
    closed = stream(sampler, PROMPT, SampleParams(max_tokens=9), "k")
    next(closed)
    closed.close()
    assert model.hf.training
    assert drained(stream(sampler, PROMPT * 2, SampleParams(), "k")) == ([], Completion((), (), StopReason.CONTEXT))
    with pytest.raises(DataError, match="at least one token"):
        next(stream(sampler, [], SampleParams(), "k"))
    with pytest.raises(RecipeError, match="temperature"):
        next(stream(sampler, PROMPT, SampleParams(temperature=-1), "k"))


def test_other_samplers_give_all_at_once():
    tokens, completion = drained(stream(ScriptedSampler([[1, 2, 3]]), PROMPT, SampleParams(), "k"))
    assert tokens == [1, 2, 3] and completion.stop is StopReason.LENGTH
