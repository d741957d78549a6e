"""The recipe `smollm`: its shape is that of the model it names, and a small model in its place goes through every stage."""

from __future__ import annotations

import json
import signal
import time

import forked
import made_up_checkpoints
import pytest
import torch
from made_up_gguf import make
from small_life import REWARD
from small_run import weights_of
from test_stages_kill import wait_for

from k2lab import cli, runner, specs
from k2lab.ckpt import origin
from k2lab.ckpt.folder import open_folder
from k2lab.core import artifacts
from k2lab.core import recipe as recipes
from k2lab.core.events import read
from k2lab.core.rng import rng
from k2lab.models import build
from k2lab.text import layout

CHAIN = ("smollm2", "domain_sft", "pairs", "dpo", "rl", "evaluate")


def test_the_recipe_plans_for_the_model_that_it_imports(capsys):
    recipe = recipes.load("smollm")
    assert [entry.name for entry in recipe.stages if entry.name in CHAIN] == list(CHAIN)
    assert recipe.stage("evaluate").config.models == ("smollm2", "domain_sft", "dpo", "rl")
    # ChatML has <|im_end|>; every other chat token is added
    added = {*layout.CHAT_TOKENS, layout.THINK, layout.THINK_END} - {layout.IM_END}
    assert recipe.model["vocab_size"] == specs.get("smollm2-135m").vocab_size + len(added)
    assert cli.main(["plan", "smollm", "--json"]) == 0
    plan = {stage["stage"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert plan.keys() >= set(CHAIN)
    for name in ("domain_sft", "dpo", "rl"):
        (weights,) = (table["numbers"]["weights"] for table in plan[name]["sections"] if "weights" in table["numbers"])
        assert weights["value"] == 4 * (134_515_008 + 576 * len(added)), name


@pytest.mark.parametrize(("format", "precision"), [("int4", "bf16"), ("fp8", "fp32"), ("bf16", "fp32")])
def test_a_kimi_release_is_imported_as_what_it_decodes_to(format, precision, tmp_path):
    folder = made_up_checkpoints.make(tmp_path / "release", "small-k2", format, shard_bytes=300_000)
    text = f'[[stage]]\ntype = "import_model"\npath = "{folder}"\nlicense = "MIT"\nprecision = "{precision}"\n'
    (tmp_path / "recipe.toml").write_text(text)
    runner.run(recipes.load(str(tmp_path / "recipe.toml")), tmp_path / "run", say=lambda _: None)
    (stage,) = (tmp_path / "run" / "stages").iterdir()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with open_folder(folder) as source, open_folder(stage) as found:
        released, imported = build.load(source, dtype), build.load(found, dtype)
        assert found.format == precision
    assert all(torch.equal(tensor, imported.state()[name]) for name, tensor in released.state().items())
    facts = artifacts.open_artifact(stage).manifest["source"]
    begun = origin.read(stage)
    if format == "bf16":
        assert begun is None and "quantised" not in facts
    else:
        assert (begun.source, [begun.format]) == (str(folder), facts["quantised"])


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """(overrides, run directory) of the recipe's whole chain with a model of two layers and rewards by chance."""
    folder = tmp_path_factory.mktemp("smollm")
    _, path = make(folder, "llama")
    (folder / "even.py").write_text(REWARD)
    with (folder / "chats.jsonl").open("w") as file:
        for i in range(60):
            print(json.dumps({"instruction": f"Say {i}", "output": "a" * (1 + i % 3), "source": "made"}), file=file)
    overrides = [
        f"stage.smollm2.path={path}", "stage.smollm2.package=none", 'stage.smollm2.sha256=""', "model.vocab_size=300",
        f"stage.questions.sources=[{{ type = 'jsonl', path = '{folder}/chats.jsonl', kind = 'instruction' }}]",
        "stage.questions.valid_share=0.2", "stage.domain_sft.steps=40", "stage.domain_sft.optim.lr=1e-2",
        f"stage.pairs.rewards=['{folder}/even.py']", "stage.pairs.limit=48", "stage.pairs.max_tokens=8",
        "stage.pairs.temperature=1.0", "stage.dpo.steps=2", "stage.rl.steps=2", "stage.rl.max_tokens=8",
        "stage.rl.seq_len=256", "stage.evaluate.tasks=[{ type = 'answered', max_tokens = 8 }]", "stage.evaluate.max_tokens=8",
    ]  # fmt: skip
    runner.run(recipes.load("smollm", overrides), folder / "run", say=lambda _: None)
    return overrides, folder / "run"


@pytest.mark.slow
def test_a_small_llama_goes_through_every_stage_of_the_recipe(through):
    _, run_dir = through
    folders = {path.name.rsplit("-", 1)[0]: path for path in (run_dir / "stages").iterdir()}
    for name in CHAIN:
        artifacts.open_artifact(folders[name], verify=True)
    assert artifacts.open_artifact(folders["rl"]).manifest["licences"] == ["Apache-2.0"]
    steps = [event for event in read(run_dir / "events") if event["kind"] == "step" and event["stage"] == "rl"]
    assert [event["rollout"]["rollouts"] for event in steps] == [16, 16]
    results = json.loads((folders["evaluate"] / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["smollm2", "domain_sft", "dpo", "rl"]
    metrics = [{row["metric"]: row["value"] for row in model["metrics"]} for model in results["models"]]
    assert metrics[1]["response_loss/made"] < metrics[0]["response_loss/made"] and "chain_sum/avg@1" in metrics[3]


@pytest.mark.slow
def test_an_import_that_was_killed_begins_again_and_gives_the_same_files(through, tmp_path):
    overrides, run_dir = through
    expected = {name: value for name, value in weights_of(run_dir).items() if name.startswith("stages/smollm2-")}
    assert any(name.endswith("model.safetensors") for name in expected)
    draw = rng(int(time.time()), "kills")
    command = ("run", "smollm", *overrides, "--only", "smollm2", "--run-dir", tmp_path / "killed", "--quiet")
    kills = 0
    for _ in range(3):
        process = forked.Run(*command)
        wait_for(tmp_path / "killed", "smollm2", 0, process)
        time.sleep(float(draw.random()) * 0.02)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    forked.finish(*command)
    assert weights_of(tmp_path / "killed") == expected
