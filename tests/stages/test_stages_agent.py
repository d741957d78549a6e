"""The agent stage with a scripted model and a made-up tool; a machine without sandbox; groups of tasks in evaluation."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from small_run import k2, write

from k2lab import runner
from k2lab.core import recipe as recipes
from k2lab.core.types import Completion, StopReason
from k2lab.text import tokenizer as text_tokenizer

TOOL = '''
import json
from dataclasses import dataclass
from k2lab.core.errors import SandboxError

@dataclass(frozen=True, kw_only=True)
class Calculator:
    """Adds."""
    works: bool = True
    def describe(self):
        if not self.works:
            raise SandboxError("no sandbox works on this machine", next="Install one")
        return "calculator in a box"
    def spec(self):
        return {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
    def call(self, arguments):
        given = json.loads(arguments)
        return str(given["a"] + given["b"]) if "a" in given else "error: the argument a is missing"
'''

STAGES = """
[[stage]]
name = "sums"
type = "corpus"
sources = [{{ type = "jsonl", path = "{folder}/sums.jsonl" }}]
valid_share = 0.5

[[stage]]
type = "agent"
model = "sft"
data = ["sums"]
tasks = [{{ type = "answered", limit = 0, domains = ["short", "long"] }}]
tools = [{{ type = "{folder}/calculator.py" }}]
max_tokens = 150
max_turns = 3

[[stage]]
type = "evaluate"
models = ["sft"]
task_data = ["sums"]
task_groups = [
  {{ tasks = [{{ type = "answered", limit = 0 }}], k = 4, temperature = 1.0, max_tokens = 3, pass_at = [2] }},
  {{ tasks = [{{ type = "answered", limit = 4, domains = ["long"] }}], k = 4, temperature = 0.5 }},
  {{ tasks = [{{ type = "answered" }}], models = ["rl"] }},
]
max_tokens = 6
seq_len = 192
"""


def recipe_in(folder):
    path = write(folder / "data")
    data = folder / "data"
    (data / "calculator.py").write_text(TOOL)
    with (data / "sums.jsonl").open("w") as file:
        for i in range(40):
            sum_ = {"prompt": f"Add {i} and {3 * i + 1}", "answer": str(4 * i + 1), "domain": "long" if i % 2 else "short"}
            print(json.dumps(sum_), file=file)
    text = path.read_text().replace("steps = 12", "steps = 2").replace("steps = 8", "steps = 2")
    path.write_text(text + STAGES.format(folder=data))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe, and a run directory that has everything before the agent stage."""
    folder = tmp_path_factory.mktemp("agent")
    path = recipe_in(folder)
    runner.run(recipes.load(str(path)), folder / "run", only="sft", device="cpu", say=lambda text: None)
    return path, folder / "run"


class Scripted:
    """In place of the model: calls the tool if there is one, and then says what came back."""

    def __init__(self, hf, pad_id, *args, eos_id, **more):
        self.end = eos_id

    def sample(self, prompts, params, keys):
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt):
        special = TOKENIZER.special_id
        text = TOKENIZER.decode(prompt)
        a, b = map(int, re.findall(r"Add (\d+) and (\d+)", text)[-1])
        if "tool_declare" not in text:
            tokens = TOKENIZER.encode("who knows")
        elif "## Return of" in text:
            tokens = TOKENIZER.encode(text.rsplit("## Return of functions.add:0\n", 1)[1].split("<|im_end|>")[0])
        else:
            arguments = json.dumps({"a": a, "b": b} if a % 4 else {"b": b})
            tokens = [
                special("<|tool_calls_section_begin|>"),
                special("<|tool_call_begin|>"),
                *TOKENIZER.encode("functions.add:0"),
                special("<|tool_call_argument_begin|>"),
                *TOKENIZER.encode(arguments),
                special("<|tool_call_end|>"),
                special("<|tool_calls_section_end|>"),
            ]
        return Completion((*tokens, self.end), (0.0,) * (len(tokens) + 1), StopReason.EOS)


def test_with_and_without_the_tool(trained, monkeypatch):
    global TOKENIZER
    path, run_dir = trained
    monkeypatch.setattr("k2lab.sampling.local.LocalSampler", Scripted)
    TOKENIZER = text_tokenizer.load(next((run_dir / "stages").glob("sft-*")))
    said = []
    outcome = runner.run(recipes.load(str(path)), run_dir, only="agent", device="cpu", say=said.append)
    assert "agent: calculator: calculator in a box" in said and not outcome.skipped
    folder = outcome.done["agent"].path
    results = json.loads((folder / "results.json").read_text())
    without, with_tools = results["models"]
    assert results["chain"] == [["sft without tools", "sft with tools"]]
    found = {metric["metric"]: metric for metric in with_tools["metrics"]}
    before = {metric["metric"]: metric["value"] for metric in without["metrics"]}
    assert {"answered/avg@1", "long/avg@1", "short/avg@1"} <= before.keys()
    assert before["answered/avg@1"] == 0 and found["answered/avg@1"]["low"] <= found["answered/avg@1"]["value"]
    assert found["long/avg@1"]["value"] == 1.0  # odd first numbers: the tool is called rightly
    assert found["answered/tool_used"]["value"] == 1.0
    change = next(change for change in results["changes"] if change["metric"] == "answered/avg@1")
    assert change["change"] == found["answered/avg@1"]["value"] and change["low"] > 0
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * found["answered/avg@1"]["n"]
    failed = [row for row in rows if row["usage"]["tool_errors"]]
    assert failed and all("error: the argument a is missing" in row["text"] and row["reward"] == 0 for row in failed)
    use = outcome.done["agent"].manifest["tool_use"]
    assert (use["tool_calls"], use["tool_errors"], use["rollouts"]) == (len(rows) // 2, len(failed), len(rows) // 2)
    assert outcome.done["agent"].manifest["disjoint"]["shared"] == 0
    assert any("## Return of functions.add:0" in sample["completion"] for sample in with_tools["samples"])
    report = json.loads(k2("report", str(run_dir), "--json").stdout)
    row = next(row for row in report["rows"] if (row["stage"], row["metric"]) == ("agent", "answered/avg@1"))
    assert (row["before"], row["verdict"]) == (0.0, "better")


def test_the_tiny_model_goes_through_the_stage_and_resumes_after_a_kill(trained, tmp_path, monkeypatch):
    from k2lab.eval import tasks

    path, run_dir = trained
    settings = [f"stage.agent.{text}" for text in ("k=2", "temperature=0.8", "max_tokens=8", "batch=8")]
    recipe = recipes.load(str(path), settings)
    copy = shutil.copytree(run_dir, tmp_path / "run")
    outcome = runner.run(recipe, run_dir, only="agent", device="cpu", say=lambda text: None)
    folder = outcome.done["agent"].path
    results = json.loads((folder / "results.json").read_text())
    assert all(0 <= metric["value"] <= 1 for model in results["models"] for metric in model["metrics"])
    done, real = [], tasks.roll_out

    def dies(some, *rest, **more):
        if len(done) == 3:
            raise MemoryError
        done.append(some)
        return real(some, *rest, **more)

    monkeypatch.setattr(tasks, "roll_out", dies)
    with pytest.raises(MemoryError):
        runner.run(recipe, copy, only="agent", device="cpu", say=lambda text: None)
    (partial,) = copy.glob("stages/agent-*.partial")
    with next(partial.glob("journal-*.jsonl")).open("a") as file:
        file.write('[{"task": "half a line')
    again = []
    monkeypatch.setattr(tasks, "roll_out", lambda some, *rest, **more: again.append(some) or real(some, *rest, **more))
    outcome = runner.run(recipe, copy, only="agent", device="cpu", say=lambda text: None)
    assert not {task.key for some in done[:3] for task in some} & {task.key for task in again[0]}
    for name in ("results.json", "rollouts.jsonl"):
        assert (outcome.done["agent"].path / name).read_bytes() == (folder / name).read_bytes()
    assert not list(outcome.done["agent"].path.glob("journal*"))


def test_what_lacks_a_machine_is_skipped_only_if_it_says_so(trained, tmp_path, monkeypatch):
    from k2lab.core.errors import SandboxError
    from k2lab.core.slots import load

    path, run_dir = trained
    copy = shutil.copytree(run_dir, tmp_path / "run")
    agent = load("stage", "agent")
    lacking = recipes.load(str(path), ["stage.agent.tools.0.works=false"])
    monkeypatch.setattr(agent, "optional", False)
    with pytest.raises(SandboxError, match="no sandbox works"):
        runner.run(lacking, copy, device="cpu", say=lambda text: None)
    monkeypatch.setattr(agent, "optional", True)

    def breaks(stage, ctx):
        raise SandboxError("the sandbox broke")

    monkeypatch.setattr(agent, "run", breaks)
    said = []
    recipe = recipes.load(str(path), ["stage.agent.max_tokens=7"])
    outcome = runner.run(recipe, copy, only="agent", device="cpu", say=said.append)
    assert outcome.skipped == {"agent": "the sandbox broke."} and said[-1] == "agent: not run. the sandbox broke."
    assert "agent" not in outcome.done and not list(copy.glob("stages/agent-*.partial"))


def test_without_a_sandbox_the_others_run_and_the_exit_code_is_3(trained):
    path, run_dir = trained
    done = k2("run", str(path), "stage.agent.tools.0.works=false", "--run-dir", str(run_dir), "--quiet", check=False)
    assert done.returncode == 3, done.stderr[-2000:]
    assert "k2 run: agent was not run: no sandbox works on this machine. Install one." in done.stderr
    assert "agent: not run. no sandbox works" in done.stdout and "agent (not run)" in done.stdout
    assert list((run_dir / "stages").glob("evaluate-*/manifest.json"))
    assert "agent was not run" in (run_dir / "report.html").read_text()
    events = [json.loads(line) for path in (run_dir / "events").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert any(event["kind"] == "stage_skipped" and event["stage"] == "agent" for event in events)
    _groups_of_tasks(run_dir)


def _groups_of_tasks(run_dir):
    (folder,) = (run_dir / "stages").glob("evaluate-*")
    (model,) = json.loads((folder / "results.json").read_text())["models"]
    names = {metric["metric"]: metric["settings"] for metric in model["metrics"]}
    assert {f"{name}/{what}@{k}" for name in ("answered", "short", "long") for what, k in (("avg", 4), ("pass", 2))} <= set(names)
    assert names["answered/avg@4"] == "plain prompt, temperature 1, k=4, max 3 tokens"
    assert names["long/avg@4 (temperature 0.5, max 96 tokens)"] == "plain prompt, temperature 0.5, k=4, max 96 tokens"
    assert json.loads((folder / "manifest.json").read_text())["disjoint"]["shared"] == 0


def test_chat_with_a_run(trained):
    path, run_dir = trained
    asked = "hello\n/tools\n\nagain\n/exit\nnever\n"
    tool = str(path.parent / "calculator.py")
    done = k2("chat", str(run_dir), "--tools", tool, "--max-tokens", "3", "--temperature", "1", input=asked)
    assert "add: calculator in a box" in done.stderr and "sft-" in done.stderr
    assert "[add: adds]" in done.stdout and done.stdout.count("--max-tokens is reached") <= 2
    again = k2("chat", str(run_dir / "sft"), "--tools", tool, "--max-tokens", "3", "--temperature", "1", input=asked)
    assert again.stdout == done.stdout
    for arguments, words in (
        ([str(run_dir / "sfft")], "Did you mean 'sft'?"),
        ([str(path.parent)], "no run directory"),
        ([str(run_dir), "--temperature", "-1"], "temperature must not be negative"),
        ([str(run_dir), "--tools", "pyhton"], "Did you mean 'python'?"),
    ):
        refused = k2("chat", *arguments, check=False, input="")
        assert refused.returncode == 2 and words in refused.stderr


@pytest.mark.parametrize(
    "override, words",
    [
        ("stage.agent.max_turns=1", "must be at least 2"),
        ("stage.agent.k=3", "need a temperature"),
        ("stage.agent.tools=[]", "name at least one"),
        ("stage.evaluate.task_groups.0.pass_at=[5]", "at least n samples"),
        ("stage.evaluate.task_groups.0.k=0", "need a temperature"),
        ("stage.evaluate.task_groups.0.tempreature=1", "Did you mean 'temperature'"),
        ("stage.evaluate.task_data=[]", "name a data set"),
    ],
)
def test_bad_settings_are_refused(trained, override, words):
    with pytest.raises(ValueError, match=words):
        recipes.load(str(trained[0]), [override])
