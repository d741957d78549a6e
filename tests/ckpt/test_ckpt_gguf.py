"""GGUF: a file written here byte by byte comes back as numbers, and as a model that computes what transformers' does."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from made_up_gguf import TOKENS, make, metadata_of, tensors_of, write

from k2lab.ckpt import gguf
from k2lab.ckpt.folder import open_folder
from k2lab.core.errors import CheckpointError
from k2lab.models import build
from k2lab.stages._import import SHORTER, add_chat_tokens, import_folder, import_gguf
from k2lab.text import tokenizer as text_tokenizer


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


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_import_gives_back_the_model_with_chat_tokens_behind_its_vocabulary(tmp_path, kind):
    model, path = make(tmp_path, kind)
    work = tmp_path / "work"
    work.mkdir()
    facts = import_gguf(path, work, chat_tokens=True)
    found, tokenizer = build.load(open_folder(work)), text_tokenizer.load(work)
    old = len(TOKENS)
    assert facts["added_tokens"] and found.vocab_size == tokenizer.vocab_size == old + len(facts["added_tokens"])
    for name, tensor in model.state().items():
        assert torch.equal(found.state()[name][: len(tensor)], tensor), name
    rows, newline = found.state()["model.embed_tokens.weight"], TOKENS.index("Ċ")
    for token in ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"):
        assert torch.equal(rows[tokenizer.special_id(token)], SHORTER * rows[newline]), token
    torch.testing.assert_close(rows[tokenizer.special_id("<think>")], rows[:old].mean(0))
    assert tokenizer.im_end_id == 2 and tokenizer.encode("the 12") == [TOKENS.index(t) for t in ("the", "Ġ", "1", "2")]
    tokens = torch.tensor([[5, 9, 30, 2, 77]])
    with torch.no_grad():
        expected, got = (m.eval().hf(tokens).logits[..., :old] for m in (model, found))
    torch.testing.assert_close(got, expected)
    with torch.no_grad():  # wherever the model would say a newline (a positive logit), it says what begins like one less readily
        logits = found.eval().hf(torch.arange(old)[None]).logits[0]
    likely = logits[:, newline] > 0.01
    assert likely.any() and (logits[likely, tokenizer.special_id("<|im_user|>")] < logits[likely, newline]).all()


def test_new_tokens_take_the_place_of_rows_that_only_pad_the_vocabulary():
    spec = {"model": {"vocab": {"a": 0, "Ċ": 1}}, "added_tokens": [{"content": "<|im_end|>", "id": 2}]}
    rows = torch.tensor([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0], [9e9, 9e9], [9e9, 9e9]])
    state, config, settings = {"model.embed_tokens.weight": rows}, {"vocab_size": 5}, {"eos_token": "<|im_end|>"}
    added = add_chat_tokens(spec, settings, state, config)
    assert "<|im_end|>" not in added and config["vocab_size"] == 3 + len(added) == len(state["model.embed_tokens.weight"])
    ids = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    assert [ids[name] for name in added] == list(range(3, 3 + len(added)))
    found = state["model.embed_tokens.weight"]
    assert torch.equal(found[:3], rows[:3]) and torch.equal(found[ids["<|im_middle|>"]], SHORTER * rows[1])
    assert torch.equal(found[ids["<think>"]], torch.tensor([2.0, 4.0]))  # the mean of trained rows
    assert settings["pad_token"] == "<|im_end|>"


def test_a_folder_gets_chat_tokens_too_and_may_be_stored_as_bf16(tmp_path):
    model, path = make(tmp_path, "qwen2")
    plain, chat = tmp_path / "plain", tmp_path / "chat"
    plain.mkdir(), chat.mkdir()
    import_gguf(path, plain, chat_tokens=False)
    facts = import_folder(plain, chat, chat_tokens=True, dtype=torch.bfloat16)
    found = build.load(open_folder(chat), dtype=torch.bfloat16)
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
    assert build.load(open_folder(work)).vocab_size == model.vocab_size
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
