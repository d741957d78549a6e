"""The parameter -> optimizer table of tiny Kimi K2 and tiny Kimi Linear, built from transformers' own classes, and its hash."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from k2lab.core.types import RowLayout
from k2lab.optim import _table
from k2lab.optim.adamw import AdamW
from k2lab.optim.muonclip import MuonClip

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

K2_TABLE = """\
parameter                                               shape    optimizer  lr scale  decay  note
model.embed_tokens.weight                               64x32    adamw      1         0.1    embedding
model.layers.{0-1}.self_attn.q_a_proj.weight            20x32    muon       1.131     0.1
model.layers.{0-1}.self_attn.q_a_layernorm.weight       20       adamw      1         0      norm
model.layers.{0-1}.self_attn.q_b_proj.weight            24x20    muon       0.9798    0.1
model.layers.{0-1}.self_attn.kv_a_proj_with_mqa.weight  16x32    muon       1.131     0.1
model.layers.{0-1}.self_attn.kv_a_layernorm.weight      12       adamw      1         0      norm
model.layers.{0-1}.self_attn.kv_b_proj.weight           32x12    muon       1.131     0.1
model.layers.{0-1}.self_attn.o_proj.weight              32x16    muon       1.131     0.1
model.layers.0.mlp.gate_proj.weight                     48x32    muon       1.386     0.1
model.layers.0.mlp.up_proj.weight                       48x32    muon       1.386     0.1
model.layers.0.mlp.down_proj.weight                     32x48    muon       1.386     0.1
model.layers.{0-1}.input_layernorm.weight               32       adamw      1         0      norm
model.layers.{0-1}.post_attention_layernorm.weight      32       adamw      1         0      norm
model.layers.1.mlp.experts.gate_up_proj                 4x32x32  muon       1.131     0.1    4 experts, gate and up apart
model.layers.1.mlp.experts.down_proj                    4x32x16  muon       1.131     0.1    4 experts
model.layers.1.mlp.gate.weight                          4x32     muon       1.131     0.1
model.layers.1.mlp.shared_experts.gate_proj.weight      16x32    muon       1.131     0.1
model.layers.1.mlp.shared_experts.up_proj.weight        16x32    muon       1.131     0.1
model.layers.1.mlp.shared_experts.down_proj.weight      32x16    muon       1.131     0.1
model.norm.weight                                       32       adamw      1         0      norm
lm_head.weight                                          64x32    adamw      1         0.1    output head
muon: 19 tensors, 17,472 parameters
adamw: 11 tensors, 4,320 parameters"""

LINEAR_TABLE = """\
parameter                                                 shape    optimizer  lr scale  decay  note
model.embed_tokens.weight                                 64x32    adamw      1         0.1    embedding
model.layers.{0-1}.self_attn.q_proj.weight                32x32    muon       1.131     0.1
model.layers.{0-1}.self_attn.k_proj.weight                32x32    muon       1.131     0.1
model.layers.{0-1}.self_attn.v_proj.weight                32x32    muon       1.131     0.1
model.layers.{0-1}.self_attn.conv1d.weight                96x1x4   adamw      1         0.1    convolution kernel
model.layers.{0-1}.self_attn.forget_gate.dt_bias          32       adamw      1         0      KDA decay gate
model.layers.{0-1}.self_attn.forget_gate.A_log            1x1x4x1  adamw      1         0      KDA decay gate
model.layers.{0-1}.self_attn.forget_gate.f_a_proj.weight  8x32     muon       1.131     0.1
model.layers.{0-1}.self_attn.forget_gate.f_b_proj.weight  32x8     muon       1.131     0.1
model.layers.{0-1}.self_attn.b_proj.weight                4x32     muon       1.131     0.1
model.layers.{0-1}.self_attn.g_a_proj.weight              8x32     muon       1.131     0.1
model.layers.{0-1}.self_attn.g_b_proj.weight              32x8     muon       1.131     0.1
model.layers.{0-1}.self_attn.o_norm.weight                8        adamw      1         0      norm
model.layers.{0-1}.self_attn.o_proj.weight                32x32    muon       1.131     0.1
model.layers.0.mlp.gate_proj.weight                       48x32    muon       1.386     0.1
model.layers.0.mlp.up_proj.weight                         48x32    muon       1.386     0.1
model.layers.0.mlp.down_proj.weight                       32x48    muon       1.386     0.1
model.layers.{0-2}.input_layernorm.weight                 32       adamw      1         0      norm
model.layers.{0-2}.post_attention_layernorm.weight        32       adamw      1         0      norm
model.layers.{1-2}.mlp.experts.gate_up_proj               4x32x32  muon       1.131     0.1    4 experts, gate and up apart
model.layers.{1-2}.mlp.experts.down_proj                  4x32x16  muon       1.131     0.1    4 experts
model.layers.{1-2}.mlp.gate.weight                        4x32     muon       1.131     0.1
model.layers.{1-2}.mlp.shared_experts.gate_proj.weight    16x32    muon       1.131     0.1
model.layers.{1-2}.mlp.shared_experts.up_proj.weight      16x32    muon       1.131     0.1
model.layers.{1-2}.mlp.shared_experts.down_proj.weight    32x16    muon       1.131     0.1
model.layers.2.self_attn.q_proj.weight                    24x32    muon       1.131     0.1
model.layers.2.self_attn.kv_a_proj_with_mqa.weight        16x32    muon       1.131     0.1
model.layers.2.self_attn.kv_a_layernorm.weight            12       adamw      1         0      norm
model.layers.2.self_attn.kv_b_proj.weight                 32x12    muon       1.131     0.1
model.layers.2.self_attn.o_proj.weight                    32x16    muon       1.131     0.1
model.norm.weight                                         32       adamw      1         0      norm
lm_head.weight                                            64x32    adamw      1         0.1    output head
muon: 37 tensors, 32,896 parameters
adamw: 18 tensors, 5,188 parameters"""


def tiny_k2() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **SIZES, num_hidden_layers=2, q_lora_rank=20, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1
    )
    return DeepseekV3ForCausalLM(config)


def tiny_linear() -> nn.Module:
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    config = KimiLinearConfig(
        **SIZES,
        num_hidden_layers=3,
        num_local_experts=4,
        linear_head_dim=8,
        linear_num_heads=4,
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    )
    return KimiLinearForCausalLM(config)


def table(model: nn.Module, **changes) -> list[_table.TableRow]:
    return MuonClip(lr=1e-3, ns_dtype="fp32", **changes).build(model.named_parameters(), []).table()


def test_tiny_k2_table_is_exactly_this():
    assert _table.table_text(table(tiny_k2())) == K2_TABLE


def test_tiny_kimi_linear_table_is_exactly_this():
    assert _table.table_text(table(tiny_linear())) == LINEAR_TABLE


@pytest.mark.parametrize("make", [tiny_k2, tiny_linear])
def test_every_parameter_has_one_row_and_buffers_have_none(make):
    model = make()
    rows = table(model)
    assert [row.name for row in rows] == [name for name, _ in model.named_parameters()]
    assert [row.shape for row in rows] == [tuple(param.shape) for _, param in model.named_parameters()]
    assert any("e_score_correction_bias" in name for name, _ in model.named_buffers())
    assert not any("e_score_correction_bias" in row.name for row in rows)


@pytest.mark.parametrize("make", [tiny_k2, tiny_linear])
def test_adamw_alone_owns_everything(make):
    model = make()
    rows = AdamW(lr=1e-3).build(model.named_parameters(), []).table()
    assert {row.optimizer for row in rows} == {"adamw"} and {row.lr_scale for row in rows} == {1.0}
    assert {row.name: row.weight_decay for row in rows} == {row.name: row.weight_decay for row in table(model)}


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("model.layers.1.mlp.gate.weight", (8, 64), ("muon", 1, True)),
        ("model.layers.1.mlp.experts.gate_up_proj", (8, 64, 64), ("muon", 2, True)),
        ("model.layers.1.mlp.experts.w13", (8, 64, 64), ("muon", 2, True)),
        ("model.layers.1.mlp.shared_experts.gate_up_proj.weight", (64, 64), ("muon", 2, True)),
        ("model.layers.1.mlp.experts.down_proj", (8, 64, 32), ("muon", 1, True)),
        ("model.layers.1.mlp.experts.3.up_proj.weight", (32, 64), ("muon", 1, True)),
        ("model.layers.0.self_attn.conv1d.weight", (192, 1, 4), ("adamw", 1, True)),
        ("model.layers.0.self_attn.q_conv1d.weight", (64, 4), ("adamw", 1, True)),
        ("model.layers.0.self_attn.forget_gate.A_log", (1, 1, 4, 1), ("adamw", 1, False)),
        ("model.layers.0.self_attn.A_log", (4, 2), ("adamw", 1, False)),
        ("model.layers.0.self_attn.dt_bias", (64,), ("adamw", 1, False)),
        ("model.layers.0.self_attn.dt_bias", (4, 16), ("adamw", 1, False)),
        ("model.layers.0.self_attn.o_proj.bias", (64,), ("adamw", 1, False)),
        ("model.layers.0.self_attn.q_norm.weight", (4, 16), ("adamw", 1, False)),
        ("language_model.model.embed_tokens.weight", (64, 32), ("adamw", 1, True)),
        ("language_model.lm_head.weight", (64, 32), ("adamw", 1, True)),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 64), ("adamw", 1, True)),
        ("model.layers.0.mlp.experts.router_scale", (8, 4, 4), ("adamw", 1, True)),
        ("model.layers.0.mixer.kernel", (8, 4, 4), ("adamw", 1, True)),
        ("vision_tower.patch_embed.proj.weight", (16, 3, 14, 14), ("adamw", 1, True)),
    ],
)
def test_rules_by_name_and_shape(name, shape, expected):
    assert _table.route(name, shape, {})[:3] == expected


def test_unknown_three_dim_tensors_say_so():
    for name in ("model.layers.0.mixer.kernel", "model.layers.0.mlp.experts.router_scale"):
        assert "unknown tensor of 3 dims" in _table.route(name, (8, 4, 4), {})[3]


def test_per_head_cuts_exactly_the_layouts_projections():
    model = tiny_linear()
    prefix = "model.layers.2.self_attn."
    layouts = [RowLayout(2, prefix + "q_proj.weight", prefix + "kv_b_proj.weight", 2, 8, 4, 8)]
    optim = MuonClip(lr=1e-3, per_head=True, ns_dtype="fp32").build(model.named_parameters(), layouts)
    split = {row.name: (row.split, row.note) for row in optim.table() if row.split == 2 and "experts" not in row.name}
    # KDA layers have a q_proj too; it is no MLA projection and stays whole.
    assert split == {prefix + "q_proj.weight": (2, "2 heads"), prefix + "kv_b_proj.weight": (2, "2 heads")}
    scale = {row.name: row.lr_scale for row in optim.table()}
    assert scale[prefix + "q_proj.weight"] == 0.2 * 32**0.5 and scale[prefix + "kv_b_proj.weight"] == 0.2 * 16**0.5


def test_frozen_parameters_are_listed_and_not_trained():
    model = tiny_k2()
    model.lm_head.weight.requires_grad_(False)
    rows = {row.name: row for row in table(model)}
    assert rows["lm_head.weight"].optimizer == "frozen" and rows["lm_head.weight"].weight_decay == 0.0


def test_hash_changes_with_everything_that_decides_an_update_and_not_with_notes():
    row = _table.TableRow("a.weight", (4, 8), "muon", 0.5, 0.1, "note", 1)
    base = _table.table_hash([row])
    changed = [
        _table.TableRow("b.weight", (4, 8), "muon", 0.5, 0.1, "note", 1),
        _table.TableRow("a.weight", (8, 4), "muon", 0.5, 0.1, "note", 1),
        _table.TableRow("a.weight", (4, 8), "adamw", 0.5, 0.1, "note", 1),
        _table.TableRow("a.weight", (4, 8), "muon", 0.4, 0.1, "note", 1),
        _table.TableRow("a.weight", (4, 8), "muon", 0.5, 0.0, "note", 1),
        _table.TableRow("a.weight", (4, 8), "muon", 0.5, 0.1, "note", 2),
    ]
    assert len({base, *(_table.table_hash([other]) for other in changed)}) == 7
    assert _table.table_hash([_table.TableRow("a.weight", (4, 8), "muon", 0.5, 0.1, "other", 1)]) == base
    assert _table.table_hash([row, changed[0]]) != _table.table_hash([changed[0], row])


def test_refactored_names_cannot_slide_to_adamw_unseen():
    """Fusing dense w1 and w3 into one tensor must keep them on Muon, cut in two, and change the hash."""
    before = {"mlp.gate_proj.weight": (48, 32), "mlp.up_proj.weight": (48, 32)}
    after = {"mlp.gate_up_proj.weight": (96, 32)}
    rows = [
        MuonClip(lr=1.0, ns_dtype="fp32").build([(n, nn.Parameter(torch.zeros(s))) for n, s in x.items()], [])
        for x in (before, after)
    ]
    assert {row.optimizer for optim in rows for row in optim.table()} == {"muon"}
    assert {row.lr_scale for optim in rows for row in optim.table()} == {0.2 * 48**0.5}
    assert rows[0].table_hash() != rows[1].table_hash()


def test_impossible_tables_are_refused():
    twice = [("a.weight", nn.Parameter(torch.zeros(2, 2)))] * 2
    with pytest.raises(ValueError, match="twice"):
        MuonClip(lr=1.0).build(twice, [])
    with pytest.raises(ValueError, match="cannot be cut"):
        MuonClip(lr=1.0).build([("experts.gate_up_proj", nn.Parameter(torch.zeros(2, 3, 4)))], [])
    with pytest.raises(ValueError, match="no parameter can be trained"):
        MuonClip(lr=1.0).build([("a.weight", nn.Parameter(torch.zeros(2, 2), requires_grad=False))], [])
    with pytest.raises(ValueError, match="not contiguous"):
        MuonClip(lr=1.0).build([("a.weight", nn.Parameter(torch.zeros(2, 3).T))], [])


def test_folding_layers_keeps_gaps_visible():
    rows = [_table.TableRow(f"model.layers.{n}.a.weight", (2, 2), "muon", 1.0, 0.1) for n in (0, 1, 2, 5, 7, 8)]
    assert "model.layers.{0-2,5,7-8}.a.weight" in _table.table_text(rows)


def test_low_rank_factors_are_adamws_and_a_frozen_base_is_not_clipped():
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (24, 32),
        "model.layers.0.self_attn.q_proj.lora_A": (4, 32),
        "model.layers.0.self_attn.q_proj.lora_B": (24, 4),
        "model.layers.0.self_attn.kv_b_proj.weight": (32, 12),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 32, 32),
        "model.layers.0.mlp.experts.gate_lora_A": (4, 4, 32),
        "model.layers.0.mlp.experts.down_lora_B": (4, 32, 4),
    }
    params = [(name, nn.Parameter(torch.ones(shape), requires_grad="lora" in name)) for name, shape in shapes.items()]
    layout = RowLayout(0, "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.kv_b_proj.weight", 2, 8, 4, 8)
    for slot in (MuonClip(lr=1e-3, ns_dtype="fp32", tau=1.0), AdamW(lr=1e-3)):
        optim = slot.build(params, [layout])
        rows = {row.name: row for row in optim.table()}
        assert {row.optimizer for name, row in rows.items() if "lora" in name} == {"adamw"}
        assert {row.note for name, row in rows.items() if "lora" in name} == {"LoRA factor"}
        assert {row.optimizer for name, row in rows.items() if "lora" not in name} == {"frozen"}
        for _, param in params:
            param.grad = torch.ones_like(param) if param.requires_grad else None
        info = optim.step(0, 10, {0: torch.tensor([50.0, 50.0])})
        assert info.clipped == {}
        assert all(bool((param == 1).all()) == ("lora" not in name) for name, param in params)
        for _, param in params:
            param.data.fill_(1.0)
