"""Heads of layer 0 that begin by looking a fixed number of tokens back."""

import pytest
import torch

from k2lab import specs
from k2lab.core.errors import RecipeError
from k2lab.models import build


def layer0_attention(spec, length=48):
    """Attention weights [H, T, T] of layer 0 by transformers' own eager path, on random tokens."""
    model = build.from_spec(spec, seed=5).hf
    model.config._attn_implementation = "eager"
    ids = torch.randint(0, spec.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids, output_attentions=True).attentions[0][0]


@pytest.mark.parametrize("q_lora_rank", [128, None])
def test_each_head_peaks_at_its_distance(q_lora_rank):
    spec = specs.get("tiny-k2").replace(local_heads=(1, 3), q_lora_rank=q_lora_rank)
    weights = layer0_attention(spec)
    for head, distance in enumerate(spec.local_heads):
        mean = [float(weights[head].diagonal(-back)[8:].mean()) for back in range(8)]
        assert max(range(8), key=mean.__getitem__) == distance
        assert mean[distance] > 0.3 and sum(mean[distance - 1 : distance + 2]) > 0.7


def test_biases_of_dense_students_do_the_same():
    spec = specs.get("tiny-qwen2")
    assert spec.local_heads == (1, 2, 3, 4)
    weights = layer0_attention(spec)
    for head, distance in enumerate(spec.local_heads):
        mean = [float(weights[head].diagonal(-back)[8:].mean()) for back in range(8)]
        assert max(range(8), key=mean.__getitem__) == distance
        assert mean[distance] > 0.3 and sum(mean[distance - 1 : distance + 2]) > 0.7
    with_heads, without = (build.from_spec(s, seed=5).state() for s in (spec, spec.replace(local_heads=())))
    changed = {name for name in with_heads if not torch.equal(with_heads[name], without[name])}
    assert changed == {f"model.layers.0.self_attn.{part}_proj.bias" for part in "qk"}


def test_without_them_no_distance_stands_out():
    weights = layer0_attention(specs.get("tiny-k2").replace(local_heads=()))
    assert max(weights[h].diagonal(-d)[8:].mean() for h in range(4) for d in (1, 2, 3)) < 0.2


def test_other_parameters_are_as_without():
    spec = specs.get("tiny-k2")
    with_heads, without = (build.from_spec(s, seed=5).state() for s in (spec, spec.replace(local_heads=())))
    changed = {name for name in with_heads if not torch.equal(with_heads[name], without[name])}
    prefix = "model.layers.0.self_attn."
    parts = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")
    assert changed == {"model.embed_tokens.weight", *(f"{prefix}{part}.weight" for part in parts)}


@pytest.mark.parametrize("change", [{"local_heads": (1, 2, 3, 4, 5)}, {"local_heads": (0,)}, {"num_attention_heads": 1}])
def test_impossible_ones_are_refused(change):
    with pytest.raises(RecipeError, match="local_heads"):
        specs.get("tiny-k2").replace(**change)


def test_models_without_rotary_positions_refuse_them():
    with pytest.raises(RecipeError, match="local_heads"):
        specs.get("tiny-linear").replace(local_heads=(1,))


def test_dense_models_without_biases_refuse_them():
    with pytest.raises(RecipeError, match="attention_bias"):
        specs.get("tiny-qwen2").replace(attention_bias=False)
