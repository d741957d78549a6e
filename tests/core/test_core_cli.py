"""The command line is frozen: adding a verb or option changes `cli_snapshot.txt` on purpose. Every help works."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from k2lab import cli, scaffold
from k2lab.core import slots
from k2lab.core.errors import RecipeError

SNAPSHOT = Path(__file__).parent / "cli_snapshot.txt"


def verbs() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def surface() -> str:
    lines = []
    for name, parser in {"k2": cli.parser(), **verbs()}.items():
        for action in parser._actions:
            if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
                continue
            shown = "/".join(action.option_strings) or action.dest
            lines.append(f"{name} {shown} nargs={action.nargs} default={action.default}")
    return "\n".join(lines) + "\n"


def test_surface_is_the_frozen_one():
    assert surface() == SNAPSHOT.read_text(encoding="utf-8"), "changed on purpose? then write surface() into cli_snapshot.txt"


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verb_has_help_and_a_function(verb, capsys):
    from k2lab import verbs as functions

    assert callable(getattr(functions, f"do_{verb}"))
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert len(capsys.readouterr().out) > 80


def test_help_imports_nothing_heavy():
    program = "import sys; from k2lab.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    program += "heavy = {'torch', 'numpy', 'transformers', 'k2lab.verbs', 'k2lab.core.recipe'}\n"
    program += "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_errors_are_one_paragraph_with_the_exit_code(capsys):
    assert cli.main(["run", "tinny"]) == 2
    text = capsys.readouterr().err
    assert "Did you mean 'tiny'?" in text and "Traceback" not in text
    with pytest.raises(RecipeError):
        cli.main(["--traceback", "run", "tinny"])


@pytest.mark.parametrize("what", ["recipe", *scaffold.SLOTS])
def test_scaffolds_load_and_are_never_overwritten(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = scaffold.write(what, "my_thing")
    if what == "recipe":
        from k2lab.core import recipe

        assert recipe.load(str(path)).stages
    else:
        cls = slots.load(what, str(tmp_path / path))
        assert cls.examples()
        assert slots.first_line(cls)
    with pytest.raises(RecipeError, match="exists already"):
        scaffold.write(what, "my_thing")
    with pytest.raises(RecipeError, match="lower-case"):
        scaffold.write(what, "My Thing")


def test_list_names_every_shipped_slot(capsys):
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for kind in slots.ROOMS:
        for name in slots.names(kind):
            assert name in text
    assert cli.main(["list", "filterz"]) == 2
