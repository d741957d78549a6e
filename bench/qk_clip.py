"""Does QK-Clip hold the attention logits? Trains `tiny-k2` twice from the same weights on the same tokens, with plain Muon and
with MuonClip, at a high learning rate and without the weight decay that would keep logits small, and draws both.

    python bench/qk_clip.py                       # about five minutes on two CPU cores
    python bench/qk_clip.py --picture docs/pictures/qk_clip.svg

Printed: the largest logit of any head in every twentieth step, the first clip, how far logits ever were above tau after it, and
the mean loss of the last fifth of the steps.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from k2lab.core import events

RECIPE = """base = "tiny-sft"
seed = {seed}
[[stage]]
name = "pretrain"
steps = {steps}
global_batch = {batch}
per_device_batch = {batch}
valid_every = 0
optim = {{ type = "muonclip", lr = {lr}, weight_decay = 0.0, tau = {tau}, schedule = {{ type = "constant", warmup = 10 }} }}
[[stage]]
name = "sft"
skip = true
[[stage]]
name = "evaluate"
skip = true
"""
WIDTH, HEIGHT, LEFT, TOP = 380, 240, 52, 34
COLOURS = {"plain Muon": "#b3413b", "MuonClip": "#2b6cb0"}


@dataclass(frozen=True)
class Line:
    """One run: per step the largest logit of any head and the loss; `clipped` are steps in which a head was scaled."""

    name: str
    logits: list[float]
    losses: list[float]
    clipped: list[int]

    def tail_loss(self) -> float:
        return statistics.mean(self.losses[-len(self.losses) // 5 :])


def run(name: str, tau: str, args: argparse.Namespace) -> Line:
    folder = args.out / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe_source.toml"
    recipe.write_text(RECIPE.format(seed=args.seed, steps=args.steps, lr=args.lr, tau=tau, batch=args.batch), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "k2lab",
        "run",
        str(recipe),
        "--run-dir",
        str(folder / "run"),
        "--device",
        args.device,
        "--quiet",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    steps = [e for e in events.read(folder / "run" / "events") if e["kind"] == "step" and e["stage"] == "pretrain"]
    largest = [max(value for heads in step["max_logits"].values() for value in heads) for step in steps]
    return Line(name, largest, [step["losses"]["lm"] for step in steps], [step["step"] for step in steps if step.get("clipped")])


def panel(lines: list[Line], field: str, title: str, log: bool, level: float | None, x0: int) -> str:
    """One chart: the values of `field` over steps, and a dashed level."""

    def height(value: float) -> float:
        return math.log10(max(value, 1e-3)) if log else value

    values = [height(v) for line in lines for v in getattr(line, field)] + ([height(level)] if level else [])
    low, high = min(values), max(values)
    steps = max(len(line.logits) for line in lines)
    w, h = WIDTH - LEFT - 12, HEIGHT - TOP - 30

    def place(step: int, value: float) -> str:
        return f"{x0 + LEFT + w * step / max(1, steps - 1):.1f},{TOP + h * (1 - (height(value) - low) / (high - low)):.1f}"

    parts = [f'<text x="{x0 + LEFT}" y="20" font-weight="600">{title}</text>']
    if log:
        decades = range(math.floor(low), math.ceil(high) + 1)
        marks = [m * 10.0**n for n in decades for m in (1, 2, 5) if low <= math.log10(m * 10.0**n) <= high]
    else:
        marks = [float(n) for n in range(math.ceil(low), math.floor(high) + 1)]
    for mark in marks:
        x, y = place(0, mark).split(",")
        parts.append(f'<line x1="{x}" x2="{x0 + LEFT + w}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{float(x) - 6}" y="{float(y) + 4}" text-anchor="end" fill="#555">{mark:,.4g}</text>')
    if level:
        x, y = place(0, level).split(",")
        parts.append(f'<line x1="{x}" x2="{x0 + LEFT + w}" y1="{y}" y2="{y}" stroke="#333" stroke-dasharray="5 4"/>')
        parts.append(f'<text x="{x0 + LEFT + w}" y="{float(y) - 5}" text-anchor="end">tau = {level:g}</text>')
    for n, line in enumerate(lines):
        points = " ".join(place(step, value) for step, value in enumerate(getattr(line, field)))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[line.name]}" stroke-width="1.6"/>')
        parts.append(f'<text x="{x0 + LEFT + 8}" y="{TOP + 14 + 15 * n}" fill="{COLOURS[line.name]}">{line.name}</text>')
    parts.append(f'<text x="{x0 + LEFT + w / 2}" y="{HEIGHT - 8}" text-anchor="middle" fill="#555">step (of {steps})</text>')
    return "\n".join(parts)


def picture(lines: list[Line], tau: float) -> str:
    body = panel(lines, "logits", "largest attention logit of any head", True, tau, 0)
    body += panel(lines, "losses", "training loss, nats per token", False, None, WIDTH)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">'
    )
    return f'{head}\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lr", type=float, default=1.5e-2)
    parser.add_argument("--tau", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="rows of 256 tokens per step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/qk_clip"))
    parser.add_argument("--picture", type=Path)
    args: Any = parser.parse_args()
    print(f"torch {torch.__version__}, {platform.machine()}, device {args.device}; lr {args.lr:g}, no decay, tau {args.tau:g}")
    lines = [run("plain Muon", '"none"', args), run("MuonClip", str(args.tau), args)]
    for line in lines:
        print(f"{line.name:>10}: largest logit, every 20th step: {', '.join(f'{v:.0f}' for v in line.logits[::20])}")
    plain, clip = lines
    after = clip.logits[clip.clipped[0] :] if clip.clipped else [float("nan")]
    when = f"first in step {clip.clipped[0]}, in {len(clip.clipped)} steps" if clip.clipped else "never"
    print(f"  MuonClip: clipped {when}; largest logit after it {max(after):.1f} = {max(after) / args.tau:.2f} tau")
    print(f"  plain Muon: largest logit {max(plain.logits):.0f} = {max(plain.logits) / args.tau:.1f} tau")
    print(f"  mean loss of the last fifth: plain Muon {plain.tail_loss():.3f}, MuonClip {clip.tail_loss():.3f}")
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        args.picture.write_text(picture(lines, args.tau), encoding="utf-8")
        print(f"drawn: {args.picture}")


if __name__ == "__main__":
    main()
