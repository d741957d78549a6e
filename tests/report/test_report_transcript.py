"""Thoughts, tool calls and results in what a model wrote: set apart where they are whole, visible where they are not."""

from __future__ import annotations

import pytest

from k2lab.report.transcript import pieces, show

CALL = "<|tool_calls_section_begin|><|tool_call_begin|>functions.{}:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
END = "<|tool_calls_section_end|><|im_end|>"
RESULT = "<|im_system|>{0}<|im_middle|>## Return of functions.{0}:0\n{1}<|im_end|>"
BACK = "<|im_assistant|>assistant<|im_middle|>"


def test_a_whole_conversation():
    text = "<think>hm</think>Wait." + CALL.format("python", '{"code": "print(1)\\nprint(2)"}') + END
    text += RESULT.format("python", "1\n2") + BACK + "It is 2.<|im_end|>"
    assert pieces(text) == [
        ("think", "", "hm"),
        ("text", "", "Wait."),
        ("call", "python", "print(1)\nprint(2)"),
        ("result", "python", "1\n2"),
        ("text", "", "It is 2."),
    ]


def test_two_calls_and_their_results():
    second = CALL.format("add", '{"a": 1, "b": [2]}').removeprefix("<|tool_calls_section_begin|>")
    text = CALL.format("add", "{not json") + second + END
    text += RESULT.format("add", "error: no") + RESULT.format("add", "3") + BACK
    assert pieces(text) == [
        ("call", "add", "{not json"),
        ("call", "add", "a: 1\nb: [2]"),
        ("result", "add", "error: no"),
        ("result", "add", "3"),
    ]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>never ends", [("think", "", "never ends")]),
        ("<think></think>4", [("text", "", "4")]),
        ("</think>4", [("text", "", "</think>4")]),
        ("a<|im_user|>user<|im_middle|>b<|im_end|>", [("text", "", "a<|im_user|>user<|im_middle|>b")]),
        ("<|tool_calls_section_begin|>junk", [("call", "", "junk")]),
        ("<|tool_call_end|>x", [("text", "", "<|tool_call_end|>x")]),
        ("<|im_end|>", []),
        (" \n", []),
    ],
)
def test_broken_texts_stay_visible(text, expected):
    assert pieces(text) == expected


def test_a_result_that_the_model_made_up_without_a_heading_is_text():
    text = "<|im_system|>python<|im_middle|>42<|im_end|>"
    assert pieces(text) == [("text", "", "<|im_system|>python<|im_middle|>42")]


def test_everything_is_escaped_and_cut():
    evil = "<img src=x onerror=alert(1)>"
    text = f"<think>{evil}</think>{evil}" + CALL.format(f"<b>{evil}", f'{{"code": "{evil}"}}') + END
    shown = show(text + RESULT.format("python", evil), 10_000)
    assert "<img" not in shown and shown.count("&lt;img") == 5
    assert "\u2026 90 more characters" in show("y" * 100, 10) and show("y" * 100, 10).count("y") == 10
    assert "(nothing)" in show("<|im_end|>", 10)


def test_long_broken_text_takes_no_time():
    assert pieces("<think>" * 20_000 + "<|tool_call_begin|>" * 20_000)[0][0] == "think"
    assert len(pieces("<|im_system|>" * 20_000)) == 1
