"""A whole training step on one GPU: torchtitan's Trainer on the shape and the tokens of `bench/gpu_trl.py`.

torchtitan 0.2.2, the last release whose imports PyTorch 2.11 satisfies (`pip install torchtitan==0.2.2 --no-deps` and torchdata,
tyro, docstring-parser, typeguard, datasets). Its DeepSeek-V3 model with our numbers: bf16 weights, fused AdamW, grouped experts,
cuDNN attention, each block and the loss compiled, no activation checkpointing. Its own initial weights; full rows.

    python bench/gpu_titan.py [--rows 8] [--accumulate 8] [--steps 3] [--checkpointing none]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from _gpu import Feed, about, clock, feeds, model_flops, peak_gb, reset_peak

from k2lab import specs
from k2lab.specs import ModelSpec

WARM = 2


def model_args(spec: ModelSpec) -> Any:
    from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs
    from torchtitan.models.moe import MoEArgs

    return DeepSeekV3ModelArgs(
        vocab_size=spec.vocab_size,
        dim=spec.hidden_size,
        inter_dim=spec.intermediate_size,
        moe_inter_dim=spec.moe_intermediate_size,
        n_layers=spec.num_layers,
        n_dense_layers=spec.first_k_dense_replace,
        n_heads=spec.num_attention_heads,
        norm_eps=spec.rms_norm_eps,
        q_lora_rank=spec.q_lora_rank or 0,
        kv_lora_rank=spec.kv_lora_rank,
        qk_nope_head_dim=spec.qk_nope_head_dim,
        qk_rope_head_dim=spec.qk_rope_head_dim,
        v_head_dim=spec.v_head_dim,
        rope_theta=spec.rope_theta,
        moe_args=MoEArgs(
            num_experts=spec.n_routed_experts,
            num_shared_experts=spec.n_shared_experts,
            top_k=spec.num_experts_per_tok,
            score_func="sigmoid",
            route_norm=spec.norm_topk_prob,
            route_scale=spec.routed_scaling_factor,
            score_before_experts=False,
        ),
    )


class Rows:
    """A data loader that repeats the micro-batches `given`."""

    def __init__(self, given: list[Feed]) -> None:
        self.arrays = [feed.rival_arrays() for feed in given]

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        while True:
            for arrays in self.arrays:
                yield {"input": arrays["input_ids"]}, arrays["shift_labels"]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def trainer(spec: ModelSpec, given: list[Feed], options: argparse.Namespace, folder: str) -> Any:
    from dataclasses import replace

    from torchtitan.config import JobConfig
    from torchtitan.protocols import train_spec
    from torchtitan.train import Trainer

    shipped = train_spec.get_train_spec("deepseek_v3")
    own = replace(
        shipped,
        model_args={spec.name: model_args(spec)},
        build_tokenizer_fn=None,
        build_dataloader_fn=lambda **ignored: Rows(given),
        build_validator_fn=None,
        state_dict_adapter=None,
    )
    train_spec.register_train_spec("bench", own)
    config = JobConfig()
    config.job.dump_folder = folder
    config.model.name, config.model.flavor = "bench", spec.name
    config.training.local_batch_size = options.rows
    config.training.global_batch_size = options.rows * options.accumulate
    config.training.seq_len = options.row
    config.training.steps = WARM + options.steps
    config.training.dtype = "bfloat16"
    config.optimizer.lr = 2e-4
    config.compile.enable = True
    config.activation_checkpoint.mode = options.checkpointing
    config.metrics.log_freq = 1_000_000
    config.checkpoint.enable = False
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29533",
    }.items():
        os.environ.setdefault(name, value)
    return Trainer(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-2b")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--row", type=int, default=4096)
    parser.add_argument("--accumulate", type=int, default=8, help="micro-batches per optimizer step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--checkpointing", default="none", choices=("none", "selective", "full"))
    options = parser.parse_args()
    spec = specs.get(options.model)
    device = torch.device("cuda")
    import torchtitan

    print(f"{about(device)}, torchtitan {getattr(torchtitan, '__version__', '')}", flush=True)
    given = feeds("a", options.accumulate, options.rows * options.row, options.row, spec.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        titan = trainer(spec, given, options, folder)
        count = sum(parameter.numel() for part in titan.model_parts for parameter in part.parameters())
        print(f"{clock()} {spec.name}: {count:,} parameters (ours {spec.total():,}, router biases among them)", flush=True)
        data = titan.batch_generator(titan.dataloader)
        for _ in range(WARM):
            titan.step += 1
            titan.train_step(data)
        torch.cuda.synchronize()
        print(f"{clock()} warm", flush=True)
        reset_peak(device)
        began = time.perf_counter()
        for _ in range(options.steps):
            titan.step += 1
            titan.train_step(data)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / options.steps
    tokens = sum(sum(feed.lengths) for feed in given)
    flops = sum(model_flops(spec, feed.lengths) for feed in given)
    print(
        f"{clock()} torchtitan {tokens / seconds / 1e3:7.1f}k tok/s  {flops / seconds / 1e12:6.1f} TFLOP/s  "
        f"{seconds * 1e3:.0f} ms for {tokens:,} tokens  peak {peak_gb(device):.1f} GB  checkpointing {options.checkpointing}"
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
