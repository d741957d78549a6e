"""Records as conversations, and what is rendered and trained of them."""

import pytest

from k2lab.core.errors import DataError
from k2lab.core.types import Reasoning, Text, ToolCall, ToolResult
from k2lab.data.sources.reasoning_tasks import ReasoningTasks
from k2lab.data.sources.tool_traces import ToolTraces
from k2lab.stages._chats import messages_of
from k2lab.text.chat import parse, render, training_views
from k2lab.text.tokenizer import train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    texts = [record["prompt"] + record["reasoning"] for record in ReasoningTasks(count=60).records()]
    return train_bpe(iter(texts), 400)


def told(record, side="chosen"):
    return [(message.role, *message.parts) for message in messages_of(record, side)]


def test_prompts_and_answers_by_kind():
    ask = ("user", Text("p"))
    assert told({"prompt": "p", "answer": "a"}) == [ask, ("assistant", Text("a"))]
    assert told({"prompt": "p", "response": "r", "answer": "a"}) == [ask, ("assistant", Text("r"))]
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert told(pair) == [ask, ("assistant", Text("c"))] and told(pair, "rejected") == [ask, ("assistant", Text("r"))]
    trace = {"prompt": "p", "reasoning": "t", "final": "f", "answer": "f"}
    assert told(trace) == [ask, ("assistant", Reasoning("t"), Text("f"))]
    assert told({**trace, "reasoning": ""}) == [ask, ("assistant", Text("f"))]
    with pytest.raises(DataError, match="no conversation"):
        messages_of({"key": "k", "text": "t"})
    with pytest.raises(DataError, match=r"k: messages\[0\]"):
        messages_of({"key": "k", "messages": [{"role": "user", "contents": "x"}]})


def test_a_trace_is_trained_as_thoughts_and_answer(tokenizer):
    record = next(iter(ReasoningTasks(families={"chain_sum:3": 1}).records()))
    (view,) = training_views(messages_of(record))
    rendered = render(view, tokenizer, default_system=False)
    trained = tokenizer.decode([token for token, flag in zip(rendered.tokens, rendered.trained) if flag])
    assert trained == f"<think>{record['reasoning']}</think>{record['final']}<|im_end|>"


def test_a_tool_conversation_is_declared_called_and_read_back(tokenizer):
    record = next(iter(ToolTraces(families={"chain_sum:7": 1}).records()))
    (view,) = training_views(messages_of(record))
    assert [type(part) for message in view for part in message.parts] == [Text, Reasoning, ToolCall, ToolResult, Text]
    rendered = render(view, tokenizer, tools=record["tools"], default_system=False)
    text = tokenizer.decode(rendered.tokens)
    assert text.startswith("<|im_system|>tool_declare<|im_middle|>[{")
    assert f"<|im_system|>python<|im_middle|>## Return of functions.python:0\n{record['answer']}<|im_end|>" in text
    trained = tokenizer.decode([token for token, flag in zip(rendered.tokens, rendered.trained) if flag])
    first, second, _ = trained.split("<|im_end|>")
    assert parse(first, tokenizer).parts[-1].name == "python"
    assert second == f"<think></think>{record['answer']}"
    assert record["messages"][2]["content"] not in first
