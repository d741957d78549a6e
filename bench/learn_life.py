"""Does the life cycle learn? Runs the recipe `tiny` with several seeds and prints every figure beside what it must reach.

    python bench/learn_life.py                              # tiny, seeds 1 2 3: about 10 + 8 minutes each on two cores
    python bench/learn_life.py --read runs/tiny             # measures a finished run
    python bench/learn_life.py --device cuda --no-kl off    # without training the student that learns no KL

Besides what a run measures itself, models are asked tasks of the run's own families and levels whose canonical keys occur in no
training part of any of its data sets: shipped tasks that the run never drew, then tasks of its held-out parts. Two models that
are compared see the same tasks and the same draws. Pass rates that choose tasks come from other draws than the figures.
A figure reaches its mark only if enough items stand behind it and (where it says "clear") its 95 % interval leaves out 0.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _figures import Line, percent, stored, summary

from k2lab import runner
from k2lab.ckpt.folder import open_folder
from k2lab.core import artifacts, events
from k2lab.core import recipe as recipes
from k2lab.data import shards
from k2lab.data.records import group_of, is_task
from k2lab.data.sources.reasoning_tasks import ReasoningTasks
from k2lab.eval import speed, stats
from k2lab.eval.tasks import run_tasks
from k2lab.gym.task import Task
from k2lab.gym.tasks.answered import Answered
from k2lab.models import build
from k2lab.sampling.local import LocalSampler
from k2lab.specs import ModelSpec
from k2lab.text import tokenizer as text_tokenizer
from k2lab.text.chat import render

PASS_SEED, SCORE_SEED = 101, 202  # draws that choose tasks, draws that are counted


class Run:
    """A run directory: the artifacts of its last whole run by stage name, its models, and scores that were measured already."""

    def __init__(self, folder: Path, device: str, max_tokens: int) -> None:
        self.folder, self.device, self.max_tokens = folder, device, max_tokens
        self.events = events.read(folder / "events")
        starts = [event["stages"] for event in self.events if event["kind"] == "run_start" and "reasoning" in event["stages"]]
        if not starts:
            raise SystemExit(f"{folder} holds no run of the life cycle")
        self.artifacts: dict[str, artifacts.Artifact] = {}
        for name, identity in starts[-1].items():
            path = folder / "stages" / artifacts.folder_name(name, identity)
            if artifacts.exists(path):
                self.artifacts[name] = artifacts.open_artifact(path)
        self.loaded: dict[Path, tuple[Any, Any, LocalSampler]] = {}
        self.scores: dict[tuple, np.ndarray] = {}

    def path(self, stage: str) -> Path:
        return self.artifacts[stage].path

    def parent(self, stage: str, role: str) -> str:
        return self.artifacts[stage].manifest["parents"][role]["name"]

    def model(self, path: Path) -> tuple[Any, Any, LocalSampler]:
        """(model, tokenizer, sampler) of a checkpoint's folder."""
        if path not in self.loaded:
            model, tokenizer = build.load(open_folder(path), device=self.device), text_tokenizer.load(path)
            sampler = LocalSampler(model.hf, tokenizer.pad_id, max_batch=256, eos_id=tokenizer.im_end_id)
            self.loaded[path] = model, tokenizer, sampler
        return self.loaded[path]

    def ask(self, path: Path, tasks: list[Task], k: int = 1, seed: int = SCORE_SEED) -> np.ndarray:
        """Scores [tasks, k] of a checkpoint: greedy for k = 1, else at temperature 1."""
        key = (path, k, seed, tuple(task.key for task in tasks))
        if key not in self.scores:
            _, tokenizer, sampler = self.model(path)
            temperature = 0.0 if k == 1 else 1.0
            settings = {"k": k, "temperature": temperature, "max_tokens": self.max_tokens, "seed": seed, "default_system": False}
            self.scores[key] = run_tasks(tasks, sampler, tokenizer, **settings).scores_PK
        return self.scores[key]

    @cached_property
    def trained(self) -> set[str]:
        """Canonical keys in the training parts of all the run's data sets."""
        found = [item for item in self.artifacts.values() if item.kind == "dataset"]
        return {group_of(record) for item in found for record in shards.read_records(item.path, "train")}

    @cached_property
    def held_out(self) -> list[dict[str, Any]]:
        """Task records of the held-out parts of the data sets that come from sources (no model wrote them)."""
        corpora = [item for item in self.artifacts.values() if item.manifest["type"] == "corpus"]
        return [r for item in corpora for r in shards.read_records(item.path, "valid") if is_task(r) and "prompt" in r]


def tasks_like(run: Run, stage: str, per_family: int) -> list[Task]:
    """Unseen tasks of the families and levels of a corpus stage, `per_family` each, levels in the stage's own shares."""
    sources = [s for s in run.artifacts[stage].manifest["stage"]["sources"] if s["type"] == "reasoning_tasks"]
    matching = {family: pattern for source in sources for family, pattern in (source.get("matching") or {}).items()}
    names = {source["name"] for source in sources}
    every = [r for split in ("train", "valid") for r in shards.read_records(run.path(stage), split) if r["source"] in names]
    shares = Counter((record["domain"], record["difficulty"]) for record in every)
    pools = {level: unseen(run, level, matching) for level in shares}
    chosen: list[dict[str, Any]] = []
    for family in sorted({family for family, _ in shares}):
        levels = [level for level in shares if level[0] == family]
        whole = sum(shares[level] for level in levels)
        parts = {level: pools[level][: round(per_family * shares[level] / whole)] for level in levels}
        spare = [record for level in levels for record in pools[level][len(parts[level]) :]]
        own = [record for part in parts.values() for record in part]
        chosen += (own + spare[: max(0, per_family - len(own))])[:per_family]
    shared = sum(group_of(record) in run.trained for record in chosen)
    parts = Counter((record["domain"], record["difficulty"]) for record in chosen)
    own = sum(record["source"] != "unseen" for record in chosen)
    checked = f"{len(chosen)} checked against {len(run.trained):,} canonical keys of all training parts, shared {shared}"
    told = ", ".join(f"{family}:{difficulty} {n}" for (family, difficulty), n in sorted(parts.items()))
    print(f"  tasks like {stage}: {checked}; {own} from held-out parts; {told}")
    return Answered(limit=0, max_tokens=run.max_tokens).tasks(chosen)


def unseen(run: Run, level: tuple[str, int], matching: dict[str, str]) -> list[dict[str, Any]]:
    """Tasks of a (family, difficulty) that no stage trains on: never drawn ones first, then those of held-out parts."""
    family, difficulty = level
    own = {family: matching[family]} if family in matching else {}
    source = ReasoningTasks(families={f"{family}:{difficulty}": 10**6}, matching=own, traces=False, name="unseen")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are fewer than a million
        fresh = list(source.records())
    kept = [record for record in run.held_out if (record["domain"], record["difficulty"]) == level]
    waiting = {group_of(record) for record in run.held_out}
    found: dict[str, dict[str, Any]] = {}
    for record in [*(record for record in fresh if group_of(record) not in waiting), *kept]:
        if group_of(record) not in run.trained:
            found.setdefault(group_of(record), record)
    return list(found.values())


def shown(before: Any, after: Any) -> str:
    return f"{100 * before.mean():.1f} -> {100 * after.mean():.1f}"


def families(tasks: list[Task]) -> dict[str, list[int]]:
    names = sorted({task.meta["domain"] for task in tasks})
    return {name: [place for place, task in enumerate(tasks) if task.meta["domain"] == name] for name in names}


def reasoning(run: Run, tasks: list[Task]) -> Iterable[Line]:
    before = "reasoning_sft"
    while run.artifacts[before].manifest["type"] == "reasoning_sft":  # the model before any reasoning was trained
        before = run.parent(before, "start")
    first, last = (run.ask(run.path(name), tasks) for name in (before, "reasoning_sft"))
    if len(families(tasks)) < 3:
        print("  these are fewer than three families")
    yield percent("reasoning: accuracy before %", stats.avg_at_k(first), at_most=15.0, need_n=500, detail=before)
    yield percent("reasoning: accuracy after %", stats.avg_at_k(last), at_least=60.0, need_n=500, detail="reasoning_sft")
    for family, places in families(tasks).items():
        yield percent(f"    {family}: before %", stats.avg_at_k(first[places]))
        yield percent(f"    {family}: after %", stats.avg_at_k(last[places]))


def preferences(run: Run, tasks: list[Task]) -> Iterable[Line]:
    found = json.loads((run.path("dpo") / "preference.json").read_text())
    yield stored("dpo: reward accuracy against its own start %", found["all"]["reward_accuracy"], at_least=70.0, need_n=300)
    for part, name in (("all", "all"), ("length_matched", "length-matched half")):
        row = found[part]
        before, after = (np.array(row[f"logprob_accuracy_{when}"]["value"]) for when in ("before", "after"))
        name, detail = f"dpo: log-prob accuracy, {name}, points", shown(before, after)
        yield stored(name, row["logprob_accuracy_change"], at_least=5.0, detail=detail)
    start = run.parent("dpo", "start")
    first, last = (run.ask(run.path(name), tasks)[:, 0] for name in (start, "dpo"))
    yield percent(f"dpo: task accuracy - {start}, points", stats.paired_change(first, last), at_least=-3.0, need_n=500)


def reinforcement(run: Run, tasks: list[Task], pass_samples: int) -> Iterable[Line]:
    start = run.parent("rl", "start")
    rates = run.ask(run.path(start), tasks, pass_samples, PASS_SEED).mean(1)
    first, last = (run.ask(run.path(name), tasks, 4).mean(1) for name in (start, "rl"))
    picked = np.flatnonzero((rates >= 0.2) & (rates <= 0.8))
    if len(picked) > 1:
        must = {"at_least": 10.0, "need_n": 500, "clear": True, "detail": shown(first[picked], last[picked])}
        yield percent("rl: avg@4 on moderate tasks, points", stats.paired_change(first[picked], last[picked]), **must)
        for family, places in families([tasks[place] for place in picked]).items():
            if len(places) > 1:
                mine = picked[places]
                yield percent(f"    {family}, points", stats.paired_change(first[mine], last[mine]))
    else:
        yield Line("rl: avg@4 on moderate tasks, points", float("nan"), at_least=10.0)
    yield percent("rl: avg@4 on all tasks, points", stats.paired_change(first, last), detail=shown(first, last))
    steps = [event for event in run.events if event["kind"] == "step" and event["stage"] == "rl"]
    gaps = [event["metrics"] for event in steps if "mismatch" in event.get("metrics", {})]
    if gaps:
        mean = float(np.mean([gap["mismatch"] for gap in gaps]))
        yield Line("rl: trainer/sampler mismatch, mean nats", mean, n=len(gaps), form="{:.1e}")
        largest = max(gap["mismatch_max"] for gap in gaps)
        yield Line("rl: trainer/sampler mismatch, largest nats", largest, n=len(gaps), at_most=1e-5, form="{:.1e}")


def student(run: Run, tasks: list[Task], without_kl: Path | None) -> Iterable[Line]:
    teacher = run.artifacts[run.parent("distill", "data")].manifest["parents"]["teacher"]["name"]
    theirs, own = (run.ask(run.path(name), tasks)[:, 0] for name in (teacher, "distill"))
    if theirs.any():
        part = stats.paired_share(theirs, own, 0, "student")
        yield percent("student: accuracy / teacher's %", part, at_least=85.0, need_n=500, detail=shown(theirs, own))
    yield percent("    accuracy - teacher's, points", stats.paired_change(theirs, own))
    configs = [json.loads((run.path(name) / "config.json").read_text()) for name in (teacher, "distill")]
    sizes = [ModelSpec.from_config(config).active(with_embeddings=False) for config in configs]
    detail = f"{sizes[1]:,} of {sizes[0]:,}"
    yield Line("student: active parameters, non-embedding %", 100 * sizes[1] / sizes[0], at_most=60.0, detail=detail)
    yield decode_line(run, [run.path(teacher), run.path("distill")], tasks)
    if without_kl is not None:
        plain = run.ask(without_kl, tasks)[:, 0]
        must = {"at_least": 0.0, "need_n": 500, "clear": True, "detail": shown(plain, own)}
        yield percent("student: accuracy - without KL, points", stats.paired_change(plain, own), **must)


def decode_line(run: Run, paths: list[Path], tasks: list[Task], batch: int = 64, tokens: int = 64) -> Line:
    """The student's decode time per token as a share of the teacher's: same prompts, batch and number of tokens, in turns."""
    samplers, prompts = [], []
    for path in paths:
        model, tokenizer, _ = run.model(path)
        samplers.append(LocalSampler(model.hf, tokenizer.pad_id, max_batch=batch))
        chats = [list(task.messages) for task in tasks[:: max(1, len(tasks) // batch)][:batch]]
        prompts.append([render(chat, tokenizer, add_generation_prompt=True, default_system=False).tokens for chat in chats])
    times = [np.array(each) for each in speed.decode_times(samplers, prompts, tokens, repeats=7)]
    shares = times[1] / times[0]
    theirs, own = (float(np.median(each)) for each in times)
    detail = f"{1e6 * own:.0f} of {1e6 * theirs:.0f} us, {len(prompts[0])} x {tokens} tokens"
    low, high = min(shares.min(), own / theirs), max(shares.max(), own / theirs)  # smallest and largest of the repeats
    name = "student: decode time per token %"
    return Line(name, 100 * own / theirs, 100 * low, 100 * high, len(shares), at_most=60.0, detail=detail)


def agent(run: Run) -> Iterable[Line]:
    results = json.loads((run.path("agent") / "results.json").read_text())
    values = {(m["name"], x["metric"]): x["value"] for m in results["models"] for x in m["metrics"]}
    for change in results["changes"]:
        if "/avg@" in change["metric"]:
            before, after = (np.array(values[change[when], change["metric"]]) for when in ("before", "after"))
            yield stored("agent: long sums, with - without tool, points", change, at_least=40.0, detail=shown(before, after))


def whole(run: Run) -> Iterable[Line]:
    manifests = [item.manifest for item in run.artifacts.values()]
    yield Line("all stages, seconds", sum(m["seconds"] for m in manifests), n=len(manifests), at_most=480.0, form="{:.0f}")
    yield Line("peak RSS, MB", max(m["peak_rss_mb"] for m in manifests), at_most=4096.0, form="{:.0f}")
    results = json.loads((run.path("evaluate") / "results.json").read_text())
    sft = next((model for model in results["models"] if model["name"] == "sft"), {"metrics": []})
    for item in sft["metrics"]:
        if item["metric"] == "docstring_names/avg@1":
            yield Line("sft: docstring answers that name the object %", 100 * item["value"], n=item["n"])
        if item["metric"] == "bits_per_byte":
            yield Line("sft: bits per byte", item["value"], form="{:.3f}")


def k2(arguments: list[str], done: Path) -> None:
    """Runs `k2 run` and checks that it made the stage whose folder matches `done`; stages that need a sandbox may be left out."""
    code = subprocess.run([sys.executable, "-m", "k2lab", "run", *arguments, "--quiet"], stdout=subprocess.DEVNULL).returncode
    made = [path for path in done.parent.glob(done.name) if artifacts.exists(path)]
    if code not in (0, 3) or not made:
        raise SystemExit(f"k2 run {' '.join(arguments)} ended with exit code {code}")


def train_without_kl(run: Run) -> Path:
    """The same student from the same answers with kl_weight = 0, by a recipe of that one stage in a sibling directory."""
    resolved = recipes.load(str(run.folder / "recipe.resolved.toml"))
    entry = resolved.stage("distill")
    table = next(stage for stage in resolved.resolved()["stage"] if stage["name"] == "distill") | {"kl_weight": 0.0}
    for role in entry.parents:  # the run's own artifacts, whatever this version of the code would make of their recipes
        value = table[role]
        paths = [str(run.path(each).resolve()) for each in (value if isinstance(value, list) else [value])]
        table[role] = paths if isinstance(value, list) else paths[0]
    sibling = run.folder.with_name(run.folder.name + "-without-kl")
    sibling.mkdir(parents=True, exist_ok=True)
    source = sibling / "distill.toml"
    tree = {"description": "without KL", "model": resolved.model, "seed": resolved.seed, "stage": [table]}
    source.write_text(recipes.to_toml(tree), encoding="utf-8")
    (planned,) = runner.survey(recipes.load(str(source)), sibling)
    k2([str(source), "--run-dir", str(sibling), "--device", run.device], planned.path)
    return planned.path


def measure(folder: Path, args: argparse.Namespace) -> list[Line]:
    """All lines of one run, printed as they come."""
    began = time.perf_counter()
    run = Run(folder, args.device, args.max_tokens)
    without_kl = train_without_kl(run) if args.no_kl == "on" and "distill" in run.artifacts else None
    tasks = tasks_like(run, "reasoning", args.per_family)
    candidates = tasks_like(run, args.practice, args.candidates)
    parts: dict[str, Callable[[], Iterable[Line]]] = {
        "reasoning_sft": lambda: reasoning(run, tasks),
        "dpo": lambda: preferences(run, tasks),
        "rl": lambda: reinforcement(run, candidates, args.pass_samples),
        "distill": lambda: student(run, tasks, without_kl),
        "agent": lambda: agent(run),
        "evaluate": lambda: whole(run),
    }
    lines: list[Line] = []
    for stage, part in parts.items():
        for line in part() if stage in run.artifacts else ():
            print(line, flush=True)
            lines.append(line)
        if stage not in run.artifacts:
            print(f"  {stage}: not run")
    print(f"  measured in {time.perf_counter() - began:.0f} s", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="?", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--read", type=Path, nargs="+", metavar="DIR", help="measure these finished runs")
    parser.add_argument("--out", type=Path, default=Path("runs/learn"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-kl", choices=("on", "off"), default="on", help="train the student without KL, too")
    parser.add_argument("--per-family", type=int, default=200, help="tasks per family that accuracies are measured on")
    parser.add_argument("--practice", default="practice", help="the stage whose kinds of tasks RL is measured on")
    parser.add_argument("--candidates", type=int, default=700, help="tasks per family of which the moderate ones are chosen")
    parser.add_argument("--pass-samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, {torch.get_num_threads()} threads, device {args.device}")
    folders = args.read or [args.out / f"{Path(args.recipe).stem}-seed{seed}" for seed in args.seeds]
    found = []
    for place, folder in enumerate(folders):
        if not args.read:
            arguments = [args.recipe, f"seed={args.seeds[place]}", "--run-dir", str(folder), "--device", args.device]
            began = time.perf_counter()
            k2(arguments, folder / "stages" / "evaluate-*")
            print(f"k2 run took {time.perf_counter() - began:.0f} s")
        print(f"{folder}", flush=True)
        found.append(measure(folder, args))
    summary([folder.name for folder in folders], found)


if __name__ == "__main__":
    main()
