"""The optimizer slots: found by name, read from recipe tables, written back in full, and free of torch until built."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from k2lab.core.errors import RecipeError
from k2lab.core.schema import build_slot, to_table
from k2lab.core.slots import first_line, load, names
from k2lab.optim.adamw import AdamW
from k2lab.optim.muonclip import MuonClip


def test_the_room_holds_two_slots():
    assert names("optimizer") == ("adamw", "muonclip")


@pytest.mark.parametrize("kind", ["optimizer", "schedule"])
def test_every_slot_has_help(kind):
    for name in names(kind):
        assert len(first_line(load(kind, name))) > 20


@pytest.mark.parametrize("name", names("optimizer"))
def test_examples_build_and_step(name):
    for config in load("optimizer", name).examples():
        param = nn.Parameter(torch.ones(4, 8))
        optim = config.build([("a.weight", param)], [])
        param.grad = torch.ones(4, 8)
        optim.clip(config.max_grad_norm)
        assert optim.step(0, 2).lr > 0
        assert not torch.equal(param, torch.ones(4, 8))


@pytest.mark.parametrize("name", names("optimizer"))
def test_resolved_table_reads_back_to_the_same_config(name):
    for config in load("optimizer", name).examples():
        for schedule in names("schedule"):
            table = {**to_table(config), "schedule": {"type": schedule}}
            again = build_slot("optimizer", table, "optim")
            assert again == build_slot("optimizer", to_table(again), "optim")
            assert to_table(again)["schedule"]["type"] == schedule


def test_a_recipe_needs_only_the_learning_rate():
    table = to_table(build_slot("optimizer", {"type": "muonclip", "lr": 1e-3}, "optim"))
    assert table["tau"] == 100.0 and table["weight_decay"] == 0.1 and table["schedule"]["type"] == "wsd"
    off = build_slot("optimizer", {"type": "muonclip", "lr": 1e-3, "tau": "none", "max_grad_norm": "none"}, "optim")
    assert off.tau is None and off.max_grad_norm is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"weight_decay": -0.1},
        {"betas": (0.9,)},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"schedule": None},
        {"max_grad_norm": 0.0},
        {"momentum": 1.0},
        {"ns_steps": 0},
        {"tau": -1.0},
        {"tau": float("nan")},
        {"alpha": 1.5},
        {"adamw_lr": -1.0},
    ],
)
def test_impossible_settings_are_recipe_errors(wrong):
    with pytest.raises(RecipeError):
        MuonClip(**{"lr": 1e-3, **wrong})
    if set(wrong) <= {"lr", "weight_decay", "betas", "eps", "schedule", "max_grad_norm"}:
        with pytest.raises(RecipeError):
            AdamW(**{"lr": 1e-3, **wrong})


def test_recipes_are_checked_without_torch():
    code = (
        "import sys; from k2lab.core.schema import build_slot, to_table; from k2lab.core.slots import load, names\n"
        "for kind in ('optimizer', 'schedule'):\n"
        "    for name in names(kind): [to_table(x) for x in load(kind, name).examples()]\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
