"""GGUF: a file written here byte by byte comes back as numbers, and as a model that computes what transformers' does."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from k2lab import specs
from k2lab.ckpt import gguf
from k2lab.core.errors import CheckpointError
from k2lab.models import build
from k2lab.stages._import import import_folder, import_gguf
from k2lab.text import layout
from k2lab.text import tokenizer as text_tokenizer

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


def half(*values):
    return np.array(values, "<f2").tobytes()


def test_blocks_are_decoded_by_hand(tmp_path):
    q = np.arange(32)
    nibbles = bytes((q[n] % 16) | (q[n + 16] % 16) << 4 for n in range(16))
    high = np.packbits(q >= 16, bitorder="little").tobytes()
    raws = {
        "Q8_0": (half(0.5) + (q - 16).astype(np.int8).tobytes(), 0.5 * (q - 16)),
        "Q4_0": (half(0.5) + nibbles, 0.5 * (q % 16 - 8)),
        "Q4_1": (half(0.5, -3.0) + nibbles, 0.5 * (q % 16) - 3.0),
        "Q5_0": (half(0.5) + high + nibbles, 0.5 * (q - 16)),
        "Q5_1": (half(0.5, 2.0) + high + nibbles, 0.5 * q + 2.0),
        "F16": (half(*q), q),
        "F32": (q.astype("<f4").tobytes(), q),
        "BF16": ((q.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes(), q),
    }
    tensors = {name: (name, (1, 32), raw) for name, (raw, _) in raws.items()}
    file = gguf.GgufFile(write(tmp_path / "x.gguf", {"a.text": "é", "a.list": [1, -2], "a.words": ["x", "y"]}, tensors))
    assert file.metadata == {"a.text": "é", "a.list": [1, -2], "a.words": ["x", "y"]}
    for name, (_, expected) in raws.items():
        np.testing.assert_array_equal(file.read(name), expected[None].astype(np.float32), err_msg=name)


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


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_import_gives_back_the_model_with_chat_tokens_behind_its_vocabulary(tmp_path, kind):
    model, path = make(tmp_path, kind)
    work = tmp_path / "work"
    work.mkdir()
    facts = import_gguf(path, work, chat_tokens=True)
    found, tokenizer = build.load(work), text_tokenizer.load(work)
    old = len(TOKENS)
    assert facts["added_tokens"] and found.vocab_size == tokenizer.vocab_size == old + len(facts["added_tokens"])
    for name, tensor in model.state().items():
        assert torch.equal(found.state()[name][: len(tensor)], tensor), name
    rows, start, newline = found.state()["model.embed_tokens.weight"], TOKENS.index("<|im_start|>"), TOKENS.index("Ċ")
    assert torch.equal(rows[tokenizer.special_id("<|im_user|>")], rows[start])
    assert torch.equal(rows[tokenizer.special_id("<|im_middle|>")], rows[newline])
    torch.testing.assert_close(rows[tokenizer.special_id("<think>")], rows[:old].mean(0))
    assert tokenizer.im_end_id == 2 and tokenizer.encode("the 12") == [TOKENS.index(t) for t in ("the", "Ġ", "1", "2")]
    tokens = torch.tensor([[5, 9, 30, 2, 77]])
    with torch.no_grad():
        expected, got = (m.eval().hf(tokens).logits[..., :old] for m in (model, found))
    torch.testing.assert_close(got, expected)


def test_a_folder_gets_chat_tokens_too_and_may_be_stored_as_bf16(tmp_path):
    model, path = make(tmp_path, "qwen2")
    plain, chat = tmp_path / "plain", tmp_path / "chat"
    plain.mkdir(), chat.mkdir()
    import_gguf(path, plain, chat_tokens=False)
    facts = import_folder(plain, chat, chat_tokens=True, dtype=torch.bfloat16)
    found = build.load(chat, dtype=torch.bfloat16)
    assert found.vocab_size == len(TOKENS) + len(facts["added_tokens"]) and len(facts["added_tokens"]) >= 11
    for name, tensor in model.state().items():
        assert torch.equal(found.state()[name][: len(tensor)], tensor.bfloat16()), name
    twice = tmp_path / "twice"
    twice.mkdir()
    assert import_folder(chat, twice, chat_tokens=True)["added_tokens"] == []  # they are there already


def test_other_programs_read_the_imported_chat_the_same(tmp_path):
    from transformers import AutoTokenizer

    from k2lab.core.types import Message
    from k2lab.text.chat import render

    _, path = make(tmp_path, "llama")
    work = tmp_path / "work"
    work.mkdir()
    import_gguf(path, work, chat_tokens=True)
    theirs, ours = AutoTokenizer.from_pretrained(str(work)), text_tokenizer.load(work)
    chat = [{"role": "user", "content": "the end 42"}]
    coded = theirs.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)["input_ids"]
    prompt = render([Message.text("user", "the end 42")], ours, add_generation_prompt=True, default_system=False)
    assert list(coded) == prompt.tokens


def test_without_chat_tokens_the_model_stays_as_it_was(tmp_path):
    model, path = make(tmp_path, "llama")
    work = tmp_path / "work"
    work.mkdir()
    assert import_gguf(path, work, chat_tokens=False)["added_tokens"] == []
    assert build.load(work).vocab_size == model.vocab_size
    assert "<|im_user|>" not in text_tokenizer.load(work).special


@pytest.mark.parametrize("change", ["magic", "short", "version", "kind", "tensor", "type", "tokenizer"])
def test_files_that_are_not_what_they_seem(tmp_path, change):
    model, path = make(tmp_path, "llama")
    metadata, tensors = metadata_of(model.spec, TOKENS, "llama"), tensors_of(model, "llama")
    raw = path.read_bytes()
    if change == "magic":
        path.write_bytes(b"XXXX" + raw[4:])
    elif change == "short":
        path.write_bytes(raw[: len(raw) // 2])
    elif change == "version":
        path.write_bytes(raw[:4] + struct.pack("<I", 9) + raw[8:])
    elif change == "kind":
        write(path, {**metadata, "general.architecture": "gemma3"}, tensors)
    elif change == "tensor":
        write(path, metadata, {**tensors, "blk.0.ffn_gate_exps.weight": tensors["blk.0.ffn_gate.weight"]})
    elif change == "type":
        kind, shape, _ = tensors["blk.0.ffn_gate.weight"]
        write(path, metadata, {**tensors, "blk.0.ffn_gate.weight": ("Q6_K", shape, b"\0" * 210 * 24)})
    else:
        write(path, {**metadata, "tokenizer.ggml.pre": "llama-bpe"}, tensors)
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(CheckpointError) as caught:
        import_gguf(path, work, chat_tokens=True)
    assert "\n" not in str(caught.value) and not list(work.glob("*.safetensors"))
