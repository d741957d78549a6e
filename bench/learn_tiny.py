"""Does the laptop recipe learn? Runs a recipe with several seeds and prints each run's figures beside what they must reach.

    python bench/learn_tiny.py                      # tiny-sft, seeds 1 2 3: about four minutes each on two cores
    python bench/learn_tiny.py tiny --seeds 1        # the first half of `tiny`, which has fewer steps

Must reach: bits per byte on held-out modules below an interpolated Witten-Bell bigram over the same tokens and text (goal:
trigram); response loss
at least 25 % below the pretrained model's; at least 95 % of sampled answers end their turn, are non-empty and hold no other
special token; at least 80 % name the asked object. There is no rival here: the count tables are the floor.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

LOSSES = ("response_loss", "response_loss/docstring_qa", "response_loss/general")


def figures(run_dir: Path) -> dict[str, float]:
    """The figures of one finished run."""
    results = json.loads(next(run_dir.glob("stages/evaluate-*/results.json")).read_text())
    metric = {(m["name"], x["metric"]): x["value"] for m in results["models"] for x in m["metrics"]}
    floor = {b["name"].split()[0]: b["value"] for b in results["baselines"] if b["metric"] == "bits_per_byte"}
    drops = {part: 100 * (1 - metric["sft", part] / metric["pretrain", part]) for part in LOSSES}
    shapes = ("eos_rate", "non_empty", "no_other_special")
    return {
        "bpb": metric["pretrain", "bits_per_byte"],
        **floor,
        **{f"{part.removeprefix('response_')} drop %": drop for part, drop in drops.items()},
        **{shape: 100 * metric["sft", f"docstring_names/{shape}"] for shape in shapes},
        "names object %": 100 * metric["sft", "docstring_names/avg@1"],
        "general exact %": 100 * metric["sft", "general_exact/avg@1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="?", default="tiny-sft")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/learn"))
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{platform.machine()}, {versions}, {torch.get_num_threads()} threads")
    rows = []
    for seed in args.seeds:
        run_dir = args.out / f"{args.recipe}-seed{seed}"
        began = time.perf_counter()
        command = [sys.executable, "-m", "k2lab", "run", args.recipe, f"seed={seed}", "--quiet", "--run-dir", str(run_dir)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        peak = max(json.loads(path.read_text())["peak_rss_mb"] for path in run_dir.glob("stages/*/manifest.json"))
        rows.append({**figures(run_dir), "seconds": time.perf_counter() - began, "peak MB": peak})
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
    print(f"{'':<18}" + "".join(f"{f'seed {s}':>10}" for s in args.seeds) + f"{'mean':>10}")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name:<18}" + "".join(f"{v:>10.4g}" for v in values) + f"{sum(values) / len(values):>10.4g}")


if __name__ == "__main__":
    main()
