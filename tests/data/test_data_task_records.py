"""Records that are tasks: kinds, tags, and what is refused with file and line."""

import json

import pytest

from k2lab.core import slots
from k2lab.core.errors import DataError
from k2lab.data.records import check_record, is_task, kind_of, map_text, text_of

TASK = {"prompt": "1 + 1 =", "answer": "2"}
REASONING = {"prompt": "1 + 1 =", "reasoning": "1+1=2", "final": "2"}


@pytest.mark.parametrize(
    "record, kind, task",
    [
        (TASK, "task", True),
        (REASONING, "reasoning", False),
        ({**REASONING, "answer": "2"}, "reasoning", True),
        ({"prompt": "p", "response": "r", "answer": "2"}, "response", True),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "answer": "2"}, "preference", True),
        ({"messages": [{"role": "user", "content": "x"}], "answer": "2"}, "chat", True),
        ({"instruction": "i", "output": "o", "answer": "2"}, "instruction", True),
        ({"question": "q", "answer": "a"}, "qa", False),
        ({"text": "t"}, "text", False),
        ({"answer": "2"}, None, False),
    ],
)
def test_kinds_and_tasks(record, kind, task):
    assert kind_of(record) == kind
    assert is_task(record) is task
    if kind:
        assert check_record(record, "x") is record


def test_the_text_of_a_task_is_question_and_answer():
    assert text_of(TASK) == "1 + 1 =\n2"
    assert map_text(TASK, str.upper) == TASK
    assert text_of({**REASONING, "answer": "2"}) == "1 + 1 =\n1+1=2\n2"


@pytest.mark.parametrize(
    "record, expected",
    [
        ({**REASONING, "final": " "}, "'final' is empty"),
        ({"prompt": "p", "reasoning": "r"}, "no known kind"),
        ({**TASK, "answer": ""}, "needs the text 'answer'"),
        ({**TASK, "answer": 2}, "'answer' must be a text"),
        ({**REASONING, "answer": 2}, "needs the text 'answer'"),
        ({**REASONING, "rewards": ["exact_match"]}, "needs the text 'answer'"),
        ({**TASK, "rewards": "exact_match"}, "list of at least one name"),
        ({**TASK, "rewards": []}, "list of at least one name"),
        ({**TASK, "rewards": ["exact_mach"]}, "Did you mean 'exact_match'"),
        ({**TASK, "options": []}, "table of settings per reward"),
        ({**TASK, "options": {"numeric": {}}}, "none of the rewards"),
        ({**TASK, "options": {"exact_match": 1}}, "table of settings per reward"),
        ({**TASK, "difficulty": [1]}, "'difficulty' must be a number or a text"),
        ({**TASK, "difficulty": True}, "'difficulty' must be a number or a text"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": {"a": 1}}, "list of tool specifications"),
    ],
)
def test_bad_tasks_name_file_and_line(tmp_path, record, expected):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(TASK) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=expected) as caught:
        list(slots.load("source", "jsonl")(path=str(path)).records())
    assert f"{path}:2" in str(caught.value) and "\n" not in str(caught.value)


def test_good_tags_pass():
    for more in (
        {"rewards": ["numeric", "own/reward.py"], "options": {"numeric": {"absolute": 0.1}}},
        {"options": {"exact_match": {"ignore_case": True}}},
        {"difficulty": 2.5, "domain": "sums"},
        {"difficulty": "hard", "rewards": None},
    ):
        assert check_record({**TASK, **more}, "x") == {**TASK, **more}
