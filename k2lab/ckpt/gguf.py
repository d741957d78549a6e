"""Reading GGUF files (llama.cpp's format, version 2 and 3): weights as dense fp32, shape, tokenizer. numpy only.

The format: magic `GGUF`, version u32, number of tensors and of metadata entries u64; entries of key, type, value; per tensor its
name, dims (fastest first), type and offset; then, aligned, the data. Quantised types store blocks of 32 values:

    Q8_0   f16 scale d; 32 x i8 q                      value = d q
    Q4_0   f16 scale d; 16 bytes of two 4-bit q        value = d (q - 8)       low halves first, then high halves
    Q4_1   f16 d, f16 m; 16 bytes of two 4-bit q       value = d q + m
    Q5_0   f16 d; 32 high bits; 16 bytes of low halves value = d (q - 16)
    Q5_1   f16 d, f16 m; 32 high bits; 16 bytes        value = d q + m
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k2lab.core.errors import CheckpointError

# Metadata types: struct codes of numbers by type id; 8 = text, 9 = array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# Tensor types: name, values per block, bytes per block.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `shape` as in PyTorch (slowest first), `type` a name in `TYPES`, `offset` and `size` in bytes."""

    shape: tuple[int, ...]
    type: str
    offset: int
    size: int


class GgufFile:
    """`metadata` {key: value}, `tensors` {name: Entry}; `read(name)` gives a tensor as f32.

    Raises CheckpointError if it is no GGUF file, is cut off, or (on reading) for a quantisation that is not listed above.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self._at = 0
        try:
            if self._raw(4) != b"GGUF":
                raise CheckpointError("this is not a GGUF file", where=str(path))
            version = self._number("I")
            if version not in (2, 3):
                raise CheckpointError(
                    "this version of the GGUF format is not read here", where=str(path), got=version, allowed="2, 3"
                )
            num_tensors, num_entries = self._number("Q"), self._number("Q")
            self.metadata: dict[str, Any] = {}
            for _ in range(num_entries):
                key = self._text()
                self.metadata[key] = self._value(self._number("I"))
            self.tensors = self._directory(num_tensors)
        except (struct.error, UnicodeDecodeError, KeyError) as error:
            raise CheckpointError(f"the GGUF file is damaged or cut off: {error}", where=str(path)) from None

    def _raw(self, count: int) -> bytes:
        self._at += count
        return self._bytes[self._at - count : self._at].tobytes()

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._raw(struct.calcsize("<" + code)))[0]

    def _text(self) -> str:
        return self._raw(self._number("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner in _NUMBERS:
                code = f"<{count}{_NUMBERS[inner]}"
                return list(struct.unpack(code, self._raw(struct.calcsize(code))))
            return [self._value(inner) for _ in range(count)]
        return self._number(_NUMBERS[kind])

    def _directory(self, count: int) -> dict[str, Entry]:
        found = {}
        for _ in range(count):
            name = self._text()
            dims = [self._number("Q") for _ in range(self._number("I"))]
            kind, offset = self._number("I"), self._number("Q")
            found[name] = (tuple(reversed(dims)), kind, offset)
        align = self.metadata.get("general.alignment", 32)
        start = (self._at + align - 1) // align * align
        entries = {}
        for name, (shape, kind, offset) in found.items():
            label, values, size = TYPES.get(kind, (f"type {kind}", 1, 0))
            entries[name] = Entry(shape, label, start + offset, int(np.prod(shape)) // values * size)
            if start + offset + entries[name].size > len(self._bytes):
                raise CheckpointError("the GGUF file is cut off", where=str(self.path), got=f"{name} ends behind the file's end")
        return entries

    def read(self, name: str) -> np.ndarray:
        """The tensor `name` as dense f32."""
        entry = self.tensors[name]
        if entry.type not in _DECODERS:
            raise CheckpointError(
                f"{name} is stored as {entry.type}, which is not read here",
                where=str(self.path),
                allowed=", ".join(label for label, _, _ in TYPES.values()),
                next="Take a file in one of these types (Q4_1, Q8_0, F16, ...)",
            )
        raw = np.asarray(self._bytes[entry.offset : entry.offset + entry.size])
        return np.array(_DECODERS[entry.type](raw).reshape(entry.shape), dtype=np.float32)


# ---------------------------------------------------------------- blocks -> values


def _half(raw: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows of blocks u8[n, size], their first f16 as f32[n, 1])."""
    rows = raw.reshape(-1, size)
    return rows, _f16(rows[:, :2])


def _f16(pair: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pair).view("<f2").astype(np.float32)


def _halves(nibbles: np.ndarray) -> np.ndarray:
    """u8[n, 16] -> values 0..15 of low halves, then of high halves, u8[n, 32]."""
    return np.concatenate([nibbles & 15, nibbles >> 4], axis=1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    """u8[n, 4] -> the bits, lowest first, as 16 or 0, u8[n, 32]."""
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little") << 4


def _q8_0(raw: np.ndarray) -> np.ndarray:
    rows, d = _half(raw, 34)
    return d * np.ascontiguousarray(rows[:, 2:]).view(np.int8)


def _q4_0(raw: np.ndarray) -> np.ndarray:
    rows, d = _half(raw, 18)
    return d * (_halves(rows[:, 2:]).astype(np.float32) - 8)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    rows, d = _half(raw, 20)
    return d * _halves(rows[:, 4:]) + _f16(rows[:, 2:4])


def _q5_0(raw: np.ndarray) -> np.ndarray:
    rows, d = _half(raw, 22)
    return d * ((_halves(rows[:, 6:]) | _fifth_bits(rows[:, 2:6])).astype(np.float32) - 16)


def _q5_1(raw: np.ndarray) -> np.ndarray:
    rows, d = _half(raw, 24)
    return d * (_halves(rows[:, 8:]) | _fifth_bits(rows[:, 4:8])) + _f16(rows[:, 2:4])


_DECODERS = {
    "F32": lambda raw: raw.view("<f4"),
    "F16": lambda raw: raw.view("<f2").astype(np.float32),
    "BF16": lambda raw: (raw.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}


# ---------------------------------------------------------------- a model's parts


_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def config_of(file: GgufFile) -> dict[str, Any]:
    """config.json of a Llama- or Qwen2-shaped file. CheckpointError for other architectures."""
    meta = file.metadata
    kind = meta.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise CheckpointError("this architecture is not read from GGUF", where=str(file.path), got=kind, allowed="llama, qwen2")
    if f"{kind}.rope.scaling.type" in meta or "rope_freqs.weight" in file.tensors:
        raise CheckpointError("scaled rotary positions are not read from GGUF", where=str(file.path))

    def need(name: str) -> Any:
        if f"{kind}.{name}" not in meta:
            raise CheckpointError("the GGUF file lacks metadata", where=str(file.path), got=f"no {kind}.{name}")
        return meta[f"{kind}.{name}"]

    heads = need("attention.head_count")
    config = {
        "model_type": kind,
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]],
        "hidden_act": "silu",
        "hidden_size": need("embedding_length"),
        "num_hidden_layers": need("block_count"),
        "intermediate_size": need("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{kind}.attention.head_count_kv", heads),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "rms_norm_eps": round(need("attention.layer_norm_rms_epsilon"), 12),
        "rope_theta": meta.get(f"{kind}.rope.freq_base", 10000.0),
        "max_position_embeddings": need("context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    if f"{kind}.attention.key_length" in meta:
        config["head_dim"] = need("attention.key_length")
    return config


def state_of(file: GgufFile, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(transformers name, f32 array) of all tensors, one at a time. CheckpointError for a tensor of no known name."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name in file.tensors:
        if name in _NAMES:
            yield _NAMES[name], file.read(name)
            continue
        parts = name.split(".")  # blk.<layer>.<part>.<weight or bias>
        if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER_NAMES:
            raise CheckpointError(
                "the GGUF file holds a tensor that its architecture does not have", where=str(file.path), got=name
            )
        value = file.read(name)
        if config["model_type"] == "llama" and parts[2] in heads:
            value = _unrotated(value, heads[parts[2]])
        yield f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}", value


def _unrotated(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of each rotary pair side by side in Llama's queries and keys; transformers keeps all first
    halves before all second ones."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# How text is cut before byte pairs are merged, by the file's `tokenizer.ggml.pre`.
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}
_CONTROL, _USER_DEFINED = 3, 4  # token types


def tokenizer_of(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tokenizer.json, tokenizer_config.json) of a byte-level BPE file. CheckpointError for other tokenizers."""
    meta = file.metadata
    pre = meta.get("tokenizer.ggml.pre", "gpt-2")
    if meta.get("tokenizer.ggml.model") != "gpt2" or pre not in _CUTS:
        raise CheckpointError(
            "this tokenizer is not read from GGUF",
            where=str(file.path),
            got=f"{meta.get('tokenizer.ggml.model')}, {pre}",
            allowed="byte-level BPE (gpt2) cut like " + ", ".join(_CUTS),
        )
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [added_token(n, token) for n, token in enumerate(tokens) if types[n] in (_CONTROL, _USER_DEFINED)]
    parts = _CUTS[pre]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: n for n, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        },
    }
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        place = meta.get(f"tokenizer.ggml.{key}_token_id")
        if place is not None:
            config[f"{role}_token"] = tokens[place]
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    return spec, config


def added_token(place: int, content: str, special: bool = True) -> dict[str, Any]:
    """An entry of `added_tokens` in tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": place, "content": content, **flags, "special": special}
