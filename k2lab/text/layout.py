"""Kimi's vocabulary layout: the pre-tokenisation pattern, the special block, and byte-pair ranks as a Hugging Face tokenizer.

The layout is that of Kimi K2 (163,840 entries): ordinary tokens are ranks 0..n-1, the special block follows and ends with [PAD].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from k2lab.core.errors import DataError, RecipeError

BOS, EOS, PAD = "[BOS]", "[EOS]", "[PAD]"
IM_END, IM_MIDDLE = "<|im_end|>", "<|im_middle|>"
IM_USER, IM_ASSISTANT, IM_SYSTEM = "<|im_user|>", "<|im_assistant|>", "<|im_system|>"
SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, CALL_ARGUMENT, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
THINK, THINK_END = "<think>", "</think>"

# Distance from the first special id, as in Kimi K2 (whose first special id is 163584).
OFFSETS = {
    BOS: 0,
    EOS: 1,
    IM_END: 2,
    IM_USER: 3,
    IM_ASSISTANT: 4,
    IM_SYSTEM: 10,
    SECTION_BEGIN: 11,
    SECTION_END: 12,
    CALL_BEGIN: 13,
    CALL_ARGUMENT: 14,
    CALL_END: 15,
    IM_MIDDLE: 17,
    THINK: 22,  # our choice of place: the facts at hand give no offset for the two think tokens
    THINK_END: 23,
}
CHAT_TOKENS = tuple(name for name in OFFSETS if name not in (BOS, EOS, THINK, THINK_END))
# Tokens that a server's parsers must still see when special tokens are left out of decoded text (`"special": false` for HF).
VISIBLE = frozenset({SECTION_BEGIN, SECTION_END, CALL_BEGIN, CALL_ARGUMENT, CALL_END, THINK, THINK_END})
MIN_SPECIAL = max(OFFSETS.values()) + 2  # the last offset, and [PAD] behind it

# Kimi's pre-tokenisation: runs of Han characters on their own; words with at most one leading mark and a change of case only
# from upper to lower, contractions attached; up to three digits; punctuation with its line ends; line ends; blanks.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        _LEAD + _UPPER + "*" + _LOWER + "+" + _CONTRACTION,
        _LEAD + _UPPER + "+" + _LOWER + "*" + _CONTRACTION,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# Kimi's own tokenizer cuts text after so many characters, and runs with (or without) blanks after so many.
MAX_CHARS = 400_000
MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{MAX_RUN + 1},}}|\S{{{MAX_RUN + 1},}}")


@cache
def byte_to_char() -> tuple[str, ...]:
    """GPT-2's printable character for each byte: printable Latin-1 stays, the other 68 bytes move to U+0100 and up."""
    stays = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in stays else next(moved)) for byte in range(256))


@cache
def char_to_byte() -> dict[str, int]:
    """Inverse of `byte_to_char`."""
    return {char: byte for byte, char in enumerate(byte_to_char())}


def to_chars(token: bytes) -> str:
    """A token's bytes as byte-level BPE files write them."""
    table = byte_to_char()
    return "".join(table[byte] for byte in token)


def to_bytes(token: str) -> bytes:
    """The bytes of a token as byte-level BPE files write it. Raises KeyError if it is not written in GPT-2's byte characters."""
    table = char_to_byte()
    return bytes([table[char] for char in token])


def special_block(first: int, size: int) -> dict[str, int]:
    """The special tokens of a vocabulary whose ordinary tokens are 0..first-1: Kimi's names at Kimi's offsets, [PAD] last,
    `<|reserved_token_{id}|>` in the gaps; in order of ids. Raises RecipeError if `size` is too small."""
    if size < MIN_SPECIAL:
        raise RecipeError(
            "the special block is too small for Kimi's chat tokens", got=f"num_special={size}", allowed=f"{MIN_SPECIAL} or more"
        )
    name_at = {offset: name for name, offset in OFFSETS.items()} | {size - 1: PAD}
    return {name_at.get(offset, reserved_name(first + offset)): first + offset for offset in range(size)}


def reserved_name(token_id: int) -> str:
    """The name of a special id that has no use yet."""
    return f"<|reserved_token_{token_id}|>"


def pieces(text: str) -> list[str]:
    """Cuts a very long text as Kimi's tokenizer does: every 400,000 characters, and within these every 25,000 characters of an
    unbroken run of blanks or of non-blanks. The pieces join to the text; nearly every text is one piece."""
    if len(text) <= MAX_RUN:
        return [text]
    cuts = []
    for start in range(0, len(text), MAX_CHARS):
        part = text[start : start + MAX_CHARS]
        marks = [0]
        for run in _LONG_RUN.finditer(part):
            marks += range(run.start() + MAX_RUN, run.end(), MAX_RUN)
        cuts += [part[a:b] for a, b in zip(marks, [*marks[1:], len(part)])]
    return cuts


def check_text(text: object) -> None:
    """Raises DataError unless `text` is a str that UTF-8 can hold (a lone surrogate, as from broken JSON, cannot)."""
    if not isinstance(text, str):
        raise DataError("only str can be encoded", got=f"{type(text).__name__}: {text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds a lone surrogate at character {error.start}, which is no Unicode text",
            got=repr(text[max(0, error.start - 20) : error.end + 20]),
            next="Repair or drop the record, e.g. text.encode('utf-8', 'replace').decode()",
        ) from None


def merges_of(ranks: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """All merges that byte-pair ranks imply, in the order in which they apply.

    Rank-based BPE (tiktoken) joins the neighbours whose joint bytes have the lowest rank, whichever two tokens they are. Written
    as merges this is, for each token in order of rank, every way to cut it into two tokens, lower ranks of the left part first.
    """
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    for token in ranks:
        ways = []
        for cut in range(1, len(token)):
            left, right = rank_of.get(token[:cut]), rank_of.get(token[cut:])
            if left is not None and right is not None:
                ways.append((left, right))
        for left, right in sorted(ways):
            yield ranks[left], ranks[right]


def pre_tokenizer() -> Any:
    """Kimi's pre-tokenisation as a `tokenizers` object."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def rust_tokenizer(ranks: Sequence[bytes]) -> Any:
    """A `tokenizers.Tokenizer` without special tokens that encodes as byte-pair ranks do."""
    import tokenizers
    from tokenizers import decoders, models

    vocab = {to_chars(token): rank for rank, token in enumerate(ranks)}
    merges = [(to_chars(left), to_chars(right)) for left, right in merges_of(ranks)]
    rust = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    rust.pre_tokenizer = pre_tokenizer()
    rust.decoder = decoders.ByteLevel()
    return rust


def train_ranks(texts: Iterator[str], num_tokens: int) -> list[bytes]:
    """`num_tokens` byte-pair ranks learnt from `texts` (all 256 bytes first); fewer if the text does not yield as many.

    A pair counts only if it occurs at least twice. Ties go to the pair with the lower ids, so equal texts give equal ranks.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    rust.train_from_iterator(texts, trainer=trainer)
    vocab = rust.get_vocab()
    ranks = sorted(vocab, key=lambda token: vocab[token])
    assert sorted(vocab.values()) == list(range(len(vocab))), "trained ids must be dense"
    return [to_bytes(token) for token in ranks]
