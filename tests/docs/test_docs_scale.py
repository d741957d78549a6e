"""The figures of docs/scale.md are what `k2 plan` says. After a change: `python tests/docs/test_docs_scale.py`."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from k2lab import cli

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
BEGIN, END = "| recipe, stage |", "\n\nStages whose length"
# Recipes and the GPUs of their plan: those that the batch sizes are made for.
GPUS = {
    "k2/continual_pretrain": 256,
    "k2/pretrain_15t": 2048,
    "k2/domain_sft": 256,
    "k2/reasoning_sft": 256,
    "k2/dpo": 256,
    "k2/rl": 256,
    "k2/distill_qwen7b": 8,
    "k2/distill_qwen32b": 8,
    "kimi_linear/2m": 8,
}


def planned(name: str, gpus: int) -> dict[str, Any]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["plan", name, "--machine", "p5.48xlarge", "--gpus", str(gpus), "--json"]) == 0
    return json.loads(out.getvalue())


def figures() -> str:
    """The table: one row a training stage."""
    rows = [f"{BEGIN} GPUs | tokens per step | state | per GPU if divided | time | price |", "|---|---|---|---|---|---|---|"]
    for name, gpus in GPUS.items():
        for stage in planned(name, gpus)["stages"]:
            found = {key: row for table in stage["sections"] for key, row in table["numbers"].items()}
            if stage["kind"] != "train":
                continue
            state = sum(found[key]["value"] for key in ("weights", "gradients", "master", "optimizer")) / 1e9
            time, price = (found.get(key) or found[f"{key}_per_billion"] for key in ("seconds", "dollars"))
            per = "" if "seconds" in found else " per 10^9 tokens"
            shown = [found["tokens_per_step"]["shown"], f"{state:,.0f} GB", found["sharded"]["shown"]]
            rows.append(
                f"| `{name}`, {stage['stage']} | {gpus:,} | "
                + " | ".join([*shown, time["shown"] + per, price["shown"] + per])
                + " |"
            )
    return "\n".join(rows)


def page() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text[: text.index(BEGIN)] + figures() + text[text.index(END) :]


def test_figures_are_what_the_plan_says():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/docs/test_docs_scale.py"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
