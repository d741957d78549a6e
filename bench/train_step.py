"""One training step on a CPU: ours against transformers' default path, same model, same tokens, alternating in one process.

Forward, backward, gradient clipping and fused AdamW in fp32 on one pack of documents with log-normal lengths (median about 200).
The rival is transformers as it comes: sdpa attention, its default experts, documents kept apart through position_ids, its own
loss. Both use torch.optim.AdamW(fused=True), so the difference is the model. Also printed: CPU seconds of the process per step,
which a busy machine disturbs less than the clock. Our allocator setting stays on for both.

On a machine that does other work too, set GOMP_SPINCOUNT=1000 as `k2` does: threads that spin at every barrier keep the cores
from each other (measured beside one busy process: 19.8 s per step without, 1.5 s with it).

    python bench/train_step.py [--tokens 4096] [--rounds 5] [--threads 2] [--model tiny-k2] [--profile]
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
from transformers import DeepseekV3ForCausalLM, KimiLinearForCausalLM

from k2lab import specs
from k2lab.core.rng import rng
from k2lab.core.types import Batch
from k2lab.models import build
from k2lab.models.losses import linear_cross_entropy


def documents(tokens: int, median: float = 200.0, spread: float = 0.7) -> list[int]:
    """Log-normal document lengths that sum to `tokens`."""
    draw, lengths = rng(0, "bench", "lengths"), []
    while sum(lengths) < tokens:
        lengths.append(int(np.clip(draw.lognormal(np.log(median), spread), 8, 2048)))
    lengths[-1] -= sum(lengths) - tokens
    return [n for n in lengths if n > 0]


def pack(lengths: list[int], vocab: int) -> Batch:
    """Random tokens in documents of these lengths."""
    starts = np.cumsum([0, *lengths])
    tokens = rng(0, "bench", "tokens").integers(0, vocab, starts[-1])
    weight = np.ones(starts[-1], np.float32)
    weight[starts[1:] - 1] = 0
    positions = np.concatenate([np.arange(n) for n in lengths])
    arrays = [torch.from_numpy(x) for x in (tokens, np.roll(tokens, -1), weight, positions, starts)]
    return Batch(*arrays, num_tokens=int(weight.sum()))


def ours(spec: specs.ModelSpec, batch: Batch) -> Callable[[], float]:
    model = build.from_spec(spec, seed=0).train()
    parameters = [parameter for _, parameter in model.named_parameters()]
    optim = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> float:
        total, _ = linear_cross_entropy(model.hidden(batch), model.head(), batch.targets_T, batch.weight_T)
        loss = total / batch.num_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optim.step()
        optim.zero_grad()
        return float(loss.detach())

    return step


def rival(spec: specs.ModelSpec, batch: Batch) -> Callable[[], float]:
    config = build.hf_config(spec)
    config.use_cache = False
    model = (DeepseekV3ForCausalLM if spec.family == "kimi_k2" else KimiLinearForCausalLM)(config).train()
    model.load_state_dict(build.from_spec(spec, seed=0).state())
    optim = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    labels = batch.targets_T.masked_fill(batch.weight_T == 0, -100)

    def step() -> float:
        loss = model(
            input_ids=batch.tokens_T[None], position_ids=batch.positions_T[None], shift_labels=labels[None], labels=labels[None]
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        return float(loss.detach())

    return step


def timed(step: Callable[[], float]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, loss) of one step."""
    wall, used = time.perf_counter(), time.process_time()
    loss = step()
    return time.perf_counter() - wall, time.process_time() - used, loss


def device() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="tiny-k2")
    parser.add_argument("--profile", action="store_true", help="also print where our step spends its time")
    parser.add_argument("--ours-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = specs.get(options.model)
    lengths = documents(options.tokens)
    batch = pack(lengths, spec.vocab_size)
    steps = {"ours": ours(spec, batch)}
    if not options.ours_only:
        steps["transformers"] = rival(spec, batch)
    print(f"device        {device()}")
    print(f"versions      python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"model         {spec.name}, {spec.total():,} parameters; {options.tokens} tokens in {len(lengths)} documents")
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, step in steps.items():
            result = timed(step)
            if turn:  # the first round warms up
                taken[name].append(result)
    flops = sum(spec.flops_per_token(options.tokens // len(lengths)).values())
    medians = {}
    for name, results in taken.items():
        wall, used = (statistics.median(r[i] for r in results) for i in (0, 1))
        medians[name] = wall
        rate = options.tokens / wall
        print(
            f"{name:13s} {wall:.3f} s/step (fastest {min(r[0] for r in results):.3f}), {used:.3f} CPU s, {rate:,.0f} tokens/s, "
            f"{rate * flops / 1e9:.0f} GFLOP/s, loss {results[0][2]:.5f} -> {results[-1][2]:.5f}"
        )
    if "transformers" in medians:
        print(f"ratio         {medians['transformers'] / medians['ours']:.2f}x")
    if options.profile:
        with torch.profiler.profile() as seen:
            steps["ours"]()
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=44))


if __name__ == "__main__":
    main()
