"""The flat RL loop: its sampler, its log-probabilities and its objective, and that it runs as a reader would run it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from k2lab import specs
from k2lab.models import build
from k2lab.text import tokenizer as tokenizers

LOOP = Path(__file__).parents[2] / "loops" / "rl_loop.py"


@pytest.fixture(scope="module")
def loop():
    spec = importlib.util.spec_from_file_location("rl_loop", LOOP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small K2 model with a tokenizer, saved with the released tensor names."""
    path = tmp_path_factory.mktemp("model")
    text = ["State the final answer to the following arithmetic problem: 1 + 2 = 3 4 5 6 7 8 9 0"] * 4
    tokenizers.train_bpe(text, vocab_size=320).save(path)
    spec = specs.from_recipe({"spec": "tiny-k2", "vocab_size": 320, "hidden_size": 128, "intermediate_size": 128})
    build.save(build.from_spec(spec, seed=5), path)
    return path


def test_log_probabilities_are_sums_over_the_response_whatever_the_padding(loop, folder):
    model = loop.load_model(folder).eval()
    rows = [([5, 6, 7, 8], [9, 10]), ([11, 12], [13, 14, 15])]
    alone = []
    for prompt, response in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        alone.append(sum(float(logprobs[len(prompt) - 1 + n, token]) for n, token in enumerate(response)))
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 0], [0, 0, 11, 12, 13, 14, 15]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1]])
    made = torch.tensor([[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        found = loop.response_logprobs(model, tokens, mask, made)
    torch.testing.assert_close(found, torch.tensor(alone), atol=2e-5, rtol=0)


def test_greedy_sampling_is_the_argmax_of_full_forwards(loop, folder):
    model = loop.load_model(folder)
    tokens, mask = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out, _, made = loop.sample(model, tokens, mask, limit=6, temperature=0.0, end=319, pad=0, generator=None)
    for row, prompt in zip(out, ([5, 6, 7], [8, 9, 10, 11, 12])):
        response = row[5:].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == response
    assert made.sum() == 12


def test_rewards_judge_the_last_number_of_a_finished_answer(loop):
    right = ["12<|im_end|>", "<think>5 7</think>12<|im_end|>", "it is 12<|im_end|>"]
    wrong = ["12", "13<|im_end|>", "<think>12<|im_end|>", "twelve<|im_end|>", "12 or 13<|im_end|>"]
    assert [loop.reward(text, "12") for text in right] == [1.0] * 3
    assert [loop.reward(text, "12") for text in wrong] == [0.0] * 5


def test_held_out_sums_are_never_trained(loop):
    tasks = loop.sums(60, 1, torch.Generator().manual_seed(0))
    assert len({question for question, _ in tasks}) == len(tasks) > 40
    assert all(eval(question.split(":")[1].rstrip(" =")) == int(answer) for question, answer in tasks)


@pytest.mark.slow
def test_it_runs(folder):
    arguments = [str(folder), "--digits", "1", "--steps", "2", "--tasks", "2", "--group", "3", "--tokens", "4", "--held-out", "5"]
    done = subprocess.run([sys.executable, str(LOOP), *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["before:", "step", "step", "after:"]
    assert "reward 0.000" in lines[1] and "no signal 1.00" in lines[1] and "norm" in lines[2]
