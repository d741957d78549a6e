"""Makes `k2lab/data/sources/_reasoning_gym_allowed.json`: which families of reasoning-gym can be trusted, and why not the others.

    python tests/data/make_reasoning_gym_allowed.py [FAMILY ...]      needs the extra: pip install "k2lab[gym]"

Each family makes its items with its default settings in a process of its own, twice, under different hash seeds. With family
names only these are examined anew; the others stay as the file has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from typing import Any

from k2lab.data.sources._reasoning_gym import ALLOWED

ITEMS = 60
SEED = 7
SECONDS = 90  # for all items of a family, made and judged
SLOWEST_MS = 300.0  # an item, on average
MARK = "\n@facts "

# Families whose question admits one text only, so that comparing with it is right whatever the family's own scorer does.
ONE_TEXT = frozenset(
    """
    ab acre aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation binary_matrix bitwise_arithmetic
    caesar_cipher calendar_arithmetic chain_sum circuit_logic color_cube_rotation count_bits count_primes course_schedule
    emoji_mystery family_relationships figlet_font futoshiki game_of_life_halting gcd gsm_symbolic isomorphic_strings
    largest_island lcm leg_counting letter_counting list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku
    modulo_grid needle_haystack number_filtering number_format prime_factorization products ransom_note rearc rectangle_count
    rotate_matrix rotten_oranges self_reference simple_equations simple_geometry spell_backward spiral_matrix string_insertion
    string_manipulation string_splitting string_synthesis sudoku syllogism time_intervals word_sequence_reversal word_sorting
    zebra_puzzles
    """.split()  # noqa: SIM905 (so many names are easier to read as text)
)

# Families where another task's answer may be right, too; each such case was looked at.
SHARED = frozenset(("jugs", "n_queens"))


def examine(family: str) -> dict[str, Any]:
    """What one process finds out about a family."""
    import reasoning_gym

    began = time.perf_counter()
    data = reasoning_gym.create_dataset(family, size=ITEMS, seed=SEED)
    items = [data[index] for index in range(ITEMS)]
    facts: dict[str, Any] = {"ms": (time.perf_counter() - began) / ITEMS * 1000}
    told = json.dumps([[item["question"], item["answer"]] for item in items])
    facts["sha256"] = hashlib.sha256(told.encode()).hexdigest()
    facts["distinct"] = len({item["question"] for item in items})
    answers = [item["answer"] for item in items]
    facts["no_text"] = sum(not isinstance(answer, str) or not answer.strip() for answer in answers)

    def score(answer: Any, item: dict[str, Any]) -> float | str:
        try:
            return float(data.score_answer(answer=answer, entry=item))
        except Exception as error:
            return type(error).__name__

    facts["gold_below_1"] = sum(score(item["answer"], item) != 1 for item in items)
    tried: list[float | str] = []
    for place, item in enumerate(items):
        others = [answers[(place + step) % ITEMS] for step in (1, 2, 3)] if family not in SHARED else []
        tried += [score(text, item) for text in ("", "banana 17", *(other for other in others if other != item["answer"]))]
    facts["raised"] = sorted({each for each in tried if isinstance(each, str)})
    facts["nonsense"] = max((each for each in tried if not isinstance(each, str)), default=0.0)
    return facts


def run(family: str, hash_seed: int) -> dict[str, Any] | str:
    """`examine` in a process of its own; a text if it failed."""
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, __file__, "--one", family]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"{ITEMS} items took over {SECONDS} s"
    if done.returncode:
        return f"it fails: {done.stderr.strip().splitlines()[-1][:160]}"
    return json.loads(done.stdout.rpartition(MARK)[2].splitlines()[0])  # some families print while they work


def verdict(family: str) -> dict[str, Any]:
    """{"allowed", "why", "reward", and what was found} of one family."""
    first, second = run(family, 1), run(family, 2)
    for each in (first, second):
        if isinstance(each, str):
            return {"allowed": False, "why": each}
    assert isinstance(first, dict) and isinstance(second, dict)
    reward = "exact_match" if family in ONE_TEXT else "reasoning_gym"
    flaws = []
    if first["sha256"] != second["sha256"]:
        flaws.append("its items are no function of the seed")
    if first["no_text"]:
        flaws.append(f"{first['no_text']} of {ITEMS} items have no answer, or an empty one")
    if first["ms"] > SLOWEST_MS:
        flaws.append(f"an item takes over {SLOWEST_MS:g} ms")
    if first["distinct"] < ITEMS // 2:
        flaws.append(f"only {first['distinct']} of {ITEMS} items differ")
    scorer = []
    if first["gold_below_1"]:
        scorer.append(f"{first['gold_below_1']} of {ITEMS} right answers do not score 1")
    if first["nonsense"] >= 1:
        scorer.append("a wrong answer scores 1")
    if first["raised"]:
        scorer.append(f"its scorer raises {', '.join(first['raised'])} on a wrong answer")
    if reward == "reasoning_gym":
        flaws += scorer
    why = "; ".join(flaws)
    if not flaws:
        why = "one right text: compared exactly" if reward == "exact_match" else "its scorer tells right from wrong"
        remarks = list(scorer) if reward == "exact_match" else []
        if family in SHARED:
            remarks.append("another task's answer may be right, too")
        if 0 < first["nonsense"] < 1:
            remarks.append("its scorer gives part of the credit to nonsense (counted 0)")
        why += "".join(f"; {remark}" for remark in remarks)
    kept = {"distinct": first["distinct"], "nonsense": round(first["nonsense"], 3), "ms": round(max(first["ms"], 0.1), 1)}
    return {"allowed": not flaws, "why": why, "reward": reward, **kept}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(f"{MARK}{json.dumps(examine(sys.argv[2]))}\n")
        return
    from importlib.metadata import version

    import reasoning_gym.factory

    # "composite" is a mixture of the others, not a family.
    families = sorted(set(reasoning_gym.factory.DATASETS) - {"composite"})
    found = json.loads(ALLOWED.read_text(encoding="utf-8"))["families"] if sys.argv[1:] else {}
    for family in sys.argv[1:] or families:
        found[family] = verdict(family)
        print(f"{family}: {json.dumps(found[family])}", file=sys.stderr, flush=True)
    head = {"reasoning_gym": version("reasoning-gym"), "items": ITEMS, "seed": SEED}
    lines = ",\n".join(f"  {json.dumps(family)}: {json.dumps(found[family])}" for family in families)
    text = json.dumps(head)[:-1] + ', "families": {\n' + lines + "\n}}\n"
    ALLOWED.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
