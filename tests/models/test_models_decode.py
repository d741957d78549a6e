"""Decoding with transformers' caches through the swapped modules: prefill and decode equal the full forward pass."""

from __future__ import annotations

import pytest
import torch
from model_samples import K2, LINEAR, logits, make, pack, twin
from transformers import DynamicCache

BOTH = pytest.mark.parametrize("spec", [K2, LINEAR], ids=["k2", "linear"])


@BOTH
@torch.no_grad()
def test_prefill_and_decode_equal_the_full_forward(spec) -> None:
    model = make(spec).eval()
    batch = pack((40,))
    full = logits(model, batch)
    cache = DynamicCache(config=model.config)
    got, done = [], 0
    for length in (23, 1, 1, 9, 1, 1, 4):  # single tokens and pieces
        tokens = batch.tokens_T[None, done : done + length]
        positions = torch.arange(done, done + length)[None]
        got.append(model.hf(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits[0])
        done += length
    assert done == 40
    assert float((torch.cat(got) - full).abs().max()) < 1e-5


@BOTH
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(spec) -> None:
    model = make(spec).eval()
    lengths = (12, 30, 21)
    prompts = [pack((n,), seed=n).tokens_T for n in lengths]
    tokens = torch.zeros(3, 30, dtype=torch.long)
    mask = torch.zeros(3, 30, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, 30 - len(prompt) :] = prompt
        mask[row, 30 - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    out = model.hf(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    extra = torch.tensor([[5], [6], [7]])
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    after = model.hf(
        input_ids=extra, attention_mask=mask, position_ids=positions[:, -1:] + 1, past_key_values=cache, use_cache=True
    ).logits[:, -1]
    for row, prompt in enumerate(prompts):
        whole = torch.cat([prompt, extra[row]])
        expected = model.hf(input_ids=whole[None], use_cache=False).logits[0]
        assert float((out.logits[row, -1] - expected[-2]).abs().max()) < 1e-5
        assert float((after[row] - expected[-1]).abs().max()) < 1e-5


@BOTH
def test_generate_gives_the_tokens_of_transformers_own_model(spec) -> None:
    model = make(spec).eval()
    prompt = pack((10,)).tokens_T[None]
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.hf.generate(prompt, **arguments), twin(model).eval().generate(prompt, **arguments))


@BOTH
@torch.no_grad()
def test_an_unpadded_batch_equals_its_rows(spec) -> None:
    model = make(spec).eval()
    rows = torch.stack([pack((80,), seed=n).tokens_T for n in range(3)])
    together = model.hf(input_ids=rows, use_cache=False).logits
    for n, row in enumerate(rows):
        assert float((together[n] - model.hf(input_ids=row[None], use_cache=False).logits[0]).abs().max()) < 1e-5
