import numpy as np
import pytest
import torch
from sampling_models import FAMILIES, tiny_k2

from k2lab.core.errors import DataError, NumericsError, RecipeError
from k2lab.core.rng import rng
from k2lab.core.types import SampleParams, StopReason
from k2lab.sampling.local import LocalSampler, draw

PROMPTS = [rng(0, "test", "prompt", n).integers(0, 96, size=length).tolist() for n, length in enumerate([5, 17, 1, 30, 9, 17, 2])]
KEYS = [f"task-{n}/0" for n in range(len(PROMPTS))]


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return FAMILIES[request.param]()


@pytest.fixture(scope="module")
def k2():
    return tiny_k2()


def full_logits(model, tokens):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float()


def assert_same(first, second, tolerance=1e-5):
    for a, b in zip(first, second, strict=True):
        assert a.tokens == b.tokens
        assert a.stop == b.stop
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=tolerance)


@pytest.mark.parametrize("decoder", [True, False])
def test_greedy_is_the_argmax_of_full_forwards(model, decoder):
    done = LocalSampler(model, pad_id=0, max_batch=4, decoder=decoder).sample(PROMPTS, SampleParams(max_tokens=12), KEYS)
    for prompt, completion in zip(PROMPTS, done):
        tokens = list(completion.tokens)
        assert len(tokens) == 12
        assert completion.stop is StopReason.LENGTH
        logits = full_logits(model, prompt + tokens)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        np.testing.assert_allclose(completion.logprobs, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batched_equals_alone_in_any_order(model, temperature):
    params = SampleParams(max_tokens=10, temperature=temperature, stop_tokens=tuple(range(12)), seed=3)
    sampler = LocalSampler(model, pad_id=0)
    together = sampler.sample(PROMPTS, params, KEYS)
    alone = [sampler.sample([prompt], params, [key])[0] for prompt, key in zip(PROMPTS, KEYS)]
    backwards = LocalSampler(model, pad_id=5, max_batch=3).sample(PROMPTS[::-1], params, KEYS[::-1])[::-1]
    assert_same(together, alone)
    assert_same(together, backwards)
    # The test means something only if rows end at different steps, so that batches are compacted.
    assert len({len(completion.tokens) for completion in together}) > 2


def test_log_probabilities_are_untempered(k2):
    params = SampleParams(max_tokens=8, temperature=0.5, top_p=0.9)
    (done,) = LocalSampler(k2, pad_id=0).sample([PROMPTS[1]], params, ["k"])
    logits = full_logits(k2, PROMPTS[1] + list(done.tokens))[len(PROMPTS[1]) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
    np.testing.assert_allclose(done.logprobs, wanted.numpy(), atol=1e-5)


def test_draws_depend_on_seed_key_and_position_only(k2):
    sampler = LocalSampler(k2, pad_id=0)
    prompt = PROMPTS[0]

    def tokens(key="a", seed=0, max_tokens=16):
        return sampler.sample([prompt], SampleParams(max_tokens=max_tokens, temperature=1.0, seed=seed), [key])[0].tokens

    assert tokens() == tokens()
    assert tokens() != tokens(key="b")
    assert tokens() != tokens(seed=1)
    assert tokens(max_tokens=6) == tokens()[:6]
    # Position t of request key uses the t-th number of the counter-based stream.
    uniforms = rng(0, "sample", "a").random(16)
    logits = full_logits(k2, prompt + list(tokens()))[len(prompt) - 1 : -1]
    assert draw(logits, torch.from_numpy(uniforms), 1.0).tolist() == list(tokens())


def test_sampled_frequencies_follow_the_distribution(k2):
    prompt, count = PROMPTS[4], 3000
    params = SampleParams(max_tokens=1, temperature=0.8)
    done = LocalSampler(k2, pad_id=0, max_batch=1000).sample([prompt] * count, params, [f"k{n}" for n in range(count)])
    observed = np.bincount([completion.tokens[0] for completion in done], minlength=96)
    wanted = (full_logits(k2, prompt)[-1].double() / 0.8).softmax(-1).numpy() * count
    common = wanted > 5
    chi2 = ((observed - wanted)[common] ** 2 / wanted[common]).sum()
    freedom = common.sum()
    assert freedom > 10
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms, 1.0).tolist() == [0, 0, 1, 1, 2, 3]
    # Nucleus of 0.6: the tokens with 0.4 and 0.3, i.e. 3/7 and 4/7 after renormalising.
    nucleus = draw(logits, torch.tensor([0.0, 0.42, 0.44, 0.99, 0.1, 0.5], dtype=torch.float64), 1.0, top_p=0.6)
    assert nucleus.tolist() == [2, 2, 3, 3, 2, 3]
    # A nucleus that ends exactly at top_p takes no further token, and there is always one.
    assert draw(logits, uniforms, 1.0, 1e-9).tolist() == [3] * 6
    assert draw(logits, uniforms + 1e-9, 0.01).tolist() == [3] * 6


def test_draw_never_picks_an_impossible_token():
    logits = torch.full((2, 5), float("-inf"))
    logits[:, 2] = 0.0
    assert draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0).tolist() == [2, 2]


def test_stop_reasons(k2):
    sampler = LocalSampler(k2, pad_id=0)
    greedy = sampler.sample([PROMPTS[1]], SampleParams(max_tokens=12), ["k"])[0].tokens
    end = next(token for n, token in enumerate(greedy) if n > 2 and token not in greedy[:n])
    upto = greedy[: greedy.index(end) + 1]

    def run(stop_tokens, **kwargs):
        params = SampleParams(max_tokens=12, stop_tokens=stop_tokens)
        return LocalSampler(k2, pad_id=0, **kwargs).sample([PROMPTS[1]], params, ["k"])[0]

    for stop_tokens, eos, wanted in [
        ((end,), None, StopReason.EOS),
        ((95, end), None, StopReason.STOP_TOKEN),
        ((end,), 95, StopReason.STOP_TOKEN),
        ((), end, StopReason.EOS),
        ((end,), (95, end), StopReason.EOS),
    ]:
        assert 95 not in greedy
        done = run(stop_tokens, eos_id=eos)
        assert (done.tokens, done.stop) == (upto, wanted)
        assert len(done.logprobs) == len(upto)
    assert run(()).stop is StopReason.LENGTH


def test_prompts_that_do_not_fit_are_recorded_not_raised(k2):
    prompts = [list(range(64)), list(range(70)), list(range(60)), list(range(3))]
    done = LocalSampler(k2, pad_id=0).sample(prompts, SampleParams(max_tokens=8), list("abcd"))
    assert [(len(c.tokens), c.stop) for c in done] == [
        (0, StopReason.CONTEXT),
        (0, StopReason.CONTEXT),
        (4, StopReason.CONTEXT),
        (8, StopReason.LENGTH),
    ]


def test_model_is_left_as_it_was(k2):
    sampler = LocalSampler(k2, pad_id=0, policy_version=7)
    before = k2.config._attn_implementation
    k2.train()
    try:
        (done,) = sampler.sample([PROMPTS[0]], SampleParams(max_tokens=2), ["k"])
        assert k2.training
    finally:
        k2.eval()
    assert done.policy_version == 7
    assert k2.config._attn_implementation == before
    loss = k2(input_ids=torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss
    loss.backward()  # nothing cached while sampling may be an inference tensor
    k2.zero_grad(set_to_none=True)


def test_wrong_requests_are_refused(k2):
    sampler = LocalSampler(k2, pad_id=0)
    with pytest.raises(DataError, match="same key"):
        sampler.sample([[1], [2]], SampleParams(temperature=1.0), ["k", "k"])
    with pytest.raises(DataError, match="at least one token"):
        sampler.sample([[]], SampleParams(), ["k"])
    with pytest.raises(DataError, match="keys"):
        sampler.sample([[1]], SampleParams(), [])
    for params in (
        SampleParams(max_tokens=0),
        SampleParams(temperature=-1.0),
        SampleParams(temperature=float("nan")),
        SampleParams(top_p=0.0),
        SampleParams(top_p=1.1),
    ):
        with pytest.raises(RecipeError):
            sampler.sample([[1]], params, ["k"])
    assert sampler.sample([], SampleParams(), []) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_an_error(temperature):
    broken = tiny_k2()
    with torch.no_grad():
        broken.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        LocalSampler(broken, pad_id=0).sample([[1, 2]], SampleParams(temperature=temperature), ["k"])
