"""Training speed on one GPU: ours against transformers on the same weights and tokens, in one process, one side after the other.

Feeds: (a) full rows, 8 x 4,096 tokens; (b) the same 32,768 tokens as documents of log-normal lengths (median 600; every
micro-batch has other lengths). In (b) transformers gets 8 rows into which whole documents are dealt evenly, and keeps them apart
by its own means: position_ids that begin anew, from which it builds block-causal masks. Its padding (about 1 %) is not counted as
tokens of its own.

Sides, forward and backward in bf16, gradients dropped after every micro-batch:
  ours      TrainModel and the LM objective
  plain     transformers as it comes: sdpa attention, its default experts, its own loss
  compiled  plain under torch.compile (--regional: layer by layer, which compiles faster)
  cudnn     compiled, with attention chosen by hand: cuDNN's kernel (feed b: with the mask; the memory-efficient one if it
            refuses)
  flex      compiled, with flex attention: transformers' sparse way for (b)
`--step` measures our whole step at 262,144 tokens with MuonClip: forward and backward of 8 micro-batches, gradient norm and
clipping, MuonClip, router bias and metrics; `--capture` how much of forward and backward the maximum logits cost.

TFLOP/s are model flops from true document lengths: 6 x (weights a token is multiplied by) x tokens + 3 x layers x heads x
(qk + v) x sum of squared lengths (causal: half of the square), over time. Peak memory counts bf16 weights and gradients.

    python bench/gpu_step.py [--sides ours,plain] [--feeds a,b] [--profile ours:a,step] [--step] [--capture] [--iterations 8]
"""

from __future__ import annotations

import argparse
import itertools
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _gpu import (
    Clocks,
    Feed,
    Step,
    about,
    blank,
    clock,
    feeds,
    forget,
    model_flops,
    ours,
    peak_gb,
    profile,
    reset_peak,
    syncs,
    timed,
)

from k2lab import specs
from k2lab.engine.objectives.lm import LM
from k2lab.engine.step import to_device
from k2lab.optim.muonclip import MuonClip
from k2lab.specs import ModelSpec

WARM = 3  # micro-batches before the clock runs; the timed ones have lengths not seen before


def our_side(spec: ModelSpec, options: argparse.Namespace) -> tuple[Callable[[Feed], torch.Tensor], Any]:
    model = ours(spec, options.device, options.dtype)
    model.capture_max_logits(100.0)
    objective = LM()

    def micro(feed: Feed) -> torch.Tensor:
        sums = objective.sums(model, to_device(feed.batch, options.device))
        loss = sums["lm"] / feed.batch.num_tokens
        loss.backward()
        return loss.detach()

    return micro, model


def rival_side(spec: ModelSpec, options: argparse.Namespace, mode: str) -> tuple[Callable[[Feed], torch.Tensor], Any]:
    model = blank(spec, options.device, options.dtype).train()
    model.config.use_cache = False
    if mode == "flex":
        model.set_attn_implementation("flex_attention")
    if mode != "plain":
        if options.regional:
            for layer in model.model.layers:
                layer.compile()
        else:
            model.compile()
    print(f"  {mode}: attention {model.config._attn_implementation}, experts {model.config._experts_implementation}")
    by_hand = mode == "cudnn"

    def micro(feed: Feed) -> torch.Tensor:
        arrays = {name: to_gpu(value, options.device) for name, value in feed.rival_arrays().items()}
        if all(len(row) == 1 for row in feed.rows):
            del arrays["position_ids"]  # full rows: no mask, the causal kernel
        if by_hand and options.device.type == "cuda":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True):
                loss = model(**arrays, labels=arrays["shift_labels"]).loss
        else:
            loss = model(**arrays, labels=arrays["shift_labels"]).loss
        loss.backward()
        return loss.detach()

    return micro, model


def to_gpu(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    return (array.pin_memory() if device.type == "cuda" else array).to(device, non_blocking=True)


def parameters(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for _, parameter in model.named_parameters()]


def measure(
    name: str, kind: str, micro: Callable[[Feed], torch.Tensor], model: Any, spec: ModelSpec, options: argparse.Namespace
) -> float:
    """Prints one line; tokens per second over all timed micro-batches."""
    given = feeds(kind, WARM + options.iterations, options.tokens, options.row, spec.vocab_size)
    began = time.perf_counter()
    losses = []

    def run(feed: Feed) -> None:
        losses.append(micro(feed))
        for parameter in parameters(model):
            parameter.grad = None

    first = micro(given[0])
    norm = torch.linalg.vector_norm(torch.stack([p.grad.float().norm() for p in parameters(model) if p.grad is not None]))
    said = f"loss {float(first):.5f}, gradient norm {float(norm):.5f}"
    for feed in given[:WARM]:
        run(feed)
    if options.device.type == "cuda":
        torch.cuda.synchronize()
    warm = time.perf_counter() - began
    reset_peak(options.device)
    with Clocks(options.device) as clocks:
        seconds = timed([partial(run, feed) for feed in given[WARM:]], options.device)
    rate = options.tokens * len(seconds) / sum(seconds)
    flops = sum(model_flops(spec, feed.lengths) for feed in given[WARM:])
    print(
        f"{clock()} {name:9s} ({kind}) {rate / 1e3:7.1f}k tok/s  {flops / sum(seconds) / 1e12:6.1f} TFLOP/s  "
        f"{1e3 * sum(seconds) / len(seconds):7.1f} ms per micro-batch  peak {peak_gb(options.device):.1f} GB  {said}"
    )
    each = " ".join(f"{1e3 * value:.0f}" for value in seconds)
    print(f"          each {each} ms; warm-up {warm:.1f} s; {clocks.said}", flush=True)
    return rate


def micro_batches(spec: ModelSpec, options: argparse.Namespace) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for given in options.sides.split(","):
        side, _, own = given.partition(":")
        kinds = list(own) or options.feeds.split(",")
        forget()
        micro = model = None
        try:
            micro, model = our_side(spec, options) if side == "ours" else rival_side(spec, options, side)
            for kind in kinds:
                found[side, kind] = measure(side, kind, micro, model, spec, options)
            if side == "ours" and options.capture:
                captured(micro, model, spec, options)
            for kind in kinds:
                if f"{side}:{kind}" in options.profile.split(","):
                    looked_into(micro, model, kind, spec, options)
        except Exception:
            print(f"{clock()} {side} failed: " + "".join(traceback.format_exc().splitlines(keepends=True)[-12:]), flush=True)
        del micro, model
    return found


def looked_into(
    micro: Callable[[Feed], torch.Tensor], model: Any, kind: str, spec: ModelSpec, options: argparse.Namespace
) -> None:
    """Kernels of a micro-batch, and where the host waits in one of lengths not seen before."""
    given = feeds(kind, WARM + options.iterations + 2, options.tokens, options.row, spec.vocab_size)[-2:]

    def run(feed: Feed) -> None:
        micro(feed)
        for parameter in parameters(model):
            parameter.grad = None

    profile(partial(run, given[0]))
    syncs(partial(run, given[1]))


def captured(micro: Callable[[Feed], torch.Tensor], model: Any, spec: ModelSpec, options: argparse.Namespace) -> None:
    """Forward and backward with and without observing the maximum logits, in turns."""
    for kind in options.feeds.split(","):
        given = feeds(kind, 4, options.tokens, options.row, spec.vocab_size)
        stats, taken = model._stats, {True: 0.0, False: 0.0}

        def run(feed: Feed) -> None:
            model.reset_max_logits()
            micro(feed)
            for parameter in parameters(model):
                parameter.grad = None

        for turn in range(3):
            for on in (True, False):
                model._stats = stats if on else {}
                seconds = timed([partial(run, feed) for feed in given], options.device)
                taken[on] += sum(seconds) if turn else 0.0
        model._stats = stats
        exact = sum(model.max_logits_exact().values())
        share = 100 * (taken[True] / taken[False] - 1)
        print(f"{clock()} maximum logits ({kind}): {share:+.2f} % of forward and backward; {exact} layers exact")


def full_step(spec: ModelSpec, options: argparse.Namespace) -> None:
    """Our whole optimizer step at `--step-tokens` tokens."""
    forget()
    model = ours(spec, options.device, options.dtype)
    optim = MuonClip(lr=2e-4, master=options.master).build(model.named_parameters(), model.row_layouts())
    model.capture_max_logits(100.0)
    step = Step(model, optim, wait=options.parts)
    for kind, size in itertools.product(options.feeds.split(","), options.micro.split(",")):
        num = max(1, options.step_tokens // int(size))
        given = feeds(kind, num * 2, int(size), options.row, spec.vocab_size)
        halves = [[feed.batch for feed in half] for half in (given[:num], given[num:])]
        began = time.perf_counter()
        step(halves[0])
        first = time.perf_counter() - began
        step(halves[1])
        step.parts.clear()
        reset_peak(options.device)
        with Clocks(options.device) as clocks:
            seconds = timed([partial(step, halves[n % 2]) for n in range(options.steps)], options.device)
        tokens, flops = int(size) * num, sum(model_flops(spec, feed.lengths) for feed in given[:num])
        mean = sum(seconds) / len(seconds)
        print(
            f"{clock()} full step ({kind}) {tokens / mean / 1e3:7.1f}k tok/s  {flops / mean / 1e12:6.1f} TFLOP/s  "
            f"{mean * 1e3:.0f} ms for {tokens:,} tokens in {num} micro-batches (fastest {min(seconds) * 1e3:.0f})  "
            f"peak {peak_gb(options.device):.1f} GB  first step {first:.1f} s  {clocks.said}  {step.said}",
            flush=True,
        )
        print("    " + "; ".join(f"{name} {1e3 * value / options.steps:.1f} ms" for name, value in step.parts.items()))
        if "step" in options.profile.split(","):
            profile(partial(step, halves[0]), repeats=1)
            syncs(partial(step, halves[0]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-2b")
    parser.add_argument("--sides", default="ours,plain", help="some of ours, plain, compiled, cudnn, flex; cudnn:a = feed a only")
    parser.add_argument("--feeds", default="a,b")
    parser.add_argument("--tokens", type=int, default=32768, help="of a micro-batch")
    parser.add_argument("--row", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--regional", action="store_true", help="compile the rival layer by layer")
    parser.add_argument("--profile", default="", help="kernels by time: ours:a, plain:b, ..., and step")
    parser.add_argument("--capture", action="store_true", help="what maximum logits cost")
    parser.add_argument("--step", action="store_true", help="our whole step with MuonClip")
    parser.add_argument("--step-tokens", type=int, default=262144)
    parser.add_argument("--micro", default="32768", help="of the whole step: tokens of a micro-batch, one or several sizes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--parts", action="store_true", help="of the whole step: wait after each part and print its time")
    parser.add_argument("--master", default="auto", help="fp32 masters: auto or off")
    parser.add_argument("--device", default="cuda", type=torch.device)
    options = parser.parse_args()
    options.dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    return options


def main() -> None:
    options = arguments()
    spec = specs.get(options.model)
    print(about(options.device))
    print(f"{spec.name}, {spec.total():,} parameters, {options.tokens:,} tokens per micro-batch", flush=True)
    if options.step:
        try:
            full_step(spec, options)
        except Exception:
            print(f"{clock()} the step failed: " + "".join(traceback.format_exc().splitlines(keepends=True)[-12:]), flush=True)
    found = micro_batches(spec, options) if options.sides else {}
    for (side, kind), rate in found.items():
        if side != "ours" and ("ours", kind) in found:
            print(f"  ratio ({kind}) ours / {side} {found['ours', kind] / rate:.2f}x")


if __name__ == "__main__":
    main()
