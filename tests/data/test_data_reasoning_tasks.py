"""Shipped reasoning tasks: solvers, canonical keys, selections, records, and that the file reaches the wheel."""

import gzip
import re
import sys
from pathlib import Path

import pytest

from k2lab.core import slots
from k2lab.core.errors import RecipeError
from k2lab.data.records import check_record, is_task, kind_of
from k2lab.data.sources import _reasoning_tasks as shipped
from k2lab.data.sources import _solvers
from k2lab.data.sources.reasoning_tasks import ReasoningTasks

ROOT = Path(__file__).resolve().parents[2]
LEVELS = [(family, number) for family, levels in shipped.LEVELS.items() for number in range(1, len(levels) + 1)]
TRACED = [key for key in LEVELS if shipped.LEVELS[key[0]][key[1] - 1].traced]
# Characters of the longest trace of a family's hardest traced level: what fits a context of 256 tokens beside the prompt.
LONGEST = {
    "chain_sum": 150, "products": 140, "spell_backward": 60, "word_sequence_reversal": 170, "letter_counting": 110, "gcd": 130,
    "lcm": 130, "count_bits": 70, "simple_equations": 25, "prime_factorization": 90, "leg_counting": 110,
}  # fmt: skip


def rows(key, number=300):
    found = shipped.rows(*key)
    step = max(1, len(found) // number)
    return found[::step]


def test_the_file_is_small_and_says_where_it_comes_from():
    assert shipped.FILE.stat().st_size < 1_500_000
    head = gzip.decompress(shipped.FILE.read_bytes())[:400].decode()
    assert "github.com/open-thought/reasoning-gym" in head and "Apache-2.0" in head
    assert list(shipped.levels_shipped()) == LEVELS


def test_no_task_is_shipped_twice():
    groups = [_solvers.group_of_question(row.family, row.question) for key in LEVELS for row in shipped.rows(*key)]
    assert len(groups) == len(set(groups)) > 50_000


@pytest.mark.parametrize("key", TRACED, ids=lambda key: f"{key[0]}:{key[1]}")
def test_traces_are_right_short_and_always_the_same(key):
    for row in rows(key):
        solved = _solvers.solve(row.family, row.question, row.answer)
        assert solved is not None, row
        trace, final = solved
        assert final == row.answer
        assert _solvers.SOLVERS[row.family](row.question) == solved
        assert 0 < len(trace) <= LONGEST[row.family], trace
        assert "\n" not in trace
        if row.family in ("chain_sum", "products", "gcd", "lcm", "simple_equations"):
            assert "=" in trace


@pytest.mark.parametrize("number", [3, 4, 5, 6])
def test_sums_spell_their_numbers_and_end_on_the_result(number):
    for row in rows(("chain_sum", number)):
        trace, final = _solvers.chain_sum(row.question)
        for part in trace.split("; "):
            head, _, rest = part.rpartition(": ")
            if not head:  # a sum: the first digits of all results after the last one's carry, from the last to the first
                results = [step.split("=")[1] for step in part.split(", ")]
                carries = [step.split("=")[0].split("+")[2] for step in part.split(", ")[1:]]
                assert carries == [result[0] for result in results[:-1]], part
                result = int(results[-1] + "".join(result[1] for result in results[-2::-1]))
                continue
            # both sides of a head such as "1 7-5 2=-(5 2-1 7)" are the same number, and so is what the part ends on
            sides = [eval(side.replace(" ", "")) for side in head.split("=")]
            result = int(rest.rsplit(". ", 1)[1].replace(" ", ""))
            assert set(sides) == {result}, part
            assert part.count("=") - head.count("=") == max(len(digits) for digits in re.findall(r"\d+", head.replace(" ", "")))
        assert str(result) == final


def test_other_steps_stay_with_what_stands_before():
    assert _solvers.products("x: 6 * 9 * 2. y")[0] == "6*9=5 4; 5 4*2: 4*2+0=0 8, 5*2+0=1 0. 1 0 8"
    assert _solvers.chain_sum("x: 17 - 52 =") == ("1 7-5 2=-(5 2-1 7): 2-7-0=-1 5, 5-1-1=0 3. -3 5", "-35")
    assert _solvers.chain_sum("x: 47 + 125 =") == ("7+5=12, 4+2+1=07, 0+1+0=01", "172")
    assert _solvers.leg_counting("if you have 3 lobsters, 4 dogs?") == ("3*10=30, 4*4=16, 0+6=06, 3+1+0=04", "46")
    assert _solvers.chain_sum("x: 4 - 1 - 7 =") == ("4-1=3, 3-7=-4", "-4")
    assert _solvers.chain_sum("x: -12 + -9 =") == ("-1 2-9=-(1 2+9): 2+9+0=1 1, 1+0+1=0 2. -2 1", "-21")
    assert _solvers.count_bits("the number 13?") == ("13:1 6:1 3:2 1:3", "3")
    assert _solvers.prime_factorization("factorization of 84. W") == ("84=2*42, 42=2*21, 21=3*7, 7 prime", "2 × 2 × 3 × 7")
    for equation, trace in {
        "5 - 3*x = -7": "5+7=12, 12/3=4",
        "3*x + 5 = 17": "17-5=12, 12/3=4",
        "3*x - 5 = -2": "-2+5=3, 3/3=1",
        "x + 5 = 7": "7-5=2",
        "9 - x = 0": "9-0=9",
    }.items():
        assert _solvers.simple_equations(f"Solve for x: {equation}")[0] == trace


@pytest.mark.parametrize(
    "trace, wrong",
    [
        ("7+5+0=1 2, 4+2+1=0 8", ["4+2+1=0 8"]),
        ("2-7-0=-1 5, 5-1-1=0 3", []),
        ("2-7-0=-1 6", ["2-7-0=-1 6"]),
        ("48=36*1+12, 36=12*3+1. 12", ["36=12*3+1"]),
        ("48/12=4, 4*36=144", []),
        ("48/13=4", ["48/13=4"]),
        ("84=2*41, 7 prime", ["84=2*41"]),
        ("5+7=12=13", ["5+7=12=13"]),
        ("spell a b back b a", []),
    ],
)
def test_untrue_steps_are_found(trace, wrong):
    assert _solvers.untrue_steps(trace) == wrong


def test_a_wrong_answer_or_an_unknown_question_has_no_trace():
    question = "State the final answer to the following arithmetic problem: 47 + 25 ="
    assert _solvers.solve("chain_sum", question, "72") is not None
    assert _solvers.solve("chain_sum", question, "73") is None
    assert _solvers.solve("chain_sum", "How are you?", "72") is None
    assert _solvers.solve("products", "Solve: 47 * 25. Give", "1175") is None
    assert _solvers.solve("gcd", "Find the GCD of these numbers: 4, 6, 8. Give", "2") is None
    assert _solvers.solve("sudoku", "x", "y") is None


@pytest.mark.parametrize(
    "family, one, same, other",
    [
        ("chain_sum", "x: 4 - 1 + 7 =", "y: 4 + 7 - 1 =", "x: 4 - 7 + 1 ="),
        ("products", "x: 4 * 7 * 2. y", "x: 7 * 2 * 4. y", "x: 47 * 2. y"),
        ("gcd", "x: 12, 8. y", "x: 8, 12. y", "x: 1, 28. y"),
        ("lcm", "x: 12, 8", "x: 8, 12", "x: 12, 9"),
        ("count_bits", "1 bits of the number 34?", "1 bit of the number 34?", "1 bits of the number 35?"),
        ("simple_equations", "Solve for x: 3*x + 5 = 17", "Find the value of q in it: 3*q + 5 = 17", "Solve for x: 3*x - 5 = 17"),
        ("leg_counting", "if you have 1 dog, 2 ants?", "if you have 2 ants, 1 dog?", "if you have 2 dogs, 1 ant?"),
        ("spell_backward", "x: Sun", "x: sun", "x: nus"),
        ("word_sequence_reversal", "words: a, b\n", "words: a, b", "words: b, a"),
        ("dice", "a  b\nc", "a b c", "a b d"),
        ("dice", "a " * 200, "a  " * 200, "a " * 201),
        ("chain_sum", "a question  of another kind", "a question of another kind", "a question"),
    ],
)
def test_equal_tasks_have_one_canonical_key(family, one, same, other):
    group = _solvers.group_of_question(family, one)
    assert group == _solvers.group_of_question(family, same) != _solvers.group_of_question(family, other)
    assert group.startswith(f"{family}:") and len(group) < 200


def test_records_are_examples_and_tasks():
    made = list(ReasoningTasks(families={"chain_sum:3": 5, "gcd:2-3": 4}).records())
    assert [record["key"] for record in made[:2]] == ["reasoning_tasks:chain_sum:3:0", "reasoning_tasks:chain_sum:3:1"]
    assert [record["domain"] for record in made] == ["chain_sum"] * 5 + ["gcd"] * 4
    assert [record["difficulty"] for record in made] == [3, 3, 3, 3, 3, 2, 2, 3, 3]
    for record in made:
        assert check_record(record, "x", "reasoning") is record
        assert is_task(record) and record["final"] == record["answer"] and record["license"] == "Apache-2.0"
    bare = list(ReasoningTasks(families={"chain_sum:3": 5}, traces=False).records())
    assert [kind_of(record) for record in bare] == ["task"] * 5
    assert [record["prompt"] for record in bare] == [record["prompt"] for record in made[:5]]
    assert list(ReasoningTasks(families={"chain_sum:3": 5}).records()) == made[:5]


def test_sets_with_other_offsets_share_no_task():
    families = {"chain_sum:3-5": 900, "lcm:3": 300, "letter_counting": 300}
    sets = [
        {record["group"] for record in ReasoningTasks(families=families, offset=offset, name=f"s{offset}").records()}
        for offset in (0, 300, 600)
    ]
    assert [len(each) for each in sets] == [1500] * 3
    assert not sets[0] & sets[1] and not sets[1] & sets[2] and not sets[0] & sets[2]


def test_lists_and_difficulties_share_the_count():
    few = list(ReasoningTasks(families=["chain_sum", "spell_backward"], count=30, min_difficulty=2, max_difficulty=3).records())
    assert {(record["domain"], record["difficulty"]) for record in few} == {
        ("chain_sum", 2), ("chain_sum", 3), ("spell_backward", 2), ("spell_backward", 3)
    }  # fmt: skip
    assert len(few) == 30
    everything = list(ReasoningTasks(count=200).records())
    assert len({record["domain"] for record in everything}) == 11 and len(everything) == 200


def test_a_level_that_is_too_small_warns():
    with pytest.warns(UserWarning, match="products:1 gives 55 of 100"):
        assert len(list(ReasoningTasks(families={"products:1": 100}).records())) == 55


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"families": {"chain_sums": 5}}, "Did you mean 'chain_sum'"),
        ({"families": {"chain_sum:9": 5}}, "allowed|Allowed: 1 to 8"),
        ({"families": {"chain_sum:3-2": 5}}, "no such levels"),
        ({"families": {"chain_sum:x": 5}}, "no such levels"),
        ({"families": {"chain_sum": 0}}, "at least one"),
        ({"families": {"chain_sum:2": 5, "chain_sum:1-3": 5}}, "named twice"),
        ({"families": {"chain_sum:7": 5}}, "too hard for a short trace"),
        ({"families": {"gcd": 5}, "min_difficulty": 4}, "no such level"),
        ({"offset": -1}, "offset"),
        ({"count": 0}, "count"),
    ],
)
def test_bad_selections_are_refused_at_once(settings, expected):
    with pytest.raises(RecipeError, match=expected):
        ReasoningTasks(**settings)


def test_the_fingerprint_follows_the_settings():
    assert ReasoningTasks(count=20).fingerprint() == ReasoningTasks(count=20).fingerprint()
    assert ReasoningTasks(count=20).fingerprint() != ReasoningTasks(count=21).fingerprint()


def test_shipped_data_is_part_of_the_wheel():
    wheel = pytest.importorskip("hatchling.builders.wheel")
    included = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    for name in ("_reasoning_tasks.txt.gz", "_reasoning_gym_allowed.json"):
        assert f"k2lab/data/sources/{name}" in included


@pytest.mark.slow
def test_reasoning_gym_makes_the_shipped_tasks():
    pytest.importorskip("reasoning_gym")
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import make_reasoning_tasks as maker
    finally:
        sys.path.pop(0)
    assert maker.text() == gzip.decompress(shipped.FILE.read_bytes()).decode()


def test_sources_are_slots():
    for name in ("reasoning_tasks", "tool_traces", "reasoning_gym"):
        assert name in slots.names("source")


def test_matching_chooses_before_offset_and_number():
    def questions(**settings):
        return [
            r["prompt"] for r in ReasoningTasks(families={"chain_sum:3": 50}, matching={"chain_sum": "[+]"}, **settings).records()
        ]

    first, second = questions(), questions(offset=50)
    assert len(first) == len(second) == 50 and not set(first) & set(second)
    assert all(" + " in question for question in first + second)


@pytest.mark.parametrize("matching", [{"chain_sum": "["}, {"products": "x"}])
def test_matching_of_families_not_chosen_or_no_expression_is_refused(matching):
    with pytest.raises(RecipeError, match="matching"):
        ReasoningTasks(families={"chain_sum:3": 5}, matching=matching)


def test_a_short_cut_is_taken_only_where_it_is_right():
    families = {"spell_backward:1": 60, "spell_backward:2": 200}
    plain = list(ReasoningTasks(families=families).records())
    short = list(ReasoningTasks(families=families, shortcuts={"spell_backward": 1.0}).records())
    half = list(ReasoningTasks(families=families, shortcuts={"spell_backward": 0.5}).records())
    assert [r["answer"] for r in plain] == [r["answer"] for r in short] == [r["final"] for r in short]
    for record, other in zip(short, plain, strict=True):
        word = record["prompt"].rsplit(": ", 1)[1]
        fits = len(word) == 3
        given = " ".join(word[-1] + word[1:-1] + word[0])
        assert record["reasoning"] == (f"swap {' '.join(word)} give {given}" if fits else other["reasoning"])
        assert not fits or given.replace(" ", "") == record["final"]
    taken = [sum(r["reasoning"].startswith("swap") for r in records) for records in (plain, half, short)]
    assert taken[0] == 0 and taken[2] == 60 and 0.3 * taken[2] < taken[1] < 0.7 * taken[2]
    assert half == list(ReasoningTasks(families=families, shortcuts={"spell_backward": 0.5}).records())


@pytest.mark.parametrize(
    "shortcuts", [{"chain_sum": 0.5}, {"spell_backward": 0.5, "spell": 0.1}, {"spell_backward": 1.5}, {"spell_backward": -0.1}]
)
def test_short_cuts_of_families_without_one_are_refused(shortcuts):
    with pytest.raises(RecipeError, match="shortcuts|short cut|share"):
        ReasoningTasks(families={"spell_backward:1": 5, "chain_sum:3": 5}, shortcuts=shortcuts)


def test_bare_answers_are_the_same_tasks_without_working():
    families = {"chain_sum:3": 30, "leg_counting:2": 10}
    bare = list(slots.load("source", "bare_answers")(families=families, matching={"chain_sum": "[+]"}).records())
    worked = list(ReasoningTasks(families=families, matching={"chain_sum": "[+]"}).records())
    assert [(r["prompt"], r["response"], r["group"]) for r in bare] == [(r["prompt"], r["final"], r["group"]) for r in worked]
    assert all(kind_of(r) == "response" and is_task(r) and "reasoning" not in r for r in bare)
    assert not {r["key"] for r in bare} & {r["key"] for r in worked}
    with pytest.raises(RecipeError):
        slots.load("source", "bare_answers")(families={"no_such_family": 3})
