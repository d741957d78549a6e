"""Our counts and names against transformers' own classes, built without memory on the meta device."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import DeepseekV3Config, LlamaConfig, Qwen2Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from k2lab import specs
from k2lab.specs import ModelSpec

CLASSES = {
    "kimi_k2": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "kimi_linear": (KimiLinearConfig, KimiLinearForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def their_model(spec, device="meta"):
    table = spec.config()
    config, model = CLASSES[table["model_type"]]
    # from_dict would keep "kimi_k2", for which transformers has no weight conversion, and experts would be saved fused
    with torch.device(device):
        return model(config.from_dict(table | {"model_type": config.model_type}))


def their_count(model):
    unique = {id(p): p.numel() for p in model.parameters()}
    bias = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    return sum(unique.values()) + bias


@pytest.mark.parametrize(
    "spec",
    [
        specs.get("tiny-k2"),
        specs.get("tiny-linear"),
        specs.get("tiny-dense"),
        specs.get("smollm2-135m"),
        specs.get("qwen2.5-7b"),
        specs.get("kimi-k2").replace(num_layers=2),
        specs.get("kimi-linear-48b").replace(num_layers=4),
        specs.get("moonlight-16b").replace(num_layers=2),
    ],
    ids=lambda spec: f"{spec.name}-{spec.num_layers}",
)
def test_parameters_equal_transformers(spec):
    model = their_model(spec)
    assert their_count(model) == spec.total()
    assert model.lm_head.weight.shape == (spec.vocab_size, spec.hidden_size)


def test_k2_layers_scale_to_the_whole():
    """Two and three layers on the meta device give the size of a layer, and so of all 61."""
    k2 = specs.get("kimi-k2")
    two, three = (their_count(their_model(k2.replace(num_layers=n))) for n in (2, 3))
    assert two + 59 * (three - two) == k2.total()


@pytest.mark.parametrize("name", ["tiny-k2", "tiny-linear", "tiny-dense"])
def test_names_on_disk_equal_transformers(name, tmp_path):
    spec = specs.get(name)
    their_model(spec, "cpu").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        theirs = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    # transformers writes the dense MLP of Kimi Linear's layer 0 under the experts' block; the released checkpoint and its own
    # reader know it as `mlp`
    dense = {key for key in theirs if "block_sparse_moe" in key and ".layers.0." in key}
    theirs = {key.replace("block_sparse_moe", "mlp") if key in dense else key: shape for key, shape in theirs.items()}
    assert theirs == dict(spec.tensor_shapes())
    # what transformers 5 writes as config.json is read back, too
    saved = ModelSpec.from_config(json.loads((tmp_path / "config.json").read_text()), name=name)
    assert saved == spec


def test_yarn_scale_equals_transformers():
    spec = specs.get("kimi-k2").replace(num_layers=1)
    assert their_model(spec).model.layers[0].self_attn.scaling == pytest.approx(spec.softmax_scale(), rel=1e-12)
    linear = specs.get("tiny-linear")
    assert their_model(linear).model.layers[3].self_attn.scaling == pytest.approx(linear.softmax_scale(), rel=1e-12)


def test_layer_pattern_reaches_transformers():
    config = KimiLinearConfig.from_dict(specs.get("kimi-linear-48b").config())
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [3, 7, 11, 15, 19, 23, 26]
    assert config.mlp_layer_types == ["dense"] + ["sparse"] * 26
    assert (config.num_local_experts, config.num_experts_per_tok, config.linear_num_heads) == (256, 8, 32)


def test_routed_and_shared_experts_start_with_equal_variance():
    """tiny-k2's routed_scaling_factor: the routed sum has the variance of one expert, as the shared expert has."""
    spec = specs.get("tiny-k2")
    torch.manual_seed(0)
    moe = their_model(spec, "cpu").model.layers[1].mlp
    x = torch.randn(2048, spec.hidden_size)
    with torch.no_grad():
        _, weights, chosen = moe.gate(x)
        routed, shared = moe.experts(x, chosen, weights), moe.shared_experts(x)
    assert (routed.var() / shared.var()).item() == pytest.approx(1.0, abs=0.1)
