import math

import numpy as np
import pytest
import torch

from k2lab.core.errors import DataError, NumericsError
from k2lab.core.rng import rng
from k2lab.core.types import Message
from k2lab.eval.bits import Document, document_bits, documents
from k2lab.eval.response import Chat, joined, response_loss
from k2lab.text import chat

LENGTHS = [3, 40, 17, 2, 65, 33, 8]


def make_docs():
    return [
        Document(tokens=rng(0, "doc", n).integers(0, 288, size=size), num_bytes=3 * size, key=f"d{n}", domain="ab"[n % 2])
        for n, size in enumerate(LENGTHS)
    ]


def test_document_bits_equal_plain_forwards(model, token_nats):
    found = document_bits(model, make_docs(), seq_len=128, tokens_per_batch=70)
    wanted = [token_nats(doc.tokens).sum() / math.log(2) for doc in make_docs()]
    np.testing.assert_allclose(found.bits, wanted, rtol=1e-5)
    assert found.tokens.tolist() == [size - 1 for size in LENGTHS]
    assert found.key == tuple(f"d{n}" for n in range(len(LENGTHS)))
    assert max(model.sizes) <= 70
    assert len(model.sizes) < len(LENGTHS)  # documents share batches
    assert sum(model.sizes) == sum(LENGTHS)


def test_long_documents_are_cut_with_one_token_of_overlap(model, token_nats):
    docs, seq_len = make_docs(), 16
    found = document_bits(model, docs, seq_len=seq_len)
    for doc, bits in zip(docs, found.bits):
        wanted, begin = 0.0, 0
        while begin < len(doc.tokens) - 1:
            wanted += token_nats(doc.tokens[begin : begin + seq_len]).sum()
            begin += seq_len - 1
        assert bits == pytest.approx(wanted / math.log(2), rel=1e-5)
    assert found.tokens.tolist() == [size - 1 for size in LENGTHS]
    whole = document_bits(model, docs, seq_len=128)
    assert found.bits[0] == pytest.approx(whole.bits[0], rel=1e-5)
    assert abs(found.bits[4] - whole.bits[4]) > 1e-3  # less context is another number


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(model, hf):
    kept = hf.lm_head.weight.data.clone()
    try:
        hf.lm_head.weight.data.zero_()
        found = document_bits(model, make_docs(), seq_len=20)
    finally:
        hf.lm_head.weight.data.copy_(kept)
    np.testing.assert_allclose(found.bits, found.tokens * math.log2(288), rtol=1e-6)
    assert found.nats_per_token().value == pytest.approx(math.log(288))
    assert found.bits_per_byte().value == pytest.approx(found.tokens.sum() * math.log2(288) / (3 * sum(LENGTHS)))


def test_domains_and_mode(model, hf):
    hf.train()
    try:
        found = document_bits(model, make_docs(), seq_len=64)
        assert hf.training
    finally:
        hf.eval()
    part = found.of("b")
    assert part.key == ("d1", "d3", "d5")
    assert part.bits.tolist() == found.bits[1::2].tolist()
    assert part.bits_per_byte().n == 3
    with pytest.raises(DataError, match="a, b"):
        found.of("c")


def test_trainer_model_agrees_with_plain_forwards(token_nats, hf):
    import copy

    from k2lab.models.swap import swap
    from k2lab.models.wrap import TrainModel

    class Unspecified(TrainModel):
        def __init__(self, hf):
            super().__init__(swap(hf), spec=None)

    found = document_bits(Unspecified(copy.deepcopy(hf)), make_docs(), seq_len=128, tokens_per_batch=100)
    wanted = [token_nats(doc.tokens).sum() / math.log(2) for doc in make_docs()]
    np.testing.assert_allclose(found.bits, wanted, rtol=1e-4)


def test_documents_of_token_shards(tmp_path):
    from k2lab.data.shards import TokenReader, TokenWriter

    with TokenWriter(tmp_path, "valid", vocab_size=288) as writer:
        for doc in make_docs():
            writer.add(doc.tokens, key=doc.key, text_bytes=doc.num_bytes, domain=doc.domain, source="s")
    for doc, wanted in zip(documents(TokenReader(tmp_path, "valid")), make_docs(), strict=True):
        assert (doc.key, doc.domain, doc.num_bytes) == (wanted.key, wanted.domain, wanted.num_bytes)
        assert np.array_equal(doc.tokens, wanted.tokens)


def test_documents_that_cannot_be_scored_are_refused(model):
    for doc in (Document([1], 5, "short"), Document([1, 2], 0, "empty")):
        with pytest.raises(DataError, match=doc.key):
            document_bits(model, [doc], seq_len=8)
    with pytest.raises(DataError, match="seq_len"):
        document_bits(model, make_docs(), seq_len=1)


def test_non_finite_likelihood_is_an_error(model, hf):
    kept = hf.lm_head.weight.data.clone()
    try:
        hf.lm_head.weight.data[5] = math.inf
        with pytest.raises(NumericsError, match="document d0"):
            document_bits(model, make_docs()[:1], seq_len=8)
    finally:
        hf.lm_head.weight.data.copy_(kept)


def rendered(tokenizer, *answers):
    chats = []
    for n, answer in enumerate(answers):
        one = chat.render([Message.text("user", f"question {n}?"), Message.text("assistant", answer)], tokenizer)
        chats.append(Chat(one.tokens, one.trained, f"c{n}"))
    return chats


def test_response_loss_counts_the_response_text_only(model, tokenizer, token_nats):
    answers = ["Yes.", "A longer answer, with more bytes."]
    chats = rendered(tokenizer, *answers)
    found = response_loss(model, chats, tokenizer.special.values(), seq_len=256)
    assert found.tokens.tolist() == [len(answer) for answer in answers]
    for each, answer, nats in zip(chats, answers, found.nats):
        # The answer's bytes stand directly before the closing <|im_end|>.
        assert bytes(each.tokens[-1 - len(answer) : -1]) == answer.encode()
        wanted = token_nats(each.tokens)[-1 - len(answer) : -1].sum()
        assert nats == pytest.approx(wanted, rel=1e-5)
    total = found.per_token()
    assert total.value == pytest.approx(found.nats.sum() / found.tokens.sum())
    assert total.n == 2


def test_joined_results_equal_one_over_all_chats(model, tokenizer):
    chats = rendered(tokenizer, "Yes.", "A longer answer, with more bytes.", "No.")
    special = tokenizer.special.values()
    whole = response_loss(model, chats, special, seq_len=256)
    parts = joined([response_loss(model, part, special, seq_len=256) for part in (chats[:1], chats[1:])])
    assert parts.key == whole.key and parts.tokens.tolist() == whole.tokens.tolist()
    np.testing.assert_allclose(parts.nats, whole.nats, rtol=1e-5)


def test_response_loss_refuses_what_it_cannot_measure(model, tokenizer):
    special = tokenizer.special.values()
    with pytest.raises(DataError, match="c0.*no response text"):
        response_loss(model, rendered(tokenizer, ""), special, seq_len=256)
    with pytest.raises(DataError, match="longer than seq_len"):
        response_loss(model, rendered(tokenizer, "x" * 300), special, seq_len=256)
    with pytest.raises(DataError, match="differ in length"):
        response_loss(model, [Chat([1, 2], [True], "odd")], special, seq_len=256)


def test_only_inference(model):
    document_bits(model, make_docs()[:2], seq_len=16)
    assert all(parameter.grad is None for parameter in model.hf.parameters())
    assert torch.is_grad_enabled()
