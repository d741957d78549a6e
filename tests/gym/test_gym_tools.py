import json

import pytest

from k2lab import sandbox
from k2lab.core import slots
from k2lab.core.errors import RecipeError, SandboxError
from k2lab.core.schema import build_slot
from k2lab.gym.tools.python import Python
from k2lab.sandbox import Outcome


@pytest.fixture(scope="module")
def tool():
    try:
        sandbox.pick()
    except SandboxError as error:
        pytest.skip(str(error))
    return Python(seconds=20, memory_mb=256, output_chars=200)


def ask(tool, code):
    return tool.call(json.dumps({"code": code}))


def test_it_is_a_slot():
    assert "python" in slots.names("tool")
    assert build_slot("tool", "python", "here") == Python()
    assert build_slot("tool", {"type": "python", "seconds": 2.0}, "here").limits().seconds == 2.0
    with pytest.raises(RecipeError, match="seconds"):
        build_slot("tool", {"type": "python", "seconds": -1.0}, "here")
    with pytest.raises(RecipeError, match="output_chars"):
        Python(output_chars=0)


def test_its_specification_is_openais():
    spec = json.loads(json.dumps(Python().spec()))
    assert spec["type"] == "function" and spec["function"]["name"] == "python"
    parameters = spec["function"]["parameters"]
    assert parameters["required"] == ["code"] and parameters["properties"]["code"]["type"] == "string"


@pytest.mark.parametrize(
    "code, wanted",
    [
        ("print(1)\nprint(2)", "1\n2"),
        ("12345678901234567890 * 98765432109876543210", "1219326311370217952237463801111263526900"),
        ("x = 5\nx", "5"),
        ("x = 5", "(no output)"),
        ("print('')", "(no output)"),
        ("'a'", "'a'"),
        ("import sys\nprint('to stderr', file=sys.stderr)", "to stderr"),
        ("print('so far')\n1 / 0", "so far\nerror: line 2: ZeroDivisionError: division by zero"),
        ("def f():\n    return y\nf()", "error: line 2: NameError: name 'y' is not defined"),
        ("print(1", "error: line 1: SyntaxError: '(' was never closed"),
        ("raise ValueError('two\\nlines')", "error: line 1: ValueError: two\nlines"),
        ("import sys\nsys.exit(4)", "error: the program ended with exit code 4"),
        ("raise SystemExit('enough')", "error: enough"),
        ("x = bytearray(1 << 30)", "error: out of memory: at most 256 MiB"),
        ("\0", "error: ValueError: source code string cannot contain null bytes"),
    ],
)
def test_what_the_model_gets_to_see(tool, code, wanted):
    assert ask(tool, code).replace("SyntaxError: source code", "ValueError: source code") == wanted


def test_time_and_output_are_limited(tool):
    short = Python(seconds=0.5, output_bytes=1000, output_chars=50)
    assert ask(short, "print('begun')\nwhile True: pass") == "begun\nerror: stopped: it did not end within 0.5 s"
    flood = ask(short, "while True: print('x' * 10)")
    assert flood.endswith("error: stopped: more than 1000 bytes of output") and len(flood) < 200
    assert ask(Python(output_chars=50), "print('x' * 90)") == "x" * 50 + "\n[cut: 50 of 90 characters]"


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ('{"code": "1"', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", '"code"'),
        ("null", '"code"'),
        ("{}", '"code"'),
        ('{"code": 3}', '"code"'),
        ('{"program": "1"}', '"code"'),
    ],
)
def test_a_models_mistake_is_a_text(tool, arguments, says):
    result = tool.call(arguments)
    assert result.startswith("error: ") and says in result


def test_without_a_sandbox_it_raises(monkeypatch):
    def none(prefer="auto"):
        raise SandboxError("none works")

    monkeypatch.setattr("k2lab.gym.tools.python.pick", none)
    with pytest.raises(SandboxError, match="none works"):
        Python().call('{"code": "1"}')
    with pytest.raises(SandboxError, match="none works"):
        Python().describe()


def test_a_crash_is_a_text():
    outcome = Outcome("some", "", False, "error", 0.1, 139)
    assert Python()._text(outcome) == "some\nerror: the program crashed"


def test_the_line_for_the_log_says_which_limits(tool):
    assert "256 MiB" in tool.describe()
