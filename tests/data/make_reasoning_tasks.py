"""Makes `k2lab/data/sources/_reasoning_tasks.txt.gz`: tasks of reasoning-gym, distinct within their family, with fixed seeds.

    python tests/data/make_reasoning_tasks.py [OUT]        needs the extra: pip install "k2lab[gym]"

The file is a function of this script, of the table of levels and of reasoning-gym's version.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

from k2lab.data.sources._reasoning_tasks import FILE, LEVELS, VERSION, Level
from k2lab.data.sources._solvers import group_of_question

HEAD = f"""\
# Tasks made with reasoning-gym {VERSION} (https://github.com/open-thought/reasoning-gym), by Open Thought and contributors.
# Licence: Apache-2.0 (https://www.apache.org/licenses/LICENSE-2.0). Selected and stored by tests/data/make_reasoning_tasks.py.
"""
DRAWS = 12  # draws per task wanted; families with few different tasks give all that come


def draw(family: str, number: int, level: Level, seen: set[str]) -> list[tuple[str, str]]:
    """At most `level.rows` (question, answer) whose group is not in `seen`, which grows."""
    import reasoning_gym

    size = DRAWS * level.rows
    dataset = reasoning_gym.create_dataset(family, seed=1_000_000 * number, size=size, **level.settings)
    rows: list[tuple[str, str]] = []
    for place in range(size):
        item = dataset[place]
        group = group_of_question(family, item["question"])
        if group in seen:
            continue
        seen.add(group)
        rows.append((item["question"], item["answer"]))
        if len(rows) == level.rows:
            break
    return rows


def text() -> str:
    """The file's text. Raises ImportError without reasoning-gym."""
    lines = [HEAD.rstrip("\n")]
    for family, levels in LEVELS.items():
        seen: set[str] = set()
        for number, level in enumerate(levels, start=1):
            rows = draw(family, number, level, seen)
            questions = [question for question, _ in rows]
            head = os.path.commonprefix(questions)
            tail = os.path.commonprefix([question[len(head) :][::-1] for question in questions])[::-1]
            lines.append("> " + "\t".join([family, str(number), json.dumps(head), json.dumps(tail)]))
            for question, answer in rows:
                middle = json.dumps(question[len(head) : len(question) - len(tail)], ensure_ascii=False)[1:-1]
                assert "\t" not in middle + answer and "\n" not in answer, question
                lines.append(f"{middle}\t{answer}")
            print(f"{family} {number}: {len(rows)}", file=sys.stderr)
    return "\n".join(lines) + "\n"


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    out.write_bytes(gzip.compress(text().encode(), 9, mtime=0))
    print(f"{out}: {out.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
