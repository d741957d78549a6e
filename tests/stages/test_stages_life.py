"""Reasoning SFT, preference pairs, DPO, teacher data and distillation: one small chain, and what its artifacts must hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small_run import k2, stage_of

from k2lab import runner
from k2lab.ckpt.folder import open_folder
from k2lab.core import artifacts
from k2lab.core import recipe as recipes
from k2lab.core.types import Message
from k2lab.data import shards
from k2lab.models import build
from k2lab.stages._asking import rendered_answer
from k2lab.stages._teacher import Teacher
from k2lab.text import tokenizer as text_tokenizer
from k2lab.text.chat import render


def records(folder):
    return [record for split in ("train", "valid") for record in shards.read_records(folder, split)]


def full_logprobs(folder, tokens):
    """log-probabilities [T, W] of the token after each position, by transformers' own forward."""
    model = build.load(open_folder(folder)).eval()
    with torch.no_grad():
        return model.hf(torch.as_tensor(tokens)[None]).logits[0].float().log_softmax(-1).numpy()


def test_every_artifact_is_whole(life):
    recipe, run_dir = life
    for entry in recipes.load(str(recipe)).stages:
        artifacts.open_artifact(stage_of(run_dir, entry.name), kind=type(entry.config).kind, verify=True)
    for name in ("pairs", "teacher_data"):
        assert shards.check(stage_of(run_dir, name)) == []


def test_pairs_hold_the_models_own_tokens_and_split_by_prompt(life):
    _, run_dir = life
    folder = stage_of(run_dir, "pairs")
    tokenizer = text_tokenizer.load(folder / "tokenizer")
    groups = {}
    for split in ("train", "valid"):
        for record in shards.read_records(folder, split):
            groups.setdefault(split, set()).add(record["group"])
            assert record["tokenizer"] == tokenizer.fingerprint()
            for side in ("chosen", "rejected"):
                tokens = record[f"{side}_tokens"]
                assert tokens[-1] == tokenizer.im_end_id and tokenizer.decode(tokens[:-1]) == record[side]
            # the test's reward: an even number of characters, the end of turn included
            assert len(record["chosen"] + "<|im_end|>") % 2 == 0 != len(record["rejected"] + "<|im_end|>") % 2
    assert not groups["train"] & groups["valid"]


def test_pass_rates_are_the_means_of_all_judged_answers(life):
    _, run_dir = life
    folder = stage_of(run_dir, "pairs")
    rates = {row["key"]: row for row in map(json.loads, (folder / "pass_rates.jsonl").read_text().splitlines())}
    asked = {item["key"]: item["answers"] for line in (folder / "answers.jsonl").open() for item in json.loads(line)}
    reasoning = {record["key"] for record in shards.read_records(stage_of(run_dir, "reasoning"), "train")}
    assert rates.keys() == asked.keys() == reasoning
    for key, answers in asked.items():
        assert len(answers) == rates[key]["samples"] == 6
        assert rates[key]["pass_rate"] == pytest.approx(np.mean([a["reward"] for a in answers]), abs=1e-6)


def test_reference_log_probabilities_are_those_of_the_named_reference(life):
    _, run_dir = life
    dpo, sft = stage_of(run_dir, "dpo"), stage_of(run_dir, "sft")
    tokenizer = text_tokenizer.load(sft)
    listed = json.loads((dpo / "reference.json").read_text())
    flat = np.load(dpo / "reference.npy")
    starts = np.cumsum([0, *listed["lengths"]])
    by_key = {key: flat[a:b] for key, a, b in zip(listed["keys"], starts, starts[1:])}
    record = next(shards.read_records(stage_of(run_dir, "pairs"), "valid"))
    coded = rendered_answer(record, record["rejected"], record["rejected_tokens"], tokenizer, False)
    found = by_key[f"{record['key']}#rejected"]
    full = full_logprobs(sft, coded.tokens)
    expected = [0.0, *(full[t - 1, token] for t, token in enumerate(coded.tokens) if t)]
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert coded.tokens[-len(record["rejected_tokens"]) :] == record["rejected_tokens"]


def test_preference_report_counts_all_held_out_pairs(life):
    _, run_dir = life
    found = json.loads((stage_of(run_dir, "dpo") / "preference.json").read_text())
    held_out = list(shards.read_records(stage_of(run_dir, "pairs"), "valid"))
    assert found["pairs"] == len(held_out) == found["all"]["reward_accuracy"]["n"]
    assert found["length_matched"]["reward_accuracy"]["n"] == max(1, len(held_out) // 2)
    assert found["length_matched"]["mean_length_gap"] <= found["all"]["mean_length_gap"]
    assert {"reward_accuracy_reference", "logprob_accuracy_before", "logprob_accuracy_after"} <= found["all"].keys()
    manifest = artifacts.open_artifact(stage_of(run_dir, "dpo")).manifest
    assert manifest["preference"] == found and manifest["parents"]["reference"]["name"] == "sft"


def test_teachers_rows_stand_beside_its_tokens(life):
    _, run_dir = life
    folder, teacher = stage_of(run_dir, "teacher_data"), stage_of(run_dir, "reasoning_sft")
    tokenizer, stored = text_tokenizer.load(teacher), Teacher(folder)
    for record in records(folder)[:6]:
        ids, logprobs = stored.rows(record)
        assert ids.shape == logprobs.shape == (len(record["response_tokens"]), 4)
        prompt = render(
            [Message.text("user", record["prompt"])], tokenizer, add_generation_prompt=True, default_system=False
        ).tokens
        full = full_logprobs(teacher, [*prompt, *record["response_tokens"]])[len(prompt) - 1 : -1]
        best = np.argsort(-full, axis=1)[:, :4]
        np.testing.assert_allclose(np.take_along_axis(full, best, 1), logprobs, atol=0.02)  # stored as fp16
        assert (best[:, 0] == ids[:, 0]).mean() > 0.9  # near ties may swap


def test_student_is_another_class_and_part_of_the_identity(life):
    recipe, run_dir = life
    config = json.loads((stage_of(run_dir, "distill") / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["hidden_size"] == 64
    losses = artifacts.open_artifact(stage_of(run_dir, "distill")).manifest["training"]["last_valid"]
    assert losses.keys() == {"valid/lm", "valid/kl"}

    def identities(*overrides):
        planned = runner.survey(recipes.load(str(recipe), overrides), run_dir)
        return {stage.entry.name: stage.identity for stage in planned}

    before, after = identities(), identities("stage.distill.student.hidden_size=96")
    assert {name for name in before if before[name] != after[name]} == {"distill"}


def test_second_run_reuses_everything(life):
    recipe, run_dir = life
    assert k2("run", str(recipe), "--run-dir", str(run_dir), "--quiet").stdout.count(": reused") == 12


def test_plan_knows_these_stages(life):
    recipe, _ = life
    inputs = {e.name: e.config.plan_inputs(e.name, None) for e in recipes.load(str(recipe)).stages}
    assert inputs["distill"].model.name == "tiny-qwen2" and inputs["distill"].kind == "train"
    plan = json.loads(k2("plan", str(recipe), "--json").stdout)
    kinds = {stage["stage"]: stage["kind"] for stage in plan["stages"]}
    assert kinds["pairs"] == kinds["teacher_data"] == "sample" and kinds["dpo"] == "train"


EVALUATE = """
[[stage]]
type = "evaluate"
models = ["sft", "reasoning_sft", "distill"]
untrained = false
task_data = ["reasoning"]
tasks = [{{ type = "answered", max_tokens = 6 }}]
max_tokens = 6
seq_len = 192
decode_tokens = {tokens}
decode_batch = 3
"""


def test_evaluation_sets_a_student_beside_its_teacher_and_times_apart(life, tmp_path):
    recipe, run_dir = life
    found = {}
    for tokens in (0, 5):
        measured = recipe.with_name(f"measured{tokens}.toml")
        measured.write_text(recipe.read_text() + EVALUATE.format(tokens=tokens))
        k2("run", str(measured), "--run-dir", str(run_dir), "--only", "evaluate", "--quiet")
        newest = max((run_dir / "stages").glob("evaluate-*"), key=lambda path: path.stat().st_mtime)
        found[tokens] = newest / "results.json"
    # times are in a file of their own, so that everything else is the same whatever the machine does
    assert found[0].read_bytes() == found[5].read_bytes() and not (found[0].parent / "timings.json").exists()
    timings = json.loads((found[5].parent / "timings.json").read_text())
    assert [model["name"] for model in timings["models"]] == ["sft", "reasoning_sft", "distill"]
    assert all(model["metrics"][0]["metric"] == "decode_time" for model in timings["models"])
    assert all(0 <= m["metrics"][0]["low"] <= m["metrics"][0]["value"] <= m["metrics"][0]["high"] for m in timings["models"])

    results = json.loads(found[0].read_text())
    assert ["sft", "reasoning_sft"] in results["chain"] and all("distill" not in edge for edge in results["chain"])
    (pair,) = results["students"]
    assert (pair["teacher"], pair["student"]) == ("reasoning_sft", "distill")
    sizes = pair["active_params_non_embedding"]
    assert 0 < sizes["student"] < sizes["teacher"]
    values = {m["name"]: {x["metric"]: x["value"] for x in m["metrics"]} for m in results["models"]}
    (right,) = [row for row in pair["changes"] if row["metric"] == "answered/avg@1"]
    both = values["reasoning_sft"]["answered/avg@1"], values["distill"]["answered/avg@1"]
    assert (right["teacher"], right["student"]) == both and right["change"] == pytest.approx(both[1] - both[0])
    assert right["low"] <= right["change"] <= right["high"]
    assert (right["ratio"] is None) == (both[0] == 0) and (both[0] == 0 or right["ratio"] == pytest.approx(both[1] / both[0]))


@pytest.mark.parametrize(
    ("settings", "where"),
    [("decode_tokens=1", "decode_tokens"), ("decode_batch=0", "decode_batch"), ("decode_tokens=-3", "to time")],
)
def test_times_that_cannot_be_taken_are_refused(life, settings, where):
    recipe, run_dir = life
    measured = recipe.with_name("refused.toml")
    measured.write_text(recipe.read_text() + EVALUATE.format(tokens=0))
    done = k2("run", str(measured), f"stage.evaluate.{settings}", "--run-dir", str(run_dir), "--dry-run", check=False)
    assert done.returncode == 2 and where in done.stderr
