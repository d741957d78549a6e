"""config.json in and out, look-up, changes and refusals."""

import json
import subprocess
import sys

import pytest

from k2lab import specs
from k2lab.core.errors import RecipeError
from k2lab.specs import ModelSpec


@pytest.mark.parametrize("name", specs.names())
def test_config_round_trip(name):
    spec = specs.get(name)
    assert ModelSpec.from_config(json.loads(json.dumps(spec.config())), name=name) == spec


def test_legacy_keys():
    config = specs.get("kimi-k2").config()
    assert config["model_type"] == "kimi_k2"
    assert config["rope_scaling"]["type"] == "yarn" and config["rope_theta"] == 50000.0
    assert "rope_parameters" not in config
    assert (config["topk_method"], config["scoring_func"]) == ("noaux_tc", "sigmoid")
    linear = specs.get("kimi-linear-48b").config()["linear_attn_config"]
    assert linear["full_attn_layers"] == [4, 8, 12, 16, 20, 24, 27]
    assert sorted(linear["full_attn_layers"] + linear["kda_layers"]) == list(range(1, 28))


def test_deepseek_v3_and_text_tower():
    config = specs.get("kimi-k2").config() | {"model_type": "deepseek_v3", "n_group": 8, "topk_group": 4, "n_routed_experts": 256}
    spec = ModelSpec.from_config(config)
    assert spec.family == "kimi_k2" and (spec.n_group, spec.topk_group) == (8, 4)
    assert spec.config()["topk_group"] == 4
    tower = ModelSpec.from_config({"model_type": "kimi_k25", "vision_config": {}, "text_config": specs.get("kimi-k2").config()})
    assert tower.replace(name="kimi-k2") == specs.get("kimi-k2")
    assert tower.name == "kimi_k25"


def test_text_tower_takes_token_ids_from_the_outer_config_and_k3_is_found_in_either():
    text = specs.get("kimi-k2").config()
    outer = {"model_type": "kimi_k25", "text_config": text | {"eos_token_id": None}, "eos_token_id": 163586}
    assert ModelSpec.from_config(outer).eos_token_id == 163586
    k3 = {"attn_res_block_size": 12}
    linear = specs.get("kimi-linear-48b").config()
    for config in ({"text_config": linear | k3}, {"text_config": linear} | k3):
        with pytest.raises(RecipeError, match="Kimi K3"):
            ModelSpec.from_config(config)


def test_modern_rope_parameters():
    config = specs.get("kimi-k2").config()
    table = config.pop("rope_scaling")
    theta = config.pop("rope_theta")
    kind = table.pop("type")
    config["rope_parameters"] = {"rope_type": kind, "rope_theta": theta, **table}
    assert ModelSpec.from_config(config, name="kimi-k2") == specs.get("kimi-k2")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("key", "value"),
    [("attn_res_block_size", 12), ("routed_expert_hidden_size", 3584), ("gate_lower_bound", -5.0), ("mla_use_output_gate", True)],
)
def test_kimi_k3_is_refused_by_its_fields(key, value, nested):
    config = specs.get("kimi-linear-48b").config()
    target = config["linear_attn_config"] if nested else config
    target[key] = value
    with pytest.raises(RecipeError, match=f"Kimi K3.*{key}"):
        ModelSpec.from_config(config)


def test_k3_fields_that_are_off_are_no_k3():
    config = specs.get("kimi-linear-48b").config() | {"mla_use_output_gate": False, "gate_lower_bound": None}
    assert ModelSpec.from_config(config).family == "kimi_linear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func.*sigmoid"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"hidden_size": "7168"}, "hidden_size.*wrong type"),
        ({"hidden_size": None}, "hidden_size.*missing"),
        ({"attention_bias": True}, "attention_bias"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"kv_lora_rank": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_other_models_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        ModelSpec.from_config(specs.get("kimi-k2").config() | change)


def test_qwen3_and_unclear_layer_lists_are_refused():
    with pytest.raises(RecipeError, match="qwen3"):
        ModelSpec.from_config(specs.get("qwen2.5-7b").config() | {"model_type": "qwen3"})
    config = specs.get("kimi-linear-48b").config()
    config["linear_attn_config"]["kda_layers"].pop()
    with pytest.raises(RecipeError, match="each layer from 1 to 27"):
        ModelSpec.from_config(config)


def test_get_by_name_and_path(tmp_path):
    with pytest.raises(RecipeError, match="Did you mean 'kimi-k2'"):
        specs.get("kimi-k")
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(specs.get("tiny-linear").config()))
    assert specs.get(str(model)).replace(name="tiny-linear") == specs.get("tiny-linear")
    assert specs.get(str(model)).name == specs.get(str(model / "config.json")).name == "my-model"
    with pytest.raises(RecipeError, match="no model configuration"):
        specs.get(str(tmp_path / "none"))


def test_from_recipe():
    assert specs.from_recipe("tiny-k2") is specs.get("tiny-k2")
    spec = specs.from_recipe({"spec": "tiny-k2", "num_layers": 5, "rope_theta": 10000})
    assert spec.num_layers == 5 and spec.layer_types == ("mla",) * 5 and spec.rope_theta == 10000.0
    for bad, message in [({"num_layers": 5}, "model.spec"), ({"spec": "tiny-k3"}, "Did you mean"), (7, "wrong type")]:
        with pytest.raises(RecipeError, match=message):
            specs.from_recipe(bad)


def test_replace_derives_again_what_was_derived():
    linear = specs.get("kimi-linear-48b").replace(num_layers=9)
    assert linear.layer_types == ("kda", "kda", "kda", "mla", "kda", "kda", "kda", "mla", "mla")
    assert specs.get("kimi-k2").replace(num_attention_heads=128).num_kv_heads == 128
    assert specs.get("qwen2.5-7b").replace(hidden_size=7168).head_dim == 256
    assert specs.get("qwen2.5-7b").replace(num_attention_heads=56).num_kv_heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layer": 4}, "Did you mean 'num_layers'"),
        ({"num_layers": "4"}, "model.num_layers: wrong type"),
        ({"num_layers": True}, "model.num_layers: wrong type"),
        ({"num_layers": 0}, "model.num_layers.*at least 1"),
        ({"hidden_size": 2.5}, "model.hidden_size: wrong type"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok.*at most 8"),
        ({"n_routed_experts": 1}, "n_routed_experts.*at least 2"),
        ({"n_group": 3}, "n_group.*divisor"),
        ({"n_group": 4, "topk_group": 5}, "topk_group.*at most"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace.*at most"),
        ({"layer_types": ["mla", "mla", "mla"]}, "layer_types.*one entry per layer"),
        ({"layer_types": ["mla", "kda"]}, "layer_types"),
        ({"qk_rope_head_dim": 63}, "even"),
        ({"nope": True}, "model.nope"),
        ({"rope": {"type": "yarn"}}, "rope.factor"),
        ({"family": "kimi_k3"}, "model.family"),
        ({"pad_token_id": 2048}, "vocab_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rms_norm_eps": 0}, "rms_norm_eps.*above 0"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        specs.get("tiny-k2").replace(**change)


def test_specs_are_hashable_and_keep_their_own_rope_table():
    table = {"type": "yarn", "factor": 4.0}
    spec = specs.get("tiny-k2").replace(rope=table)
    table["factor"] = 8.0
    assert spec.rope["factor"] == 4.0
    assert len({spec, specs.get("tiny-k2")}) == 2


def test_import_is_light():
    code = (
        "import sys; import k2lab.specs as s, k2lab.plan.report; [s.get(n) for n in s.names()]; "
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors', 'tokenizers'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
