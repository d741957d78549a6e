"""Stored forms: our folder, Kimi's folder, other Hugging Face folders; equal ids with transformers and between the forms."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import transformers
from text_samples import SENTENCES, corpus, random_text

from k2lab.core.errors import DataError, MachineError, RecipeError
from k2lab.text import layout
from k2lab.text.tokenizer import Tokenizer, load

TEXTS = [*SENTENCES, *corpus()[:5], *(random_text("files", n) for n in range(300))]


def plain(text: str) -> str:
    """`text` without special-token names, which other programs would encode as special tokens."""
    for name in layout.OFFSETS:
        text = text.replace(name, "")
    return text


def test_saved_folder_loads_back_equal(tok: Tokenizer, saved: Path):
    copy = load(saved)
    assert copy.fingerprint() == tok.fingerprint()
    assert (copy.special, copy.vocab_size) == (tok.special, tok.vocab_size)
    assert (copy.bos_id, copy.eos_id, copy.pad_id, copy.im_end_id) == (tok.bos_id, tok.eos_id, tok.pad_id, tok.im_end_id)
    assert copy.encode_batch(TEXTS) == tok.encode_batch(TEXTS)
    long = " " * 30_000 + "z" * 60_000
    assert copy.encode(long) == tok.encode(long)


@pytest.mark.parametrize("model_type", [None, "deepseek_v3", "kimi_linear"])
def test_transformers_gives_the_same_ids(tok: Tokenizer, saved: Path, tmp_path: Path, model_type: str | None):
    shutil.copytree(saved, tmp_path / "model")
    if model_type:  # AutoTokenizer picks its class by the model's type when there is a config
        (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model_type}))
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [plain(text) for text in TEXTS]
    assert hf(texts, add_special_tokens=False).input_ids == tok.encode_batch(texts)
    assert hf.convert_tokens_to_ids(list(tok.special)) == list(tok.special.values())
    assert (hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (tok.bos_id, tok.eos_id, tok.pad_id)
    assert len(hf) == tok.vocab_size
    ids = [tok.special_id("<think>"), *tok.encode("hm"), tok.special_id("</think>"), tok.im_end_id]
    assert hf.decode(ids, skip_special_tokens=True) == "<think>hm</think>"
    assert hf("<|im_end|>", add_special_tokens=False).input_ids == [tok.im_end_id]
    assert tok.im_end_id not in tok.encode("<|im_end|>")


def test_fast_tokenizer_class_and_a_second_save_by_transformers(tok: Tokenizer, saved: Path, tmp_path: Path):
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(saved)
    assert hf(SENTENCES[0], add_special_tokens=False).input_ids == tok.encode(SENTENCES[0])
    hf.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.fingerprint() == tok.fingerprint()
    assert again.pad_id == tok.pad_id


def test_kimi_folder_gives_the_same_ids(tok: Tokenizer, kimi_folder: Path, tmp_path: Path):
    kimi = load(kimi_folder)
    assert kimi.special == tok.special
    assert kimi.fingerprint() == tok.fingerprint()
    assert (kimi.bos_id, kimi.eos_id, kimi.pad_id, kimi.im_end_id) == (tok.bos_id, tok.eos_id, tok.pad_id, tok.im_end_id)
    long = [" " * 450_000, "y" * 70_000 + "\n" * 30_000 + "中" * 1000]  # more blanks than tiktoken alone can take
    assert kimi.encode_batch([*TEXTS, *long]) == tok.encode_batch([*TEXTS, *long])
    with pytest.raises(DataError, match="surrogate"):
        kimi.encode("\ud83d")
    kimi.save(tmp_path / "out")
    assert load(tmp_path / "out").fingerprint() == tok.fingerprint()
    assert load(tmp_path / "out").encode_batch(TEXTS) == tok.encode_batch(TEXTS)


def test_kimi_folder_without_tiktoken_names_the_extra(kimi_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(MachineError, match=r"pip install 'k2lab\[kimi\]'"):
        load(kimi_folder)


def test_kimi_eos_is_read_from_the_file(kimi_folder: Path):
    path = kimi_folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eos_token": {"content": "<|im_end|>"}}))
    kimi = load(kimi_folder)
    assert kimi.eos_id == kimi.im_end_id == kimi.special["<|im_end|>"]


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda f: (f / "tiktoken.model").write_text("IQ== 0\nnonsense\n"), r"tiktoken.model:2.*no byte-pair rank"),
        (lambda f: (f / "tiktoken.model").write_text("IQ== 0\nIg== 2\n"), "without gaps"),
        (lambda f: (f / "tiktoken.model").write_text("IQ== 0\nIg== 1\n"), "254 single bytes have no rank"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "holds no special tokens"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "not a JSON file"),
        (lambda f: (f / "tokenizer_config.json").write_text("{}"), "added_tokens_decoder must map"),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"3": {"content": "[BOS]"}}}'),
            "smallest id 3",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text(
                '{"added_tokens_decoder": {"508": {"content": "[BOS]"}}, "eos_token": "[BOT]"}'
            ),
            "eos_token names a token.*Did you mean",
        ),
    ],
)
def test_damaged_kimi_folders(kimi_folder: Path, damage, match: str):
    damage(kimi_folder)
    with pytest.raises(DataError, match=match):
        load(kimi_folder)


def test_other_tokenizer_folder(qwen_folder: Path, tmp_path: Path):
    qwen = load(qwen_folder)
    hf = transformers.AutoTokenizer.from_pretrained(qwen_folder)
    texts = [plain(text) for text in TEXTS] + ["if x:\n      pass\n            deeper"]
    assert qwen.encode_batch(texts) == hf(texts, add_special_tokens=False).input_ids
    assert set(qwen.special) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"}
    assert qwen.im_end_id == qwen.eos_id == qwen.special["<|im_end|>"]
    assert qwen.pad_id == qwen.special["<|endoftext|>"]
    assert qwen.vocab_size == len(hf)
    with pytest.raises(RecipeError, match="no bos token"):
        _ = qwen.bos_id
    text = "a<|im_end|><tool_call>b<|endoftext|>"
    assert not set(qwen.encode(text)) & set(qwen.special.values())
    assert qwen.decode(qwen.encode(text)) == text
    assert qwen.decode(qwen.encode("cafe\u0301      x")) == "café      x"  # the folder's own NFC
    qwen.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (qwen_folder / "tokenizer.json").read_bytes()
    assert not (tmp_path / "chat_template.jinja").exists()
    assert load(tmp_path).fingerprint() == qwen.fingerprint()


def test_eos_ends_messages_where_there_is_no_im_end(qwen_folder: Path, tmp_path: Path):
    spec = json.loads((qwen_folder / "tokenizer.json").read_text().replace("<|im_end|>", "<|eot_id|>"))
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]  # the older way to write merges
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|im_start|>"}}')
    llama = load(tmp_path)
    assert llama.im_end_id == llama.eos_id == llama.special["<|eot_id|>"]
    assert llama.bos_id == llama.special["<|im_start|>"]
    assert llama.encode(SENTENCES[2]) == load(qwen_folder).encode(SENTENCES[2])


def test_patterns_count_in_fingerprints(qwen_folder: Path, tmp_path: Path):
    shutil.copytree(qwen_folder, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    text = path.read_text()
    assert text.count("(?i:'s|'t)") == 1
    path.write_text(text.replace("(?i:'s|'t)", "(?i:'s|'d)"))
    assert load(tmp_path / "other").fingerprint() != load(qwen_folder).fingerprint()


def test_folders_that_are_no_byte_level_bpe(tmp_path: Path):
    import tokenizers
    from tokenizers import models

    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="without tokenizer files"):
        load(tmp_path)
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="not a byte-level BPE"):
        load(tmp_path)
