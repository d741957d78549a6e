"""What a checkpoint is refused for beside names and shapes of its tensors: wrong YaRN, a tokenizer with ids that the embedding
lacks, files whose sha256 changed. Values that no training leaves behind: `values.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from k2lab.ckpt.strict import is_count, is_number, read_object
from k2lab.core.artifacts import MANIFEST, file_sha256
from k2lab.core.errors import CheckpointError
from k2lab.specs import ModelSpec

CHECKSUMS, SUMS, FETCHED = "checksums.json", "SHA256SUMS", "fetched.json"
MAX_LAYERS = 10_000  # a bound on what a damaged config.json can make us count
YARN_KEYS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
DENSE_ROPE = ("yarn", "linear", "dynamic", "llama3", "longrope")
LONGEST_UNSCALED = 32_768  # positions; a config.json of more without a word on scaling has lost its table
TOKENIZER, RANKS, TOKENIZER_CONFIG = "tokenizer.json", "tiktoken.model", "tokenizer_config.json"


# ---------------------------------------------------------------- config.json


def check_config(config: dict[str, Any], where: str) -> None:
    """Bounds that keep a damaged config.json from costing memory before it is refused."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        layers = place.get("num_hidden_layers")
        if layers is not None and not (is_count(layers) and 1 <= layers <= MAX_LAYERS):
            raise CheckpointError(
                "this is no number of layers", where=f"{where}: num_hidden_layers", got=layers, allowed=f"1 to {MAX_LAYERS}"
            )


def check_positions(config: dict[str, Any], spec: ModelSpec, where: str) -> None:
    """YaRN as releases have it: a model that reads another position scale than it was trained with still speaks, and is worse."""
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    legacy, modern = text.get("rope_scaling"), text.get("rope_parameters")
    for key, table in (("rope_scaling", legacy), ("rope_parameters", modern)):
        if table is not None and not isinstance(table, dict):
            raise _wrong_rope("this is no table", where, key, table, "a table, or null")
        if table and not isinstance(table.get("type", table.get("rope_type")), str):
            raise _wrong_rope("a scaling of positions needs its type", where, key, table, "type (or rope_type), for example yarn")
        if table and "type" in table and table.get("rope_type", table["type"]) != table["type"]:
            raise _wrong_rope("type and rope_type disagree", where, key, table, "the same in both")
    if isinstance(legacy, dict) and isinstance(modern, dict):
        differ = [key for key in legacy.keys() & modern.keys() if legacy[key] != modern[key]]
        if differ:
            raise _wrong_rope(
                "rope_scaling and rope_parameters disagree", where, differ[0], modern[differ[0]], str(legacy[differ[0]])
            )
    if spec.family == "kimi_k2":
        _check_said(text, legacy, modern, spec, where)
    if spec.rope is None:
        return
    kind = spec.rope.get("type", spec.rope.get("rope_type"))
    if spec.family == "dense":
        if kind not in DENSE_ROPE:
            raise _wrong_rope("this scaling of positions is not known", where, "type", kind, ", ".join(DENSE_ROPE))
        return
    if kind != "yarn":
        raise _wrong_rope("this scaling of positions is not known", where, "type", kind, "yarn")
    for key in YARN_KEYS:
        if not is_number(spec.rope.get(key)):
            raise _wrong_rope(
                "YaRN needs this number", where, key, spec.rope.get(key, "nothing"), f"numbers for {', '.join(YARN_KEYS)}"
            )
    if spec.rope.get("attention_factor") is not None:
        raise _wrong_rope("releases have no such key", where, "attention_factor", spec.rope["attention_factor"], "mscale alone")
    reach = spec.rope["factor"] * spec.rope["original_max_position_embeddings"]
    if abs(reach - spec.max_position_embeddings) > 1e-6 * reach:
        raise _wrong_rope(
            "YaRN's factor x original_max_position_embeddings is not max_position_embeddings",
            where,
            "factor",
            f"{spec.rope['factor']} x {spec.rope['original_max_position_embeddings']} = {reach:.0f}",
            f"{spec.max_position_embeddings} (releases: 32 x 4096, 64 x 4096, DeepSeek-V3 40 x 4096)",
        )


def _check_said(text: dict[str, Any], legacy: Any, modern: Any, spec: ModelSpec, where: str) -> None:
    """What other programs would fill in with a default that no Kimi model has."""
    if text.get("rope_theta") is None and not (isinstance(modern, dict) and modern.get("rope_theta") is not None):
        raise _wrong_rope("this key is required and missing", where, "rope_theta", "nothing", "a number; 50000.0 in Kimi K2")
    if legacy is None and modern is None and "rope_scaling" not in text and spec.max_position_embeddings > LONGEST_UNSCALED:
        raise _wrong_rope(
            f"a model of {spec.max_position_embeddings} positions must say how they are scaled",
            where,
            "rope_scaling",
            "nothing",
            "YaRN's table, or null where positions are not scaled",
        )


def _wrong_rope(what: str, where: str, key: str, got: object, allowed: str) -> CheckpointError:
    place = key if key.startswith("rope_") else f"rope_scaling.{key}"
    return CheckpointError(
        what, where=f"{where}: {place}", got=got, allowed=allowed, next="Put the config.json of the release back"
    )


# ---------------------------------------------------------------- tokenizer


def check_tokenizer(path: Path, spec: ModelSpec) -> None:
    """Every token id of the folder's tokenizer, if it has one, has a row in the embedding. Reads ids only."""
    for name, ids in ((TOKENIZER, _ids_of_json), (RANKS, _ids_of_ranks), (TOKENIZER_CONFIG, _ids_of_config)):
        file = path / name
        if not file.is_file():
            if file.is_symlink() or file.exists():
                raise CheckpointError("this is no file", where=str(file))
            continue
        try:
            largest = max(ids(file), default=-1)
        except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"this tokenizer file is damaged: {error}", where=str(file)) from None
        if largest >= spec.vocab_size:
            raise CheckpointError(
                f"the tokenizer has ids that the embedding (model.embed_tokens.weight, {spec.vocab_size} rows) lacks",
                where=str(file),
                got=f"id {largest}",
                allowed=f"ids below vocab_size = {spec.vocab_size}",
                next="Take tokenizer and weights from the same release",
            )


def _ids_of_json(file: Path) -> Iterator[int]:
    table = read_object(file)
    vocab = table.get("model", {}).get("vocab", {})
    yield from map(_id, vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
    for token in table.get("added_tokens") or []:
        yield _id(token["id"])


def _ids_of_config(file: Path) -> Iterator[int]:
    for token_id in read_object(file).get("added_tokens_decoder") or {}:
        yield _id(int(token_id))


def _ids_of_ranks(file: Path) -> Iterator[int]:
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                _, rank = line.split()
                yield _id(int(rank))


def _id(value: Any) -> int:
    if not is_count(value):
        raise ValueError(f"{value!r:.100} is no token id")
    return value


# ---------------------------------------------------------------- sha256


def check_digests(path: Path) -> None:
    """Verifies the sha256 of every file that the folder's checksums.json, SHA256SUMS, fetched.json (what `k2 fetch` wrote) or
    artifact manifest states; a manifest in the folder above counts, where the checkpoint is part of an artifact."""
    for file, stated in stated_digests(path):
        if not file.is_file():
            raise CheckpointError(f"this file is missing although {stated['by']} lists it", where=str(file))
        size = file.stat().st_size
        if stated.get("size") not in (None, size):
            raise CheckpointError(
                "this file was changed after it was written",
                where=str(file),
                got=f"{size} bytes",
                allowed=f"{stated['size']} bytes",
            )
        if file_sha256(file) != stated["sha256"]:
            raise CheckpointError(
                f"this file was changed after it was written: its sha256 is not that of {stated['by']}",
                where=str(file),
                next="Fetch it again",
            )


def stated_digests(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, {"sha256", "size" or None, "by": which list})."""
    if (path / CHECKSUMS).is_file():
        yield from _listed(path, read_object(path / CHECKSUMS), path / CHECKSUMS)
    if (path / FETCHED).is_file():
        files = read_object(path / FETCHED).get("files")
        if isinstance(files, dict):  # the hub states another digest of small files
            files = {name: facts for name, facts in files.items() if not (isinstance(facts, dict) and "git-sha1" in facts)}
        yield from _listed(path, files, path / FETCHED)
    if (path / SUMS).is_file():
        table = {}
        for line in (path / SUMS).read_bytes().decode("utf-8", "replace").splitlines():
            match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
            if line.strip() and match is None:
                raise CheckpointError("this line is no sha256 and file name", where=str(path / SUMS), got=line[:200])
            if match:
                table[match[2]] = {"sha256": match[1].lower()}
        yield from _listed(path, table, path / SUMS)
    for base in (path, path.resolve().parent):
        if not (base / MANIFEST).is_file():
            continue
        manifest = read_object(base / MANIFEST)
        if not {"format", "kind", "files"} <= manifest.keys():
            continue  # another program's manifest
        below = _listed(base, manifest["files"], base / MANIFEST)
        yield from below if base == path else (pair for pair in below if pair[0].resolve().is_relative_to(path.resolve()))


def _listed(base: Path, table: Any, by: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    if not isinstance(table, dict):
        raise CheckpointError("files must map names to sha256 and size", where=str(by), got=type(table).__name__)
    for name, facts in table.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\0" in name or not parts.parts:
            raise CheckpointError("this name leads out of the folder", where=str(by), got=name)
        if not isinstance(facts, dict) or not re.fullmatch(r"[0-9a-f]{64}", str(facts.get("sha256"))):
            raise CheckpointError("a file is listed with sha256 and size", where=f"{name[:200]} in {by}", got=facts)
        yield base / parts, {**facts, "by": by.name}
