import json
import threading
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest

from k2lab.core.errors import DataError, RecipeError
from k2lab.core.types import Completion, Message, Reasoning, SampleParams, StopReason, Text, ToolCall, ToolResult
from k2lab.gym.agent import Toolbox
from k2lab.gym.rollouts import from_json, roll_out, to_json
from k2lab.gym.task import Task
from k2lab.sampling.scripted import ScriptedSampler
from k2lab.text import chat
from k2lab.text.layout import special_block
from k2lab.text.tokenizer import from_ranks

TOKENIZER = from_ranks([bytes([n]) for n in range(256)], special_block(256, 32))
END = TOKENIZER.im_end_id
PARAMS = SampleParams(max_tokens=400)


def spec(name):
    parameters = {"type": "object", "properties": {"code": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


@dataclass
class Tool:
    """A fake: `behave(arguments)` is the result."""

    behave: object
    name: str = "python"

    def spec(self):
        return spec(self.name)

    def call(self, arguments):
        return self.behave(arguments)


def make_task(key="t", answer="7", **more):
    fields = {"messages": (Message.text("user", f"ask {key}"),), "rewards": ("exact_match",), **more}
    return Task(key=key, answer=answer, **fields)


def call(arguments='{"code": "3+4"}', name="python", index=0):
    return ToolCall(name, arguments, f"functions.{name}:{index}")


def result(content, index=0, name="python"):
    return Message("tool", (ToolResult(f"functions.{name}:{index}", content),), name)


def assistant(*parts):
    return Message("assistant", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def turns_of(messages, tools):
    """The conversation as rendered, and the tokens of each of the assistant's turns in it."""
    rendered = chat.render(messages, TOKENIZER, tools=[tool.spec() for tool in tools] or None, default_system=False)
    turns, run = [], []
    for token, trained in zip(rendered.tokens, rendered.trained):
        if trained:
            run.append(token)
        elif run:
            turns.append(run)
            run = []
    return rendered, [*turns, run]


def play(task, turns, *, tools=(), **more):
    """One rollout whose turns are scripted."""
    sampler = ScriptedSampler(turns)
    settings = {"params": PARAMS, "seed": 3, "tools": tools, "max_turns": 6, **more}
    (group,) = roll_out([task], sampler, TOKENIZER, **settings)
    (rollout,) = group.rollouts
    return rollout, sampler


def same_as_rendered(rollout, rendered):
    assert rollout.tokens.tolist() == rendered.tokens
    assert rollout.weight.tolist() == [float(flag) for flag in rendered.trained]


def test_a_tool_loop_yields_the_tokens_of_the_rendered_conversation():
    tool = Tool(lambda arguments: f"ran {arguments}")
    task = make_task()
    conversation = [
        *task.messages,
        assistant(Reasoning("I shall compute."), "Let me see. ", call()),
        result('ran {"code": "3+4"}'),
        assistant(Reasoning("Once more."), call('{"code": "7"}', index=1)),
        result('ran {"code": "7"}', 1),
        assistant(Reasoning("It is seven."), "7"),
    ]
    rendered, turns = turns_of(conversation, [tool])
    rollout, sampler = play(task, turns, tools=[tool])
    same_as_rendered(rollout, rendered)
    assert list(rollout.messages) == conversation
    assert rollout.response.endswith("</think>7<|im_end|>")
    assert (rollout.reward, rollout.rewards, rollout.error) == (1.0, {"exact_match": 1.0}, "")
    assert rollout.stop is StopReason.EOS
    prompt = len(sampler.requests[0][0])
    model = sum(map(len, turns))
    assert rollout.usage == {
        "prompt": prompt,
        "response": model,
        "context": len(rendered.tokens) - prompt - model,
        "turns": 3,
        "last_turn": len(turns[-1]),
        "tool_calls": 2,
        "tool_results": 2,
        "tool_errors": 0,
    }
    assert [key for _, _, key in sampler.requests] == ["t/0", "t/0 turn 1", "t/0 turn 2"]
    assert rollout.timings["sample"] >= 0 and rollout.timings["tools"] >= 0
    assert rollout.samples()[0].key == "t#0"
    copy = from_json(json.loads(json.dumps(to_json(rollout))))
    assert to_json(copy) == to_json(rollout) and copy.tokens.dtype == rollout.tokens.dtype and copy.stop is rollout.stop


def test_parallel_calls_keep_their_order_whichever_ends_first():
    def behave(arguments):
        time.sleep(0.1 if "slow" in arguments else 0)
        return arguments

    python, other = Tool(behave), Tool(lambda arguments: "other", "search")
    task = make_task()
    conversation = [
        *task.messages,
        assistant("", call('{"code": "slow"}'), call('{"code": "fast"}', index=1), call("{}", "search", 2)),
        result('{"code": "slow"}'),
        result('{"code": "fast"}', 1),
        result("other", 2, "search"),
        assistant("7"),
    ]
    rendered, turns = turns_of(conversation, [python, other])
    rollout, _ = play(task, turns, tools=[python, other])
    same_as_rendered(rollout, rendered)
    assert rollout.usage["tool_results"] == 3
    assert rollout.reward == 1


@pytest.mark.parametrize(
    "bad, words",
    [
        (call('{"code": '), "error: this call could not be read: the arguments are not valid JSON"),
        (call("[1]"), "not a JSON object"),
        (call("{}", "pyhton"), "error: there is no tool 'pyhton'; tools: python"),
    ],
)
def test_a_call_that_cannot_be_made_is_answered_in_words(bad, words):
    """It is the model's fault, so the rollout counts: no error, and the model may try again."""
    tool = Tool(lambda arguments: "fine")
    conversation = [*make_task().messages, assistant("", bad), result("?", 0, bad.name), assistant("7")]
    _, turns = turns_of(conversation, [tool])
    rollout, _ = play(make_task(), turns, tools=[tool])
    (answered,) = [message for message in rollout.messages if message.role == "tool"]
    assert words in answered.parts[0].content
    assert answered.parts[0].id == f"functions.{bad.name}:0"
    assert words in TOKENIZER.decode(rollout.tokens.tolist())
    assert (rollout.usage["tool_errors"], rollout.error, rollout.reward) == (1, "", 1.0)


def test_a_tool_that_fails_is_the_rollouts_error():
    def fails(arguments):
        raise ValueError("no disk")

    task = make_task()
    _, turns = turns_of([*task.messages, assistant("", call()), result("?"), assistant("7")], [Tool(fails)])
    for behave, words in (
        (fails, "python failed: ValueError: no disk"),
        (lambda arguments: 7, "python failed: it returned int, not text"),
        (lambda arguments: exit(3), "python failed: SystemExit: 3"),
    ):
        rollout, _ = play(task, turns, tools=[Tool(behave)])
        assert rollout.error == words
        assert (rollout.reward, rollout.rewards) == (0.0, {"exact_match": 1.0})
        assert f"error: {words}" in TOKENIZER.decode(rollout.tokens.tolist())
        assert rollout.usage["turns"] == 2  # nothing is lost: the conversation went on


def test_a_tool_that_never_returns_is_given_up_and_the_others_are_not():
    forever = threading.Event()

    def behave(arguments):
        if "forever" in arguments:
            forever.wait()
        return "quick"

    tool, task = Tool(behave), make_task()
    two = assistant("", call('{"code": "forever"}'), call('{"code": "quick"}', index=1))
    _, turns = turns_of([*task.messages, two, result("?"), result("?", 1), assistant("7")], [tool])
    rollout, _ = play(task, turns, tools=[tool], tool_timeout=0.2)
    forever.set()
    contents = [message.parts[0].content for message in rollout.messages if message.role == "tool"]
    assert contents == ["error: python did not return within 0.2 seconds", "quick"]
    assert rollout.error == "python did not return within 0.2 seconds"
    assert rollout.timings["tools"] >= 0.2


def test_many_endless_calls_do_not_wait_for_each_other_forever():
    forever = threading.Event()
    box = Toolbox([Tool(lambda arguments: forever.wait() and "")], timeout=0.05, workers=2)
    answers = box.run([call()] * 5)
    forever.set()
    assert all(answer.broken for answer in answers)
    assert box.run([]) == []


def test_truncated_calls_end_the_rollout_and_are_kept():
    tool, task = Tool(lambda arguments: "never run"), make_task()
    _, (turn, _) = turns_of([*task.messages, assistant("", call()), result("?"), assistant("7")], [tool])
    rollout, _ = play(task, [turn], tools=[tool], params=SampleParams(max_tokens=len(turn) - 6))
    assert rollout.stop is StopReason.LENGTH
    (cut,) = [part for part in rollout.messages[-1].parts if isinstance(part, ToolCall)]
    assert "cut off" in cut.error
    assert rollout.tokens.tolist()[-len(turn) + 6 :] == turn[:-6]
    assert (rollout.usage["tool_calls"], rollout.usage["tool_results"], rollout.reward) == (1, 0, 0.0)


def test_the_token_budget_spans_all_turns():
    tool, task = Tool(lambda arguments: "x" * 50), make_task()
    _, (turn, _) = turns_of([*task.messages, assistant("", call()), result("?"), assistant("7")], [tool])
    budget = len(turn) + 5
    rollout, sampler = play(task, [turn, [65] * 40], tools=[tool], params=SampleParams(max_tokens=budget))
    assert [params.max_tokens for _, params, _ in sampler.requests] == [budget, 5]
    assert (rollout.usage["response"], rollout.stop) == (budget, StopReason.LENGTH)
    exactly, _ = play(task, [turn], tools=[tool], params=SampleParams(max_tokens=len(turn)))
    assert (exactly.usage["turns"], exactly.stop) == (1, StopReason.EOS)


def test_one_that_may_write_less_is_cut_as_if_sampled_alone():
    """Rollouts of one limit share a batch in later turns; draws depend on positions, so cutting equals a lower limit."""
    tool = Tool(lambda arguments: "ok")
    short = [*TOKENIZER.encode(""), *turns_of([Message.text("user", "u"), assistant("", call())], [tool])[1][0]]
    long = [*TOKENIZER.encode("pad it " * 3), *short]
    replies = {
        "a/0": short,
        "b/0": long,
        "a/0 turn 1": [66] * 99,
        "b/0 turn 1": Completion((66,) * 60, (-0.5,) * 60, StopReason.CONTEXT),
    }
    sampler = ScriptedSampler(replies)
    params = SampleParams(max_tokens=len(long) + 10)
    groups = roll_out([make_task("a"), make_task("b")], sampler, TOKENIZER, params=params, seed=0, tools=[tool], max_turns=2)
    (a,), (b,) = groups[0].rollouts, groups[1].rollouts
    assert a.usage["response"] == b.usage["response"] == len(long) + 10
    assert (a.stop, b.stop) == (StopReason.LENGTH, StopReason.LENGTH)
    assert b.logprobs[b.weight > 0][-10:].tolist() == [-0.5] * 10


def test_turns_calls_and_tools_are_limited():
    ran = []
    tool, task = Tool(lambda arguments: ran.append(arguments) or "again"), make_task()
    three = assistant("", call(), call(index=1), call(index=2))
    turn = turns_of([*task.messages, three], [tool])[1][0]
    rollout, _ = play(task, [turn] * 3, tools=[tool], max_turns=3, max_tool_calls=4)
    assert rollout.usage == {**rollout.usage, "turns": 3, "tool_calls": 9, "tool_results": 6, "tool_errors": 2}
    assert len(ran) == 4
    assert "the limit of tool calls is reached" in TOKENIZER.decode(rollout.tokens.tolist())
    own = replace(task, max_turns=1)
    assert play(own, [turn], tools=[tool], max_turns=3)[0].usage["turns"] == 1
    assert play(task, [turn], max_turns=3)[0].usage == {**rollout.usage, **play(task, [turn], max_turns=1)[0].usage}
    assert len(ran) == 4


def test_two_rollouts_of_a_task_are_separate_and_draws_are_keyed():
    tool = Tool(lambda arguments: "ok")
    turn = turns_of([Message.text("user", "u"), assistant("", call())], [tool])[1][0]
    seven, eight = [*TOKENIZER.encode("7"), END], [*TOKENIZER.encode("8"), END]
    replies = {"t/0": turn, "t/1": eight, "t/0 turn 1": seven, "u/0": seven, "u/1": seven}
    params = SampleParams(max_tokens=200, temperature=1.0, seed=99)
    tasks = [make_task("t"), make_task("u")]
    done = []
    sampler = ScriptedSampler(replies, policy_version=4)
    groups = roll_out(
        tasks,
        sampler,
        TOKENIZER,
        k=2,
        params=params,
        seed=5,
        tools=[tool],
        max_turns=2,
        progress=lambda ended, total: done.append((ended, total)),
    )
    assert [(group.task, [rollout.reward for rollout in group.rollouts]) for group in groups] == [("t", [1, 0]), ("u", [1, 1])]
    assert [rollout.index for rollout in groups[0].rollouts] == [0, 1]
    assert {params.seed for _, params, _ in sampler.requests} == {5}
    assert groups[0].rollouts[0].policy_version == (4, 4)
    assert done == [(3, 4), (4, 4)]
    later = ScriptedSampler(lambda prompt, key: seven)
    roll_out(tasks, later, TOKENIZER, k=2, params=params, seed=5, policy_version=7, keys_prefix="rl/")
    assert [key for _, _, key in later.requests] == [f"rl/{key} policy 7" for key in ("t/0", "t/1", "u/0", "u/1")]


def test_a_prompt_beyond_the_window_is_recorded():
    reply = Completion((), (), StopReason.CONTEXT)
    rollout, _ = play(make_task(), [reply])
    assert rollout.stop is StopReason.CONTEXT
    assert "leaves no room in the model's window" in rollout.error
    assert (rollout.reward, rollout.response, len(rollout.tokens)) == (0.0, "", rollout.usage["prompt"])


def test_a_window_that_results_fill_ends_the_rollout_with_what_the_model_wrote():
    tool, task = Tool(lambda arguments: "x" * 500), make_task()
    turn = turns_of([*task.messages, assistant("", call())], [tool])[1][0]
    rollout, _ = play(task, [turn, Completion((), (), StopReason.CONTEXT)], tools=[tool])
    assert (rollout.stop, rollout.error, rollout.reward) == (StopReason.CONTEXT, "", 0.0)
    assert rollout.tokens.tolist()[-len(turn) :] == turn  # nothing is predicted from the result
    assert rollout.usage["context"] == 0
    assert any(message.role == "tool" for message in rollout.messages)


def test_a_turn_that_ended_by_another_stop_token_is_closed_as_context():
    tool, task = Tool(lambda arguments: "ok"), make_task()
    section_end = TOKENIZER.special_id("<|tool_calls_section_end|>")
    conversation = [*task.messages, assistant("", call()), result("ok"), assistant("7")]
    rendered, (first, last) = turns_of(conversation, [tool])
    rollout, _ = play(task, [first, last], tools=[tool], params=SampleParams(max_tokens=400, stop_tokens=(section_end,)))
    assert rollout.tokens.tolist() == rendered.tokens
    assert rollout.usage["response"] == len(first) - 1 + len(last)


REWARD = """
from dataclasses import dataclass
@dataclass(frozen=True, kw_only=True)
class Odd:
    value: str = "nan"
    def score(self, task, response):
        if self.value == "raise":
            raise ZeroDivisionError("by zero")
        return None if self.value == "none" else float(self.value)
"""


@pytest.mark.parametrize("value, words", [("nan", "outside"), ("1.5", "outside"), ("raise", "by zero"), ("none", "TypeError")])
def test_a_reward_that_fails_is_recorded(tmp_path, value, words):
    path = tmp_path / "odd.py"
    path.write_text(REWARD)
    task = make_task(rewards=("exact_match", str(path)), options={str(path): {"value": value}})
    rollout, _ = play(task, [[*TOKENIZER.encode("7"), END]])
    assert words in rollout.error
    assert rollout.rewards == {"exact_match": 1.0, str(path): 0.0}
    assert rollout.reward == 0


def test_ids_that_are_no_tokens_are_recorded():
    rollout, _ = play(make_task(), [Completion((65, 9999), (0.0, 0.0), StopReason.EOS)])
    assert "no such token" in rollout.error
    assert rollout.tokens.tolist()[-2:] == [65, 9999]
    assert (rollout.stop, rollout.reward, rollout.response) == (StopReason.ERROR, 0.0, "")


def test_results_that_no_tokenizer_takes_are_made_text():
    tool, task = Tool(lambda arguments: "a\ud800b<|im_end|>"), make_task()
    turn = turns_of([*task.messages, assistant("", call())], [tool])[1][0]
    rollout, _ = play(task, [turn, [*TOKENIZER.encode("7"), END]], tools=[tool])
    assert rollout.messages[-2].parts[0].content == "a?b<|im_end|>"
    assert rollout.tokens.tolist().count(END) == 5  # of tools, user, two answers, result: text never ends a turn
    assert rollout.reward == 1


def test_tools_that_a_task_names_are_found(tmp_path):
    path = tmp_path / "echo.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Echo:\n"
        "    def spec(self):\n"
        '        return {"type": "function", "function": {"name": "echo", "parameters": {}}}\n'
        "    def call(self, arguments):\n"
        '        return "echo " + arguments\n'
    )
    task = make_task(tools=(str(path),))
    turn = turns_of([*task.messages, assistant("", call("{}", "echo"))], [])[1][0]
    rollout, sampler = play(task, [turn, [*TOKENIZER.encode("7"), END]])
    assert rollout.messages[-2].parts[0].content == "echo {}"
    assert '"name":"echo"' in TOKENIZER.decode(sampler.requests[0][0])


def test_settings_that_make_no_sense():
    sampler = ScriptedSampler([])
    for words, error, tasks, more in (
        ("k = 2", RecipeError, [make_task()], {"k": 2}),
        ("max_turns=0", RecipeError, [make_task()], {"max_turns": 0}),
        ("no task", DataError, [], {}),
        ("same key", DataError, [make_task(), make_task()], {}),
        ("no reward called", RecipeError, [make_task(rewards=("nonexistent",))], {}),
        ("two tools", RecipeError, [make_task()], {"tools": [Tool(len), Tool(len)]}),
        ("name its function", RecipeError, [make_task()], {"tools": [Tool(len, name="")]}),
    ):
        with pytest.raises(error, match=words):
            roll_out(tasks, sampler, TOKENIZER, **{"params": PARAMS, "seed": 0, **more})
    assert sampler.requests == []


def test_a_task_s_own_limit_holds_where_the_caller_gives_none():
    task = make_task(max_tokens=3)
    rollout, sampler = play(task, [[65] * 9], params=SampleParams(max_tokens=0))
    assert sampler.requests[0][1].max_tokens == 3
    assert np.count_nonzero(rollout.weight) == 3


def test_rollouts_look_like_the_tool_traces_that_models_are_trained_on():
    from k2lab.data.sources.tool_traces import ToolTraces
    from k2lab.gym.tasks.answered import Answered

    (record,) = [record for record, _ in zip(ToolTraces(families={"chain_sum:7": 4}).records(), range(1))]
    (task,) = Answered(limit=0).tasks([{**record, "key": "k", "domain": "chain_sum"}])
    messages = chat.from_openai(record["messages"])
    tool = Tool(lambda arguments: messages[2].parts[0].content)
    tool.spec = lambda: record["tools"][0]
    rendered, turns = turns_of(messages, [tool])
    rollout, _ = play(task, turns, tools=[tool])
    same_as_rendered(rollout, rendered)
    assert rollout.reward == 1
