"""Numbers that follow from shapes, against published figures."""

import math

import pytest

from k2lab import specs
from k2lab.core.errors import RecipeError


def test_kimi_k2_parameters():
    k2 = specs.get("kimi-k2")
    groups = k2.parameters()
    assert groups["routed_experts"] == 60 * 384 * 3 * 7168 * 2048
    assert groups["attention_mla"] / 1e9 == pytest.approx(6.17, abs=0.005)
    assert groups["shared_experts"] / 1e9 == pytest.approx(2.64, abs=0.005)
    assert groups["dense_mlp"] == 3 * 7168 * 18432
    assert groups["routers"] == 60 * (384 * 7168 + 384)
    assert groups["embedding"] == groups["head"] == 163840 * 7168
    assert round(k2.total() / 1e9, 1) == 1026.4
    assert round(k2.active() / 1e9, 1) == 32.9
    assert round(k2.matmul_active() / 1e9, 1) == 31.7
    assert k2.active() - k2.active(with_embeddings=False) == 2 * 163840 * 7168


def test_kimi_k2_bytes_and_cache():
    k2 = specs.get("kimi-k2")
    assert k2.kv_bytes_per_token() == 70_272
    assert k2.kv_bytes_per_token(1) * 2 == 70_272
    assert round(k2.bytes("int4_group") / 1e9) == 594
    assert round(k2.bytes("bf16") / 1e12, 2) == 2.05
    assert round(k2.bytes("fp8_block") / 1e12, 2) == 1.03
    assert k2.bytes("fp32") == 4 * k2.total()
    assert k2.state_bytes() == k2.conv_state_bytes() == 0


def test_mini_2b_is_the_proxy_that_speed_is_measured_on():
    proxy = specs.get("mini-2b")
    assert proxy.total() == 2_321_979_712
    flops = proxy.flops_per_token(4096)
    assert round(sum(flops.values()) / 1e6) == 3337
    assert flops["mla"] == 3 * 6 * 16 * (192 + 128) * 4096
    assert proxy.softmax_scale() == 192**-0.5


@pytest.mark.parametrize("name", ["mini-2b", "mini-k2", "mini-linear"])
def test_mini_models_have_the_true_head_geometry(name):
    mini, big = specs.get(name), specs.get("kimi-linear-48b" if name == "mini-linear" else "kimi-k2")
    for field in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "linear_head_dim"):
        assert getattr(mini, field) == getattr(big, field), field
    if name != "mini-2b":
        assert 0.3e9 < mini.total() < 1e9


def test_int4_bytes_are_packed_weights_and_scales():
    tiny = specs.get("tiny-k2")
    experts = tiny.parameters()["routed_experts"]
    bias = 8  # the routers' correction bias stays fp32
    assert tiny.bytes("bf16") == 2 * tiny.total() + 2 * bias
    assert tiny.bytes("bf16") - tiny.bytes("int4_group") == experts * 2 - (experts // 2 + experts // 32 * 2)


def test_fp8_bytes_round_blocks_up():
    plain = specs.get("tiny-k2").replace(kv_lora_rank=200)  # kv_a_proj: 264 rows -> 3 blocks of 128
    quantised = [t for t in plain.tensors() if t.kind in ("linear", "expert")]
    weights = sum(t.numel * t.count for t in quantised)
    scales = sum(t.count * 4 * math.ceil(t.shape[0] / 128) * math.ceil(t.shape[1] / 128) for t in quantised)
    assert plain.bytes("bf16") - plain.bytes("fp8_block") == weights - scales
    assert any(t.shape[0] % 128 for t in quantised)


def test_kimi_linear():
    linear = specs.get("kimi-linear-48b")
    assert 48e9 < linear.total() < 50e9
    assert 3.0e9 < linear.matmul_active() < linear.active() < 3.6e9
    assert [index + 1 for index in linear.layers_of("mla")] == [4, 8, 12, 16, 20, 24, 27]
    assert len(linear.layers_of("kda")) == 20
    assert linear.state_bytes() == 20 * 32 * 128 * 128 * 4  # 42 MB
    assert round(linear.state_bytes() / 1e6) == 42
    assert linear.kv_bytes_per_token() == 8_064


@pytest.mark.parametrize(
    ("name", "total"),
    [("moonlight-16b", 15.96e9), ("qwen2.5-7b", 7.616e9), ("smollm2-135m", 134.515e6)],
)
def test_known_totals(name, total):
    assert specs.get(name).total() == pytest.approx(total, rel=1e-3)


def test_tensor_counts_match_releases():
    # Moonlight's release has 5,344 tensors, 27 of which are rotary tables that are computed, not learnt
    assert len(list(specs.get("moonlight-16b").tensor_shapes())) == 5344 - 27
    assert len(list(specs.get("kimi-k2").tensor_shapes())) == 2 + 1 + 61 * 9 + 3 + 60 * (2 + 3 + 3 * 384)


def test_tensor_shapes_sum_to_total_and_are_unique():
    for name in specs.names():
        spec = specs.get(name)
        shapes = list(spec.tensor_shapes())
        assert len({key for key, _ in shapes}) == len(shapes)
        assert sum(math.prod(shape) for _, shape in shapes) == spec.total()
        assert not any("{" in key for key, _ in shapes)


def test_flops_scale_as_stated():
    k2, linear = specs.get("kimi-k2"), specs.get("kimi-linear-48b")
    forward = k2.flops_per_token(4096, training=False)
    assert forward["matmul"] == 2 * k2.matmul_active()
    assert forward["mla"] == 61 * 64 * (192 + 128) * 4096
    assert k2.flops_per_token(8192, training=False)["mla"] == 2 * forward["mla"]
    assert k2.flops_per_token(4096) == {key: 3 * value for key, value in forward.items()}
    short, long = (linear.flops_per_token(n, training=False)["kda"] for n in (4096, 2_000_000))
    assert short == long
    per_head = (short / 20 - 2 * 3 * 4096 * 4) / 32  # without the convolutions
    assert per_head == 6 * 128**2 + 3 * 64 * 128 + 64**2 == 126_976


def test_attention_of_two_million_tokens():
    linear = specs.get("kimi-linear-48b")
    forward = linear.flops_per_token(2_000_000, training=False)
    assert forward["mla"] * 2_000_000 == pytest.approx(2.87e17, rel=1e-3)


def test_tied_head_is_multiplied_but_counted_once():
    tied = specs.get("smollm2-135m")
    untied = tied.replace(tie_word_embeddings=False)
    assert untied.total() - tied.total() == 49152 * 576
    assert untied.matmul_active() == tied.matmul_active()


def test_softmax_scale_includes_yarn():
    k2 = specs.get("kimi-k2")
    assert k2.replace(rope={**k2.rope, "factor": 64.0}).softmax_scale() == pytest.approx(0.1446796, abs=1e-7)
    assert k2.replace(rope=None).softmax_scale() == pytest.approx(192**-0.5)


def test_unknown_format_and_format_without_experts():
    with pytest.raises(RecipeError, match="int4_group"):
        specs.get("kimi-k2").bytes("int4_grop")
    with pytest.raises(RecipeError, match="no routed experts"):
        specs.get("qwen2.5-7b").bytes("int4_group")
    with pytest.raises(RecipeError, match="context"):
        specs.get("tiny-k2").flops_per_token(0)
