"""Reading and writing tokenizer folders: `tokenizer.json` (ours, and any byte-level one), and Kimi's `tiktoken.model`."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2lab.core.errors import DataError, MachineError, did_you_mean
from k2lab.text import layout

if TYPE_CHECKING:
    from k2lab.text.tokenizer import Tokenizer

RANK_FILE = "tiktoken.model"
HF_FILE = "tokenizer.json"
COPIED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class rust_encoder:  # a class, not a closure, so that tokenizers can be pickled to worker processes
    """Encodes texts with a `tokenizers.Tokenizer` that has no special tokens."""

    def __init__(self, rust: Any) -> None:
        self.rust = rust
        rust.no_truncation()
        rust.no_padding()

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if len(texts) == 1:
            return [self.rust.encode(texts[0], add_special_tokens=False).ids]
        return [coded.ids for coded in self.rust.encode_batch_fast(texts, add_special_tokens=False)]


class tiktoken_encoder:
    """Encodes texts with the `tiktoken` package and Kimi's pattern. Raises MachineError if the package is missing."""

    def __init__(self, ranks: list[bytes]) -> None:
        self.ranks = ranks
        try:
            import tiktoken
        except ImportError:
            raise MachineError(
                f"reading Kimi's {RANK_FILE} needs the package tiktoken, which is not installed",
                next="pip install 'k2lab[kimi]'",
            ) from None
        self.encoding = tiktoken.Encoding(
            "kimi",
            pat_str=layout.PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens={},
        )

    def __reduce__(self):
        return (tiktoken_encoder, (self.ranks,))

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if len(texts) == 1:
            return [self.encoding.encode_ordinary(texts[0])]
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)


# ---------------------------------------------------------------- reading


def load(folder: Path) -> Tokenizer:
    """See `k2lab.text.tokenizer.load`."""
    if folder.is_file() and folder.name in (RANK_FILE, HF_FILE):
        folder = folder.parent
    if (folder / RANK_FILE).is_file():
        return _load_kimi(folder)
    if (folder / HF_FILE).is_file():
        return _load_hf(folder)
    raise DataError(
        f"there is no tokenizer in {folder}",
        got="no such folder" if not folder.is_dir() else "a folder without tokenizer files",
        allowed=f"a folder with {HF_FILE} or with {RANK_FILE} and tokenizer_config.json",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"this is not a JSON file: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise DataError("the file must hold a JSON object", where=str(path), got=type(value).__name__)
    return value


def _content(token: Any) -> str | None:
    """A token's text: config files hold either the text or an object with the key `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _roles(config: dict[str, Any], token_map: dict[str, Any], special: dict[str, int], where: str) -> dict[str, str | None]:
    """Names of the bos, eos, pad and im_end tokens."""
    roles: dict[str, str | None] = {}
    for role in ("bos", "eos", "pad"):
        name = _content(config.get(f"{role}_token")) or _content(token_map.get(f"{role}_token"))
        if name is not None and name not in special:
            raise DataError(
                f"{role}_token names a token that the tokenizer does not have",
                where=where,
                got=repr(name),
                next=did_you_mean(name, special),
            )
        roles[role] = name
    roles["im_end"] = layout.IM_END if layout.IM_END in special else roles["eos"]
    return roles


def _read_ranks(path: Path) -> list[bytes]:
    """Ranks of a tiktoken file: one `base64 rank` per line, ranks dense from 0, all 256 bytes present."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[int(rank)] = base64.b64decode(token, validate=True)
        except ValueError:
            raise DataError(
                "this line is no byte-pair rank",
                where=f"{path}:{number}",
                got=repr(line[:80]),
                allowed="base64 of the token's bytes, one blank, its rank",
            ) from None
    tokens = set(ranks.values())
    if sorted(ranks) != list(range(len(ranks))) or len(tokens) != len(ranks):
        raise DataError("ranks must be 0, 1, 2, ... without gaps, and tokens must differ", where=str(path))
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise DataError(f"{len(missing)} single bytes have no rank", where=str(path), got=f"first missing byte: {missing[0]}")
    return [ranks[rank] for rank in range(len(ranks))]


def _load_kimi(folder: Path) -> Tokenizer:
    from k2lab.text.tokenizer import from_ranks

    config_path = folder / "tokenizer_config.json"
    if not config_path.is_file():
        raise DataError(
            f"{RANK_FILE} holds no special tokens, and the file that names them is missing",
            where=str(config_path),
            next="Copy tokenizer_config.json of the same release beside it",
        )
    config = _read_json(config_path)
    ranks = _read_ranks(folder / RANK_FILE)
    try:
        added = {int(token_id): _content(token) for token_id, token in config["added_tokens_decoder"].items()}
    except (KeyError, AttributeError, ValueError):
        raise DataError("added_tokens_decoder must map ids to special tokens", where=str(config_path)) from None
    first = len(ranks)
    if not added or min(added) < first or not all(isinstance(name, str) for name in added.values()):
        raise DataError(
            f"special tokens must have names and ids from {first} on, the number of ranks in {RANK_FILE}",
            where=f"{config_path}: added_tokens_decoder",
            got=f"smallest id {min(added)}" if added else "no tokens",
            next="Take both files from the same release",
        )
    special: dict[str, int] = {}
    for token_id in range(first, max(added) + 1):
        name = added.get(token_id) or layout.reserved_name(token_id)
        if name in special:
            raise DataError(f"the special token {name!r} has two ids", where=f"{config_path}: added_tokens_decoder")
        special[name] = token_id
    roles = _roles(config, {}, special, str(config_path))
    return from_ranks(ranks, special, roles, tiktoken_encoder(ranks))


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    """The parts of a pre-tokenizer, decoder or normalizer, with sequences opened."""
    if isinstance(node, dict):
        yield node
        for key in ("pretokenizers", "decoders", "normalizers"):
            for child in node.get(key) or []:
                yield from _walk(child)


def _patterns(spec: dict[str, Any]) -> tuple[str, ...]:
    """What fixes pre-tokenisation: the regexes, and the settings of other parts, in order."""
    found = []
    for part in _walk(spec.get("pre_tokenizer")):
        if part["type"] == "Split":
            found.append(next(iter(part["pattern"].values())))
        elif part["type"] == "ByteLevel" and not part.get("use_regex", True) and not part.get("add_prefix_space"):
            continue  # only writes bytes as characters
        elif part["type"] != "Sequence":
            found.append(json.dumps(part, sort_keys=True))
    return tuple(found)


def _load_hf(folder: Path) -> Tokenizer:
    import tokenizers

    from k2lab.text.tokenizer import Tokenizer, Vocabulary

    path = folder / HF_FILE
    spec = _read_json(path)
    files = {HF_FILE: path.read_text(encoding="utf-8")}
    files |= {name: (folder / name).read_text(encoding="utf-8") for name in COPIED if (folder / name).is_file()}
    config, token_map = (_read_json(folder / name) if name in files else {} for name in COPIED[:2])
    model = spec.get("model") or {}
    byte_level = any(part.get("type") == "ByteLevel" for part in _walk(spec.get("decoder")))
    if model.get("type", "BPE") != "BPE" or not byte_level:
        raise DataError(
            "this is not a byte-level BPE tokenizer",
            where=str(path),
            got=f"a {model.get('type')} model" if byte_level else "no ByteLevel decoder",
            allowed="byte-level BPE, as Kimi, Qwen, Llama 3, DeepSeek and GPT-2 use it",
        )
    special, kept = _split_added(spec, config)
    vocab: dict[str, int] = model["vocab"]
    for role in ("bos", "eos", "pad"):  # some files name a token that is in the vocabulary but not among the added ones
        name = _content(config.get(f"{role}_token")) or _content(token_map.get(f"{role}_token"))
        if name is not None and name not in special and name in vocab:
            special[name] = vocab[name]
    taken = set(special.values())
    try:
        ordinary = {token_id: layout.to_bytes(token) for token, token_id in vocab.items() if token_id not in taken}
        merges = tuple((layout.to_bytes(left), layout.to_bytes(right)) for left, right in _merge_pairs(model["merges"]))
    except (KeyError, ValueError) as error:
        raise DataError(f"vocabulary and merges are not in byte-level form ({error})", where=str(path)) from None
    ordinary |= {token["id"]: token["content"].encode() for token in kept}
    # The library numbers added tokens anew unless the vocabulary holds them (as raw text, which equals no byte-level token).
    model = {**model, "vocab": vocab | {token["content"]: token["id"] for token in kept}}
    try:
        rust = tokenizers.Tokenizer.from_str(json.dumps({**spec, "model": model, "added_tokens": kept}))
    except Exception as error:  # the Rust library raises bare Exception
        raise DataError(f"the tokenizers library does not read this file: {error}", where=str(path)) from None
    vocabulary = Vocabulary(
        ordinary=ordinary,
        special=dict(sorted(special.items(), key=lambda item: item[1])),
        roles=_roles(config, token_map, special, str(folder / COPIED[0])),
        patterns=_patterns(spec),
        merges=merges,
        normalizer=json.dumps(spec["normalizer"], sort_keys=True) if spec.get("normalizer") else "",
        files=files,
    )
    return Tokenizer(vocabulary, rust_encoder(rust))


def _split_added(spec: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Added tokens as special tokens (name -> id), and those that stay in the encoder because they are plain blanks."""
    special, kept = {}, []
    for token in spec.get("added_tokens") or []:
        if not token["content"].strip() and not token.get("special"):
            kept.append(token)
        else:
            special[token["content"]] = token["id"]
    known = {token["id"] for token in kept} | set(special.values())
    for token_id, token in (config.get("added_tokens_decoder") or {}).items():
        name = _content(token)
        if int(token_id) not in known and name:
            special[name] = int(token_id)
    return special, kept


def _merge_pairs(merges: list[Any]) -> Iterator[tuple[str, str]]:
    for merge in merges:  # older files hold "left right", newer ones [left, right]
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


# ---------------------------------------------------------------- writing


def save(tokenizer: Tokenizer, folder: Path, chat_template: str | None) -> None:
    """See `k2lab.text.tokenizer.Tokenizer.save`."""
    from k2lab.text.template import chat_template as kimi_template

    vocabulary = tokenizer._vocabulary
    files = dict(vocabulary.files) or _kimi_files(tokenizer)
    if chat_template is None and all(name in tokenizer.special for name in layout.CHAT_TOKENS):
        chat_template = kimi_template()
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _kimi_files(tokenizer: Tokenizer) -> dict[str, str]:
    from tokenizers import AddedToken

    from k2lab.text.tokenizer import kimi_config

    ranks = tokenizer._ranks()
    clash = {token for token in ranks if len(token) > 1} & {name.encode() for name in tokenizer.special}
    if clash:
        raise DataError(
            "an ordinary token has the same text as a special token, which tokenizer.json cannot express",
            got=repr(sorted(clash)[0]),
        )
    rust = layout.rust_tokenizer(ranks)
    rust.add_tokens(
        [
            AddedToken(name, special=name not in layout.VISIBLE, normalized=False)
            for name in sorted(tokenizer.special, key=lambda name: tokenizer.special[name])
        ]
    )
    for name, token_id in tokenizer.special.items():
        assert rust.token_to_id(name) == token_id, f"{name} must keep its id"
    roles = tokenizer._vocabulary.roles
    config = {
        **kimi_config(tokenizer.special, roles),
        "model_max_length": 10**30,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    token_map = {f"{role}_token": roles[role] for role in ("bos", "eos", "pad") if roles.get(role)}
    return {
        HF_FILE: rust.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(token_map, indent=2, ensure_ascii=False) + "\n",
    }
