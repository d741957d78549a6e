"""Records as chats: what fine-tuning and evaluation render."""

from __future__ import annotations

from typing import Any

from k2lab.core.errors import DataError
from k2lab.core.types import Message


def messages_of(record: dict[str, Any]) -> list[Message]:
    """The conversation of an instruction, chat or question-answer record. DataError for other records."""
    from k2lab.data.records import kind_of
    from k2lab.gym.task import question_of
    from k2lab.text.chat import from_openai

    kind = kind_of(record)
    if kind == "chat":
        return from_openai(record["messages"])
    if kind == "instruction":
        return [*question_of(record), Message.text("assistant", record["output"])]
    if kind == "qa":
        return [Message.text("user", record["question"]), Message.text("assistant", record["answer"])]
    raise DataError(
        f"a {kind} record is no conversation",
        where=str(record.get("key")),
        allowed='{"instruction","input","output"}, {"messages"} or {"question","answer"}',
    )


def document_start(tokenizer: Any) -> int:
    """The token before a document's first: [BOS], or where a vocabulary has none (Qwen) the end-of-document token."""
    from k2lab.core.errors import RecipeError

    try:
        return tokenizer.bos_id
    except RecipeError:
        return tokenizer.eos_id
