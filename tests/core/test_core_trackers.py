"""Trackers read events; they are asked for through the environment and change nothing."""

import sys
import types

import pytest

from k2lab.core import trackers
from k2lab.core.errors import MachineError

STEP = {
    "kind": "step",
    "stage": "pretrain",
    "step": 7,
    "losses": {"lm": 2.5},
    "lr": 1e-3,
    "grad_norm": 0.5,
    "max_logits": {"0": [3.0, 9.0], "1": [1.0, 2.0]},
    "clipped": {"0": [1]},
    "expert_load": {"gate": [0.5, 0.25, 0.25, 0.0]},
}
VALID = {"kind": "valid", "stage": "pretrain", "step": 7, "metrics": {"valid/lm": 2.25}}


class Writer:
    def __init__(self, folder):
        self.folder, self.rows, self.flushed = folder, [], 0

    def add_scalar(self, name, value, step):
        self.rows.append((name, value, step))

    def flush(self):
        self.flushed += 1


def test_nothing_listens_unless_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("K2_TENSORBOARD", raising=False)
    monkeypatch.delenv("K2_WANDB", raising=False)
    assert trackers.from_environment(tmp_path) == []


def test_tensorboard_gets_every_number_with_its_step(monkeypatch, tmp_path):
    made = []
    module = types.SimpleNamespace(SummaryWriter=lambda folder: made.append(Writer(folder)) or made[-1])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setenv("K2_TENSORBOARD", "1")
    monkeypatch.delenv("K2_WANDB", raising=False)
    (listen,) = trackers.from_environment(tmp_path)
    for event in (STEP, VALID, {"kind": "stage_end", "stage": "pretrain", "step": 0}):
        listen(event)
    assert made[0].folder == str(tmp_path / "tensorboard") and made[0].flushed == 1
    assert {name: value for name, value, _ in made[0].rows} == {
        "pretrain/loss/lm": 2.5,
        "pretrain/lr": 1e-3,
        "pretrain/grad_norm": 0.5,
        "pretrain/max_logit": 9.0,
        "pretrain/clipped_heads": 1.0,
        "pretrain/expert_load_max/gate": 2.0,
        "pretrain/valid/lm": 2.25,
    }
    assert {step for _, _, step in made[0].rows} == {7}


def test_files_of_the_real_writer_can_be_read_back(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    listen = trackers.tensorboard(tmp_path)
    listen(STEP)
    listen({"kind": "stage_end", "stage": "pretrain", "step": 0})
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in read.Scalars("pretrain/loss/lm")] == [(7, 2.5)]


def test_missing_library_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MachineError, match="tensorboard is not installed"):
        trackers.tensorboard(tmp_path)
