"""The flat loops run as a reader would run them, and see the same model as the package does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from k2lab import specs
from k2lab.models import build
from k2lab.text import tokenizer as tokenizers

pytestmark = pytest.mark.slow
LOOPS = Path(__file__).parents[2] / "loops"


def loop(name, *arguments):
    done = subprocess.run([sys.executable, str(LOOPS / name), *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A small K2 model with a tokenizer, saved with the released tensor names."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tokenizers.train_bpe(["say what it does; the words of a text come one by one"] * 4, vocab_size=320)
    tokenizer.save(folder)
    spec = specs.from_recipe({"spec": "tiny-k2", "vocab_size": 320, "hidden_size": 128, "intermediate_size": 128})
    build.save(build.from_spec(spec, seed=5), folder)
    return folder


def test_sft_loop_loads_every_tensor_and_lowers_the_loss(model_folder, tmp_path):
    rows = [{"instruction": f"say {n}", "output": "the words"} for n in range(40)]
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    done = loop("sft_loop.py", str(model_folder), "--data", str(data), "--steps", "6", "--batch", "4", "--micro", "2")
    assert "MISSING" not in done.stdout + done.stderr
    before, after = (float(re.search(rf"{word}:\s+([\d.]+) nats", done.stdout).group(1)) for word in ("before", "after"))
    assert after < before


def test_sft_loop_refuses_a_model_with_missing_tensors(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = {name: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items() if "experts.3" not in name}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        [sys.executable, str(LOOPS / "sft_loop.py"), str(tmp_path), "--steps", "1"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
