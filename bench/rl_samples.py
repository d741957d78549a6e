"""RL samples per second: our RL stage's loop against TRL's GRPOTrainer, on the same model, tasks and sizes, in one process.

Both sample groups of responses with the model in training, judge them with the same verifier and make one AdamW update per
batch, with GRPO's loss, in fp32 on the CPU. TRL generates with transformers' `generate`, as it does without a server. Turns
alternate, so that a machine that is slower for a while is so for both; the first step of every turn warms up and is left out.
On a machine that does other work too, set GOMP_SPINCOUNT=1000 as `k2` does.

    python bench/rl_samples.py                             # tiny-k2 with random weights: every response is max_tokens long
    python bench/rl_samples.py --model runs/tiny/stages/reasoning_sft-*/ --max-tokens 64

Without TRL it times ours alone, and says how to get TRL.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from k2lab import __version__, specs
from k2lab.ckpt.folder import open_folder
from k2lab.core.events import EventWriter
from k2lab.core.slots import load
from k2lab.core.types import Message
from k2lab.engine.loop import train
from k2lab.engine.run import TrainRun
from k2lab.gym.task import Task
from k2lab.models import build
from k2lab.rl.feed import RolloutFeed, Settings
from k2lab.rl.shaping import Budget
from k2lab.text import tokenizer as tokenizers
from k2lab.text.template import chat_template

VERIFIER = "numeric"  # the last number of a response is the answer
INSTALL = """TRL is not installed here. In an environment of its own beside this one:
    python -m venv trl && trl/bin/pip install trl==1.16.0 torch transformers k2lab
    trl/bin/python bench/rl_samples.py"""


def new_model(folder: Path) -> None:
    """tiny-k2 with random weights and a tokenizer of its whole vocabulary."""
    spec = specs.get("tiny-k2")
    records = load("source", "python_docstrings")().records()
    texts = [record["text"] for _, record in zip(range(3000), records)]
    tokenizers.train_bpe(texts, vocab_size=spec.vocab_size).save(folder)
    build.save(build.from_spec(spec, seed=0), folder)


def questions(count: int) -> list[tuple[str, str]]:
    pairs = [(a, b) for a in range(11, 99) for b in range(11, 99)][:: max(1, 88 * 88 // count)][:count]
    return [(f"State the final answer to the following arithmetic problem: {a} + {b} =", str(a + b)) for a, b in pairs]


class Turn:
    """Seconds per step and mean response length of one turn, without its first step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.length = 0.0

    def rate(self, samples: int) -> float:
        return samples * len(self.seconds[1:]) / sum(self.seconds[1:])


# ---------------------------------------------------------------- ours


def ours(folder: Path, args: argparse.Namespace, asked: list[tuple[str, str]]) -> Turn:
    """The stage's feed, objective, optimizer and loop."""
    tokenizer, model = tokenizers.load(folder), build.load(open_folder(folder))
    tasks = [
        Task(key=str(n), messages=(Message.text("user", q),), answer=a, rewards=(VERIFIER,), max_tokens=args.max_tokens)
        for n, (q, a) in enumerate(asked)
    ]
    settings = Settings(
        name="bench",
        seed=0,
        total_steps=args.steps + 1,
        group_size=args.group,
        tasks_per_step=args.tasks,
        seq_len=512,
        tokens_per_batch=4096,
        budget=Budget(penalty=0.0),
        sample_batch=args.tasks * args.group,
    )
    feed = RolloutFeed(tasks, tokenizer, settings)
    feed.attach(model)
    optim = load("optimizer", "adamw")(lr=args.lr).build(model.named_parameters(), model.row_layouts())
    turn, lengths = Turn(), []

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            turn.seconds.append(event["seconds"])
            lengths.append(event["rollout"]["length"])

    with tempfile.TemporaryDirectory() as work:
        events = EventWriter(Path(work), enabled=False)
        events.listeners.append(listen)
        run = TrainRun(
            work=Path(work),
            events=events,
            total_steps=args.steps + 1,
            microbatches=0,
            checkpoint_every=10**9,
            facts=feed.facts,
        )
        run.after_step = []
        train(model, optim, feed, load("objective", "grpo")(ptx_weight=0.0), run)
    turn.length = sum(lengths) / len(lengths)
    return turn


# ---------------------------------------------------------------- TRL


def theirs(folder: Path, args: argparse.Namespace, asked: list[tuple[str, str]]) -> Turn:
    """GRPOTrainer as its documentation sets it up, without evaluation, saving and reference model."""
    from datasets import Dataset
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        PreTrainedTokenizerFast,
        PrinterCallback,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer

    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]  # transformers stacks the experts by its own name of the architecture
    model = DeepseekV3ForCausalLM.from_pretrained(folder, config=DeepseekV3Config.from_dict(config), dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = chat_template(default_system=False)
    tokenizer.eos_token = "<|im_end|>"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    rows = [{"prompt": [{"role": "user", "content": q}], "answer": a} for q, a in asked]
    turn, lengths = Turn(), []

    judge = load("reward", VERIFIER)()

    def reward(prompts: list, completions: list, completion_ids: list, answer: list[str], **_: Any) -> list[float]:
        lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
        return [judge.score({"answer": a}, each[0]["content"]) for each, a in zip(completions, answer)]

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.mark = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.perf_counter()
            turn.seconds.append(now - self.mark)
            self.mark = now

    with tempfile.TemporaryDirectory() as work:
        settings = GRPOConfig(
            output_dir=work,
            per_device_train_batch_size=args.tasks * args.group,
            gradient_accumulation_steps=1,
            num_generations=args.group,
            max_completion_length=args.max_tokens,
            max_steps=args.steps + 1,
            learning_rate=args.lr,
            beta=0.0,
            temperature=1.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    turn.length = sum(lengths) / len(lengths)
    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a Kimi-K2-shaped model directory; default: tiny-k2 with random weights")
    parser.add_argument("--tasks", type=int, default=16, help="questions per step")
    parser.add_argument("--group", type=int, default=8, help="responses per question")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    try:
        import transformers
        import trl

        trl_version = trl.__version__
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    except ImportError:
        trl_version = None
        print(INSTALL)
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or Path(made)
        if args.model is None:
            new_model(folder)
        asked = questions(args.tasks * (args.steps + 1))
        samples = args.tasks * args.group
        print(
            f"{platform.machine()}, {args.threads} threads; k2lab {__version__}, torch {torch.__version__}, TRL {trl_version}; "
            f"{args.tasks} tasks x {args.group} responses of at most {args.max_tokens} tokens, fp32"
        )
        ratios = []
        for turn in range(args.turns):
            mine = ours(folder, args, asked)
            line = f"turn {turn + 1}: k2lab {mine.rate(samples):.1f} samples/s ({mine.length:.1f} tokens each)"
            if trl_version:
                other = theirs(folder, args, asked)
                ratios.append(mine.rate(samples) / other.rate(samples))
                line += f", TRL {other.rate(samples):.1f} samples/s ({other.length:.1f} tokens each), ratio {ratios[-1]:.2f}"
            print(line, flush=True)
        if ratios:
            print(f"ratio over {len(ratios)} turns: {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
