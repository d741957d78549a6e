"""Law 1: one function calls backward. Law 4 and 5: slot files and torch-free rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from k2lab.core import slots

PACKAGE = Path(slots.__file__).parents[1]


def test_exactly_one_place_calls_backward():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "backward":
                found.append(f"{path.relative_to(PACKAGE)}")
    assert found == ["engine/step.py"]


@pytest.mark.parametrize("kind", sorted(slots.ROOMS))
def test_every_slot_file_holds_one_frozen_dataclass_with_help_and_examples(kind):
    for name in slots.names(kind):
        cls = slots.load(kind, name)
        assert slots.first_line(cls), f"{kind} {name} has no help line"
        examples = cls.examples()
        assert examples and all(isinstance(item, cls) for item in examples), f"{kind} {name}"


TORCH_FREE = {
    "rooms": "import k2lab.core.recipe, k2lab.core.artifacts, k2lab.text, k2lab.specs, k2lab.plan.report, k2lab.report.html",
    "plan": "from k2lab.cli import main; assert main(['plan', 'kimi_linear/2m']) == 0",
    "list": "from k2lab.cli import main; assert main(['list']) == 0",
    "check": "from k2lab.cli import main; assert main(['check', 'tiny']) == 0",
    "dry run": "from k2lab.cli import main; assert main(['run', 'tiny', '--dry-run', '--run-dir', 'no-such-run']) == 0",
    "dry run linear": "from k2lab.cli import main; assert main(['run', 'tiny-linear', '--dry-run']) == 0",
    "print": "from k2lab.cli import main; assert main(['run', 'k2/continual_pretrain', '--print']) == 0",
}


@pytest.mark.parametrize("what", TORCH_FREE)
def test_runs_without_torch_and_transformers(what, tmp_path):
    program = f"import sys\n{TORCH_FREE[what]}\nassert not {{'torch', 'transformers'}} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
