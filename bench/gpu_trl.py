"""A whole training step on one GPU: ours against TRL's SFTTrainer, same shape, weights and tokens, one after the other.

TRL: SFTTrainer on transformers' model in bf16, fused AdamW, its grouped experts and chunked loss, rows of full length that are
tokenised already, no gradient checkpointing (its default would be slower; the memory is there). Ours: MuonClip with fp32 masters,
clipping, router bias and metrics; with `--optimizers muonclip,adamw` also AdamW with masters. Both sides take `--accumulate`
micro-batches of `--rows` per optimizer step; with `--our-rows` ours packs the same tokens into larger micro-batches (TRL's 8 rows
of 4,096 take 63 GB: it has no room for them).

    python bench/gpu_trl.py [--rows 8] [--accumulate 8] [--steps 3] [--sides ours,trl] [--our-rows 8,16]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _gpu import Feed, Step, about, blank, clock, feeds, forget, model_flops, ours, peak_gb, reset_peak, timed

from k2lab import specs
from k2lab.optim.adamw import AdamW
from k2lab.optim.muonclip import MuonClip
from k2lab.specs import ModelSpec

WARM = 2


def report(name: str, seconds: float, spec: ModelSpec, given: list[Feed], options: argparse.Namespace, more: str) -> float:
    """Prints one line for a step of `seconds` over the micro-batches `given`."""
    tokens = sum(sum(feed.lengths) for feed in given)
    flops = sum(model_flops(spec, feed.lengths) for feed in given)
    print(
        f"{clock()} {name:14s} {tokens / seconds / 1e3:7.1f}k tok/s  {flops / seconds / 1e12:6.1f} TFLOP/s  "
        f"{seconds * 1e3:.0f} ms for {tokens:,} tokens  peak {peak_gb(options.device):.1f} GB  {more}",
        flush=True,
    )
    return tokens / seconds


def our_step(spec: ModelSpec, given: list[Feed], options: argparse.Namespace, name: str) -> float:
    model = ours(spec, options.device, options.dtype)
    slot = {"muonclip": MuonClip, "adamw": AdamW}[name](lr=2e-4)
    step = Step(model, slot.build(model.named_parameters(), model.row_layouts()))
    model.capture_max_logits(100.0)
    batches = [feed.batch for feed in given]
    for _ in range(WARM):
        step(batches)
    reset_peak(options.device)
    seconds = timed([partial(step, batches) for _ in range(options.steps)], options.device)
    return report(f"ours, {name}", sum(seconds) / len(seconds), spec, given, options, f"{len(given)} micro-batches, {step.said}")


def tokenizer(vocab: int) -> Any:
    """A stand-in: the rows are tokens already, SFTTrainer only asks for a padding token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"<{n}>": n for n in range(vocab)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<0>")), pad_token="<0>", eos_token="<1>"
    )


def trl_step(spec: ModelSpec, given: list[Feed], options: argparse.Namespace) -> float:
    import datasets
    import trl
    from transformers import TrainerCallback

    model = blank(spec, options.device, options.dtype).train()
    rows = [row.tolist() for feed in given for row in feed.rival_arrays()["input_ids"]]
    repeats = WARM + options.steps
    data = datasets.Dataset.from_dict({"input_ids": rows * repeats, "labels": rows * repeats})
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (WARM, repeats):
                if options.device.type == "cuda":
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())
                if state.global_step == WARM:
                    reset_peak(options.device)

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=options.rows,
            gradient_accumulation_steps=len(given),
            max_steps=repeats,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=options.device.type == "cuda",
            use_cpu=options.device.type != "cuda",
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            save_strategy="no",
            report_to="none",
            logging_steps=repeats,
            disable_tqdm=True,
            dataloader_drop_last=True,
        )
        trainer = trl.SFTTrainer(
            model=model, args=settings, train_dataset=data, processing_class=tokenizer(spec.vocab_size), callbacks=[Clock()]
        )
        trainer.train()
        loss = next((entry["loss"] for entry in trainer.state.log_history if "loss" in entry), float("nan"))
    more = f"mean loss {loss:.4f}, TRL {trl.__version__}, experts {model.config._experts_implementation}"
    return report("TRL SFTTrainer", (marks[1] - marks[0]) / options.steps, spec, given, options, more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-2b")
    parser.add_argument("--sides", default="ours,trl")
    parser.add_argument("--optimizers", default="muonclip", help="of our side: muonclip, adamw")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--our-rows", default="", help="of our micro-batches, one or several numbers; as --rows if not given")
    parser.add_argument("--row", type=int, default=4096)
    parser.add_argument("--accumulate", type=int, default=8, help="micro-batches per optimizer step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cuda", type=torch.device)
    options = parser.parse_args()
    options.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    spec = specs.get(options.model)
    print(about(options.device))
    print(
        f"{spec.name}, {spec.total():,} parameters, {options.accumulate} micro-batches of {options.rows} x {options.row:,}",
        flush=True,
    )
    sides: dict[str, tuple[int, Callable[..., float]]] = {}
    for rows in (int(text) for text in (options.our_rows or str(options.rows)).split(",")):
        if options.accumulate * options.rows % rows:
            parser.error(f"{options.accumulate * options.rows} rows of a step are no whole micro-batches of {rows}")
        sides |= {f"ours, {name}, {rows} rows": (rows, partial(our_step, name=name)) for name in options.optimizers.split(",")}
    sides["trl"] = options.rows, trl_step
    found: dict[str, float] = {}
    for name, (rows, side) in sides.items():
        if name.split(",")[0] not in options.sides.split(","):
            continue
        forget()
        given = feeds("a", options.accumulate * options.rows // rows, rows * options.row, options.row, spec.vocab_size)
        try:
            found[name] = side(spec, given, options)
        except Exception:
            print(f"{clock()} {name} failed: " + "".join(traceback.format_exc().splitlines(keepends=True)[-12:]), flush=True)
    for name, rate in found.items():
        if name != "trl" and "trl" in found:
            print(f"  ratio {name} / trl {rate / found['trl']:.2f}x")


if __name__ == "__main__":
    main()
