"""Held-out records that carry their right answer and the rewards that judge it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from k2lab.core.errors import DataError, RecipeError
from k2lab.gym.tasks._records import choose

if TYPE_CHECKING:
    from k2lab.core.types import Message
    from k2lab.gym.task import Task


@dataclass(frozen=True, kw_only=True)
class Answered:
    """Records with an `answer`: the prompt is asked, the record's own rewards judge the response.

    Uses records of every kind but plain text and question-answer; a chat's prompt is all up to the user's last turn. Others are
    passed over. `meta` holds family (`domain`), `difficulty` and `group`.
    """

    limit: int = 100  # tasks at most; 0 = all
    domains: tuple[str, ...] = ()  # only records of these domains (task families); () = any
    sources: tuple[str, ...] = ()  # only records of these sources; () = any
    min_difficulty: float | None = None  # leaves out easier records, and those whose difficulty is no number
    max_difficulty: float | None = None  # leaves out harder records, and those whose difficulty is no number
    max_tokens: int = 96  # tokens of a response, thoughts included
    seed: int = 0  # chooses the records if there are more than `limit`

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(self.domains))
        object.__setattr__(self, "sources", tuple(self.sources))
        if self.max_tokens < 1 or self.limit < 0:
            where = "max_tokens" if self.max_tokens < 1 else "limit"
            raise RecipeError("must be positive", where=where, got=getattr(self, where))

    def tasks(self, records: Iterable[dict[str, Any]]) -> list[Task]:
        """One task per fitting record. Raises DataError if no record fits."""
        from k2lab.data.records import is_task
        from k2lab.gym.task import Task

        records = list(records)
        fitting = [record for record in records if self._fits(record)]
        if not fitting:
            have = sorted({str(record.get("domain", "(none)")) for record in records if is_task(record)})
            raise DataError(
                "no record fits the task answered",
                got=f"{len(records)} records; of which tasks: " + (f"those of the domains {', '.join(have)}" if have else "none"),
                allowed='records with "answer"' + (f" of {', '.join(self.domains)}" if self.domains else ""),
            )
        return [
            Task(
                key=f"answered/{record['key']}",
                messages=prompt_of(record),
                answer=record["answer"],
                gold=_gold(record),
                rewards=tuple(record.get("rewards") or ("exact_match",)),
                options=record.get("options") or {},
                max_tokens=self.max_tokens,
                meta={
                    "domain": record.get("domain", ""),
                    "difficulty": record.get("difficulty"),
                    "group": record.get("group", record["key"]),
                },
            )
            for record in choose(fitting, self.limit, self.seed, "answered")
        ]

    def _fits(self, record: dict[str, Any]) -> bool:
        from k2lab.data.records import is_task

        if not is_task(record) or not prompt_of(record):
            return False
        if (self.domains and record.get("domain") not in self.domains) or (
            self.sources and record.get("source") not in self.sources
        ):
            return False
        if self.min_difficulty is None and self.max_difficulty is None:
            return True
        level = record.get("difficulty")
        if not isinstance(level, (int, float)) or isinstance(level, bool):
            return False
        return (self.min_difficulty is None or level >= self.min_difficulty) and (
            self.max_difficulty is None or level <= self.max_difficulty
        )

    @staticmethod
    def examples() -> list[Answered]:
        return [Answered(), Answered(limit=0, domains=("chain_sum",), min_difficulty=1, max_difficulty=3, max_tokens=64)]


def prompt_of(record: dict[str, Any]) -> tuple[Message, ...]:
    """What is asked: the user's turn, or a chat up to its last user's turn; empty for records that ask nothing."""
    from k2lab.core.types import Message
    from k2lab.gym.task import question_of
    from k2lab.text.openai import from_openai

    if "messages" in record:
        messages = from_openai(record["messages"])
        last = max((n for n, message in enumerate(messages, 1) if message.role == "user"), default=0)
        return tuple(messages[:last])
    if "instruction" in record:
        return question_of(record)
    return (Message.text("user", record["prompt"]),) if "prompt" in record else ()


def _gold(record: dict[str, Any]) -> str:
    """A response that must score 1: the record's own last answer, without its thoughts."""
    if "messages" in record:
        last = record["messages"][-1]
        return (last.get("content") or "") if last.get("role") == "assistant" else ""
    return str(record.get("final") or record.get("output") or "")
