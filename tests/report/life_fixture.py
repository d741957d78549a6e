"""A synthetic run of the whole life cycle: the shape of its files is that of the real stages, the numbers are made up."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from k2lab.core import artifacts, rng
from k2lab.core.events import EventWriter

SEED = 1
FAMILIES = ("chain_sum", "spell_backward", "letter_counting")
RIGHT = {  # share of right answers over all families, and per family, by model
    "pretrain": (0.0, 0.0, 0.0, 0.0),
    "sft": (0.08, 0.02, 0.1, 0.12),
    "reasoning_sft": (0.64, 0.52, 0.8, 0.6),
    "dpo": (0.63, 0.55, 0.79, 0.55),
    "rl": (0.75, 0.71, 0.82, 0.72),
    "distill": (0.69, 0.66, 0.75, 0.66),
}
BITS = {"untrained": 3.9, "pretrain": 2.05, "sft": 2.6, "reasoning_sft": 2.9, "dpo": 2.92, "rl": 2.93, "distill": 3.4}
CHAIN = [("untrained", "pretrain"), ("pretrain", "sft"), ("sft", "reasoning_sft"), ("reasoning_sft", "dpo"), ("dpo", "rl")]
N = 600

# name: (type, kind, parents {role: stage}, seconds)
STAGES: dict[str, tuple[str, str, dict[str, str], float]] = {
    "instructions": ("corpus", "dataset", {}, 3.0),
    "corpus": ("corpus", "dataset", {"against": "instructions"}, 1.2),
    "tokenizer": ("tokenizer", "tokenizer", {"corpus": "corpus", "chats": "instructions"}, 1.5),
    "tokenize": ("tokenize", "tokens", {"corpus": "corpus", "tokenizer": "tokenizer"}, 0.7),
    "pretrain": ("pretrain", "checkpoint", {"data": "tokenize"}, 95.0),
    "sft": ("sft", "checkpoint", {"start": "pretrain", "data": "instructions"}, 90.0),
    "reasoning": ("corpus", "dataset", {}, 0.9),
    "reasoning_sft": ("reasoning_sft", "checkpoint", {"start": "sft", "data": "reasoning", "replay": "instructions"}, 80.0),
    "pairs": ("preference_data", "dataset", {"model": "reasoning_sft", "tasks": "reasoning"}, 22.0),
    "dpo": ("dpo", "checkpoint", {"start": "reasoning_sft", "reference": "sft", "data": "pairs"}, 25.0),
    "rl_tasks": ("corpus", "dataset", {}, 0.4),
    "rl": ("rl", "checkpoint", {"start": "dpo", "tasks": "rl_tasks", "ptx": "reasoning"}, 60.0),
    "teacher_data": ("teacher_data", "dataset", {"teacher": "rl", "prompts": "reasoning"}, 14.0),
    "distill": ("distill", "checkpoint", {"data": "teacher_data"}, 30.0),
    "long_sums": ("corpus", "dataset", {}, 0.3),
    "agent": ("agent", "report", {"model": "rl", "data": "long_sums"}, 16.0),
    "evaluate": ("evaluate", "report", {**{f"models[{i}]": m for i, m in enumerate(RIGHT)}, "tokens": "tokenize",
                                        "instructions": "instructions", "task_data": "reasoning"}, 40.0),
}  # fmt: skip
BOX = "python: bubblewrap 0.8.0; own user namespace, dropped user; no network; limits: 5 s, 512 MiB memory"
STUDENT = {"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320, "intermediate_size": 64,
           "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
           "max_position_embeddings": 512, "rope_theta": 10000.0}  # fmt: skip
TEACHER = {**STUDENT, "hidden_size": 96, "intermediate_size": 128}


def make_life(run_dir: Path, *, skipped: str = "", hostile: str = "", steps: int = 60, errors: int = 0) -> Path:
    """Writes the run directory and returns it. With `skipped`, the agent stage was not run for this reason; `hostile` is put into
    every text that a model wrote; `errors` rollouts failed in each step of RL."""
    (run_dir / "stages").mkdir(parents=True)
    lines = ['description = "The whole life of a small model"', 'model = "tiny-k2"', "seed = 1"]
    for name, (kind, _, parents, _) in STAGES.items():
        lines += ["", "[[stage]]", f'name = "{name}"', f'type = "{kind}"']
        lines += [f'{role.partition("[")[0]} = "{parent}"' for role, parent in parents.items() if "[" not in role]
    for name in ("recipe.toml", "recipe.resolved.toml"):
        (run_dir / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    env = {
        "recipe": "life",
        "command": "k2 run life",
        "cpu": "AMD EPYC",
        "cores": 2,
        "memory_gb": 25.3,
        "versions": {"k2lab": "1"},
    }
    artifacts.write_json(run_dir / "env.json", env)
    events = EventWriter(run_dir / "events", run="life")
    clock = 1_763_770_000.0
    events.emit("run_start", step=0, recipe="life", t=clock)
    made: dict[str, str] = {}
    for name, (kind, makes, parents, seconds) in STAGES.items():
        events.stage = name
        if name == "agent" and skipped:
            events.emit("stage_skipped", step=0, reason=skipped, t=clock)
            continue
        table = {"type": kind, **({"pass_rate": [0.2, 0.8]} if kind == "rl" else {})}
        refs = {role: {"name": parent, "identity": made[parent]} for role, parent in parents.items()}
        made[name] = artifacts.identity({**table, "name": name}, {r: i["identity"] for r, i in refs.items()}, 1, SEED)
        total = steps if makes == "checkpoint" else 0
        events.emit(
            "stage_start", step=0, type=kind, identity=made[name], total=total or None, unit="steps", resumed=False, t=clock
        )
        for step in range(1, total + 1):
            events.emit("step", step=step, t=round(clock + seconds * step / total, 3), **step_of(kind, step, total, errors))
            if step % 20 == 0:
                events.emit("valid", step=step, metrics=valid_of(kind, step / total), t=round(clock + seconds * step / total, 3))
        clock += seconds
        if kind == "agent":
            events.emit("note", step=0, text=f"tools run in {BOX}", t=clock)
        folder = run_dir / "stages" / f"{name}-{made[name][:8]}"
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir()
        facts = files_of(name, partial, hostile)
        artifacts.finish(
            partial,
            folder,
            {"kind": makes, "name": name, "type": kind, "identity": made[name], "parents": refs, "stage": table, "seed": SEED,
             "seconds": seconds, "peak_rss_mb": 700.0, "created": "2025-11-22T00:00:00Z", "licences": ["PSF-2.0"], **facts},
        )  # fmt: skip
        events.emit("stage_end", step=total, seconds=seconds, peak_rss_mb=700.0, artifact=folder.name, t=clock)
    events.close()
    return run_dir


def step_of(kind: str, step: int, total: int, errors: int) -> dict[str, Any]:
    """The fields of a step event of each type of stage."""
    draw, share = rng.rng(SEED, kind, "step", step), step / total
    fall = math.exp(-4 * share)
    noise = float(draw.normal(0, 0.02))
    fields: dict[str, Any] = {
        "total": total,
        "lr": 1e-3 * (1 - share),
        "grad_norm": 1 + fall,
        "tokens": 2000,
        "tokens_per_s": 9000.0,
    }
    if kind == "dpo":
        wins = 0.35 * (1 - fall)
        fields["losses"] = {"dpo": 0.45 + 0.24 * fall + noise}
        fields["metrics"] = {"accuracy": 0.5 + wins, "margin": 2 * wins, "logprob_accuracy": 0.52 + wins / 2, "lm": 1.0}
        fields["metrics"] |= {"chosen_logprob": -14 - 3 * share, "rejected_logprob": -15 - 9 * share}
    elif kind == "rl":
        reward = min(1.0, max(0.0, 0.55 + 0.2 * (1 - fall) + 3 * noise))
        fields["losses"] = {"kimi": 0.9 + noise, "ptx": 0.7 + noise}
        fields["rollout"] = {"reward": reward, "shaped_reward": reward - 0.05, "pass_rate": reward, "truncated": 0.06}
        fields["rollout"] |= {"length": 48 - 9 * share + 40 * noise, "length_max": 96.0, "zero_signal": 0.25 + 0.2 * share}
        fields["rollout"] |= {"errors": float(errors), "too_long": 0.0, "rollouts": 128.0, "groups": 16.0, "lag": 0.0}
        fields["rollout"] |= {"temperature": 1.2 - 0.4 * share, "sample_seconds": 0.5 + noise, "new_fact": 3.0 + share}
        fields["metrics"] = {"mismatch": 2e-7, "mismatch_max": 2e-6 + abs(noise) * 1e-5, "log_ratio": noise * 1e-5}
        fields["metrics"] |= {"kl": 1e-9, "entropy": 0.8 - 0.3 * share, "clip_share": 0.01}
    elif kind == "distill":
        fields["losses"] = {"lm": 0.6 + 4 * fall, "kl": 0.1 + 2 * fall}
    else:
        fields["losses"] = {"lm": 1.5 + 4 * fall + noise}
    return fields


def valid_of(kind: str, share: float) -> dict[str, float]:
    """What validation inside training found."""
    if kind == "dpo":
        found = {"valid/dpo": 0.6 - 0.1 * share, "held_out/accuracy": 0.5 + 0.2 * share, "held_out/margin": 0.5 * share}
        found |= {"held_out/logprob_accuracy": 0.5 + 0.15 * share, "held_out/chosen_logprob": -15.0}
        return {**found, "held_out/rejected_logprob": -17.0}
    if kind == "distill":
        return {"valid/lm": 1 - 0.3 * share, "valid/kl": 0.4 - 0.2 * share}
    return {} if kind == "rl" else {"valid/lm": 2 - share / 2}


def files_of(name: str, folder: Path, hostile: str) -> dict[str, Any]:
    """Writes an artifact's files; returns what its manifest says besides the usual."""
    (folder / "data.bin").write_bytes(b"\0" * 4000 * len(name))
    if name == "evaluate":
        artifacts.write_json(folder / "results.json", evaluation(hostile))
    if name == "agent":
        artifacts.write_json(folder / "results.json", agent(hostile))
        use = {"turns": 196, "tool_calls": 97, "tool_results": 97, "tool_errors": 3, "prompt": 4000, "response": 5200}
        use |= {"context": 2100, "rollouts": 100, "rollouts_with_calls": 95, "sample_s": 9.0, "tools_s": 3.9}
        return {"tool_use": use}
    if name in ("pairs", "rl"):
        rates = [round(float(rng.rng(SEED, name, "rate", i).integers(0, 9)) / 8, 6) for i in range(200)]
        text = "".join(json.dumps({"key": f"t{i}", "pass_rate": rate, "samples": 8}) + "\n" for i, rate in enumerate(rates))
        (folder / "pass_rates.jsonl").write_text(text, encoding="utf-8")
    if name == "dpo":
        artifacts.write_json(folder / "preference.json", preference())
    if STAGES[name][1] == "checkpoint":
        config = STUDENT if name == "distill" else TEACHER
        artifacts.write_json(folder / "config.json", config)
        return {"parameters": 500_000 if name == "distill" else 1_200_000}
    return {}


def preference() -> dict[str, Any]:
    """What a dpo stage writes about held-out pairs."""

    def entry(value: float, half: float, n: int) -> dict[str, Any]:
        return {"value": value, "low": value - half, "high": value + half, "n": n}

    def part(n: int, lift: float) -> dict[str, Any]:
        return {"reward_accuracy": entry(0.78 + lift, 0.04, n), "reward_accuracy_reference": entry(0.74, 0.05, n),
                "logprob_accuracy_before": entry(0.56, 0.05, n), "logprob_accuracy_after": entry(0.66 + lift, 0.05, n),
                "logprob_accuracy_change": entry(0.10 + lift, 0.03, n), "reward_margin": entry(2.1, 0.4, n)}  # fmt: skip

    every, close = part(420, 0.0), part(210, -0.02)
    return {
        "format": 1,
        "pairs": 420,
        "all": {**every, "mean_length_gap": 3.2},
        "length_matched": {**close, "mean_length_gap": 0.4},
    }


def metric(name: str, value: float, n: int = N, **more: Any) -> dict[str, Any]:
    """An entry of a model's `metrics` with an interval of plausible width."""
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.002) / n)
    table = {"unit": "fraction", "better": "higher", "settings": "plain prompt, temperature 1, k=4, max 96 tokens", "std": 0.4}
    low, high = max(0.0, value - half), min(1.0, value + half)
    return {"metric": name, "value": value, "low": low, "high": high, "n": n, **table, **more}


def evaluation(hostile: str) -> dict[str, Any]:
    """The results.json of an evaluate stage over the whole chain."""
    models, bits = [], {"unit": "bits/byte", "better": "lower", "settings": "pieces of 256 tokens"}
    for name, value in BITS.items():
        metrics = [metric("bits_per_byte", value, 520, low=value - 0.04, high=value + 0.04, **bits)]
        metrics.append(metric("bits_per_byte/docs", value, 400, low=value - 0.05, high=value + 0.05, **bits))
        if name in RIGHT:
            overall, *each = RIGHT[name]
            for family, score in zip(("answered", *FAMILIES), (overall, *each)):
                metrics.append(metric(f"{family}/avg@4", score, N if family == "answered" else N // 3))
                metrics += [metric(f"{family}/pass@{k}", 1 - (1 - score) ** (1 + k / 4), N) for k in (2, 4)]
            metrics += [metric("answered/eos_rate", 0.1 if name == "pretrain" else 0.97), metric("answered/non_empty", 1.0)]
            speed = {"unit": "ms/token", "better": "lower", "settings": "one answer at a time"}
            metrics.append(metric("decode_time", 1.1 if name == "distill" else 2.3, 5, low=1.0, high=2.4, **speed))
        samples = [{"prompt": f"What is {i} + 27?", "completion": said(name, i) + hostile, "stop": "eos"} for i in range(6)]
        models.append({"name": name, "stage": None if name == "untrained" else name, "label": name, "metrics": metrics,
                       "samples": samples})  # fmt: skip
    values = {model["name"]: {m["metric"]: m for m in model["metrics"]} for model in models}
    changes = []
    for before, after in CHAIN:
        for name, item in values[after].items():
            if name in values[before]:
                change = item["value"] - values[before][name]["value"]
                half = 0.03 if "bits" in name else 0.025
                bounds = {"change": change, "low": change - half, "high": change + half}
                changes.append({"before": before, "after": after, "metric": name, "n": item["n"], **bounds})
    baselines = [{"name": "trigram (Witten-Bell)", "metric": "bits_per_byte", "value": 2.4}]
    return {"format": 1, "models": models, "chain": [list(edge) for edge in CHAIN], "changes": changes, "baselines": baselines}


def said(name: str, i: int) -> str:
    """What a model answers to a sum."""
    if name in ("untrained", "pretrain"):
        return "n n n the the"
    if name == "sft":
        return f"{20 + i}<|im_end|>"
    return f"<think>{i} + 27 = 20 + {7 + i} = {27 + i}</think>{27 + i}<|im_end|>"


CALL = (
    "<think>too long for my head</think><|tool_calls_section_begin|><|tool_call_begin|>functions.python:0"
    '<|tool_call_argument_begin|>{"code": "print(48213377 + 90211245)"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
    "<|im_system|>python<|im_middle|>## Return of functions.python:0\n138424622<|im_end|><|im_assistant|>assistant<|im_middle|>"
    "138424622<|im_end|>"
)


def agent(hostile: str) -> dict[str, Any]:
    """The results.json of an agent stage: the model without tools is what the one with them came from."""
    plain, tooled = (
        "plain prompt, temperature 0, k=1, max 256 tokens",
        "plain prompt, temperature 0, k=1, max 256 tokens, with python",
    )
    names, prompt = ("rl without tools", "rl with tools"), "What is 48213377 + 90211245?"
    models = []
    for name, stage, settings, score, text in (
        (names[0], None, plain, 0.02, "138424522<|im_end|>"),
        (names[1], "agent", tooled, 0.93, CALL),
    ):
        metrics = [metric("chain_sum/avg@1", score, 100, settings=settings)]
        metrics += [metric("chain_sum/tool_used", 0.95, 100, settings=settings),
                    metric("chain_sum/tool_failed", 0.03, 95, settings=settings, better="lower")] if stage else []  # fmt: skip
        samples = [{"prompt": f"{prompt}{'?' * i}", "completion": text + hostile, "stop": "eos"} for i in range(4)]
        models.append({"name": name, "stage": stage, "label": name.replace(" with", ", with"), "metrics": metrics,
                       "samples": samples})  # fmt: skip
    change = {
        "before": names[0],
        "after": names[1],
        "metric": "chain_sum/avg@1",
        "change": 0.91,
        "low": 0.84,
        "high": 0.97,
        "n": 100,
    }
    return {"format": 1, "models": models, "chain": [list(names)], "changes": [change], "baselines": []}


if __name__ == "__main__":
    import sys

    from k2lab.report import html

    print(html.write(make_life(Path(sys.argv[1]), skipped=sys.argv[2] if len(sys.argv) > 2 else "")))
