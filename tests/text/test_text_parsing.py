"""Parsing: the inverse of rendering, and what models and servers write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_samples import random_conversation, random_text

from k2lab.core.rng import rng
from k2lab.core.types import Message, Reasoning, Text, ToolCall, ToolResult
from k2lab.text.chat import parse, render
from k2lab.text.tokenizer import Tokenizer, load


def to_tokens(tok: Tokenizer, text: str) -> list[int]:
    """Tokens of a text in which every special-token name stands for the special token."""
    tokens: list[int] = []
    while text:
        at, name = min(((text.index(name), name) for name in tok.special if name in text), default=(len(text), ""))
        tokens += tok.encode(text[:at])
        if name:
            tokens.append(tok.special[name])
        text = text[at + len(name) :]
    return tokens


def test_parse_undoes_render(tok: Tokenizer):
    for n in range(100):
        messages = random_conversation("parse", n)
        tokens = render(messages, tok, default_system=False).tokens
        bodies: list[list[int]] = [[]]
        for token in tokens:
            bodies[-1].append(token)
            if token == tok.im_end_id:
                bodies.append([])
        assert bodies.pop() == []
        parsed = [parse(body, tok) for body in bodies]
        kept = parsed[-1].parts if messages[-1].role == "assistant" else ()
        assert kept == () or kept == messages[-1].parts
        no_thoughts = [tuple(p for p in m.parts if not isinstance(p, Reasoning)) or (Text(""),) for m in messages]
        assert [tuple(p for p in m.parts if not isinstance(p, Reasoning)) or (Text(""),) for m in parsed] == no_thoughts
        assert [(m.role, m.name) for m in parsed] == [(m.role, m.name) for m in messages]


def test_parse_keeps_special_strings_that_are_ordinary_tokens(tok: Tokenizer):
    texts = [random_text("parse", n) for n in range(300)] + ["<|im_end|>", "</think><|tool_call_section_begin|>"]
    for text in texts:
        message = Message(
            "assistant", (Reasoning(text + "."), Text(text + "."), ToolCall("f", f'{{"a": "{len(text)}"}}', "functions.f:0"))
        )
        assert parse(render([message], tok, default_system=False).tokens, tok) == message


SECTION, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENT, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
F0 = f"{CALL}functions.f:0{ARGUMENT}{{}}{CALL_END}"
F = ToolCall("f", "{}", "functions.f:0")


@pytest.mark.parametrize("form", ["tokens", "text"])
@pytest.mark.parametrize(
    "written, parts",
    [
        ("plain<|im_end|>", (Text("plain"),)),
        ("plain", (Text("plain"),)),
        ("", (Text(""),)),
        ("<|im_end|>never", (Text(""),)),
        ("a[EOS]b", (Text("a"),)),
        ("<|im_assistant|>assistant<|im_middle|>hello<|im_end|>", (Text("hello"),)),
        (f"say{SECTION}{F0}{END}<|im_end|>", (Text("say"), F)),
        (f"say<|tool_call_section_begin|>{F0}<|tool_call_section_end|><|im_end|>", (Text("say"), F)),
        (f"say\n<|tool_call_section_begin|>\n{F0}\n<|tool_call_section_end|>\n<|im_end|>", (Text("say\n"), F)),
        (f"{SECTION} \n{F0}\n {END} \n<|im_end|>", (F,)),
        (F0, (F,)),
        (f"{SECTION}{F0}", (F,)),
        (f"{SECTION}{CALL} \n functions.f:0 {ARGUMENT}{{}}{CALL_END}{END}", (F,)),
        (f"{SECTION}{CALL}f:7{ARGUMENT}{{}}{CALL_END}{END}", (ToolCall("f", "{}", "f:7"),)),
        (f"{SECTION}{CALL}f{ARGUMENT}{{}}{CALL_END}{END}", (ToolCall("f", "{}", "f"),)),
        (f"{SECTION}{CALL}functions.a.b:c:3{ARGUMENT}{{}}{CALL_END}", (ToolCall("a.b:c", "{}", "functions.a.b:c:3"),)),
        (f'{SECTION}{CALL}functions.f:0 {{"a": 1}}{CALL_END}{END}', (ToolCall("f", '{"a": 1}', "functions.f:0"),)),
        (f"{SECTION}{CALL}functions.f:0{ARGUMENT}{{}}{SECTION}", (F,)),
        (f"{SECTION}{F0}{F0}{END}{SECTION}{F0}{END}", (F, F, F)),
        (f"before{SECTION}{F0}{END}after", (Text("beforeafter"), F)),
        (f"{SECTION}stray{F0}{END}", (Text("stray"), F)),
        (f"odd{CALL_END}<|im_middle|>text", (Text(f"odd{CALL_END}<|im_middle|>text"),)),
        ("<think>why</think>so", (Reasoning("why"), Text("so"))),
        (" \n<think>why\n</think>\nso", (Reasoning("why\n"), Text("\nso"))),
        ("why</think>so", (Reasoning("why"), Text("so"))),
        ("<think></think>so", (Text("so"),)),
        ("<think>cut off", (Reasoning("cut off"),)),
        (f"<think>never closed{SECTION}{F0}{END}", (Reasoning("never closed"), F)),
        (f"<think>why</think>{SECTION}{F0}{END}", (Reasoning("why"), F)),
        ("a<think>b</think>c", (Text("a<think>b</think>c"),)),
    ],
)
def test_liberal_parsing(tok: Tokenizer, written: str, parts: tuple, form: str):
    given = written if form == "text" else to_tokens(tok, written)
    assert parse(given, tok) == Message("assistant", parts)


@pytest.mark.parametrize(
    "written, name, arguments, error",
    [
        (f"{CALL}functions.f:0{ARGUMENT}{{'a': 1}}{CALL_END}", "f", "{'a': 1}", "the arguments are not valid JSON"),
        (f"{CALL}functions.f:0{ARGUMENT}[1]{CALL_END}", "f", "[1]", "not a JSON object but list"),
        (f"{CALL}functions.f:0{ARGUMENT}{CALL_END}", "f", "", "not valid JSON"),
        (f'{CALL}functions.f:0{ARGUMENT}{{"a": ', "f", '{"a": ', "the call was cut off: the arguments"),
        (f'{CALL}functions.f:0{ARGUMENT}{{"a": <|im_end|>', "f", '{"a": ', "the call was cut off"),
        (f"{CALL}functions.f", "f", "", "the call was cut off"),
        (f"{CALL}:0{ARGUMENT}{{}}{CALL_END}", "", "{}", "the call has no name"),
        (f"{CALL}functions.f:0{ARGUMENT}{'[' * 100_000}{CALL_END}", "f", "[" * 100_000, "not valid JSON"),
    ],
)
def test_unusable_calls_keep_their_text_and_say_why(tok: Tokenizer, written: str, name: str, arguments: str, error: str):
    for given in (written, to_tokens(tok, written)):
        (call,) = parse(given, tok).parts
        assert isinstance(call, ToolCall)
        assert (call.name, call.arguments) == (name, arguments)
        assert error in (call.error or "")


def test_other_roles_are_read_from_their_header(tok: Tokenizer):
    assert parse("<|im_user|>Ann<|im_middle|>hi<|im_end|>", tok) == Message("user", (Text("hi"),), "Ann")
    assert parse("<|im_system|>system<|im_middle|>## Return of x\ny<|im_end|>", tok).role == "system"
    tool = parse("<|im_system|>tool<|im_middle|>## Return of functions.f:0\na\nb<|im_end|>", tok)
    assert tool == Message("tool", (ToolResult("functions.f:0", "a\nb"),))


def test_parsing_never_fails_and_loses_no_text(tok: Tokenizer):
    names = [*tok.special, "<|tool_call_section_begin|>", "{", '{"a": 1}', "functions.f:0", " "]
    stops = ("<|im_end|>", "[EOS]", "[PAD]")
    for n in range(1000):
        draw = rng(0, "text", "parse noise", n)
        pieces = [names[i] if draw.random() < 0.7 else f"word{i}." for i in draw.integers(0, len(names), 12)]
        assert parse("".join(pieces), tok).parts
        message = parse(to_tokens(tok, "".join(pieces)), tok)
        read = pieces[: min((pieces.index(stop) for stop in stops if stop in pieces), default=len(pieces))]
        told = (message.name or "") + "".join(
            part.text
            if isinstance(part, (Text, Reasoning))
            else f"{part.id}{part.arguments if isinstance(part, ToolCall) else part.content}"
            for part in message.parts
        )
        assert all(word in told for word in read if word.startswith("word")), pieces


def test_parse_works_for_tokenizers_without_kimis_tokens(qwen_folder: Path):
    qwen = load(qwen_folder)
    tokens = [*qwen.encode("hello"), qwen.im_end_id, *qwen.encode("more")]
    assert parse(tokens, qwen) == Message.text("assistant", "hello")
    assert parse("hello<|im_end|>more", qwen) == Message.text("assistant", "hello")
