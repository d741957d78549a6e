"""Reinforcement learning in one flat file: no k2lab, only torch and transformers.

Documentation that runs: Kimi's objective on sums. Per step it draws groups of answers with the present weights, lets a verifier
judge them, takes reward less the group's mean as advantage A, and minimises (A - tau log pi/pi_old)^2 / (2 tau), whose gradient
at pi = pi_old is REINFORCE's. What it leaves out, and the library has: a measured filter for tasks of moderate difficulty, PTX
samples, budgets, MuonClip, resume, several processes, packing without padding, a sampler several times as fast.

    python loops/rl_loop.py runs/tiny/stages/reasoning_sft-*/           # a chat model that can sum a little
    python loops/rl_loop.py MODEL_DIR --digits 1 --steps 40 --tasks 16 --group 8
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

# ---------------------------------------------------------------- model and tasks


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


def sums(count: int, digits: int, generator: torch.Generator) -> list[tuple[str, str]]:
    """`count` different questions and their right answers."""
    low, high = (0 if digits == 1 else 10 ** (digits - 1)), 10**digits
    found: dict[str, str] = {}
    while len(found) < min(count, (high - low) ** 2 // 2):
        a, b = torch.randint(low, high, (2,), generator=generator).tolist()
        found[f"State the final answer to the following arithmetic problem: {a} + {b} ="] = str(a + b)
    return list(found.items())


def reward(response: str, answer: str) -> float:
    """1 if the turn was ended and the last number behind the thoughts is right, else 0."""
    if not response.endswith("<|im_end|>") or ("<think>" in response and "</think>" not in response):
        return 0.0
    final = response.removesuffix("<|im_end|>").rsplit("</think>", 1)[-1]
    numbers = re.findall(r"-?\d+", final)
    return float(bool(numbers) and numbers[-1] == answer)


def prompts_of(tokenizer, questions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompt tokens [B, T] and their mask, each ending with the header of the assistant's turn."""
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in questions
    ]
    longest = max(map(len, rendered))
    tokens = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rendered])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rendered])
    return tokens, mask


# ---------------------------------------------------------------- sampling


@torch.no_grad()
def sample(model, tokens, mask, *, limit: int, temperature: float, end: int, pad: int, generator):
    """(tokens with responses [B, T], attention mask [B, T], 1 on the response's tokens [B, T]); responses end with `end`.

    Decodes with the model's own cache; greedy if the temperature is 0.
    """
    model.eval()
    cache, step_tokens = None, tokens
    prompt = tokens.shape[1]
    alive = torch.ones(len(tokens), dtype=torch.bool)
    for _ in range(limit):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step_tokens.shape[1] :]
        out = model(
            input_ids=step_tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        step_tokens = torch.where(alive[:, None], chosen, pad)
        tokens = torch.cat([tokens, step_tokens], 1)
        mask = torch.cat([mask, alive[:, None].long()], 1)
        alive = alive & (chosen[:, 0] != end)
        if not alive.any():
            break
    made = mask.clone()
    made[:, :prompt] = 0
    return tokens, mask, made


def response_logprobs(model, tokens, mask, made) -> torch.Tensor:
    """log pi(response | prompt) of every row: the plain sum over its tokens, [B]. Position i predicts token i + 1."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits[:, :-1].float()
    nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1)
    return -(nll * made[:, 1:]).sum(1)


def judge(tokenizer, tokens, made, answers: list[str]) -> torch.Tensor:
    texts = [tokenizer.decode(row[flag.bool()]) for row, flag in zip(tokens, made)]
    return torch.tensor([reward(text, answer) for text, answer in zip(texts, answers)])


# ---------------------------------------------------------------- the loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="a model directory with tokenizer, e.g. runs/tiny/stages/reasoning_sft-*/")
    parser.add_argument("--digits", type=int, default=2, help="digits of the numbers that are added")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tasks", type=int, default=16, help="questions per step")
    parser.add_argument("--group", type=int, default=8, help="answers per question")
    parser.add_argument("--micro", type=int, default=32, help="answers per forward and backward")
    parser.add_argument("--tokens", type=int, default=48, help="most tokens of an answer")
    parser.add_argument("--tau", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--held-out", type=int, default=100, help="questions that are never trained")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = load_model(args.model)
    end, pad = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(args.seed)
    tasks = sums(args.held_out + args.steps * args.tasks, args.digits, generator)
    held_out, train = tasks[: args.held_out], tasks[args.held_out :]
    draw = {"limit": args.tokens, "end": end, "pad": pad, "generator": generator}

    def accuracy() -> float:
        tokens, mask = prompts_of(tokenizer, [question for question, _ in held_out])
        tokens, _, made = sample(model, tokens, mask, temperature=0.0, **draw)
        return float(judge(tokenizer, tokens, made, [answer for _, answer in held_out]).mean())

    print(f"before: {accuracy():.3f} of {len(held_out)} held-out sums right (greedy)")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(args.steps):
        began = time.perf_counter()
        chosen = [train[(step * args.tasks + n) % len(train)] for n in range(args.tasks)]
        questions = [question for question, _ in chosen for _ in range(args.group)]
        answers = [answer for _, answer in chosen for _ in range(args.group)]
        tokens, mask = prompts_of(tokenizer, questions)
        tokens, mask, made = sample(model, tokens, mask, temperature=args.temperature, **draw)
        rewards = judge(tokenizer, tokens, made, answers)
        groups = rewards.view(args.tasks, args.group)
        advantages = (groups - groups.mean(1, keepdim=True)).flatten()
        rows = [slice(first, first + args.micro) for first in range(0, len(tokens), args.micro)]
        with torch.no_grad():  # pi_old; here the policy moves once per batch, so it equals pi and only its gradient counts
            old = torch.cat([response_logprobs(model, tokens[part], mask[part], made[part]) for part in rows])
        model.train()
        loss_sum = 0.0
        for part in rows:
            ratio = response_logprobs(model, tokens[part], mask[part], made[part]) - old[part]
            loss = (advantages[part] - args.tau * ratio).square().sum() / (2 * args.tau)
            (loss / len(tokens)).backward()  # one divisor for the whole step: the sequences
            loss_sum += float(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        silent = float((groups.amax(1) == groups.amin(1)).float().mean())
        print(
            f"step {step + 1:3d}  reward {rewards.mean():.3f}  length {made.sum(1).float().mean():.1f}  no signal {silent:.2f}  "
            f"loss {loss_sum / len(tokens):.4f}  norm {norm:.3f}  {time.perf_counter() - began:.1f} s",
            flush=True,
        )
    print(f"after:  {accuracy():.3f} of {len(held_out)} held-out sums right (greedy)")


if __name__ == "__main__":
    main()
