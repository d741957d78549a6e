"""What MuonClip costs on a small model: whole training steps against AdamW, and Newton-Schulz against torch.optim.Muon's.

Step: forward, backward, gradient clipping and optimizer on one pack, with the same model, tokens and initial weights, the
optimizers taking turns in one process. MuonClip's steps also observe the largest logit of every head and apply QK-Clip.
"muonclip" chooses the number type of Newton-Schulz by itself, "muonclip fp32" is told; "torch" is torch.optim.Muon plus
torch.optim.AdamW, without QK-Clip: it takes no 3-D tensors, so it gets every expert's gate, up and down as a matrix of its
own.

Newton-Schulz: all Muon matrices of the model with random gradients, ours in stacks (both number types) against torch's loop.

Times are medians over rounds (fastest in brackets), with the CPU seconds of the process beside them, which a busy machine
disturbs less than the clock.

    python bench/muonclip_step.py [--tokens 4096] [--rounds 7] [--threads 2] [--model tiny-k2]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from torch.optim._muon import _zeropower_via_newtonschulz

from k2lab import specs
from k2lab.core.rng import rng
from k2lab.core.types import Batch
from k2lab.models import build
from k2lab.models.losses import linear_cross_entropy
from k2lab.optim._newton_schulz import newton_schulz
from k2lab.optim.adamw import AdamW
from k2lab.optim.muonclip import MuonClip
from k2lab.optim.schedules.constant import Constant

Timing = tuple[float, float, float]  # whole step, optimizer alone (both wall seconds), CPU seconds


def pack(tokens: int, vocab: int, document: int = 256) -> Batch:
    """Random tokens in documents of equal length."""
    starts = np.arange(0, tokens + 1, document)
    ids = rng(0, "bench", "tokens").integers(0, vocab, starts[-1])
    weight = np.ones(len(ids), np.float32)
    weight[starts[1:] - 1] = 0
    arrays = [torch.from_numpy(x) for x in (ids, np.roll(ids, -1), weight, np.arange(len(ids)) % document, starts)]
    return Batch(*arrays, num_tokens=int(weight.sum()))


class TorchMuon:
    """torch.optim.Muon and AdamW with the table of ours: fused experts are given as views, one matrix each."""

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]], table: list) -> None:
        params = dict(named)
        self.views: list[tuple[torch.nn.Parameter, torch.nn.Parameter, int]] = []
        matrices, rest = [], []
        for row in table:
            param = params[row.name]
            if row.optimizer != "muon":
                rest.append(param)
            elif param.ndim == 2:
                matrices.append(param)
            else:
                blocks = param.data.view(-1, param.shape[1] // row.split, param.shape[2])
                for index, block in enumerate(blocks):
                    own = torch.nn.Parameter(block)
                    self.views.append((own, param, index))
                    matrices.append(own)
        self.params = list(params.values())
        self.muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

    def clip(self, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.params, max_norm))

    def step(self, step: int, total_steps: int, max_logits: object) -> None:
        for own, param, index in self.views:
            own.grad = param.grad.view(-1, *own.shape)[index]
        self.muon.step()
        self.adamw.step()

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None


def stepper(spec: specs.ModelSpec, batch: Batch, config: AdamW | MuonClip | None) -> tuple[Callable[[], Timing], object]:
    """A function that makes one training step, and its optimizer. `config` None = torch's own optimizers."""
    model = build.from_spec(spec, seed=0).train()
    named = list(model.named_parameters())
    optim = (config or MuonClip(lr=1e-3, ns_dtype="bf16")).build(named, model.row_layouts())
    if config is None:
        optim = TorchMuon(named, optim.table())
    model.capture_max_logits(getattr(config, "tau", None))

    def step() -> Timing:
        began, used = time.perf_counter(), time.process_time()
        model.reset_max_logits()
        total, _ = linear_cross_entropy(model.hidden(batch), model.head(), batch.targets_T, batch.weight_T)
        (total / batch.num_tokens).backward()
        turn = time.perf_counter()
        optim.clip(1.0)
        optim.step(0, 1000, model.max_logits())
        ended = time.perf_counter()
        optim.zero_grad()
        return time.perf_counter() - began, ended - turn, time.process_time() - used

    return step, optim


def rounds(steps: dict[str, Callable[[], Timing]], count: int) -> dict[str, list[Timing]]:
    """`count` timings of each step, taking turns, after one round to warm up."""
    taken: dict[str, list[Timing]] = {name: [] for name in steps}
    for turn in range(count + 1):
        for name, step in steps.items():
            result = step()
            if turn:
                taken[name].append(result)
    return taken


def clocked(work: Callable[[], object]) -> Callable[[], Timing]:
    def step() -> Timing:
        began, used = time.perf_counter(), time.process_time()
        work()
        wall = time.perf_counter() - began
        return wall, wall, time.process_time() - used

    return step


def newton_schulz_steps(table: list) -> tuple[dict[str, Callable[[], Timing]], str]:
    """Newton-Schulz of all Muon matrices of a model: ours by stacks of equal shape, torch's matrix by matrix."""
    counts: dict[tuple[int, int], int] = {}
    for row in table:
        if row.optimizer == "muon":
            shape = tuple(sorted((row.shape[-2] // row.split, row.shape[-1])))
            counts[shape] = counts.get(shape, 0) + row.split * (row.shape[0] if len(row.shape) == 3 else 1)
    draw = rng(0, "bench", "gradients")
    stacks = [torch.from_numpy(draw.standard_normal((n, *shape), dtype=np.float32)) for shape, n in counts.items()]

    def ours(bf16: bool) -> None:
        for stack in stacks:
            for part in stack.split(max(1, (1 << 19) // stack[0].numel())):
                newton_schulz(part, 5, bf16)

    def theirs() -> None:
        for stack in stacks:
            for matrix in stack:
                _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)

    works = {"ours bf16": lambda: ours(True), "ours fp32": lambda: ours(False), "torch bf16": theirs}
    return {name: clocked(work) for name, work in works.items()}, f"{sum(counts.values())} matrices of {len(counts)} shapes"


def median(results: list[Timing], column: int) -> float:
    return statistics.median(result[column] for result in results)


def show(taken: dict[str, list[Timing]], base: str) -> None:
    """Prints one line per name, with the ratio of its median wall and CPU time to `base`'s."""
    for name, results in taken.items():
        wall, optim, used = (median(results, column) for column in range(3))
        ratios = [median(results, column) / median(taken[base], column) for column in (0, 2)]
        print(
            f"  {name:13s} {wall * 1e3:7.1f} ms (fastest {min(r[0] for r in results) * 1e3:.1f}), "
            f"clip+update {optim * 1e3:.1f} ms, {used * 1e3:7.1f} CPU ms; {ratios[0]:.2f} x {base}, {ratios[1]:.2f} in CPU time"
        )


def device() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="tiny-k2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = specs.get(options.model)
    batch = pack(options.tokens, spec.vocab_size)
    constant = Constant()
    configs = {
        "adamw": AdamW(lr=1e-3, schedule=constant),
        "muonclip": MuonClip(lr=1e-3, schedule=constant),
        "muonclip fp32": MuonClip(lr=1e-3, schedule=constant, ns_dtype="fp32"),
        "torch": None,
    }
    built = {name: stepper(spec, batch, config) for name, config in configs.items()}
    muonclip = built["muonclip"][1]
    print(f"device    {device()}")
    print(f"versions  python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"model     {spec.name}, {spec.total():,} parameters; {options.tokens} tokens")
    print("\n".join(f"          {line}" for line in muonclip.table_text().splitlines()[-4:]))
    print(f"training steps, {options.rounds} rounds")
    taken = rounds({name: step for name, (step, _) in built.items()}, options.rounds)
    show(taken, "adamw")
    # Steps that follow each other meet the same load of the machine: the median of their ratios is steadiest.
    pairs = [own[0] / base[0] for own, base in zip(taken["muonclip"], taken["adamw"])]
    print(f"  muonclip / adamw, median of {len(pairs)} neighbouring pairs: {statistics.median(pairs):.3f} (goal: at most 1.25)")
    steps, what = newton_schulz_steps(muonclip.table())
    print(f"Newton-Schulz alone, {what}, {4 * options.rounds} rounds")
    show(rounds(steps, 4 * options.rounds), "torch bf16")


if __name__ == "__main__":
    main()
