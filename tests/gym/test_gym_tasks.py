import dataclasses

import pytest

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.types import Message
from k2lab.data.sources.general_instructions import GeneralInstructions
from k2lab.gym.task import Task, check_tasks, question_of
from k2lab.gym.tasks.docstring_names import DocstringNames
from k2lab.gym.tasks.general_exact import GeneralExact

END = "<|im_end|>"
ASK = (Message.text("user", "what?"),)


def docstring_record(name, output=None, key=None):
    return {
        "key": key or f"doc:{name}",
        "instruction": f"What does `{name}` do?",
        "input": "",
        "output": f"`{name}`: Does something." if output is None else output,
        "object": name,
        "module": name.split(".")[0],
    }


def test_task_score_is_the_product_of_its_rewards():
    task = Task(key="t", messages=ASK, answer="7", rewards=("numeric", "well_formed"))
    assert task.scores("it is 7") == {"numeric": 1.0, "well_formed": 0.0}
    assert task.score("it is 7") == 0.0
    assert task.score("it is 7" + END) == 1.0


def test_task_options_reach_the_reward():
    strict = Task(key="t", messages=ASK, answer="Yes", rewards=("exact_match",))
    lenient = dataclasses.replace(strict, options={"exact_match": {"ignore_case": True}})
    assert (strict.score("yes"), lenient.score("yes")) == (0.0, 1.0)
    with pytest.raises(RecipeError, match="ignore_case"):
        dataclasses.replace(strict, options={"exact_match": {"ignore_cas": True}}).score("yes")


def test_user_reward_file_and_its_range(tmp_path):
    path = tmp_path / "generous.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Generous:\n"
        "    value: float = 1.0\n"
        "    def score(self, task, response):\n"
        "        return self.value\n"
    )
    task = Task(key="t", messages=ASK, answer="x", rewards=(str(path),))
    assert any("scores 1" in problem for problem in check_tasks([task]))
    broken = dataclasses.replace(task, options={str(path): {"value": float("nan")}})
    assert "outside [0, 1]" in check_tasks([broken])[0]
    path.with_name("raises.py").write_text(path.read_text().replace("self.value", "1 / 0", 1).replace("return", "return 1 / 0,"))
    raising = dataclasses.replace(task, rewards=(str(path.with_name("raises.py")),))
    assert "a reward failed: ZeroDivisionError" in check_tasks([raising])[0]
    with pytest.raises(DataError, match="outside"):
        dataclasses.replace(task, options={str(path): {"value": 1.5}}).score("x")


def test_check_tasks_finds_each_kind_of_problem():
    good = Task(key="good", messages=ASK, answer="7", rewards=("numeric",))
    assert check_tasks([good]) == []
    cases = {
        "twice": [good, good],
        "gold": [dataclasses.replace(good, gold="it is 8")],
        "last message": [dataclasses.replace(good, messages=(*ASK, Message.text("assistant", "7")))],
        "no reward": [dataclasses.replace(good, rewards=())],
        "no room": [dataclasses.replace(good, max_tokens=0)],
        "no reward called": [dataclasses.replace(good, rewards=("nonexistent",))],
        "no number": [dataclasses.replace(good, answer="seven")],
        "scores 1": [dataclasses.replace(good, answer="", rewards=("exact_match",))],
    }
    for words, tasks in cases.items():
        problems = check_tasks(tasks)
        assert problems and any(words in problem for problem in problems), (words, problems)
        assert all(problem.startswith("good: ") for problem in problems)


def test_docstring_names_asks_for_the_object():
    records = [docstring_record("json.dumps"), docstring_record("os.path.join"), {"key": "x", "text": "no question"}]
    tasks = DocstringNames().tasks(records)
    assert [task.answer for task in tasks] == ["json.dumps", "os.path.join"]
    assert check_tasks(tasks) == []
    assert tasks[0].score("`json.dumps`: Serialize." + END) == 1
    assert tasks[0].score("`json.dump`: Serialize." + END) == 0
    assert tasks[0].meta == {"module": "json", "named_in_question": True}
    assert "`json.dumps`" in tasks[0].messages[-1].content


def test_docstring_names_passes_over_answers_that_do_not_name_the_object():
    records = [docstring_record("json.dumps", output="Serialize obj."), docstring_record("os.getcwd")]
    assert [task.answer for task in DocstringNames().tasks(records)] == ["os.getcwd"]
    with pytest.raises(DataError, match="no record fits"):
        DocstringNames().tasks(records[:1])


def test_limit_does_not_depend_on_the_order_of_records():
    records = [docstring_record(f"m.f{n}") for n in range(40)]
    some = DocstringNames(limit=7).tasks(records)
    again = DocstringNames(limit=7).tasks(records[::-1])
    other = DocstringNames(limit=7, seed=1).tasks(records)
    assert len(some) == 7
    assert {task.key for task in some} == {task.key for task in again}
    assert {task.key for task in some} != {task.key for task in other}
    assert len(DocstringNames(limit=0).tasks(records)) == 40


def test_general_exact_on_the_source_itself():
    records = list(GeneralInstructions(count=300).records())
    tasks = GeneralExact(limit=0).tasks(records)
    assert len(tasks) > 250
    assert check_tasks(tasks) == []
    by_key = {f"general_exact/{record['key']}": record for record in records}
    for task in tasks:
        record = by_key[task.key]
        assert task.messages == question_of(record)
        assert task.meta["task"] == record["task"]
        assert task.score(record["output"] + END) == 1
        assert task.score(record["output"] + " and more" + END) == 0
    assert GeneralExact(limit=10).tasks(records + [docstring_record("a.b")])[0].answer
    with pytest.raises(DataError, match="no record fits"):
        GeneralExact().tasks([docstring_record("a.b")])


def test_questions_are_worded_as_in_fine_tuning():
    chats = pytest.importorskip("k2lab.stages._chats")
    for record in (docstring_record("json.dumps"), {"key": "k", "instruction": "Sort.", "input": "b a", "output": "a b"}):
        assert question_of(record) == tuple(chats.messages_of(record)[:-1])


@pytest.mark.parametrize("cls", [DocstringNames, GeneralExact])
def test_task_slots_give_examples(cls):
    record = {**docstring_record("json.dumps"), "source": "general_instructions"}
    for example in cls.examples():
        assert check_tasks(example.tasks([record])) == []
