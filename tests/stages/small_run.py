"""A recipe of seconds on data that the test writes; used by kill, resume and bad-input tests."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from k2lab.core.events import read

SENTENCE = "the model reads text and learns which token comes next while experts share the work of each layer in turn"
WORDS = SENTENCE.split(" ")

INSTRUCTIONS = """
[[stage]]
name = "instructions"
type = "corpus"
sources = [{{ type = "jsonl", path = "{folder}/chats.jsonl", kind = "instruction" }}]
valid_share = 0.2
"""

RECIPE = (
    """
model = {{ spec = "{spec}", vocab_size = 320, hidden_size = 128, intermediate_size = 128 }}
seed = 3
description = "a run of seconds for tests"
"""
    + INSTRUCTIONS
    + """
[[stage]]
type = "corpus"
sources = [{{ type = "jsonl", path = "{folder}/texts.jsonl" }}]
filters = [{{ type = "length", min_chars = 10 }}, {{ type = "exact_dedup" }}]
valid_share = 0.2

[[stage]]
type = "tokenizer"
corpus = "corpus"
vocab_size = 320

[[stage]]
type = "tokenize"

[[stage]]
type = "pretrain"
data = "tokenize"
steps = 12
seq_len = 64
global_batch = 4
per_device_batch = 2
optim = {{ type = "muonclip", lr = 2e-3, ns_dtype = "fp32", tau = 0.2 }}
valid_every = 4
valid_tokens = 512
checkpoint_every = 3
early_stop = {{ patience = 50 }}

[[stage]]
type = "sft"
steps = 8
seq_len = 192
global_batch = 4
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-3 }}
valid_every = 4
valid_tokens = 512
checkpoint_every = 2
"""
)

EVALUATE = """
[[stage]]
type = "evaluate"
models = ["pretrain", "sft"]
tokens = "tokenize"
instructions = "instructions"
tasks = [{ type = "general_exact", limit = 6, max_tokens = 6 }]
prompts = ["Say model 3"]
max_tokens = 6
seq_len = 192
"""


def write(folder: Path, spec: str = "tiny-k2") -> Path:
    """Writes data and recipe into `folder`; the recipe's path."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        for i in range(160):
            words = [WORDS[(i * 7 + 3 * k * k + k) % len(WORDS)] for k in range(20 + i % 30)]
            print(json.dumps({"text": " ".join(words) + f" {i}.", "source": "made"}), file=file)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for i in range(80):
            word = WORDS[i % len(WORDS)]
            row = {"instruction": f"Say {word} {i}", "output": f"{word} {i}", "source": "general_instructions"}
            print(json.dumps(row), file=file)
    path = folder / "small.toml"
    path.write_text(RECIPE.format(folder=folder, spec=spec), encoding="utf-8")
    return path


def k2(
    *arguments: str, cwd: Path | None = None, check: bool = True, input: str | None = None, **env: str
) -> subprocess.CompletedProcess:
    """Runs the command line in its own process with one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "k2lab", *arguments],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        input=input,
        text=True,
        timeout=300,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def environment(**more: str) -> dict[str, str]:
    """The test's environment with one thread per process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random", **more}


def stage_of(run_dir: Path, name: str) -> Path:
    """The directory of a stage that is done."""
    return next(path for path in (run_dir / "stages").glob(f"{name}-*") if not path.name.endswith(".partial"))


def losses(run_dir: Path, stage: str) -> list[float]:
    """Cross-entropy of each step of a stage."""
    steps = (event for event in read(run_dir / "events") if event["kind"] == "step" and event["stage"] == stage)
    return [event["losses"]["lm"] for event in steps]


def weights_of(run_dir: Path) -> dict[str, str]:
    """{stage directory/file: sha256} of everything that a run computed (manifests hold times and are left out)."""
    found = {}
    for path in sorted((run_dir / "stages").rglob("*")):
        if path.is_file() and path.name != "manifest.json" and ".partial" not in str(path):
            found[path.relative_to(run_dir).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
