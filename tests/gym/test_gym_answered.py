"""The task slot `answered`: records that carry their own answer become tasks."""

import pytest

from k2lab.core.errors import DataError, RecipeError
from k2lab.data.sources.general_instructions import GeneralInstructions
from k2lab.data.sources.reasoning_tasks import ReasoningTasks
from k2lab.data.sources.tool_traces import ToolTraces
from k2lab.gym.task import check_tasks
from k2lab.gym.tasks.answered import Answered, prompt_of

END = "<|im_end|>"


def record(**fields):
    return {"key": "k", "prompt": "1 + 1 =", "answer": "2", **fields}


@pytest.fixture(scope="module")
def records():
    return list(ReasoningTasks(families={"chain_sum:1-4": 120, "spell_backward:1-2": 60}).records())


def test_every_record_becomes_a_task_that_can_be_won(records):
    tasks = Answered(limit=0).tasks(records)
    assert len(tasks) == len(records) and check_tasks(tasks) == []
    for task, given in zip(tasks, records):
        assert task.key == f"answered/{given['key']}" and task.messages[-1].content == given["prompt"]
        assert task.rewards == ("exact_match",) and task.max_tokens == 96
        assert task.meta == {"domain": given["domain"], "difficulty": given["difficulty"], "group": given["group"]}
        assert task.score(f"<think>{given['reasoning']}</think>{given['final']}{END}") == 1
        assert task.score(f"{given['final']}0{END}") == 0


def test_domains_and_difficulties_choose(records):
    chosen = Answered(limit=0, domains=["chain_sum"], min_difficulty=2, max_difficulty=3).tasks(records)
    assert {(task.meta["domain"], task.meta["difficulty"]) for task in chosen} == {("chain_sum", 2), ("chain_sum", 3)}
    unknown = [record(difficulty="hard"), record(key="l", difficulty=2), record(key="m")]
    assert [task.key for task in Answered(max_difficulty=2).tasks(unknown)] == ["answered/l"]
    assert Answered(sources=["reasoning_tasks"], limit=0).tasks([*records, record(source="other")])[-1].key != "answered/k"
    with pytest.raises(DataError, match="no record fits.*chain_sum, spell_backward"):
        Answered(domains=["products"]).tasks(records)


def test_the_choice_does_not_depend_on_the_order(records):
    some, again = Answered(limit=9).tasks(records), Answered(limit=9).tasks(records[::-1])
    assert len(some) == 9 and {task.key for task in some} == {task.key for task in again}
    assert {task.key for task in Answered(limit=9, seed=1).tasks(records)} != {task.key for task in some}


def test_rewards_and_options_are_the_records_own():
    (task,) = Answered().tasks([record(answer="2.0", rewards=["numeric"], options={"numeric": {"absolute": 0.5}})])
    assert (task.rewards, task.options) == (("numeric",), {"numeric": {"absolute": 0.5}})
    assert (task.score("2.3"), task.score("2.6")) == (1, 0)


def test_every_kind_of_record_asks_its_question():
    chat = next(iter(ToolTraces(families={"chain_sum:7": 1}).records()))
    instruction = {"key": "i", "instruction": "Add.", "input": "1 1", "output": "It is 2", "answer": "2", "rewards": ["numeric"]}
    preference = record(key="p", chosen="2", rejected="3")
    tasks = Answered().tasks([chat, instruction, preference])
    assert [task.messages[-1].content for task in tasks] == [chat["messages"][0]["content"], "Add.\n\n1 1", "1 + 1 ="]
    assert tasks[0].gold == chat["answer"] and tasks[1].gold == "It is 2"
    assert check_tasks(tasks) == []


def test_a_chat_is_asked_up_to_the_users_last_turn():
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert [message.content for message in prompt_of({"messages": messages})] == ["Be brief.", "a", "b", "c"]
    assert prompt_of({"messages": messages[:1]}) == ()


def test_what_is_no_task_is_passed_over():
    plain = [*GeneralInstructions(count=20).records(), {"key": "q", "question": "q", "answer": "a"}, {"key": "t", "text": "t"}]
    assert [task.key for task in Answered().tasks([*plain, record()])] == ["answered/k"]
    with pytest.raises(DataError, match="no record fits.*none"):
        Answered().tasks(plain)


def test_bad_settings_are_refused():
    with pytest.raises(RecipeError, match="max_tokens"):
        Answered(max_tokens=0)
    with pytest.raises(RecipeError, match="limit"):
        Answered(limit=-1)
