"""The later stages behind `small_run`'s recipe: reasoning SFT, preference pairs, DPO, teacher data, distillation."""

from __future__ import annotations

import json
from pathlib import Path

from small_run import WORDS, write

# Right or wrong by chance: what a model of seconds writes is judged by the parity of its length.
REWARD = '''"""Reward of a test."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Even:
    """1 if the response has an even number of characters."""

    def score(self, task, response):
        return float(len(response) % 2 == 0)

    @staticmethod
    def examples():
        return [Even()]
'''

LIFE = """
[[stage]]
name = "reasoning"
type = "corpus"
sources = [{{ type = "jsonl", path = "{folder}/reasoning.jsonl", kind = "reasoning" }}]
valid_share = 0.2

[[stage]]
type = "reasoning_sft"
start = "sft"
data = ["reasoning"]
replay = ["instructions", "corpus"]
replay_share = 0.25
steps = 24
seq_len = 192
global_batch = 8
per_device_batch = 4
optim = {{ type = "adamw", lr = 3e-3 }}
valid_every = 12
valid_tokens = 512
checkpoint_every = 4

[[stage]]
name = "pairs"
type = "preference_data"
model = "reasoning_sft"
tasks = "reasoning"
k = 6
batch = 48
max_tokens = 24
valid_share = 0.25

[[stage]]
type = "dpo"
start = "reasoning_sft"
reference = "sft"
data = "pairs"
steps = 6
seq_len = 192
global_batch = 4
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-3 }}
valid_every = 3
valid_tokens = 1024
checkpoint_every = 2

[[stage]]
type = "teacher_data"
teacher = "reasoning_sft"
prompts = ["reasoning"]
k = 2
batch = 32
max_tokens = 24
top_k = 4
valid_share = 0.25

[[stage]]
type = "distill"
student = {{ spec = "tiny-qwen2", vocab_size = 320, hidden_size = 64, intermediate_size = 64 }}
data = "teacher_data"
replay = ["instructions"]
steps = 6
seq_len = 192
global_batch = 4
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-3 }}
valid_every = 3
valid_tokens = 512
checkpoint_every = 2
"""


def write_life(folder: Path, spec: str = "tiny-k2") -> Path:
    """Writes data and recipe of the whole chain into `folder`; the recipe's path."""
    recipe = write(folder, spec)
    (folder / "even.py").write_text(REWARD, encoding="utf-8")
    with (folder / "reasoning.jsonl").open("w", encoding="utf-8") as file:
        for i in range(60):
            word = WORDS[i % len(WORDS)]
            row = {
                "prompt": f"Say {word} {i}",
                "reasoning": word,
                "final": f"{word}",
                "answer": f"{word}",
                "rewards": [f"{folder}/even.py"],
                "domain": "say" if i % 3 else "tell",
            }
            print(json.dumps(row), file=file)
    recipe.write_text(recipe.read_text() + LIFE.format(folder=folder), encoding="utf-8")
    return recipe
