"""Fixtures of the text room: a small corpus, a tokenizer trained on it, and folders in the three stored forms."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from text_samples import VOCAB_SIZE, corpus

from k2lab.text.tokenizer import Tokenizer, kimi_config, train_bpe


@pytest.fixture(scope="session")
def tok() -> Tokenizer:
    return train_bpe(corpus(), VOCAB_SIZE)


@pytest.fixture(scope="session")
def saved(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tok.save(folder)
    return folder


@pytest.fixture
def kimi_folder(tok: Tokenizer, tmp_path: Path) -> Path:
    """The tokenizer as Kimi publishes its own: byte-pair ranks in base64, special tokens in tokenizer_config.json."""
    folder = tmp_path / "kimi"
    folder.mkdir()
    first = tok.bos_id
    lines = [base64.b64encode(tok.token_bytes(rank)) + b" %d\n" % rank for rank in range(first)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    named = {name: token_id for name, token_id in tok.special.items() if "reserved" not in name}
    config = kimi_config(named, {"bos": "[BOS]", "eos": "[EOS]", "pad": "[PAD]"}) | {"tokenizer_class": "TikTokenTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder in the manner of Qwen: NFC, another pattern, added tokens, blanks as an added token, no bos."""
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

    rust = tokenizers.Tokenizer(models.BPE())
    rust.normalizer = normalizers.NFC()
    pattern = Regex(r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    rust.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    rust.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    rust.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("      ", normalized=False)])
    folder = tmp_path_factory.mktemp("qwen")
    rust.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<|endoftext|>",
        "chat_template": "{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
