"""What a user can get wrong: one paragraph, the right exit code, earlier work intact."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import pytest
from small_run import environment, k2, weights_of, write


def refused(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr[-1500:]
    text = done.stderr.strip().split("\n\n")[-1]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    "override, words",
    [
        ("stage.pretrain.stpes=3", ["stage.pretrain", "Did you mean 'steps'"]),
        ("stage.pretrain.steps=many", ["stage.pretrain.steps", "wrong type"]),
        ("stage.pretrain.global_batch=3", ["stage.pretrain", "multiple of 2"]),
        ("model=tiny-k3", ["model", "Did you mean 'tiny-k2'"]),
        ("stage.pretrain.start=corpus", ["stage.pretrain.start", "makes a dataset, and a checkpoint is needed"]),
    ],
)
def test_recipe_errors_end_before_anything_runs(tmp_path, override, words):
    recipe = write(tmp_path / "data")
    refused(k2("run", str(recipe), override, "--run-dir", str(tmp_path / "run"), check=False), 2, *words)
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_corrupt_jsonl_names_file_and_line(tmp_path):
    recipe = write(tmp_path / "data")
    lines = (tmp_path / "data" / "texts.jsonl").read_text().splitlines()
    lines[41] = lines[41][:-5]
    (tmp_path / "data" / "texts.jsonl").write_text("\n".join(lines) + "\n")
    done = k2("run", str(recipe), "--only", "corpus", "--run-dir", str(tmp_path / "run"), check=False)
    refused(done, 2, "texts.jsonl", "42")


def test_nothing_left_after_filters_shows_the_funnel(tmp_path):
    recipe = write(tmp_path / "data")
    done = k2(
        "run", str(recipe), "stage.corpus.filters.0.min_chars=100000", "--only", "corpus", "--run-dir", str(tmp_path), check=False
    )
    refused(done, 2, "length kept 0 of 160")


def test_vocabulary_larger_than_the_models_is_refused_and_earlier_work_stays(tmp_path):
    recipe = write(tmp_path / "data")
    done = k2("run", str(recipe), "stage.tokenizer.vocab_size=340", "--quiet", "--run-dir", str(tmp_path / "run"), check=False)
    refused(done, 2, "the tokenizer has 340 tokens and the model only 320")
    assert len(list((tmp_path / "run").rglob("manifest.json"))) == 4


def test_sample_longer_than_the_limit_names_the_sample(tmp_path):
    recipe = write(tmp_path / "data")
    with (tmp_path / "data" / "chats.jsonl").open("a") as file:
        for n in range(20):  # enough for some to fall into the training part
            file.write(json.dumps({"instruction": f"Say it {n}", "output": "again and " * 400}) + "\n")
    arguments = ["run", str(recipe), "stage.pretrain.steps=2", "--quiet", "--run-dir", str(tmp_path / "run")]
    done = k2(*arguments, check=False)
    refused(done, 2, "longer than seq_len = 192", "chats.jsonl", "over_length")
    before = weights_of(tmp_path / "run")
    k2(*arguments, "stage.sft.over_length=drop")
    assert before.items() <= weights_of(tmp_path / "run").items()


def test_infinite_loss_stops_before_the_optimizer_moves(tmp_path):
    recipe = write(tmp_path / "data")
    arguments = ["run", str(recipe), "--quiet", "--run-dir", str(tmp_path / "run"), "--only", "pretrain"]
    done = k2(*arguments, "stage.pretrain.optim.lr=1e30", "stage.pretrain.optim.max_grad_norm=none", check=False)
    refused(done, 4, "is not finite; the optimizer has not moved", "pretrain, step", "batch keys")


def test_an_artifact_edited_by_hand_is_refused(tmp_path):
    recipe = write(tmp_path / "data")
    arguments = ["run", str(recipe), "--quiet", "--run-dir", str(tmp_path / "run"), "--only", "tokenizer"]
    k2(*arguments)
    edited = next((tmp_path / "run" / "stages").glob("corpus-*/train/records-*.jsonl"))
    edited.write_text(edited.read_text() + '{"text": "slipped in", "key": "x", "source": "y"}\n')
    refused(k2(*arguments, check=False), 2, "was changed after it was written", edited.name)
    refused(k2("check", str(tmp_path / "run"), check=False), 2)


def test_two_runs_in_one_directory(tmp_path):
    recipe = write(tmp_path / "data")
    command = [sys.executable, "-m", "k2lab", "run", str(recipe), "--quiet", "--run-dir", str(tmp_path / "run")]
    first = subprocess.Popen([*command], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run" / "events").is_dir():
            assert first.poll() is None
            time.sleep(0.01)
        refused(
            k2("run", str(recipe), "--quiet", "--run-dir", str(tmp_path / "run"), check=False),
            3,
            str(first.pid),
            "using this directory",
        )
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()


def test_full_disk_is_said_and_work_stays(tmp_path):
    """A file size limit makes writes fail as a full disk does (the kernel says EFBIG; the paragraph is the same)."""
    recipe = write(tmp_path / "data")
    arguments = ["run", str(recipe), "stage.pretrain.steps=2", "--quiet", "--run-dir", str(tmp_path / "run")]
    k2(*arguments, "--only", "tokenize")
    limit = 200_000

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "k2lab", *arguments], env=environment(), capture_output=True, text=True, preexec_fn=small_files
    )
    refused(done, 3, "disk")
    assert len(list((tmp_path / "run").rglob("manifest.json"))) == 4
    k2(*arguments)


def test_eval_of_something_that_is_no_model(tmp_path):
    refused(k2("eval", str(tmp_path / "nothing"), check=False), 2, "no run directory")
    refused(k2("report", str(tmp_path), check=False), 2, "not a run directory")


def test_no_secret_from_the_environment_reaches_the_run_directory(tmp_path):
    recipe = write(tmp_path / "data")
    secret = "hf_thisIsASecretThatMustNotLeak"
    k2(
        "run",
        str(recipe),
        "--quiet",
        "--only",
        "tokenize",
        "--run-dir",
        str(tmp_path / "run"),
        HF_TOKEN=secret,
        WANDB_API_KEY=secret,
    )
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path
