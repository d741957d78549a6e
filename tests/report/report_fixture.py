"""A synthetic run directory that looks like a real one: the shape of the files is that of `k2 run tiny`, the numbers are made up.

Everything is a function of the arguments, so that tests can compare two runs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from k2lab.core import artifacts, rng
from k2lab.core.events import EventWriter

START = 1_763_770_000.0  # when the run began, in seconds since 1970
ORDER = ("instructions", "corpus", "tokenizer", "tokenize", "pretrain", "sft", "evaluate")
SECONDS = dict(zip((*ORDER, "again"), (3.0, 2.8, 1.0, 1.3, 141.0, 37.5, 21.4, 5.0)))
MEMORY = dict(zip((*ORDER, "again"), (91.0, 148.0, 212.0, 230.0, 1874.0, 1911.0, 986.0, 400.0)))
KINDS = dict(zip(ORDER[1:], ("dataset", "tokenizer", "tokens", "checkpoint", "checkpoint", "report")))  # by type of stage
LAYERS, HEADS, EXPERTS, TAU = 4, 4, 8, 40.0

STAGES: dict[str, dict[str, Any]] = {
    "instructions": {"type": "corpus", "sources": [{"type": "docstring_qa"}, {"type": "general_instructions"}]},
    "corpus": {
        "type": "corpus",
        "sources": [{"type": "python_reference"}, {"type": "python_docstrings"}],
        "against": ["instructions"],
        "valid_share": 0.08,
    },
    "tokenizer": {"type": "tokenizer", "corpus": "corpus", "vocab_size": 2048},
    "tokenize": {"type": "tokenize", "corpus": "corpus", "tokenizer": "tokenizer"},
    "pretrain": {"type": "pretrain", "data": "tokenize", "steps": 300, "optim": {"type": "muonclip", "lr": 2e-3, "tau": TAU}},
    "sft": {"type": "sft", "start": "pretrain", "data": "instructions", "epochs": 2.0, "optim": {"type": "muonclip", "tau": TAU}},
    "evaluate": {"type": "evaluate", "models": ["pretrain", "sft"], "tokens": "tokenize", "instructions": "instructions"},
}
PARENTS = {
    "instructions": {},
    "corpus": {"against": "instructions"},
    "tokenizer": {"corpus": "corpus"},
    "tokenize": {"corpus": "corpus", "tokenizer": "tokenizer"},
    "pretrain": {"data": "tokenize"},
    "sft": {"start": "pretrain", "data": "instructions"},
    "evaluate": {"models[0]": "pretrain", "models[1]": "sft", "tokens": "tokenize", "instructions": "instructions"},
    "again": {"models": "sft"},
}


def make(
    run_dir: Path,
    *,
    upto: str = "",
    cut: int | None = None,
    resume_at: int | None = None,
    results: dict[str, Any] | None = None,
    again: dict[str, Any] | None = None,
    stages: dict[str, dict[str, Any]] | None = None,
    start: float = START,
    recipe: str = "tiny",
    steps: dict[str, int] | None = None,
    hostile: str = "",
) -> Path:
    """Writes a run directory and returns it.

    Stages after `upto` have not started; with `cut`, the stage `upto` was killed after that step. With `resume_at`, a first
    attempt at pretrain was killed 25 steps after its checkpoint at that step, and a second one finished. `results` replaces the
    content of results.json, `again` is that of a second evaluate stage; `stages` overrides stage tables; `hostile` is put into
    every text. In a directory that holds a run already, finished artifacts of the same identity are reused, as `k2 run` does.
    """
    tables = {name: {**table, **(stages or {}).get(name, {})} for name, table in STAGES.items()}
    found = {"evaluate": results if results is not None else example_results(hostile)}
    if again is not None:
        tables["again"] = {"type": "evaluate", "models": ["sft"], "seed": 2}
        found["again"] = again
    num = {"pretrain": 300, "sft": 80, **(steps or {})}
    (run_dir / "stages").mkdir(parents=True, exist_ok=True)
    text = _recipe_text(tables, hostile)
    (run_dir / "recipe.toml").write_text(text, encoding="utf-8")
    (run_dir / "recipe.resolved.toml").write_text(text, encoding="utf-8")
    artifacts.write_json(run_dir / "env.json", _env(recipe))
    clock = _Clock(EventWriter(run_dir / "events", writer="rank0", run=recipe), start)
    clock.emit("run_start", 0, recipe=recipe, versions=_env(recipe)["versions"], device="auto")
    made: dict[str, str] = {}
    for name in tables:
        parents = {role: {"name": parent, "identity": made[parent]} for role, parent in PARENTS[name].items()}
        identity = artifacts.identity(tables[name], {role: item["identity"] for role, item in parents.items()}, 1, 1)
        killed = name == upto and cut is not None
        if (run_dir / "stages" / f"{name}-{identity[:8]}").is_dir():
            made[name] = identity
            continue
        clock.events.stage = name
        _log(clock, name, identity, num.get(name, 0), cut if killed else None, resume_at if name == "pretrain" else None, hostile)
        if killed:
            partial = run_dir / "stages" / f"{name}-{identity[:8]}.partial"
            partial.mkdir(exist_ok=True)
            (partial / "manifest.json").write_text("{}", encoding="utf-8")  # must not be mistaken for a finished one
            break
        made[name] = identity
        _artifact(run_dir, name, tables[name], identity, parents, clock.now, found.get(name), hostile)
        cost = {"seconds": SECONDS[name], "peak_rss_mb": MEMORY[name]}
        clock.emit("stage_end", clock.events.step, **cost, artifact=f"{name}-{identity[:8]}")
        if name == upto:
            break
    clock.events.close()
    return run_dir


class _Clock:
    """Emits events with made-up times."""

    def __init__(self, events: EventWriter, now: float) -> None:
        self.events, self.now = events, now

    def emit(self, kind: str, step: int, after: float = 0.0, **fields: Any) -> None:
        self.now += after
        self.events.emit(kind, step=step, t=round(self.now, 3), **fields)

    def again(self) -> None:
        """A new attempt, as after a kill."""
        old = self.events
        old.close()
        self.events = EventWriter(old.path.parent, writer=old.path.stem, run=old.run)
        self.events.stage = old.stage
        self.now += 60.0


def _recipe_text(tables: dict[str, dict[str, Any]], hostile: str) -> str:
    lines = ['description = "Kimi K2 shape (MLA + MoE) on a laptop: pretrain, fine-tune, evaluate, report"']
    lines += ['model = "tiny-k2"', "seed = 1"]
    if hostile:
        lines.append(f"# {hostile}".replace("\n", " "))
    for name, table in tables.items():
        lines += ["", "[[stage]]", f'name = "{name}"'] + [f"{key} = {_toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _env(recipe: str) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "command": f"k2 run {recipe}",
        "versions": {"k2lab": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.23.0", "numpy": "2.4.6"},
        "platform": "Linux x86_64",
        "cpu": "AMD EPYC 9R14",
        "cores": 2,
        "device": "auto",
        "threads": 2,
        "memory_gb": 25.3,
    }


def _log(clock: _Clock, name: str, identity: str, steps: int, cut: int | None, resume_at: int | None, hostile: str) -> None:
    start = {"type": STAGES.get(name, STAGES["evaluate"])["type"], "identity": identity}
    if not steps:
        clock.emit("stage_start", 0, **start, total=None, unit="", resumed=False)
        clock.emit("progress", 0, SECONDS[name] * 0.8, done=7199, total=7199, unit="records")
        if name in ("corpus", "instructions"):
            for row in _funnel(name, hostile):
                clock.emit("funnel", 0, **row)
        clock.now += SECONDS[name] * 0.2
        return
    clock.emit("stage_start", 0, **start, total=steps, unit="steps", resumed=False)
    if name == "sft":
        clock.emit("note", 0, text=f"14 train samples without a trained token or over 256 tokens were left out{hostile}")
    if resume_at is not None:
        _steps(clock, name, 0, resume_at, steps)
        _steps(clock, name, resume_at, resume_at + 25, steps, offset=5.0)  # lost with the kill, and plainly wrong values
        clock.again()
        clock.emit("stage_start", resume_at, **start, total=steps, unit="steps", resumed=True)
        _steps(clock, name, resume_at, cut or steps, steps)
    else:
        _steps(clock, name, 0, cut or steps, steps)


def _steps(clock: _Clock, name: str, first: int, last: int, total: int, offset: float = 0.0) -> None:
    """Optimizer steps `first + 1 .. last`; `offset` is added to losses so that tests can tell attempts apart."""
    top, floor, every = (7.62, 2.95, 60) if name == "pretrain" else (3.4, 1.72, 20)
    seconds = SECONDS[name] / total
    for step in range(first + 1, last + 1):
        draw = rng.rng(1, name, "step", step)
        share = step / total
        curve = floor + (top - floor) * (0.75 * math.exp(-share * 14) + 0.25 * math.exp(-share * 2.6))
        lr = 2e-3 * min(1.0, step / 20, (1 - share) / 0.4 + 1e-3)
        heads = {
            str(layer): [
                round(float(4 + 3 * head + (4.6 * layer + 3.1 * head) * (1 - math.exp(-share * 4)) + draw.normal(0, 0.5)), 3)
                for head in range(HEADS)
            ]
            for layer in range(LAYERS)
        }
        clipped = {layer: [h for h, value in enumerate(values) if value > TAU] for layer, values in heads.items()}
        heads = {layer: [min(value, TAU + 3) for value in values] for layer, values in heads.items()}
        clock.emit(
            "step",
            step,
            seconds,
            total=total,
            losses={"lm": round(curve + float(draw.normal(0, 0.05)) + offset, 4)},
            lr=lr,
            grad_norm=round(float(0.6 + 5 * math.exp(-share * 12) + abs(draw.normal(0, 0.12))), 4),
            tokens=4080,
            tokens_per_s=round(4096 / seconds * float(draw.normal(1, 0.03)), 1),
            seconds=round(seconds, 4),
            rss_mb=MEMORY[name] - 40 * math.exp(-step / 9),
            eta_s=round((total - step) * seconds, 1),
            max_logits=heads,
            expert_load={f"layer {layer}": _shares(draw, layer, share) for layer in range(1, LAYERS)},
            **({"clipped": {k: v for k, v in clipped.items() if v}} if any(clipped.values()) else {}),
        )
        if step % every == 0 or step == total:
            clock.emit("valid", step, metrics={"valid/lm": round(curve + 0.12 + offset, 4)}, epoch=round(share * 2, 3))


def _shares(draw: np.random.Generator, layer: int, share: float) -> list[float]:
    """Load per expert: uneven at first, nearly even once the router bias has worked."""
    tilt = np.cos(np.arange(EXPERTS) * (1.3 + layer)) * 1.6 * math.exp(-share * 7) + draw.normal(0, 0.08, EXPERTS)
    loads = np.exp(tilt)
    return [round(float(value), 5) for value in loads / loads.sum()]


def _funnel(name: str, hostile: str) -> list[dict[str, Any]]:
    if name == "instructions":
        return [{"filter": "exact_dedup", "seen": 7764, "kept": 7764, "dropped": 0, "changed": 0, "examples": []}]
    return [
        {"filter": "length", "seen": 7199, "kept": 7014, "dropped": 185, "changed": 0, "examples": [
            {"text": "cmath.sin(z, /) Return the sine of z.", "why": "38 characters, fewer than 40"},
            {"text": f"class ast.Add Add{hostile}", "why": f"18 characters, fewer than 40{hostile}"},
            {"text": "fileinput.close() Close the sequence.", "why": "38 characters, fewer than 40"},
            {"text": "a fourth example, which is not shown", "why": "too many"}]},
        {"filter": "repetition", "seen": 7014, "kept": 6810, "dropped": 204, "changed": 0, "examples": [
            {"text": "atexit.register register(func, *args, **kwargs) -> func Register a function to be executed ...",
             "why": "duplicate 5-grams: 16% of the characters, over 15%"}]},
        {"filter": "near_dedup", "seen": 6810, "kept": 5675, "dropped": 1135, "changed": 0, "examples": [
            {"text": "posixpath.relpath(path, start=None) Return a relative version of a path",
             "why": "similarity 0.82 with python_docstrings:ntpath.relpath"}]},
        {"filter": "pii", "seen": 5675, "kept": 5675, "dropped": 0, "changed": 8, "examples": [
            {"text": "...x.close() The sqlite3 module is written by <EMAIL>.", "why": "found 1 email"}]},
    ]  # fmt: skip


def _artifact(
    run_dir: Path,
    name: str,
    table: dict[str, Any],
    identity: str,
    parents: dict[str, Any],
    now: float,
    results: dict[str, Any] | None,
    hostile: str,
) -> None:
    partial = run_dir / "stages" / f"{name}-{identity[:8]}.partial"
    partial.mkdir(exist_ok=True)
    if results is not None:
        artifacts.write_json(partial / "results.json", results)
    else:
        (partial / "data.bin").write_bytes(b"\0" * (5_000 * len(name)))
    extra: dict[str, Any] = {"parameters": 3_214_592} if name in ("pretrain", "sft") else {}
    if name == "tokenize":
        extra["counts"] = {"train": {"documents": 6155, "tokens": 577_421, "text_bytes": 1_772_816}}
    moment = np.datetime64(int(now), "s")
    manifest = {
        "kind": KINDS[table["type"]],
        "name": name,
        "type": table["type"],
        "identity": identity,
        "parents": parents,
        "stage": table,
        "seed": 1,
        "seconds": SECONDS[name],
        "peak_rss_mb": MEMORY[name],
        "created": f"{moment}Z",
        "versions": _env("tiny")["versions"],
        "device": "cpu",
        "licences": ["PSF-2.0", f"Apache-2.0{hostile}"],
        **extra,
    }
    artifacts.finish(partial, partial.with_name(f"{name}-{identity[:8]}"), manifest)


def metric(name: str, value: float, low: float, high: float, n: int, **more: Any) -> dict[str, Any]:
    """One entry of a model's `metrics`."""
    settings = {"unit": "fraction", "better": "higher", "settings": "greedy, max 64 tokens", **more}
    return {"metric": name, "value": value, "low": low, "high": high, "std": (high - low) / 3.92, "n": n, **settings}


def example_results(hostile: str = "") -> dict[str, Any]:
    """What an evaluate stage writes for three models."""
    bits = {"unit": "bits/byte", "better": "lower", "settings": "held-out documents, 256-token windows"}
    values = {
        "init": ((3.583, 3.571, 3.596), (3.541, 3.53, 3.552), (0.0, 0.0, 0.006), (0.0, 0.0, 0.006)),
        "pretrain": ((1.684, 1.662, 1.706), (1.812, 1.77, 1.854), (0.01, 0.003, 0.024), (0.083, 0.064, 0.107)),
        "sft": ((1.731, 1.708, 1.754), (1.821, 1.78, 1.862), (0.318, 0.282, 0.356), (0.962, 0.943, 0.975)),
    }
    labels = {"init": "untrained", "pretrain": "pretrained", "sft": "fine-tuned"}
    said = {
        "init": ("ritequ ===\u00b7 zip\u00b7\u00b7ne\u00b7ft0x__", "length"),
        "pretrain": (" a list of the arguments of the function.\n\n    If the argument is not a string, the result", "length"),
        "sft": ("It returns the largest item of an iterable, or the largest of two or more arguments.", "eos"),
    }
    models = []
    for name, (docs, ref, exact, stops) in values.items():
        metrics = [
            metric("bits_per_byte/docstrings", *docs, 519, **bits),
            metric("bits_per_byte/reference", *ref, 61, **bits),
            metric("exact_match", *exact, 600),
            metric("eos_rate", *stops, 600),
        ]
        samples = [
            {"prompt": f"What does max(iterable) do?{hostile}", "completion": said[name][0] + hostile, "stop": said[name][1]},
            {"prompt": "def add(a, b):\n    ", "completion": "return a + b" if name != "init" else "", "stop": "eos"},
        ]
        stage = None if name == "init" else name
        about = {"name": name, "stage": stage, "label": labels[name] + hostile}
        models.append({**about, "metrics": metrics, "samples": samples})
    changes = []
    for before, after in (("init", "pretrain"), ("pretrain", "sft")):
        for i, entry in enumerate(models[0]["metrics"]):
            change = values[after][i][0] - values[before][i][0]
            half = abs(change) * 0.12 + 0.004
            item = {"before": before, "after": after, "metric": entry["metric"], "change": change, "n": entry["n"]}
            changes.append({**item, "low": change - half, "high": change + half})
    changes[5].update(low=-0.006, high=0.024)  # sft on the reference: chance could explain it
    baselines = [
        {"name": "unigram bytes", "metric": "bits_per_byte/docstrings", "value": 4.61},
        {"name": "bigram (Witten-Bell)", "metric": "bits_per_byte/docstrings", "value": 2.442},
        {"name": "trigram (Witten-Bell)", "metric": "bits_per_byte/docstrings", "value": 2.103},
    ]
    chain = [["init", "pretrain"], ["pretrain", "sft"]]
    return {"format": 1, "models": models, "chain": chain, "changes": changes, "baselines": baselines}


if __name__ == "__main__":
    import sys

    from k2lab.report import html

    print(html.write(make(Path(sys.argv[1]), resume_at=120)))
