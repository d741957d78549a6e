"""Recipes: merging, overrides, origins, and every error with its key path."""

from __future__ import annotations

import pytest

from k2lab.core import recipe as recipes
from k2lab.core.errors import RecipeError

CORPUS = """
[[stage]]
type = "corpus"
sources = [{ type = "general_instructions" }]
"""


def write(tmp_path, text, name="r.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def failure(tmp_path, text, *overrides) -> str:
    with pytest.raises(RecipeError) as caught:
        recipes.load(write(tmp_path, text), overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_shipped_recipe_parses_and_reads_back_from_its_resolved_form(name, tmp_path):
    recipe = recipes.load(name)
    again = recipes.load(write(tmp_path, recipes.to_toml(recipe.resolved())))
    assert again.resolved() == recipe.resolved()
    assert [entry.config for entry in again.stages] == [entry.config for entry in recipe.stages]


def test_unknown_key_is_named_with_its_path_and_a_proposal(tmp_path):
    text = failure(tmp_path, CORPUS + "valid_shar = 0.1\n")
    assert "stage.corpus.valid_shar" in text
    assert "Did you mean 'valid_share'?" in text


def test_missing_required_key_is_named(tmp_path):
    assert "stage.corpus.sources: this key is required and missing" in failure(tmp_path, '[[stage]]\ntype = "corpus"\n')


def test_missing_type_of_a_slot_is_named(tmp_path):
    assert "stage.corpus.sources[0].type" in failure(tmp_path, '[[stage]]\ntype = "corpus"\nsources = [{ path = "x" }]\n')


@pytest.mark.parametrize(
    "line, words",
    [
        ('valid_share = "a lot"', ["stage.corpus.valid_share", "wrong type str", "a number"]),
        ("valid_share = true", ["stage.corpus.valid_share", "wrong type bool"]),
        ("valid_share = 3.0", ["stage.corpus.valid_share", "between 0 and 1"]),
        ("sources = []", ["stage.corpus.sources", "at least one source"]),
    ],
)
def test_wrong_types_and_values(tmp_path, line, words):
    base = CORPUS if not line.startswith("sources") else '[[stage]]\ntype = "corpus"\n'
    text = failure(tmp_path, base + line + "\n")
    assert all(word in text for word in words), text


def test_unknown_stage_type_and_slot_names_are_proposed(tmp_path):
    assert "Did you mean 'corpus'?" in failure(tmp_path, '[[stage]]\ntype = "corpsu"\n')
    text = failure(tmp_path, '[[stage]]\ntype = "corpus"\nsources = [{ type = "jsonll", path = "x" }]\n')
    assert "stage.corpus.sources[0].type" in text
    assert "'jsonl'" in text


def test_two_stages_of_one_name_are_refused(tmp_path):
    assert "two stages are called 'corpus'" in failure(tmp_path, CORPUS + CORPUS)


def test_parent_that_does_not_exist_or_is_of_another_kind(tmp_path):
    text = failure(tmp_path, CORPUS + '[[stage]]\ntype = "tokenizer"\ncorpus = "corpsu"\n')
    assert "stage.tokenizer.corpus" in text and "Did you mean 'corpus'?" in text
    text = failure(
        tmp_path,
        CORPUS + '[[stage]]\ntype = "tokenizer"\ncorpus = "corpus"\n[[stage]]\ntype = "tokenize"\ncorpus = "tokenizer"\n',
    )
    assert "makes a tokenizer, and a dataset is needed" in text


def test_base_merges_appends_places_and_skips(tmp_path):
    base = write(tmp_path, CORPUS + '[[stage]]\ntype = "tokenizer"\ncorpus = "corpus"\nvocab_size = 700\n', "base.toml")
    assert base
    child = """
base = "base.toml"
[[stage]]
name = "corpus"
valid_share = 0.2
[[stage]]
name = "second"
type = "corpus"
sources = [{ type = "general_instructions" }]
after = "corpus"
[[stage]]
name = "tokenizer"
skip = true
"""
    recipe = recipes.load(write(tmp_path, child))
    assert [entry.name for entry in recipe.stages] == ["corpus", "second"]
    assert recipe.stage("corpus").config.valid_share == 0.2
    assert "base.toml" in recipe.origins["stage.corpus.sources"]
    assert "r.toml" in recipe.origins["stage.corpus.valid_share"]


def test_base_circle_is_refused(tmp_path):
    write(tmp_path, 'base = "b.toml"\n', "a.toml")
    write(tmp_path, 'base = "a.toml"\n', "b.toml")
    with pytest.raises(RecipeError, match="circle"):
        recipes.load(str(tmp_path / "a.toml"))


def test_changed_type_replaces_a_table():
    with pytest.raises(RecipeError, match="stage.pretrain.optim.lr: this key is required"):
        recipes.load("tiny", ["stage.pretrain.optim.type=adamw"])  # muonclip's lr went with its table
    recipe = recipes.load("tiny", ["stage.pretrain.optim.type=adamw", "stage.pretrain.optim.lr=3e-3"])
    assert type(recipe.stage("pretrain").config.optim).slot_name == "adamw"


def test_overrides_follow_key_paths_and_types():
    recipe = recipes.load("tiny", ["seed=7", "stage.pretrain.optim.lr=1e-4", "stage.corpus.filters.0.min_chars=99"])
    assert recipe.seed == 7
    assert recipe.stage("pretrain").config.optim.lr == 1e-4
    assert recipe.stage("corpus").config.filters[0].min_chars == 99
    assert recipe.origins["stage.pretrain.optim.lr"] == "override"


@pytest.mark.parametrize(
    "override, word",
    [
        ("stage.pretrian.steps=3", "Did you mean 'pretrain'?"),
        ("stage.pretrain.stesp=3", "Did you mean 'steps'?"),
        ("sed=3", "Did you mean 'seed'?"),
        ("stage.pretrain.steps", "key=value"),
        ("stage.pretrain.steps=1.5", "wrong type float"),
        ("stage.pretrain.global_batch=10", "multiple of"),
        ("stage.pretrain.steps=-1", "positive"),
        ("stage.pretrain.epochs=1.0", "exactly one"),
    ],
)
def test_bad_overrides(override, word):
    with pytest.raises(RecipeError) as caught:
        recipes.load("tiny", [override])
    assert word in str(caught.value)


def test_describe_shows_every_value_with_its_origin():
    text = recipes.describe(recipes.load("tiny-linear", ["stage.sft.seq_len=128"]))
    assert any("seq_len = 128" in line and line.endswith("# override") for line in text.splitlines())
    assert any('model = "tiny-linear"' in line and "tiny-linear.toml" in line for line in text.splitlines())
    assert any("keep_checkpoints" in line and line.endswith("# default") for line in text.splitlines())


def test_inline_sources_become_a_corpus_stage(tmp_path):
    data = write(tmp_path, '{"instruction": "a", "output": "b"}\n', "d.jsonl")
    text = f'base = "tiny"\n[[stage]]\nname = "sft"\ndata = {{ type = "jsonl", path = "{data}" }}\n'
    recipe = recipes.load(write(tmp_path, text))
    assert recipe.stage("sft").config.data == "sft_data"
    assert recipe.stage("sft_data").type == "corpus"


def test_not_toml_and_not_there(tmp_path):
    assert "not valid TOML" in failure(tmp_path, "model = \n")
    with pytest.raises(RecipeError, match="no recipe file"):
        recipes.load(str(tmp_path / "none.toml"))
    with pytest.raises(RecipeError, match="Did you mean 'tiny'"):
        recipes.load("tinny")


def test_a_users_own_slot_file_works_by_path(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine:\n"
        "    'My records.'\n"
        "    n: int = 2\n"
        "    def records(self):\n"
        "        return iter([{'key': f'm{i}', 'text': 'x' * i, 'source': 'm'} for i in range(self.n)])\n"
        "    def fingerprint(self):\n"
        "        return 'f'\n",
        encoding="utf-8",
    )
    recipe = recipes.load(write(tmp_path, f'[[stage]]\ntype = "corpus"\nsources = [{{ type = "{own}", n = 3 }}]\n'))
    assert len(list(recipe.stage("corpus").config.sources[0].records())) == 3
    again = recipes.load(write(tmp_path, recipes.to_toml(recipe.resolved()), "again.toml"))
    assert again.stage("corpus").config.sources[0].n == 3
