"""Runs that the tests of several files look at."""

from __future__ import annotations

import pytest
from small_life import write_life
from small_run import k2


@pytest.fixture(scope="session")
def life(tmp_path_factory):
    """(recipe, run directory) of the finished chain of `small_life`; tests may add stages, and change none."""
    folder = tmp_path_factory.mktemp("life")
    recipe = write_life(folder / "data")
    k2("run", str(recipe), "--run-dir", str(folder / "run"), "--quiet")
    return recipe, folder / "run"
