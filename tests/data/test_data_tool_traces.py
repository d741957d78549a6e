"""Conversations with tool calls: exact results, what is rendered, and what is refused."""

import json

import pytest

from k2lab.core.errors import RecipeError
from k2lab.core.schema import build_slot
from k2lab.data.records import check_record, is_task
from k2lab.data.sources.reasoning_tasks import ReasoningTasks
from k2lab.data.sources.tool_traces import ToolTraces
from k2lab.gym.tools.python import Python

FAMILIES = {"chain_sum:7-8": 60, "products:4-5": 40, "count_bits:4": 10, "gcd:3": 10, "lcm:3": 10}


def call_of(record):
    (call,) = record["messages"][1]["tool_calls"]
    return call["function"]


def printed(code, capsys):
    exec(code, {})
    return capsys.readouterr().out.rstrip("\n")


def test_the_called_program_prints_the_answer(capsys):
    made = list(ToolTraces(families=FAMILIES).records())
    assert len(made) == sum(FAMILIES.values())
    for record in made:
        assert check_record(record, "x", "chat") is record and is_task(record)
        assert record["tools"] == [Python().spec()]
        assert call_of(record)["name"] == "python"
        result = printed(json.loads(call_of(record)["arguments"])["code"], capsys)
        user, call, tool, last = record["messages"]
        assert (user["role"], call["role"], tool["role"], last["role"]) == ("user", "assistant", "tool", "assistant")
        assert result == tool["content"] == last["content"] == record["answer"]
        assert tool["name"] == "python" and tool["tool_call_id"] == call["tool_calls"][0]["id"]


def test_programs_copy_the_numbers_as_they_stand_in_the_question():
    for record in ToolTraces(families={"chain_sum:8": 5, "products:5": 5}).records():
        code = json.loads(call_of(record)["arguments"])["code"]
        assert code.removeprefix("print(").removesuffix(")") in record["messages"][0]["content"]


def test_tasks_and_keys_are_those_of_reasoning_tasks():
    ours = list(ToolTraces(families={"chain_sum:7": 30}, offset=5).records())
    bare = list(ReasoningTasks(families={"chain_sum:7": 30}, offset=5, traces=False).records())
    assert [record["group"] for record in ours] == [record["group"] for record in bare]
    assert [record["messages"][0]["content"] for record in ours] == [record["prompt"] for record in bare]


def test_the_plan_is_thought_or_left_out():
    (with_plan,) = ToolTraces(families={"chain_sum:7": 1}, plan="use python").records()
    (without,) = ToolTraces(families={"chain_sum:7": 1}, plan="").records()
    assert with_plan["messages"][1]["reasoning_content"] == "use python"
    assert "reasoning_content" not in without["messages"][1]


def test_another_tool_is_declared_as_it_specifies_itself(tmp_path):
    path = tmp_path / "calculator.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Calculator:\n"
        "    takes: str = 'code'\n"
        "    def spec(self):\n"
        "        parameters = {'type': 'object', 'properties': {self.takes: {'type': 'string'}}}\n"
        "        return {'type': 'function', 'function': {'name': 'calculator', 'parameters': parameters}}\n"
        "    def call(self, arguments):\n"
        "        return ''\n"
    )
    table = {"type": "tool_traces", "families": {"products:5": 2}, "tool": str(path)}
    own = build_slot("source", table, "sources[0]")
    record = next(iter(own.records()))
    assert call_of(record)["name"] == record["messages"][2]["name"] == "calculator"
    assert own.fingerprint() != ToolTraces(families={"products:5": 2}).fingerprint()
    other = build_slot("source", {**table, "tool": {"type": str(path), "takes": "formula"}}, "sources[0]")
    with pytest.raises(RecipeError, match="does not take code"):
        next(iter(other.records()))


def test_bad_settings_are_refused():
    with pytest.raises(RecipeError, match="nothing in spell_backward is computed"):
        ToolTraces(families={"spell_backward:1": 5})
    with pytest.raises(RecipeError, match="offset"):
        ToolTraces(offset=-1)
    with pytest.warns(UserWarning, match="gives 0 of 5"):
        assert list(ToolTraces(families={"products:5": 5}, offset=10**6).records()) == []
