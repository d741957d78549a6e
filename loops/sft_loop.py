"""Supervised fine-tuning in one flat file: no k2lab, only torch and transformers.

Documentation that runs: chat rendering, loss on the assistant's tokens only, one division by all trained tokens of a step however
many micro-batches it has, and greedy answers before and after. What it leaves out, and the library has: packing without padding,
MuonClip, resume, several processes, held-out tasks with intervals, a report.

    python loops/sft_loop.py runs/tiny/stages/pretrain-*/                     # the shipped questions about Python
    python loops/sft_loop.py MODEL_DIR --data my.jsonl --steps 200            # {"instruction": ..., "output": ...} lines
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

IGNORED = -100  # label of a token that is context only
MODULES = ("shutil", "math", "json", "os.path", "statistics", "textwrap", "itertools", "random", "string", "collections")


# ---------------------------------------------------------------- model and data


def load_model(folder: Path):
    """A model directory. Kimi K2's own config.json says `kimi_k2`, which transformers does not know; the name must go, since
    transformers looks up by it how the experts' tensors are stacked, and otherwise makes new experts with a mere warning."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") == "kimi_k2":
        del config["model_type"]
        config, kind = DeepseekV3Config.from_dict(config), DeepseekV3ForCausalLM
    else:
        config, kind = AutoConfig.from_pretrained(folder), AutoModelForCausalLM
    model, info = kind.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise SystemExit(f"{folder} lacks {sorted(info['missing_keys'])[:3]}")
    return model


def questions() -> list[dict]:
    """What a few standard modules' functions do, from their docstrings."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in sorted(vars(module)):
            thing = getattr(module, attribute)
            doc = inspect.getdoc(thing) if callable(thing) and not attribute.startswith("_") else None
            if doc:
                sentence = re.split(r"(?<=[.!?])\s", " ".join(doc.split()))[0]
                if 16 <= len(sentence) <= 160:
                    full = f"{name}.{attribute}"
                    found.append({"instruction": f"What does `{full}` do?", "output": f"`{full}`: {sentence}"})
    return found


def read_jsonl(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def encode(tokenizer, record: dict, limit: int) -> tuple[list[int], list[int]] | None:
    """(tokens, labels): the prompt up to the assistant's header is context, the answer and its end-of-turn token are trained."""
    text = record["instruction"] + (f"\n\n{record['input']}" if record.get("input") else "")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False)
    # The answer is encoded as ordinary text: strings in the data that look like special tokens must not become them.
    answer = tokenizer.encode(record["output"], add_special_tokens=False, split_special_tokens=True)
    answer.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tokens = [*prompt, *answer]
    return (tokens, [IGNORED] * len(prompt) + answer) if len(tokens) <= limit else None


def collate(samples: list, pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded tokens, labels and attention mask [B, T]."""
    length = max(len(tokens) for tokens, _ in samples)
    tokens = torch.tensor([t + [pad] * (length - len(t)) for t, _ in samples])
    labels = torch.tensor([y + [IGNORED] * (length - len(y)) for _, y in samples])
    mask = torch.tensor([[1] * len(t) + [0] * (length - len(t)) for t, _ in samples])
    return tokens, labels, mask


def loss_sum(model, tokens, labels, mask) -> torch.Tensor:
    """Summed nats over trained tokens; position i predicts token i + 1."""
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def response_loss(model, samples: list, pad: int) -> float:
    """Nats per trained token over held-out samples."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(samples), 16):
        tokens, labels, mask = collate(samples[start : start + 16], pad)
        total += loss_sum(model, tokens, labels, mask).item()
        count += int((labels[:, 1:] != IGNORED).sum())
    return total / max(1, count)


@torch.no_grad()
def answer(model, tokenizer, question: str, limit: int = 48) -> str:
    model.eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False, return_tensors="pt"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=limit,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(out[0, prompt.shape[1] :])


# ---------------------------------------------------------------- the loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a model directory with tokenizer, e.g. runs/tiny/stages/pretrain-*/")
    parser.add_argument("--data", help="JSON lines with instruction, output and optionally input")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--micro", type=int, default=8, help="samples per forward and backward")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = load_model(args.model)
    pad = tokenizer.pad_token_id
    records = read_jsonl(args.data) if args.data else questions()
    encoded = [sample for record in records if (sample := encode(tokenizer, record, args.seq_len))]
    held_out, train = encoded[::10], [sample for n, sample in enumerate(encoded) if n % 10]
    asked = records[0]["instruction"]
    print(f"{len(train)} samples to train on, {len(held_out)} held out")
    print(f"before: {response_loss(model, held_out, pad):.3f} nats per token\n  {asked} -> {answer(model, tokenizer, asked)!r}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    for step in range(args.steps):
        chosen = [train[order[(step * args.batch + n) % len(order)]] for n in range(args.batch)]
        # One divisor for the whole step, known before the first backward: the mean does not depend on --micro.
        count = sum(label != IGNORED for _, labels in chosen for label in labels[1:])
        total = 0.0
        model.train()
        for start in range(0, args.batch, args.micro):
            loss = loss_sum(model, *collate(chosen[start : start + args.micro], pad))
            (loss / count).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 10, 2 * (args.steps - step) / args.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 9 or step + 1 == args.steps:
            print(f"step {step + 1:4d}  loss {total / count:.4f}")
    print(f"after:  {response_loss(model, held_out, pad):.3f} nats per token\n  {asked} -> {answer(model, tokenizer, asked)!r}")


if __name__ == "__main__":
    main()
