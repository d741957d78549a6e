"""docs/cli.md is what the parser says. After a change: `python tests/docs/test_docs_cli.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from k2lab import cli

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def reference() -> str:
    """The page: one section a verb, one row an argument."""
    subparsers = next(a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    told = {action.dest: action.help or "" for action in subparsers._choices_actions}
    codes = "0 done, 1 a bug of ours, 2 recipe or data, 3 machine, 4 numerics, 130 interrupted"
    lines = [
        "# Commands",
        "",
        f"Written from the parser itself. Exit codes: {codes}.",
        "",
    ]
    for verb, parser in subparsers.choices.items():
        lines += [
            f"## k2 {verb}",
            "",
            (told.get(verb) or "").strip().capitalize() + ".",
            "",
            "| argument | default | meaning |",
            "|---|---|---|",
        ]
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction):
                continue
            shown = ", ".join(action.option_strings) or (action.metavar or action.dest)
            default = "" if action.default in (None, False, argparse.SUPPRESS, []) else f"`{action.default}`"
            lines.append(f"| `{shown}` | {default} | {(action.help or '').replace('|', '/').replace('`', '')} |")
        lines.append("")
    return "\n".join(lines)


def test_page_is_what_the_parser_says():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python tests/docs/test_docs_cli.py"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
