"""LoRA beside `small_run`'s recipe: SFT on an INT4 base whose experts stay packed, and what may follow it."""

from __future__ import annotations

import json
from pathlib import Path

from small_life import REWARD
from small_run import INSTRUCTIONS, WORDS, write

LORA = '{ rank = 4, alpha = 8.0, experts = "packed", merge = false }'
SFT = (
    """
model = "tiny-k2"
seed = 3
"""
    + INSTRUCTIONS
    + """
[[stage]]
type = "sft"
start = "{base}"
data = "instructions"
steps = 12
seq_len = 192
global_batch = 4
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-2, weight_decay = 0.0 }}
valid_every = 6
valid_tokens = 512
checkpoint_every = 3
lora = {lora}
"""
)

# SFT again on the adapter, full SFT on both, evaluation.
AGAIN = """
[[stage]]
name = "again"
type = "sft"
start = "sft"
data = "instructions"
steps = 2
seq_len = 192
global_batch = 4
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-3 }}
valid_every = 0
lora = {lora}

[[stage]]
name = "full"
type = "sft"
start = "again"
data = "instructions"
steps = 1
seq_len = 192
global_batch = 4
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-9 }}
valid_every = 0
router_bias_rate = 0.0

[[stage]]
type = "evaluate"
models = ["sft", "again", "full"]
instructions = "instructions"
prompts = ["Say model 3"]
max_tokens = 6
seq_len = 192
"""

# One adapter through every other kind of training.
LIFE = """
[[stage]]
name = "pairs"
type = "corpus"
sources = [{{ type = "jsonl", path = "{folder}/pairs.jsonl", kind = "preference" }}]
valid_share = 0.25

[[stage]]
name = "tasks"
type = "corpus"
sources = [{{ type = "jsonl", path = "{folder}/tasks.jsonl", kind = "task" }}]
valid_share = 0.25

[[stage]]
type = "dpo"
start = "sft"
data = "pairs"
steps = 4
seq_len = 256
global_batch = 4
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-2 }}
valid_every = 4
valid_tokens = 512
lora = {lora}

[[stage]]
type = "rl"
start = "dpo"
tasks = "tasks"
pass_samples = 0
steps = 2
group_size = 4
tasks_per_step = 4
max_tokens = 8
seq_len = 192
optim = {{ type = "adamw", lr = 1e-2 }}
lora = {lora}

[[stage]]
type = "distill"
start = "rl"
data = "instructions"
kl_weight = 0.0
steps = 2
seq_len = 192
global_batch = 4
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-3 }}
valid_every = 0
lora = {merged}
"""


def recipe(folder: Path, base: Path, table: str = LORA, more: str = "") -> Path:
    """Writes the recipe of SFT with the table `lora` (and `more` stages) into `folder`; its path."""
    path = folder / "lora.toml"
    path.write_text(SFT.format(folder=folder, base=base, lora=table) + more)
    return path


def write_lora_life(folder: Path, base: Path) -> Path:
    """Writes the data of all kinds and the recipe of one adapter through them; the recipe's path."""
    write(folder)
    (folder / "even.py").write_text(REWARD)
    with (folder / "pairs.jsonl").open("w") as pairs, (folder / "tasks.jsonl").open("w") as tasks:
        for i in range(40):
            word = WORDS[i % len(WORDS)]
            print(json.dumps({"prompt": f"Say {word} {i}", "chosen": f"{word} {i}", "rejected": f"no {i}"}), file=pairs)
            row = {"prompt": f"Say {word} {i}", "answer": word, "rewards": [f"{folder}/even.py"], "domain": "say"}
            print(json.dumps(row), file=tasks)
    merged = LORA.replace("false", "true").replace("packed", "dense")
    return recipe(folder, base, more=LIFE.format(folder=folder, lora=LORA, merged=merged))
