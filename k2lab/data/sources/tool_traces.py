"""Conversations in which the assistant computes with the tool `python` what is too long to work out: chat records that are tasks.

The user asks for a sum of long numbers, the assistant calls {"code": "print(8359384 - 2166924)"}, gets the tool's result and
answers. Questions are reasoning-gym's (Apache-2.0), shipped with K2 Lab; results are computed by Python when records are made.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

from k2lab.core import slots
from k2lab.core.errors import RecipeError
from k2lab.core.slots import Slot
from k2lab.data.records import Record
from k2lab.data.sources import _reasoning_tasks as shipped


def _after(pattern: str) -> Callable[[str], str]:
    def cut(question: str) -> str:
        found = re.search(pattern, question)
        assert found is not None, question
        return found[1]

    return cut


def _two(function: str) -> Callable[[str], str]:
    return lambda question: f"{function}({', '.join(re.findall(r'[0-9]+', question.split(':', 1)[1]))})"


# What is computed, as Python would write it; numbers and blanks as in the question, so that a model has but to copy.
_EXPRESSIONS: dict[str, Callable[[str], str]] = {
    "chain_sum": _after(r"problem: (.*) =$"),
    "products": _after(r"multiplication: (.*?)\."),
    "count_bits": lambda question: f"bin({_after(r'number ([0-9]+)')(question)}).count('1')",
    "gcd": _two("math.gcd"),
    "lcm": _two("math.lcm"),
}


@dataclass(frozen=True, kw_only=True)
class ToolTraces:
    """Conversations with tool calls: long sums and products computed by `python`, results exact; tasks and chats at once.

    `messages` are in the OpenAI form and `tools` declares the tool as its slot specifies it; `answer` and `rewards` judge an
    answer to the user's question.
    """

    # As in the source `reasoning_tasks`: family, "family:LEVEL" or "family:LOW-HIGH" -> number of conversations.
    families: dict[str, int] = field(default_factory=lambda: {"chain_sum:7-8": 600, "products:4-5": 400})
    offset: int = 0  # tasks passed over at the beginning of each family's level: for sets that share no task
    # The tool that is declared and called; it must take {"code": ...}. Use the same table as where the model gets the tool.
    tool: Annotated[Any, Slot("tool")] = field(default_factory=lambda: slots.load("tool", "python")())
    plan: str = "too long to work out, so use python"  # what the assistant thinks before the call; "" = no thoughts
    name: str = "tool_traces"  # begins the records' keys; give a second source of this type another

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise RecipeError("must not be negative", where="offset", got=self.offset)
        for (family, _), _ in self._selection():
            if family not in _EXPRESSIONS:
                raise RecipeError(f"nothing in {family} is computed", where="families", allowed=", ".join(_EXPRESSIONS))

    def _selection(self) -> list[tuple[tuple[str, int], int]]:
        return shipped.selection(self.families, 0, 1, 0, traced=False)

    def records(self) -> Iterator[Record]:
        """Chat records. Warns of levels that have fewer tasks than were asked for, and of results that are not the answer."""
        spec, short, wrong = self._spec(), [], 0
        for key, number in self._selection():
            rows = shipped.rows(*key)[self.offset : self.offset + number]
            if len(rows) < number:
                short.append(f"{key[0]}:{key[1]} gives {len(rows)} of {number}")
            for row in rows:
                expression = _EXPRESSIONS[row.family](row.question)
                result = str(eval(expression, {"__builtins__": {"bin": bin}, "math": math}))
                if result != row.answer:
                    wrong += 1
                    continue
                messages = self._messages(row.question, expression, result, spec["function"]["name"])
                yield {"messages": messages, "tools": [spec], **shipped.tags(row, self.name)}
        if short:
            warnings.warn(f"{self.name}: there are fewer tasks than asked for: {', '.join(short)}", stacklevel=2)
        if wrong:
            warnings.warn(f"{self.name}: {wrong} tasks whose answer is not what Python computes were left out", stacklevel=2)

    def _messages(self, question: str, expression: str, result: str, tool: str) -> list[dict[str, Any]]:
        code = f"print({expression})"
        if expression.startswith("math."):
            code = f"import math; {code}"
        call_id = f"functions.{tool}:0"
        function = {"name": tool, "arguments": json.dumps({"code": code})}
        call: dict[str, Any] = {"role": "assistant", "content": ""}
        if self.plan:
            call["reasoning_content"] = self.plan
        call["tool_calls"] = [{"id": call_id, "type": "function", "function": function}]
        return [
            {"role": "user", "content": question},
            call,
            {"role": "tool", "name": tool, "tool_call_id": call_id, "content": result},
            {"role": "assistant", "content": result},
        ]

    def _spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.tool.spec()
        if "code" not in spec["function"].get("parameters", {}).get("properties", {}):
            raise RecipeError("the tool does not take code", where="tool", got=spec["function"]["name"])
        return spec

    def fingerprint(self) -> str:
        """sha256 hex over the settings, the shipped tasks, this file and the tool's specification."""
        with open(__file__, "rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        return shipped.digest([repr(self), own, self._spec()])

    @staticmethod
    def examples() -> list[ToolTraces]:
        return [ToolTraces(), ToolTraces(families={"chain_sum:7": 20, "gcd:3": 10}, offset=100, plan="")]
