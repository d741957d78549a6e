import io
from dataclasses import dataclass

import pytest

from k2lab import chat
from k2lab.core.errors import DataError
from k2lab.core.types import Completion, Message, SampleParams, StopReason
from k2lab.gym.agent import Toolbox
from k2lab.sampling.scripted import ScriptedSampler
from k2lab.text.chat import render
from k2lab.text.layout import special_block
from k2lab.text.tokenizer import from_ranks

TOKENIZER = from_ranks([bytes([n]) for n in range(256)], special_block(256, 32))
END, SPECIAL = TOKENIZER.im_end_id, TOKENIZER.special_id


def say(text):
    return [*TOKENIZER.encode(text), END]


def call(name, arguments, index=0):
    return [
        SPECIAL("<|tool_call_begin|>"),
        *TOKENIZER.encode(f"functions.{name}:{index}"),
        SPECIAL("<|tool_call_argument_begin|>"),
        *TOKENIZER.encode(arguments),
        SPECIAL("<|tool_call_end|>"),
    ]


def calls(*inside):
    tokens = [token for one in inside for token in one]
    return [SPECIAL("<|tool_calls_section_begin|>"), *tokens, SPECIAL("<|tool_calls_section_end|>"), END]


@dataclass(frozen=True)
class Echo:
    def spec(self):
        return {"type": "function", "function": {"name": "echo", "description": "says it again", "parameters": {}}}

    def call(self, arguments):
        return f"heard {arguments}"


def talk(replies, lines, **more):
    """What a piped session prints, and the sampler."""
    sampler = ScriptedSampler(replies)
    out = io.StringIO()
    printer = chat.Printer(out)
    session = chat.Session(sampler, TOKENIZER, printer, params=SampleParams(max_tokens=300), default_system=False, **more)
    chat.repl(session, printer, io.StringIO("".join(f"{line}\n" for line in lines)))
    return out.getvalue(), sampler, session


def prompts(sampler):
    return [TOKENIZER.decode(prompt) for prompt, _, _ in sampler.requests]


def test_one_answer_per_line_with_history():
    shown, sampler, session = talk([say("hi"), say("blue")], ["hello", "", "which colour?", "/exit", "never said"])
    assert shown == "hi\nblue\n"
    assert prompts(sampler)[1] == (
        "<|im_user|>user<|im_middle|>hello<|im_end|><|im_assistant|>assistant<|im_middle|>hi<|im_end|>"
        "<|im_user|>user<|im_middle|>which colour?<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    assert len({key for _, _, key in sampler.requests}) == 2
    assert (
        sampler.requests[1][0] == render(session.messages[:3], TOKENIZER, add_generation_prompt=True, default_system=False).tokens
    )


def test_reset_and_system_message():
    _, sampler, _ = talk([say("a"), say("b")], ["one", "/reset", "two"], system="Be brief.")
    start = "<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>user<|im_middle|>"
    assert [prompt.removeprefix(start)[:3] for prompt in prompts(sampler)] == ["one", "two"]


def test_tool_calls_and_results_are_shown_and_the_loop_goes_on():
    replies = [
        [*TOKENIZER.encode("Let me ask. "), *calls(call("echo", '{"a": 1}'), call("nothing", "{}", 1))],
        say("It said so."),
    ]
    shown, sampler, session = talk(replies, ["ask it"], toolbox=Toolbox([Echo()]))
    lines = shown.splitlines()
    assert lines[:2] == ["Let me ask. ", '[calls] echo {"a": 1}']
    assert "[calls] nothing {}" in lines and "error: there is no tool 'nothing'; tools: echo" in lines
    assert 'heard {"a": 1}' in lines and lines[-1] == "It said so."
    assert "<|tool_call" not in shown
    assert [message.role for message in session.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert prompts(sampler)[1].endswith("## Return of functions.nothing:1\nerror: there is no tool 'nothing'; tools: echo"
        "<|im_end|><|im_assistant|>assistant<|im_middle|>")  # fmt: skip


def test_a_model_that_only_calls_is_stopped():
    shown, sampler, _ = talk([calls(call("echo", "{}"))] * 3, ["go"], toolbox=Toolbox([Echo()]), max_turns=3)
    assert len(sampler.requests) == 3 and shown.endswith("[stopped after 3 turns with tool calls]\n")


def test_thoughts_are_shown_and_leave_history():
    thinking = [SPECIAL("<think>"), *TOKENIZER.encode("hm"), SPECIAL("</think>"), *say("4")]
    shown, sampler, _ = talk([thinking, say("5")], ["2+2?", "and 2+3?"])
    assert shown.splitlines()[0] == "[thinks] hm" and "4" in shown.splitlines()
    assert "<think></think>4<|im_end|>" in prompts(sampler)[1] and "hm" not in prompts(sampler)[1]


def test_characters_are_shown_whole_and_control_characters_are_not():
    euro = list("€".encode())
    shown, _, _ = talk([[*euro, *TOKENIZER.encode("\x1b[2J!"), euro[0], END]], ["x"])
    assert shown == "€\ufffd[2J!\ufffd\n"


def test_cut_answers_and_messages_without_room():
    full = Completion((), (), StopReason.CONTEXT)
    shown, sampler, session = talk([[65] * 400, full, say("ok")], ["a", "b", "c"])
    assert "[cut off: --max-tokens is reached]" in shown
    assert "no room for this" in shown and shown.endswith("ok\n")
    assert "<|im_middle|>b" not in prompts(sampler)[2]
    assert session.messages[-2] == Message.text("user", "c")


def test_commands():
    shown, sampler, _ = talk([], ["/tools", "/help", "/tols"])
    assert "the model has no tools" in shown and "/reset forgets" in shown and "Did you mean '/tools'?" in shown
    assert sampler.requests == []
    assert "echo: says it again" in talk([], ["/tools"], toolbox=Toolbox([Echo()]))[0]


def test_paths_that_hold_no_model(tmp_path):
    with pytest.raises(DataError, match="no run directory"):
        chat.model_directory(tmp_path / "x")
    (tmp_path / "recipe.resolved.toml").write_text("seed = 1\n")
    with pytest.raises(DataError, match="no finished model yet"):
        chat.model_directory(tmp_path)
