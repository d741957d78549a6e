"""Is what we export what an engine serves? Log-probabilities of our own model beside those of vLLM or transformers.

    python bench/serve_parity.py [MODEL_DIR] [--engine vllm --python /path/to/python] [--formats bf16,fp8,int4]

MODEL_DIR is any bf16 or fp32 folder with a tokenizer (default: one is made, Kimi K2's parts and head geometry, 11 M parameters,
random weights). It is exported by `k2 convert` in every format; the engine opens each export, answers 64 prompts with 32 tokens,
greedily and drawn at temperature 1, and says the log-probability of each token. Our model opens the same export and is given the
same tokens.

    greedy      answers of which we would have chosen every token
    |dlogp|     largest difference of log-probabilities, over greedy and drawn tokens; in fp32 without the tokens behind a choice
                of experts by less than 2e-6, which sums in another order decide otherwise (how many: said below the table)
    k3          mean of exp(r) - 1 - r over drawn tokens, r = log p (ours) - log p (engine): an estimate of KL(engine || ours)
    unpacked    the same k3 with our weights *before* they were quantised: what a wrong grid would look like
    chat        whether the engine renders a conversation to our tokens and ends answers at the token that ends a turn

In fp32 greedy answers must be equal and |dlogp| <= 1e-3; in bf16 k3 <= 1e-3. `--python` names the interpreter that has the
engine; k2lab need not be installed there. On a CPU vLLM serves INT4 and FP8 experts only where the processor has AMX.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _served as served
import numpy as np
import torch

from k2lab import cli

HERE = Path(__file__).parent
MAX_DLOGP, MAX_K3 = 1e-3, 1e-3
SAID = {True: "yes", False: "NO", None: "shown only"}
TIE = 2e-6  # of router scores, which lie between 0 and 1


def export(source: Path, formats: list[str], root: Path) -> dict[str, Path]:
    """{format: folder}, written by `k2 convert`."""
    folders = {}
    for name in formats:
        folders[name] = root / name
        code = cli.main(["convert", "--quiet", str(source), str(folders[name]), "--to", name])
        if code:
            raise SystemExit(code)
    return folders


def ask(args: argparse.Namespace, folder: Path, dtype: str, prompts: list[list[int]], root: Path) -> dict[str, Any]:
    """The engine's answer, or {"refused": the last line it said}."""
    job = {
        "model": str(folder),
        "dtype": dtype,
        "prompts": prompts,
        "tokens": args.tokens,
        "messages": served.MESSAGES,
        "options": json.loads(args.options),
        "weights": str(root / f"{folder.name}-{dtype}.experts.safetensors"),
    }
    name = f"{folder.name}-{dtype}"
    files = root / f"{name}.job.json", root / f"{name}.answer.json"
    files[0].write_text(json.dumps(job), encoding="utf-8")
    command = [args.python, str(HERE / f"_engine_{args.engine}.py"), *map(str, files)]
    with open(root / f"{name}.log", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=served.environment(), check=False).returncode
    if code:
        lines = (root / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line.split(": ", 1)[-1].strip() for line in lines if "Error: " in line]
        return {"refused": next((line for line in told if line), lines[-1] if lines else "nothing was said")}
    return json.loads(files[1].read_text(encoding="utf-8"))


def compare(model: Any, dtype: str, answer: dict[str, Any], prompts: list[list[int]]) -> dict[str, Any]:
    """Figures of one answer."""
    ours = {
        kind: served.score(model, [(prompt, row["tokens"]) for prompt, row in zip(prompts, answer[kind])])
        for kind in ("greedy", "drawn")
    }
    # In fp32 sums in another order differ by about 1e-6; where two experts are nearer to each other than that, either is right.
    tie = TIE if dtype == "float32" else -1.0
    apart, decided = {}, {}
    for kind, scored in ours.items():
        theirs = np.concatenate([row["logprobs"] for row in answer[kind]])
        decided[kind] = np.concatenate([each.gap for each in scored]) > tie
        apart[kind] = np.concatenate([each.logp for each in scored]) - theirs
    equal = sum(
        bool(((each.best == row["tokens"]) | (each.gap <= tie)).all()) for each, row in zip(ours["greedy"], answer["greedy"])
    )
    r = apart["drawn"]
    return {
        "answers": len(prompts),
        "equal": equal,
        "dlogp": max(float(np.abs(apart[kind][decided[kind]]).max()) for kind in ours),
        "dlogp_with_ties": max(float(np.abs(each).max()) for each in apart.values()),
        "ties": sum(int((~each).sum()) for each in decided.values()),
        "tokens": sum(each.size for each in decided.values()),
        "k3": float(np.mean(np.expm1(r) - r)),
        "mean_logp": float(np.mean(np.concatenate([row["logprobs"] for row in answer["drawn"]]))),
    }


def verdict(args: argparse.Namespace, row: dict[str, Any]) -> bool | None:
    """None: nothing is promised. vLLM's FP8 layers round activations to FP8, too."""
    if row["format"] == "fp8" and args.engine == "vllm":
        return None
    if row["dtype"] == "float32":
        return row["equal"] == row["answers"] and row["dlogp"] <= MAX_DLOGP
    return row["k3"] <= MAX_K3


def measure(
    args: argparse.Namespace, folders: dict[str, Path], plain: Path, prompts: list[list[int]], root: Path
) -> list[dict[str, Any]]:
    """One row per format and arithmetic."""
    cases = [(name, dtype) for name in folders for dtype in args.dtypes.split(",")]
    with ThreadPoolExecutor(args.at_once) as pool:
        answers = list(pool.map(lambda case: ask(args, folders[case[0]], case[1], prompts, root), cases))
    rows = []
    for (name, dtype), answer in zip(cases, answers):
        row = {"format": name, "dtype": dtype, "answer": answer}
        rows.append(row)
        if "refused" in answer:
            continue
        row |= compare(served.load(folders[name], dtype, args.device), dtype, answer, prompts)
        row["reached"] = verdict(args, row)
        if name != "bf16":
            row["unpacked"] = compare(served.load(plain, dtype, args.device), dtype, answer, prompts)["k3"]
        weights = root / f"{name}-{dtype}.experts.safetensors"
        if weights.exists():
            row["experts"] = served.experts_apart(folders[name], weights)
        tokens, end = served.our_chat(folders[name])
        row["chat"] = answer.get("chat") == tokens and end in answer.get("ends", [])
    return rows


def show(rows: list[dict[str, Any]], device: str) -> None:
    first = next((row["answer"] for row in rows if "refused" not in row["answer"]), {})
    versions = ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items())
    print(f"\nengine: {versions} on {first.get('device', '?')}; ours: torch {torch.__version__} on {device}")
    print(f"{'format':<7}{'in':<10}{'greedy equal':>13}{'max |dlogp|':>13}{'k3':>10}{'unpacked':>10}{'chat':>6}  must")
    for row in rows:
        if "refused" in row["answer"]:
            print(f"{row['format']:<7}{row['dtype']:<10}refused: {row['answer']['refused'][:150]}")
            continue
        must = "equal, |dlogp| <= 1e-3" if row["dtype"] == "float32" else "k3 <= 1e-3"
        unpacked = f"{row['unpacked']:.2e}" if "unpacked" in row else ""
        print(
            f"{row['format']:<7}{row['dtype']:<10}{row['equal']:>6} of {row['answers']:<3}{row['dlogp']:>13.2e}{row['k3']:>10.2e}"
            f"{unpacked:>10}{'yes' if row['chat'] else 'NO':>6}  {must}: {SAID[row['reached']]}"
        )
    for row in rows:
        if "refused" not in row["answer"]:
            ties = ""
            if row["ties"]:
                ties = f"; {row['ties']} of {row['tokens']} tokens left out behind a tie of experts"
                ties += f", with them |dlogp| {row['dlogp_with_ties']:.1e}"
            if "experts" in row:
                ties += f"; experts as the kernel multiplies by them: {row['experts'][0]} of {row['experts'][1]} values differ"
            kernels = "; ".join(f"{part} {names}" for part, names in row["answer"]["kernels"].items())
            seconds = f"{row['answer']['seconds_to_load']:.0f} + {row['answer']['seconds']:.0f} s"
            print(f"  {row['format']} {row['dtype']}: {kernels}; mean log p {row['mean_logp']:.2f}; {seconds}{ties}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a folder with weights in bf16 or fp32 and a tokenizer")
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="transformers")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the engine")
    parser.add_argument("--formats", default="bf16,int4,fp8")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="the engine's arithmetic, and ours")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--options", default="{}", help="more arguments of vLLM's LLM(), as JSON")
    parser.add_argument("--device", default="cpu", help="of our model")
    parser.add_argument("--at-once", type=int, default=1, help="engines that run at the same time")
    parser.add_argument("--keep", type=Path, help="where to leave exports, jobs and logs")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    root = args.keep or Path(tempfile.mkdtemp(prefix="serve_parity-"))
    root.mkdir(parents=True, exist_ok=True)
    source = args.model or root / "made"
    if args.model is None and not source.exists():
        # transformers guesses the height of FP8 blocks from rows and scales: Kimi K2's latent of 512 + 64 rows is refused
        served.make(source, **({"qk_rope_head_dim": 128} if args.engine == "transformers" else {}))
    prompts = served.prompts(source, args.prompts)
    folders = export(source, args.formats.split(","), root)
    rows = measure(args, folders, folders.get("bf16", source), prompts, root)
    show(rows, args.device)
    if args.json:
        for row in rows:
            row["answer"] = {key: value for key, value in row["answer"].items() if key not in ("greedy", "drawn", "served")}
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if args.keep is None:
        shutil.rmtree(root)
    judged = [row for row in rows if "refused" not in row["answer"]]
    return 0 if judged and all(row["reached"] is not False and row["chat"] for row in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
