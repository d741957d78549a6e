"""Our decoder against the model's own forward: same tokens, same log-probabilities, whoever shares the batch."""

import numpy as np
import pytest
import torch
from sampling_models import swapped, tiny_k2

from k2lab import specs
from k2lab.core.rng import rng
from k2lab.core.types import Sample, SampleParams
from k2lab.data.pack import pack
from k2lab.models import build, decode
from k2lab.models.losses import token_logprobs
from k2lab.sampling.local import LocalSampler

W = 320


def model_of(name):
    """A small model of a family with weights that training could have left: larger and more uneven than at the start."""
    shape = {"vocab_size": W, "hidden_size": 128, "intermediate_size": 128}
    spec = specs.get(name.removesuffix("-llama")).replace(
        **shape, **({"attention_bias": False, "local_heads": ()} if name.endswith("-llama") else {})
    )
    model = build.from_spec(spec, seed=5)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = rng(5, "test", key).standard_normal(tensor.shape).astype(np.float32)
            tensor.mul_(1 + 0.3 * torch.from_numpy(noise)).mul_(1.5 if tensor.ndim > 1 else 1.0)
            if key.endswith("bias"):
                tensor.add_(0.2 * torch.from_numpy(noise))  # biases begin at 0
        for router in model.routers().values():
            router.e_score_correction_bias.copy_(torch.linspace(-0.1, 0.1, len(router.e_score_correction_bias)))
    return model.eval()


@pytest.fixture(scope="module", params=["tiny-k2", "tiny-linear", "tiny-qwen2", "tiny-qwen2-llama"])
def model(request):
    return model_of(request.param)


def prompts_of(count, group=1):
    lengths = [3 + int(rng(0, "length", n // group).integers(0, 70)) for n in range(count)]
    return [rng(0, "prompt", n // group).integers(0, W, size=length).tolist() for n, length in enumerate(lengths)]


def keys_of(count):
    return [f"task/{n}" for n in range(count)]


def assert_same(first, second, tolerance=1e-5):
    for a, b in zip(first, second, strict=True):
        assert (a.tokens, a.stop) == (b.tokens, b.stop)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=tolerance)


def trained_logprobs(model, prompts, done):
    """log p of the completions' tokens by the forward that training uses, packed."""
    samples = []
    for n, (prompt, completion) in enumerate(zip(prompts, done, strict=True)):
        tokens = np.array([*prompt, *completion.tokens], np.int32)
        weight = np.array([0] * len(prompt) + [1] * len(completion.tokens), np.float32)
        samples.append(Sample(tokens=tokens, weight=weight, key=str(n)))
    batch = pack(samples)
    with torch.no_grad():
        found = token_logprobs(model.hidden(batch), model.head(), torch.from_numpy(batch.targets_T))
    return found[torch.from_numpy(batch.weight_T) != 0].numpy()


def test_every_family_has_the_decoder(model):
    assert decode.supports(model.hf) and isinstance(model.hf.k2_decoder(model.hf), decode.Decoder)


def test_log_probabilities_agree_with_the_training_forward(model):
    prompts = prompts_of(24, group=4)
    params = SampleParams(max_tokens=40, temperature=1.0, stop_tokens=tuple(range(6)))
    done = LocalSampler(model.hf, pad_id=0).sample(prompts, params, keys_of(24))
    sampled = np.concatenate([completion.logprobs for completion in done])
    assert len(sampled) > 300
    worst = np.abs(sampled - trained_logprobs(model, prompts, done)).max()
    print(f"largest difference of sampler and trainer over {len(sampled)} tokens: {worst:.1e}")
    assert worst <= 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_tokens_as_the_models_own_forward(model, temperature):
    prompts = prompts_of(20, group=1 if temperature == 0 else 4)
    params = SampleParams(max_tokens=24, temperature=temperature, stop_tokens=tuple(range(10)), seed=1)
    ours = LocalSampler(model.hf, pad_id=0).sample(prompts, params, keys_of(20))
    # transformers' own recurrence of Kimi Delta Attention is farther from fp64 (1.4e-5) than ours (4e-6): hence 3e-5
    assert_same(ours, LocalSampler(model.hf, pad_id=0, decoder=False).sample(prompts, params, keys_of(20)), 3e-5)
    assert len({len(completion.tokens) for completion in ours}) > 1


def test_waiting_requests_take_the_places_of_finished_ones(model):
    prompts = prompts_of(40, group=5)
    params = SampleParams(max_tokens=30, temperature=1.0, stop_tokens=tuple(range(20)))
    together = LocalSampler(model.hf, pad_id=0, max_batch=64).sample(prompts, params, keys_of(40))
    for size in (1, 7, 16):
        assert_same(together, LocalSampler(model.hf, pad_id=3, max_batch=size).sample(prompts, params, keys_of(40)))


def test_prompts_run_in_packs_of_limited_size(model, monkeypatch):
    prompts, params = prompts_of(12, group=2), SampleParams(max_tokens=8, temperature=1.0)
    together = LocalSampler(model.hf, pad_id=0).sample(prompts, params, keys_of(12))
    monkeypatch.setattr(decode, "PACK_TOKENS", 60)
    sizes = []
    original = decode.Decoder._prefill
    monkeypatch.setattr(
        decode.Decoder, "_prefill", lambda self, prompts, new: sizes.append(new.pack.num_tokens) or original(self, prompts, new)
    )
    assert_same(together, LocalSampler(model.hf, pad_id=0).sample(prompts, params, keys_of(12)))
    assert len(sizes) > 2 and all(size <= max(60, max(map(len, prompts))) for size in sizes)


def test_every_prompt_runs_once(monkeypatch):
    model = model_of("tiny-k2")
    run = []
    original = decode.Decoder._prefill
    monkeypatch.setattr(
        decode.Decoder,
        "_prefill",
        lambda self, prompts, new: run.extend(map(tuple, prompts)) or original(self, prompts, new),
    )
    prompts = prompts_of(24, group=8)
    prompts = [prompts[n] for n in rng(0, "mix").permutation(24)]
    LocalSampler(model.hf, pad_id=0).sample(prompts, SampleParams(max_tokens=3, temperature=1.0), keys_of(24))
    assert sorted(run) == sorted({tuple(prompt) for prompt in prompts}) and len(run) == 3


def test_memory_grows_and_rows_move(model):
    """Long completions beside short ones, one row left at the end."""
    prompts = prompts_of(12)
    params = SampleParams(max_tokens=150, temperature=1.0, stop_tokens=tuple(range(40)))
    together = LocalSampler(model.hf, pad_id=0).sample(prompts, params, keys_of(12))
    longest = max(range(12), key=lambda n: len(together[n].tokens))
    alone = LocalSampler(model.hf, pad_id=0).sample([prompts[longest]], params, [keys_of(12)[longest]])
    assert_same([together[longest]], alone)
    free = SampleParams(max_tokens=150, temperature=1.0)
    both = LocalSampler(model.hf, pad_id=0).sample(prompts[:2], free, keys_of(2))
    assert_same(both, LocalSampler(model.hf, pad_id=0, decoder=False).sample(prompts[:2], free, keys_of(2)), 3e-5)


@pytest.mark.parametrize("decoder", [True, False])
def test_most_probable_tokens(model, decoder):
    prompts = prompts_of(4)
    params = SampleParams(max_tokens=6, temperature=0.7, top_k_logprobs=5)
    done = LocalSampler(model.hf, pad_id=0, decoder=decoder).sample(prompts, params, keys_of(4))
    for prompt, completion in zip(prompts, done):
        tokens = torch.tensor([*prompt, *completion.tokens])
        with torch.no_grad():
            logprobs = model.hf(tokens[None], use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        best, ids = logprobs.topk(5)
        assert len(completion.top) == len(completion.tokens) == 6
        for t, (own_ids, own_logprobs) in enumerate(completion.top):
            assert list(own_ids) == ids[t].tolist()
            np.testing.assert_allclose(own_logprobs, best[t].numpy(), atol=1e-5)
            if completion.tokens[t] in own_ids:
                place = own_ids.index(completion.tokens[t])
                assert completion.logprobs[t] == pytest.approx(own_logprobs[place], abs=1e-6)
    plain = LocalSampler(model.hf, pad_id=0, decoder=decoder).sample(
        prompts, SampleParams(max_tokens=6, temperature=0.7), keys_of(4)
    )
    assert [c.tokens for c in plain] == [c.tokens for c in done] and all(c.top == () for c in plain)


def test_weights_are_shared_not_copied():
    model = model_of("tiny-k2")
    sampler = LocalSampler(model.hf, pad_id=0)
    prompts, params = prompts_of(3), SampleParams(max_tokens=5, temperature=1.0)
    before = sampler.sample(prompts, params, keys_of(3))
    with torch.no_grad():
        for _, tensor in model.named_parameters():
            tensor.mul_(1.1)
    after = sampler.sample(prompts, params, keys_of(3))
    assert [c.logprobs for c in after] != [c.logprobs for c in before]
    assert_same(after, LocalSampler(model.hf, pad_id=0).sample(prompts, params, keys_of(3)), 0.0)


def test_models_that_are_not_ours_keep_their_own_forward():
    plain, ours = tiny_k2(), swapped(tiny_k2())
    assert not hasattr(plain, "k2_decoder") and decode.supports(ours)
    adapted = swapped(tiny_k2())
    adapted.model.layers[0].self_attn.kv_b_proj.register_parameter("adapter", torch.nn.Parameter(torch.zeros(1)))
    assert not decode.supports(adapted) and ours.k2_decoder(adapted) is None
    hooked = swapped(tiny_k2())
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert not decode.supports(hooked)
    params = SampleParams(max_tokens=5)
    assert_same(*(LocalSampler(m, pad_id=0).sample([[1, 2, 3]], params, ["k"]) for m in (plain, ours)))
    assert_same(*(LocalSampler(m, pad_id=0).sample([[1, 2, 3]], params, ["k"]) for m in (adapted, ours)))
