"""Code blocks of README and docs are true: TOML parses as a recipe, `k2` commands parse, named files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from k2lab import cli
from k2lab.core import recipe as recipes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for match in re.finditer(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            found.append((page.name, match[1]))
    return found


@pytest.mark.parametrize("page, text", blocks("toml"), ids=lambda value: value[:20])
def test_toml_blocks_are_recipes(page, text, tmp_path):
    path = tmp_path / "block.toml"
    path.write_text(text, encoding="utf-8")
    assert recipes.load(str(path)).stages


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"^k2 [^\n]*", "\n".join(m for _, m in blocks("")), re.M) + re.findall(r"`(k2 [^`]+)`", text):
            for part in line.split("#")[0].split(";"):
                # Bare verbs such as `k2 plan` are names, not commands; list and doctor need nothing more.
                words = part.split()
                whole = len(words) > 2 or words[1:] in (["list"], ["doctor"])
                if words[:1] == ["k2"] and whole and "..." not in part:
                    found.append(part.strip())
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    arguments = shlex.split(command)[1:]
    if arguments[0].isupper() or any(word.isupper() and len(word) > 3 for word in arguments):
        arguments = ["x" if word.isupper() else word for word in arguments]
    known, rest = cli.parser().parse_known_args(arguments)
    assert known.verb
    assert not [word for word in rest if word.startswith("-")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for name in re.findall(r"`((?:k2lab|tests|loops|bench|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name
