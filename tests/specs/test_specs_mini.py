"""The recipes of one GPU are tiny's life cycle with other numbers: they parse, plan, and fit together."""

import pytest

from k2lab import cli, specs
from k2lab.core import recipe as recipes

MINI = [name for name in recipes.shipped() if name in ("mini", "mini-linear")]


def test_both_are_shipped():
    assert len(MINI) == 2


@pytest.mark.parametrize("name", MINI)
def test_stages_are_those_of_tiny(name):
    mini, tiny = recipes.load(name), recipes.load("tiny")
    assert [(stage.name, type(stage.config)) for stage in mini.stages] == [
        (stage.name, type(stage.config)) for stage in tiny.stages
    ]
    for stage in tiny.stages:
        for field in ("start", "data", "model", "teacher", "tasks", "prompts"):
            assert getattr(mini.stage(stage.name).config, field, None) == getattr(stage.config, field, None)


@pytest.mark.parametrize("name", MINI)
def test_model_student_and_tokenizer_agree_and_training_is_in_bf16_with_masters(name):
    recipe = recipes.load(name)
    spec = specs.from_recipe(recipe.model)
    student = specs.from_recipe(recipe.stage("distill").config.student)
    assert spec.vocab_size == student.vocab_size == recipe.stage("tokenizer").config.vocab_size
    trained = [stage.config for stage in recipe.stages if hasattr(stage.config, "optim")]
    assert len(trained) == 8
    assert {config.precision for config in trained} == {"bf16"}
    assert {config.optim.master for config in trained} == {"auto"}
    # step checkpoints of 4 GB are written at the end of a stage only
    assert all(config.checkpoint_every >= config.steps for config in trained)


@pytest.mark.parametrize("name", MINI)
def test_they_plan_and_fit_one_gpu(name, capsys):
    assert cli.main(["plan", name, "--machine", "p5.48xlarge", "--gpus", "1"]) == 0
    text = capsys.readouterr().out
    assert text.count("! Fits:") == 8, "every training stage"
    assert cli.main(["run", name, "--dry-run"]) == 0
