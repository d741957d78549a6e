"""What a very long context costs: attention, logits, cache, hidden states. For stages with 128k tokens per sequence or more."""

from __future__ import annotations

from k2lab.core.types import PlanInput
from k2lab.plan import lines
from k2lab.plan.compute import ATTENTION_PASSES, ATTENTION_PASSES_RECOMPUTED
from k2lab.plan.lines import Section
from k2lab.plan.machines import Machine
from k2lab.plan.memory import LOGITS_CHUNK, check_input

LONG = 131072


def section(inp: PlanInput, machine: Machine) -> Section | None:
    """The table for a stage whose sequences hold at least 131,072 tokens; None for shorter ones."""
    spec = check_input(inp)
    length = inp.seq_len
    if length < LONG:
        return None
    out = Section(f"Long context: one sequence of {length:,} tokens on {inp.gpus} x {machine.gpu}")
    forward = {name: value * length for name, value in spec.flops_per_token(length, training=False).items()}
    attention = forward["mla"] + forward["attention"]
    layers = len(spec.layers_of("mla")) + len(spec.layers_of("attention"))
    width = f"({spec.qk_head_dim} + {spec.value_head_dim})"
    out.add(
        "attention_forward",
        f"attention, {layers} layers, forward",
        attention,
        lines.flop(attention),
        "computed",
        f"layers x {spec.num_attention_heads} heads x {width} x tokens^2 (causal half, 2 flop per multiply-add)",
    )
    if forward["kda"]:
        kda = forward["kda"]
        text = "layers x tokens x (heads (6 d^2 + 3 C d + C^2) + convolutions), C = 64"
        out.add("kda_forward", f"KDA, {len(spec.layers_of('kda'))} layers, forward", kda, lines.flop(kda), "computed", text)
        ratio = (attention / layers) / (kda / len(spec.layers_of("kda")))
        out.add("mla_over_kda", "one attention layer / one KDA layer", ratio, f"{ratio:,.0f} x", "computed", "from the two above")
    out.add(
        "matmul_forward",
        "matrix work, forward",
        forward["matmul"],
        lines.flop(forward["matmul"]),
        "computed",
        "2 x matmul_active x tokens",
    )
    rate = machine.peak(inp.precision) * machine.assumed_attention_mfu * inp.gpus
    speed = f"{inp.gpus} x ASSUMED {rate / inp.gpus / 1e12:,.3g} TFLOP/s"
    for key, label, passes in (
        ("attention_seconds", "attention alone, forward + backward", ATTENTION_PASSES),
        ("attention_seconds_recomputed", "the same with checkpointing", ATTENTION_PASSES_RECOMPUTED),
    ):
        seconds = passes * attention / rate
        out.add(
            key,
            label,
            seconds,
            lines.duration(seconds),
            "assumed",
            f"{passes} x forward / ({speed}); the sequence divided over the GPUs",
        )
    sequences = inp.gpus * inp.per_device_batch * inp.grad_acc
    seconds = sequences * ATTENTION_PASSES * attention / rate
    out.add(
        "attention_seconds_per_step",
        f"attention alone, one step of {sequences:,} sequences",
        seconds,
        lines.duration(seconds),
        "assumed",
        "sequences per step x the above without checkpointing",
    )
    _memory_lines(inp, out)
    return out


def _memory_lines(inp: PlanInput, out: Section) -> None:
    spec, length = check_input(inp), inp.seq_len
    logits = 2 * length * spec.vocab_size
    chunk = LOGITS_CHUNK * spec.vocab_size * 4
    out.add("logits_bytes", "all logits, bf16", logits, lines.size(logits), "computed", f"tokens x {spec.vocab_size:,} x 2 B")
    out.add(
        "logits_chunk_bytes",
        "one chunk of logits, fp32",
        chunk,
        lines.size(chunk),
        "computed",
        f"{LOGITS_CHUNK:,} positions x vocabulary x 4 B",
    )
    each = spec.kv_bytes_per_token()
    out.add("kv_bytes", "key-value cache, bf16", each * length, lines.size(each * length), "computed", f"{each:,} B per token")
    if spec.state_bytes():
        state = spec.state_bytes()
        out.add(
            "state_bytes", "KDA state, fp32", state, lines.size(state), "computed", "layers x heads x d^2 x 4 B, at any length"
        )
        whole = spec.num_layers * (spec.kv_lora_rank + spec.qk_rope_head_dim) * 2 * length
        out.add(
            "kv_bytes_all_mla",
            "cache if every layer were MLA",
            whole,
            lines.size(whole),
            "computed",
            f"{spec.num_layers} layers instead",
        )
    hidden = 2 * length * spec.hidden_size
    out.add(
        "hidden_bytes", "one hidden state, bf16", hidden, lines.size(hidden), "computed", f"tokens x {spec.hidden_size:,} x 2 B"
    )
    kept = spec.num_layers * hidden
    out.add(
        "checkpoint_bytes", "checkpointed hidden states", kept, lines.size(kept), "computed", f"one per layer x {spec.num_layers}"
    )
    out.remarks.append(
        f"The loss must be computed in chunks: all logits at once are {lines.size(logits)}, and their gradient is as much again."
    )
    out.remarks.append(
        f"The {spec.num_layers} checkpointed hidden states take {lines.size(kept)} per sequence: "
        "shard the sequence over GPUs or offload them."
    )
    if length > spec.max_position_embeddings:
        out.remarks.append(f"{length:,} tokens exceed the {spec.max_position_embeddings:,} that {spec.name} was trained for.")
