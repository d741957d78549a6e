"""Ways to damage a checkpoint folder, each a name and a function of the folder; the same ones at every run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from k2lab.core.artifacts import file_sha256
from k2lab.core.rng import rng

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
Damage = Callable[[Path], None]
DEEP = "{" + '"a":{' * 100_000
HUGE = 1 << 62


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("model*.safetensors"))[number]


def split(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a shard."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def patch(file: Path, at: int, piece: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(at if at >= 0 else file.stat().st_size + at)
        stream.write(piece)


def holder(folder: Path, end: str) -> tuple[Path, str]:
    """The shard and name of the first tensor whose name ends so."""
    for file in sorted(folder.glob("model*.safetensors")):
        for name in split(file)[0]:
            if name.endswith(end):
                return file, name
    raise KeyError(end)


# ---------------------------------------------------------------- bytes of a shard


def flip(seed: int, part: str, folder: Path) -> None:
    """One bit of the length ("length"), the header's text or the data."""
    file = shard(folder)
    length = int.from_bytes(file.read_bytes()[:8], "little")
    low, high = {"length": (0, 8), "header": (8, 8 + length), "data": (8 + length, file.stat().st_size)}[part]
    draw = rng(seed, "flip", part)
    at = int(draw.integers(low, high))
    patch(file, at, bytes([file.read_bytes()[at] ^ 1 << int(draw.integers(8))]))


def truncate(share: float, folder: Path) -> None:
    file = shard(folder)
    os.truncate(file, int(file.stat().st_size * share) if share <= 1 else file.stat().st_size - int(share))


def truncate_to(size: int, folder: Path) -> None:
    os.truncate(shard(folder), size)


def lengthen(count: int, folder: Path) -> None:
    with shard(folder).open("ab") as stream:
        stream.write(bytes(count))


def set_length(value: int, folder: Path) -> None:
    patch(shard(folder), 0, value.to_bytes(8, "little"))


def raw_header(text: bytes, folder: Path) -> None:
    _, data = split(shard(folder))
    join(shard(folder), text, data)


def around_header(before: bytes, after: bytes, folder: Path) -> None:
    header, data = split(shard(folder))
    join(shard(folder), before + json.dumps(header).encode() + after, data)


def double_name(folder: Path) -> None:
    header, data = split(shard(folder))
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    join(shard(folder), text.encode(), data)


def edit(change: Callable[[dict[str, Any], list[str]], Any], number: int, folder: Path) -> None:
    """`change(header, names in the order of the data)` in place, or a new header as its result."""
    header, data = split(shard(folder, number))
    names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header = change(header, names) or header
    join(shard(folder, number), json.dumps(header).encode(), data)


def _set(key: str, value: Any, which: int, header: dict[str, Any], names: list[str]) -> None:
    header[names[which]][key] = value


def _shift(start: int, end: int, which: int, header: dict[str, Any], names: list[str]) -> None:
    offsets = header[names[which]]["data_offsets"]
    header[names[which]]["data_offsets"] = [offsets[0] + start, offsets[1] + end]


def _swap_offsets(header: dict[str, Any], names: list[str]) -> None:
    size = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names}
    one, other = next((a, b) for a in names for b in names if size[a] != size[b])
    header[one]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[one]["data_offsets"]


def _swap_equal_offsets(header: dict[str, Any], names: list[str]) -> None:
    size = {name: header[name]["data_offsets"][1] - header[name]["data_offsets"][0] for name in names}
    one, other = next((a, b) for a in names for b in names if a < b and size[a] == size[b] > 100)
    header[one]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[one]["data_offsets"]


def _drop(which: int, header: dict[str, Any], names: list[str]) -> None:
    del header[names[which]]


def _drop_key(key: str, which: int, header: dict[str, Any], names: list[str]) -> None:
    del header[names[which]][key]


def _rename(which: int, to: str, header: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {to if name == names[which] else name: value for name, value in header.items()}


def _add(name: str, value: Any, header: dict[str, Any], names: list[str]) -> None:
    header[name] = value


def _transpose(header: dict[str, Any], names: list[str]) -> None:
    name = next(name for name in names if len(set(header[name]["shape"])) == 2)
    header[name]["shape"].reverse()


def _flatten(header: dict[str, Any], names: list[str]) -> None:
    name = next(name for name in names if len(header[name]["shape"]) == 2)
    rows, columns = header[name]["shape"]
    header[name]["shape"] = [rows * columns]


def header_damages() -> Iterator[tuple[str, Damage]]:
    for seed in range(16):
        yield f"length bit {seed}", partial(flip, seed, "length")
    for seed in range(60):
        yield f"header bit {seed}", partial(flip, seed, "header")
    for size in (0, 1, 7, 8, 9, 10, 100, 500):
        yield f"cut to {size}", partial(truncate_to, size)
    for share in (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999):
        yield f"cut to {share}", partial(truncate, share)
    for count in (1.5, 2, 3, 64, 4096):
        yield f"cut by {int(count)}", partial(truncate, count + 0.5)
    for count in (1, 2, 8, 4096):
        yield f"{count} bytes more", partial(lengthen, count)
    for value in (0, 1, 2, 100_000_000, 100_000_001, 1 << 31, 1 << 63, (1 << 64) - 1):
        yield f"length {value}", partial(set_length, value)
    texts = {
        "list": b"[]",
        "null": b"null",
        "number": b"17",
        "text": b'"abc"',
        "empty": b"{}",
        "blank": b"    ",
        "deep": DEEP.encode(),
        "deep list": b'{"a":' + b"[" * 100_000,
        "not utf-8": b'{"\xff\xfe": 1}',
        "garbage": bytes(range(256)),
        "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    }
    for name, text in texts.items():
        yield f"header is {name}", partial(raw_header, text)
    yield "mark before the header", partial(around_header, b"\xef\xbb\xbf", b"")
    yield "blank before the header", partial(around_header, b" ", b"")
    yield "brace after the header", partial(around_header, b"", b"}")
    yield "number after the header", partial(around_header, b"", b"0")
    yield "a name twice", double_name


def table_damages() -> Iterator[tuple[str, Damage]]:
    """Headers that are JSON, and wrong."""
    bad_shapes: list[Any] = [None, "x", {}, 7, [-1], [1.5], [True], ["1"], [HUGE, HUGE], [10**30], [0], [1] * 2000, [[2]]]
    bad_shapes += [[1 << 31, 1 << 31], [1 << 32, 1 << 32], []]
    for value in bad_shapes:
        yield f"shape {str(value)[:30]}", partial(edit, partial(_set, "shape", value, 1), 1)
    offsets: list[Any] = [None, "x", [], [0], [0, 1, 2], [-2, 0], [4, 2], [0, HUGE], [HUGE, HUGE], [0.0, 2.0], ["0", "2"]]
    offsets += [[True, False], [0, 10**40], {"start": 0}, [[0], [2]]]
    for value in offsets:
        yield f"offsets {str(value)[:30]}", partial(edit, partial(_set, "data_offsets", value, 1), 1)
    for value in (None, 7, "", "F16", "F64", "I32", "U8", "F8_E4M3", "F8_E5M2", "bf16", "BF16 ", "F4", "C64", ["BF16"], {"a": 1}):
        for which in (0, -1):
            yield f"type {value} of {which}", partial(edit, partial(_set, "dtype", value, which), 1)
    for start, end in ((2, 2), (-2, -2), (0, 2), (0, -2), (2, 0), (-2, 0), (1, 1)):
        for which in (0, 2):
            yield f"offsets of {which} by {start} {end}", partial(edit, partial(_shift, start, end, which), 1)
    yield "offsets of two swapped", partial(edit, _swap_offsets, 1)
    for which in (0, 3, -1):
        yield f"tensor {which} left out", partial(edit, partial(_drop, which), 1)
        yield f"tensor {which} renamed", partial(edit, partial(_rename, which, "model.nothing.weight"), 1)
        for key in ("dtype", "shape", "data_offsets"):
            yield f"{key} of {which} left out", partial(edit, partial(_drop_key, key, which), 1)
    yield "a name without end", partial(edit, partial(_rename, 0, "x" * 100_000), 1)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    yield "an empty tensor more", partial(edit, partial(_add, "more", empty), 1)
    yield "a key more", partial(edit, partial(_set, "device", "cuda", 1), 1)
    yield "an entry that is a list", partial(edit, partial(_add, "more", []), 1)
    yield "metadata that is a list", partial(edit, partial(_add, "__metadata__", ["pt"]), 1)
    yield "metadata with a number", partial(edit, partial(_add, "__metadata__", {"format": 1}), 1)
    yield "a matrix transposed", partial(edit, _transpose, 1)
    yield "a matrix flattened", partial(edit, _flatten, 1)


# ---------------------------------------------------------------- index and files


def write_text(name: str, text: str | bytes, folder: Path) -> None:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def edit_json(name: str, change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    table = json.loads((folder / name).read_text())
    result = change(table)
    (folder / name).write_text(json.dumps(table if result is None else result))


def _all_to(file: Any, table: dict[str, Any]) -> None:
    table["weight_map"] = dict.fromkeys(table["weight_map"], file)


def _first_to(file: Any, table: dict[str, Any]) -> None:
    table["weight_map"][next(iter(table["weight_map"]))] = file


def _exchange(table: dict[str, Any]) -> None:
    where = table["weight_map"]
    one, other = next((a, b) for a in where for b in where if where[a] != where[b])
    where[one], where[other] = where[other], where[one]


def _put(key: str, value: Any, table: dict[str, Any]) -> None:
    table[key] = value


def _drop_first(table: dict[str, Any]) -> None:
    del table["weight_map"][next(iter(table["weight_map"]))]


def _add_name(table: dict[str, Any]) -> None:
    table["weight_map"]["model.more.weight"] = next(iter(table["weight_map"].values()))


def double_key(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    at = text.index('"model.embed_tokens.weight"')
    line = text[at : text.index(",", at) + 1]
    (folder / INDEX).write_text(text[:at] + line + text[at:])


def remove(name: str, folder: Path) -> None:
    (folder / name if name else shard(folder)).unlink()


def exchange_files(folder: Path) -> None:
    one, other = shard(folder, 0), shard(folder, 1)
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)


def as_something_else(name: str, kind: str, folder: Path) -> None:
    file = folder / name if name else shard(folder)
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file.name if kind == "loop" else "nowhere")


def stray(folder: Path) -> None:
    shutil.copy(shard(folder), folder / "model-00077-of-00077.safetensors")


def in_two_files(folder: Path) -> None:
    """A tensor of the first shard also in the second."""
    header, data = split(shard(folder, 0))
    name = next(name for name in header if name != "__metadata__")
    start, end = header[name]["data_offsets"]
    other, more = split(shard(folder, 1))
    other[name] = {**header[name], "data_offsets": [len(more), len(more) + end - start]}
    join(shard(folder, 1), json.dumps(other).encode(), more + data[start:end])


def index_damages() -> Iterator[tuple[str, Damage]]:
    paths = ["../model.safetensors", "/etc/passwd", "a/model.safetensors", "..", ".", "", "./model-00001-of-00001.safetensors"]
    paths += ["..\\x.safetensors", "model\0.safetensors", "missing.safetensors", "config.json", "x" * 5000 + ".safetensors"]
    paths += [".hidden.safetensors", "~/model.safetensors", "file:///etc/passwd", "model.safetensors\n"]
    for value in [*paths, None, 7, [], {}]:
        yield f"index names {str(value)[:30]!r}", partial(edit_json, INDEX, partial(_first_to, value))
    yield "index puts all into ../x", partial(edit_json, INDEX, partial(_all_to, "../x.safetensors"))
    yield "index puts all into one", partial(edit_json, INDEX, partial(_all_to, "model-00001-of-00004.safetensors"))
    yield "index exchanges two", partial(edit_json, INDEX, _exchange)
    yield "index lacks a tensor", partial(edit_json, INDEX, _drop_first)
    yield "index has a tensor more", partial(edit_json, INDEX, _add_name)
    yield "index has a name twice", double_key
    for value in (None, [], "x", 3, {}):
        yield f"weight_map {value}", partial(edit_json, INDEX, partial(_put, "weight_map", value))
    for value in ({"total_size": -1}, {"total_size": "x"}, {"total_size": 1.5}, {"total_size": []}, [], "x"):
        yield f"metadata {value}", partial(edit_json, INDEX, partial(_put, "metadata", value))
    for name in (INDEX, CONFIG, "tokenizer.json"):
        for label, text in (("empty", ""), ("garbage", "\x00\xff{"), ("cut", '{"a": '), ("list", "[1]"), ("deep", DEEP)):
            yield f"{name} is {label}", partial(write_text, name, text)
        yield f"{name} is a folder", partial(as_something_else, name, "folder")
        yield f"{name} is a pipe", partial(as_something_else, name, "pipe")
    for name in (INDEX, CONFIG):
        yield f"{name} with NaN", partial(write_text, name, '{"a": NaN}')
        yield f"{name} with a long number", partial(write_text, name, '{"num_hidden_layers": ' + "9" * 6000 + "}")
        yield f"{name} missing", partial(remove, name)
    for kind in ("folder", "pipe", "loop", "nowhere"):
        yield f"a shard is a {kind}", partial(as_something_else, "", kind)
    yield "a shard missing", partial(remove, "")
    yield "two shards exchanged", exchange_files
    yield "a stray shard", stray
    yield "a tensor in two files", in_two_files


# ---------------------------------------------------------------- config.json


NUMBERS = [
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "vocab_size",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "first_k_dense_replace",
    "n_shared_experts",
    "num_experts_per_tok",
]
VALUES: tuple[Any, ...] = (None, "x", -1, 10**9, 10**30, 1.5, [], {}, True)


def _rope(key: str, value: Any, table: dict[str, Any]) -> None:
    table["rope_scaling"][key] = value


def _weights(key: str, value: Any, table: dict[str, Any]) -> None:
    table["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value


def _quantised(key: str, value: Any, table: dict[str, Any]) -> None:
    table["quantization_config"][key] = value


def config_damages() -> Iterator[tuple[str, Damage]]:
    for key in NUMBERS:
        for value in VALUES:
            if (key, value) != ("first_k_dense_replace", True):
                yield f"{key} {value}", partial(edit_json, CONFIG, partial(_put, key, value))
    for key, wrong in (
        ("q_lora_rank", [32, None, "x", -1]),
        ("tie_word_embeddings", [True]),
        ("text_config", [{}, {"hidden_size": 1}]),
        ("rope_scaling", ["yarn", 3, {"type": "yarn"}, {"rope_type": "linear", "factor": 32.0}, {"factor": 32.0}]),
        ("max_position_embeddings", [4096, 262144, None, "x", -1]),
        ("rope_theta", ["x", -1, []]),
        ("quantization_config", [None, {}, [], "int4", {"quant_method": "awq"}, {"quant_method": ["fp8"]}]),
        ("compression_config", [{"format": "pack-quantized"}]),
        ("k2_qat", [True, {"format": "fp8_block"}]),
        ("hidden_act", ["gelu"]),
        ("scoring_func", ["softmax"]),
        ("attn_res_block_size", [12]),
        ("moe_layer_freq", [2]),
        ("eos_token_id", [352, -1, "x", [1, 10**9]]),
    ):
        for value in wrong:
            yield f"{key} {value}", partial(edit_json, CONFIG, partial(_put, key, value))
    for key in ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "type"):
        for value in (None, "x", 10**400 if key == "factor" else -5):
            if key in ("factor", "original_max_position_embeddings", "type") or value != -5:
                yield f"rope {key} {str(value)[:20]}", partial(edit_json, CONFIG, partial(_rope, key, value))
    for key, value in (("num_bits", 8), ("group_size", 128), ("symmetric", False), ("actorder", "group"), ("type", "float")):
        yield f"int4 {key} {value}", partial(edit_json, CONFIG, partial(_weights, key, value))
    for key, value in (("format", "nvfp4-pack-quantized"), ("config_groups", None), ("config_groups", [1]), ("bits", 4)):
        yield f"int4 {key} {value}", partial(edit_json, CONFIG, partial(_quantised, key, value))


# ---------------------------------------------------------------- values, seen by reading all of them


def value(end: str, piece: bytes, repeat: bool, folder: Path) -> None:
    """The first value of a tensor, or all of them, replaced."""
    file, name = holder(folder, end)
    header, data = split(file)
    start, stop = header[name]["data_offsets"]
    patch(file, file.stat().st_size - len(data) + start, piece * ((stop - start) // len(piece)) if repeat else piece)


def sums(folder: Path, **wrong: Any) -> None:
    files = {file.name: {"sha256": file_sha256(file), "size": file.stat().st_size} for file in folder.iterdir()}
    (folder / "checksums.json").write_text(json.dumps(files | wrong))


def after_sums(damage: Damage, folder: Path) -> None:
    sums(folder)
    damage(folder)


def wrong_sums(name: str, facts: Any, folder: Path) -> None:
    sums(folder, **{name: facts})


def deep_damages() -> Iterator[tuple[str, Damage]]:
    bf16 = {"NaN": b"\xc0\x7f", "infinity": b"\x80\x7f", "-infinity": b"\x80\xff"}
    for end in ("mlp.gate.weight", "embed_tokens.weight", "input_layernorm.weight", "o_proj.weight", "weight_scale"):
        for label, piece in bf16.items():
            yield f"{label} in {end}", partial(value, end, piece, False)
    for label, piece in (("0", b"\0\0"), ("-0", b"\0\x80"), ("-1", b"\x80\xbf")):
        yield f"scale {label}", partial(value, "weight_scale", piece, False)
    for end in ("mlp.gate.weight", "o_proj.weight", "shared_experts.up_proj.weight", "norm.weight", "lm_head.weight"):
        yield f"zeros in {end}", partial(value, end, b"\0\0", True)
        yield f"negative zeros in {end}", partial(value, end, b"\0\x80", True)
    yield "zero codes", partial(value, "weight_packed", b"\x88", True)
    yield "NaN in the router's bias", partial(value, "e_score_correction_bias", b"\0\0\xc0\x7f", False)
    yield "weight_shape transposed", partial(value, "up_proj.weight_shape", b"\xa0\0\0\0\x60\0\0\0", False)
    for seed in range(25):
        yield f"data bit {seed}", partial(after_sums, partial(flip, seed, "data"))
    yield "equal offsets swapped", partial(after_sums, partial(edit, _swap_equal_offsets, 1))
    yield "tokenizer changed", partial(after_sums, partial(edit_json, "tokenizer.json", partial(_put, "version", "2.0")))
    for name, facts in (
        ("config.json", {"sha256": "0" * 64}),
        ("config.json", {"sha256": "0"}),
        ("config.json", 7),
        ("config.json", {"size": 1}),
        ("missing.txt", {"sha256": "0" * 64}),
        ("../escape", {"sha256": "0" * 64}),
        ("/etc/passwd", {"sha256": "0" * 64}),
        ("a\0b", {"sha256": "0" * 64}),
    ):
        yield f"checksum of {name!r} {facts}", partial(wrong_sums, name, facts)
    yield "checksums are a list", partial(write_text, "checksums.json", "[]")
    yield "sums are garbage", partial(write_text, "SHA256SUMS", b"\xff\xff hello\n")


SHALLOW = [*header_damages(), *table_damages(), *index_damages(), *config_damages()]
VALUES_READ = list(deep_damages())
