"""Dense students: the same numbers as transformers' own classes, packed as alone, decoded as trained, and small enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from k2lab import specs
from k2lab.core.slots import load
from k2lab.core.types import Sample, SampleParams
from k2lab.data.pack import pack
from k2lab.engine.step import forward_backward, to_device
from k2lab.models import build
from k2lab.models.losses import token_logprobs
from k2lab.optim.schedules.constant import Constant
from k2lab.sampling.local import LocalSampler

QWEN = specs.get("tiny-qwen2").replace(vocab_size=300, hidden_size=64, intermediate_size=96)
LLAMA = QWEN.replace(attention_bias=False, tie_word_embeddings=True, local_heads=())
PLAIN = {"qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM}


def documents(sizes=(40, 7, 90, 1, 23)):
    draw = np.random.Generator(np.random.Philox(key=3))
    for n, size in enumerate(sizes):
        tokens = draw.integers(0, 300, size).astype(np.int32)
        weight = np.ones(size, np.float32)
        weight[0] = 0
        yield Sample(tokens=tokens, weight=weight, key=str(n))


def logits(model, batch):
    batch = to_device(batch, torch.device("cpu"))
    return model.hidden(batch) @ model.head().t()


@pytest.mark.parametrize("spec", [QWEN, LLAMA], ids=["qwen2", "llama"])
def test_packed_logits_equal_transformers_one_document_at_a_time(spec, tmp_path):
    model = build.from_spec(spec, seed=1).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases begin at 0, which would hide an error
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    build.save(model, tmp_path)
    kind = build.read_config(tmp_path)["model_type"]
    plain = PLAIN[kind].from_pretrained(str(tmp_path), attn_implementation="eager", dtype=torch.float32).eval()
    batch = pack(list(documents()))
    with torch.no_grad():
        ours = logits(model, batch)
        for start, end in zip(batch.starts_S1, batch.starts_S1[1:]):
            theirs = plain(torch.as_tensor(batch.tokens_T[start:end])[None]).logits[0]
            torch.testing.assert_close(ours[start:end], theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", [QWEN, LLAMA], ids=["qwen2", "llama"])
def test_gradients_of_a_pack_are_those_of_its_documents(spec):
    objective = load("objective", "lm")()
    samples = list(documents((30, 70, 12)))

    def gradients(batches):
        model = build.from_spec(spec, seed=1).to(dtype=torch.float64)
        counts = {"lm": sum(batch.num_tokens for batch in batches)}
        forward_backward(model, objective, batches, counts)
        return {name: p.grad for name, p in model.named_parameters()}

    packed, alone = gradients([pack(samples)]), gradients([pack([sample]) for sample in samples])
    for name, grad in packed.items():
        torch.testing.assert_close(grad, alone[name], atol=1e-10, rtol=1e-8, msg=name)


def test_what_a_student_samples_has_the_log_probabilities_that_training_sees():
    model = build.from_spec(QWEN, seed=1)
    prompts = [list(range(5, 20)), [7, 8], list(range(100, 140))]
    params = SampleParams(max_tokens=12, temperature=1.0, seed=4)
    done = LocalSampler(model.hf, pad_id=0, eos_id=299).sample(prompts, params, ["a", "b", "c"])
    model.eval()
    for prompt, completion in zip(prompts, done):
        tokens = np.array([*prompt, *completion.tokens], np.int32)
        batch = to_device(pack([Sample(tokens=tokens, weight=np.ones(len(tokens), np.float32), key="x")]), torch.device("cpu"))
        with torch.no_grad():
            found = token_logprobs(model.hidden(batch), model.head(), batch.targets_T)
        np.testing.assert_allclose(found[len(prompt) - 1 : -1].numpy(), completion.logprobs, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muonclip"])
def test_both_optimizers_know_every_parameter_of_a_student(name):
    model = build.from_spec(QWEN, seed=1)
    optim = load("optimizer", name)(lr=1e-3, schedule=Constant()).build(model.named_parameters(), model.row_layouts())
    assert "unknown" not in optim.table_text()
    names = {row.name: row.optimizer for row in optim.table()}
    assert names["model.embed_tokens.weight"] == names["lm_head.weight"] == "adamw"
    assert names["model.layers.0.self_attn.q_proj.weight"] == ("muon" if name == "muonclip" else "adamw")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    forward_backward(model, load("objective", "lm")(), [pack(list(documents()))], {"lm": 100})
    optim.step(0, 10)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_tiny_student_is_small_beside_its_teacher():
    teacher, student = specs.get("tiny-k2"), specs.get("tiny-qwen2")
    assert student.vocab_size == teacher.vocab_size
    assert student.active(with_embeddings=False) <= 0.6 * teacher.active(with_embeddings=False)
    ours = sum(p.numel() for name, p in build.from_spec(student, seed=0).named_parameters())
    assert ours == student.total()
    assert sum(student.flops_per_token(256).values()) < 0.7 * sum(teacher.flops_per_token(256).values())
