"""The tokenizer: byte-level BPE whose ordinary text never turns into special tokens.

`train_bpe` learns one in Kimi's layout; `load` reads one that we saved, a user's Kimi folder, or any byte-level Hugging Face
tokenizer. Special tokens are kept outside the encoder: they are only ever written by id (`special_id`), so data that contains
the text `<|im_end|>` cannot end a turn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2lab.core.errors import DataError, RecipeError, did_you_mean
from k2lab.text import layout

Encode = Callable[[list[str]], list[list[int]]]
_SLICE_CHARS = 4_000_000  # encoded at once: the Rust library's intermediate results take about 100 bytes a token


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made of, however it was stored.

    `ordinary` id -> bytes; `special` name -> id; `roles` holds the names of bos, eos, pad and im_end, None where there is none;
    `patterns` the pre-tokenisation regexes in order; `merges` None means all merges that the ranks imply (tiktoken's rule);
    `normalizer` the file's own text normalizer, if any; `files` the original Hugging Face files, kept so that `save` can
    write them again (empty for Kimi's layout, whose files we write).
    """

    ordinary: dict[int, bytes]
    special: dict[str, int]
    roles: dict[str, str | None]
    patterns: tuple[str, ...] = (layout.PATTERN,)
    merges: tuple[tuple[bytes, bytes], ...] | None = None
    normalizer: str = ""
    files: dict[str, str] = field(default_factory=dict)


class Tokenizer:
    """Encodes text to ids and decodes ids to text. Made by `train_bpe` or `load`; immutable.

    `vocab_size` counts ordinary and special tokens; `special` maps each special token's name to its id.
    """

    def __init__(self, vocabulary: Vocabulary, encode: Encode) -> None:
        self._vocabulary = vocabulary
        self._encode = encode
        self.special: dict[str, int] = dict(vocabulary.special)
        self.vocab_size: int = 1 + max([*vocabulary.ordinary, *self.special.values()])
        self._is_special = frozenset(self.special.values())
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        for token_id, token in vocabulary.ordinary.items():
            self._bytes[token_id] = token
        for name, token_id in self.special.items():
            self._bytes[token_id] = name.encode()
        # Kimi cuts very long texts before it encodes them; other tokenizers don't.
        self._cuts = vocabulary.patterns == (layout.PATTERN,)
        self._fingerprint = ""

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special={len(self.special)})"

    # ------------------------------------------------------------ special tokens

    def special_id(self, name: str) -> int:
        """The id of the special token `name`. Raises RecipeError if this tokenizer has no such special token."""
        if name not in self.special:
            named = [key for key in self.special if "reserved" not in key]
            raise RecipeError(
                f"this tokenizer has no special token {name!r}",
                allowed=", ".join(named[:30]) or "none: it has no special tokens",
                next=did_you_mean(name, named) or "Use a tokenizer in Kimi's layout, or one that defines this token",
            )
        return self.special[name]

    def _role_id(self, role: str) -> int:
        name = self._vocabulary.roles.get(role)
        if name is None:
            raise RecipeError(
                f"this tokenizer has no {role} token",
                next=f"Set {role}_token in its tokenizer_config.json to one of its special tokens",
            )
        return self.special_id(name)

    @property
    def bos_id(self) -> int:
        """Id of the token that starts a document. RecipeError if there is none."""
        return self._role_id("bos")

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a document. RecipeError if there is none."""
        return self._role_id("eos")

    @property
    def pad_id(self) -> int:
        """Id of the padding token. RecipeError if there is none."""
        return self._role_id("pad")

    @property
    def im_end_id(self) -> int:
        """Id of the token that ends a message: `<|im_end|>`, or eos where there is no such token."""
        return self._role_id("im_end")

    # ------------------------------------------------------------ text <-> ids

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all of it ordinary text. Raises DataError for lone surrogates and for what is no str."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them; uses all cores."""
        for text in texts:
            layout.check_text(text)
        if not self._cuts or all(len(text) <= layout.MAX_RUN for text in texts):
            return self._encode_slices(texts)
        parts = [layout.pieces(text) for text in texts]
        coded = iter(self._encode_slices([piece for part in parts for piece in part]))
        return [[token for _ in part for token in next(coded)] for part in parts]

    def _encode_slices(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = []
        start = chars = 0
        for end, text in enumerate(texts, 1):
            chars += len(text)
            if chars >= _SLICE_CHARS:
                ids += self._encode(texts[start:end])
                start, chars = end, 0
        return ids + self._encode(texts[start:]) if start < len(texts) else ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; those of its name for a special token. Raises DataError for an id that is no token."""
        token = self._bytes[token_id] if 0 <= token_id < self.vocab_size else None
        if token is None:
            raise DataError(
                "there is no such token", got=int(token_id), allowed=f"ids 0 to {self.vocab_size - 1} that are in use"
            )
        return token

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves every special token out."""
        if skip_special:
            ids = (token_id for token_id in ids if token_id not in self._is_special)
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    # ------------------------------------------------------------ storage

    def fingerprint(self) -> str:
        """sha256 over vocabulary, merges, special tokens and pre-tokenisation patterns; equal for every stored form."""
        if not self._fingerprint:
            vocabulary = self._vocabulary
            rank_of = {token: rank for rank, token in vocabulary.ordinary.items()}
            digest = hashlib.sha256(b"k2lab tokenizer 1\n")
            for token_id, token in sorted(vocabulary.ordinary.items()):
                digest.update(b"%d %s\n" % (token_id, token.hex().encode()))
            for left, right in self._merges():
                digest.update(b"%d+%d\n" % (rank_of[left], rank_of[right]))
            extra = [sorted(self.special.items()), vocabulary.patterns, vocabulary.normalizer]
            digest.update(json.dumps(extra).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _merges(self) -> Iterable[tuple[bytes, bytes]]:
        merges = self._vocabulary.merges
        return layout.merges_of(self._ranks()) if merges is None else merges

    def _ranks(self) -> list[bytes]:
        return [token for _, token in sorted(self._vocabulary.ordinary.items())]

    def save(self, folder: Path, chat_template: str | None = None) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja` into `folder`, so
        that `transformers.AutoTokenizer.from_pretrained(folder)` gives the same ids and the same rendered chats.

        `chat_template` replaces the default one (`template.chat_template()`, e.g. with other defaults). A tokenizer that was
        loaded from a Hugging Face folder is written as it was, with its own chat template unless it has Kimi's chat tokens.
        """
        from k2lab.text import _files

        _files.save(self, Path(folder), chat_template)


def train_bpe(texts: Iterable[str], vocab_size: int, num_special: int = 32, digit_merges: bool = True) -> Tokenizer:
    """Byte-level BPE in Kimi's layout: `vocab_size - num_special` ordinary tokens, then the special block.

    Without `digit_merges` every digit stays a token of its own (Kimi's pattern allows up to three in one).
    Equal texts in equal order give the equal tokenizer, whatever the number of threads. Raises RecipeError if the sizes are too
    small for 256 bytes and Kimi's special tokens, DataError if the texts don't yield so many tokens.
    """
    num_tokens = vocab_size - num_special
    special = layout.special_block(num_tokens, num_special)
    if num_tokens < 256:
        raise RecipeError(
            "the vocabulary is too small for all bytes",
            got=f"vocab_size={vocab_size}, num_special={num_special}",
            allowed=f"vocab_size of {256 + num_special} or more",
        )
    ranks = layout.train_ranks(_training_pieces(texts, digit_merges), num_tokens)
    if len(ranks) < num_tokens:
        raise DataError(
            f"the texts yield only {len(ranks)} ordinary tokens, {num_tokens} are wanted",
            got=f"vocab_size={vocab_size}, num_special={num_special}",
            allowed=f"vocab_size up to {len(ranks) + num_special} with these texts",
            next="Give more text or a smaller vocab_size",
        )
    return from_ranks(ranks, special)


def _training_pieces(texts: Iterable[str], digit_merges: bool) -> Iterator[str]:
    if isinstance(texts, str):
        raise DataError("train_bpe takes many texts, not one str", next="Pass [text]")
    for text in texts:
        layout.check_text(text)
        for piece in layout.pieces(text):
            if digit_merges or not piece.isnumeric():
                yield piece
            else:
                yield from piece


def from_ranks(
    ranks: Sequence[bytes],
    special: dict[str, int],
    roles: dict[str, str | None] | None = None,
    encode: Encode | None = None,
) -> Tokenizer:
    """A tokenizer from byte-pair ranks and special tokens; `roles` as in `Vocabulary`, `encode` by default the Rust library's."""
    from k2lab.text import _files

    if encode is None:
        encode = _files.rust_encoder(layout.rust_tokenizer(ranks))
    roles = roles or {"bos": layout.BOS, "eos": layout.EOS, "pad": layout.PAD, "im_end": layout.IM_END}
    return Tokenizer(Vocabulary(ordinary=dict(enumerate(ranks)), special=special, roles=roles), encode)


def load(path: Path) -> Tokenizer:
    """Reads a tokenizer folder: one that `save` wrote, a Kimi folder (`tiktoken.model`; needs the extra `k2lab[kimi]`), or any
    byte-level Hugging Face tokenizer (`tokenizer.json`), whose special tokens are its added tokens.

    Added tokens that are only blanks (some tokenizers have such for indentation) count as ordinary text. Raises DataError if the
    files are missing, damaged or not byte-level BPE, MachineError if the extra is missing.
    """
    from k2lab.text import _files

    return _files.load(Path(path))


def kimi_config(special: dict[str, int], roles: dict[str, str | None]) -> dict[str, Any]:
    """`tokenizer_config.json` of a tokenizer in Kimi's layout, without a tokenizer class."""
    return {
        "added_tokens_decoder": {
            str(token_id): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": name not in layout.VISIBLE,
            }
            for name, token_id in special.items()
        },
        **{f"{role}_token": roles[role] for role in ("bos", "eos", "pad") if roles.get(role)},
        "clean_up_tokenization_spaces": False,
    }
