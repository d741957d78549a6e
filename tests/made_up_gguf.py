"""A GGUF file of a small model with random weights, written byte by byte."""

from __future__ import annotations

import struct

from k2lab import specs
from k2lab.ckpt import gguf
from k2lab.models import build
from k2lab.text import layout

TYPE_OF = {label: (kind, values, size) for kind, (label, values, size) in gguf.TYPES.items()}
TYPE_OF["Q6_K"] = (14, 256, 210)  # not read here


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(value):
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        if isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def write(path, metadata, tensors):
    """`tensors` {name: (type, shape, raw bytes)}."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + entry(value) for key, value in metadata.items())
    data, offset = b"", 0
    for name, (kind, shape, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", TYPE_OF[kind][0], offset)
        data += raw + b"\0" * (-len(raw) % 32)
        offset = len(data)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def metadata_of(spec, tokens, kind):
    return {
        "general.architecture": kind,
        f"{kind}.block_count": spec.num_layers,
        f"{kind}.context_length": spec.max_position_embeddings,
        f"{kind}.embedding_length": spec.hidden_size,
        f"{kind}.feed_forward_length": spec.intermediate_size,
        f"{kind}.attention.head_count": spec.num_attention_heads,
        f"{kind}.attention.head_count_kv": spec.num_kv_heads,
        f"{kind}.rope.freq_base": spec.rope_theta,
        f"{kind}.attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["t h", "th e"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
    }


def tensors_of(model, kind):
    """A model's weights under llama.cpp's names; Llama's queries and keys with each rotary pair side by side."""
    back = {ours: theirs for theirs, ours in gguf._LAYER_NAMES.items()}
    whole = {ours: theirs for theirs, ours in gguf._NAMES.items()}
    found = {}
    for name, tensor in model.state().items():
        value = tensor.numpy()
        if name in whole:
            found[whole[name]] = value
            continue
        _, _, layer, *middle, last = name.split(".")
        part = back[".".join(middle)]
        if kind == "llama" and part in ("attn_q", "attn_k"):
            heads = model.spec.num_attention_heads if part == "attn_q" else model.spec.num_kv_heads
            value = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        found[f"blk.{layer}.{part}.{last}"] = value
    return {name: ("F32", value.shape, value.astype("<f4").tobytes()) for name, value in found.items()}


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *layout.byte_to_char(), "th", "the"]


def make(tmp_path, kind):
    spec = specs.get("tiny-qwen2").replace(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        attention_bias=kind == "qwen2",
        local_heads=(),
        tie_word_embeddings=kind == "llama",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = build.from_spec(spec, seed=5)
    return model, write(tmp_path / f"{kind}.gguf", metadata_of(spec, TOKENS, kind), tensors_of(model, kind))
