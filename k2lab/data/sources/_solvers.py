"""How tasks of some reasoning-gym families are worked out step by step: one solver per family, and what makes two tasks equal.

A solver takes a task's question and returns (trace, final answer). Traces are written for small models: short, regular, and
every step depends on a few tokens that stand near. Digits that are worked on one by one are separated by blanks, so that no
tokenizer merges them; a blank-separated run such as `1 2` is the number 12, and `-1 5` is -10 + 5. `untrue_steps` recomputes
every equation of a trace.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from math import gcd

Solved = tuple[str, str]

# ---------------------------------------------------------------- numbers as digits


def _spaced(number: int) -> str:
    """The digits of a number with blanks between: 47 -> "4 7"."""
    return ("-" if number < 0 else "") + " ".join(str(abs(number)))


def _columns(a: int, b: int, sign: int) -> str:
    """The steps of `a + b`, or of `a - b` for a >= b, digit by digit from the right: `digit+digit+carry=carry digit`.

    47+25: "7+5+0=1 2, 4+2+1=0 7". In a difference what is borrowed is a carry of -1: 52-17: "2-7-0=-1 5, 5-1-1=0 3".
    """
    op, steps, carry = "+" if sign > 0 else "-", [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        value = x + sign * (y + carry)
        steps.append(f"{x}{op}{y}{op}{carry}={value // 10} {value % 10}")
        carry = abs(value // 10)
    return ", ".join(steps)


def _add(a: int, b: int) -> str:
    """`a + b` where a or b is negative: the digits of both, what it comes to without signs, the steps, the digits of the result.

    "1 7-5 2=-(5 2-1 7): ... . -3 5"; "-2 2+9 8=9 8-2 2: ... . 7 6"; "-2 2-9 8=-(2 2+9 8): ... . -1 2 0".
    """
    head = f"{_spaced(a)}{'+' if b >= 0 else '-'}{_spaced(abs(b))}"
    large, small = max(abs(a), abs(b)), min(abs(a), abs(b))
    if a < 0 and b < 0:
        head, steps = f"{head}=-({_spaced(-a)}+{_spaced(-b)})", _columns(-a, -b, 1)
    else:
        steps = _columns(large, small, -1)
        if a + b < 0:
            head += f"=-({_spaced(large)}-{_spaced(small)})"
        elif a < 0:
            head += f"={_spaced(large)}-{_spaced(small)}"
    return f"{head}: {steps}. {_spaced(a + b)}"


def _sum_columns(a: int, b: int) -> str:
    """The steps of `a + b` for a, b >= 0, digit by digit from the right; each result has two digits, the first is the carry, and
    the sum is read off them: 47+25: "7+5=12, 4+2+1=07"."""
    steps, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        steps.append(f"{x}+{y}" + (f"+{carry}" if place else "") + f"={x + y + carry:02d}")
        carry = (x + y + carry) // 10
    return ", ".join(steps)


# ---------------------------------------------------------------- solvers


def _find(pattern: str, question: str) -> re.Match[str]:
    found = re.search(pattern, question, re.DOTALL)
    if found is None:
        raise ValueError(f"a question of another kind: {question}")
    return found


def _terms(question: str) -> list[int]:
    """The signed terms of the sum at the end of a question."""
    first, *others = _find(r"-?\d+(?: [+-] -?\d+)*(?= =$)", question)[0].split(" ")
    return [int(first)] + [int(v) if op == "+" else -int(v) for op, v in zip(others[::2], others[1::2])]


def chain_sum(question: str) -> Solved:
    """One term after the other. One-digit terms at once, "4-1=3, 3-7=-4"; others digit by digit from the right with a carry,
    47 + 25 as "7+5=12, 4+2+1=07" (see `_sum_columns`), and where signs differ (see `_columns`) 17 - 52 as
    "1 7-5 2=-(5 2-1 7): 2-7-0=-1 5, 5-1-1=0 3. -3 5"."""
    terms = _terms(question)
    steps, total = [], terms[0]
    for term in terms[1:]:
        if max(map(abs, terms)) < 10:
            steps.append(f"{total}{term:+d}={total + term}")
        elif min(total, term) >= 0:
            steps.append(_sum_columns(total, term))
        else:
            steps.append(_add(total, term))
        total += term
    return (", " if max(map(abs, terms)) < 10 else "; ").join(steps), str(total)


def _factors(question: str) -> list[int]:
    return [int(value) for value in _find(r"-?\d+(?: \* -?\d+)+", question)[0].split(" * ")]


def products(question: str) -> Solved:
    """One factor after the other. Two digits at once, "3*4=1 2"; a longer number digit by digit from the right,
    `digit*digit+carry=carry digit`: "1 2*7: 2*7+0=1 4, 1*7+1=0 8. 8 4". One-digit factors only, after the first."""
    first, *others = _factors(question)
    steps, total = [], first
    for factor in others:
        if not 0 <= factor < 10 or total < 0:
            raise ValueError("only one-digit factors are worked out")
        if total < 10:
            steps.append(f"{total}*{factor}={_spaced(total * factor)}")
        else:
            parts, carry = [], 0
            for digit in map(int, reversed(str(total))):
                value = digit * factor + carry
                parts.append(f"{digit}*{factor}+{carry}={value // 10} {value % 10}")
                carry = value // 10
            steps.append(f"{_spaced(total)}*{factor}: {', '.join(parts)}. {_spaced(total * factor)}")
        total *= factor
    return "; ".join(steps), str(total)


def spell_backward(question: str) -> Solved:
    """The letters forward, then backward: "spell s u n back n u s"."""
    word = question.rsplit(": ", 1)[1]
    return f"spell {' '.join(word)} back {' '.join(word[::-1])}", word[::-1]


def swap_ends(question: str) -> Solved:
    """A short cut for words of three letters: the ends are swapped, "swap s u n give n u s"."""
    word = question.rsplit(": ", 1)[1]
    if len(word) != 3:
        raise ValueError("swapping the ends spells a word of three letters backward, no other")
    return f"swap {' '.join(word)} give {' '.join(word[::-1])}", word[::-1]


def word_sequence_reversal(question: str) -> Solved:
    """The words as given, then from the last: "list: go acute hundred back: hundred acute go"."""
    words = question.rsplit("words: ", 1)[1].strip().split(", ")
    return f"list: {' '.join(words)} back: {' '.join(words[::-1])}", ", ".join(words[::-1])


def letter_counting(question: str) -> Solved:
    """The text letter by letter; each time the letter comes, the count so far stands behind it: "h: h 1 u n d, t h 2 e. 2"."""
    found = _find(r'the letter "(.)" appear in the text: "(.*)"\?$', question)
    letter, count, words = found[1], 0, []
    for word in found[2].lower().split(" "):
        out = []
        for each in word:
            count += each == letter
            out.append(f"{each} {count}" if each == letter else each)
        words.append(" ".join(out))
    return f"{letter}: {', '.join(words)}. {count}", str(count)


def _numbers(question: str) -> list[int]:
    return [int(value) for value in re.findall(r"\d+", question.split(":", 1)[1])]


def _euclid(a: int, b: int) -> list[str]:
    """Euclid's divisions of the larger by the smaller until nothing remains: "48=36*1+12", "36=12*3+0"."""
    a, b = max(a, b), min(a, b)
    steps = []
    while b:
        steps.append(f"{a}={b}*{a // b}+{a % b}")
        a, b = b, a % b
    return steps


def greatest_common_divisor(question: str) -> Solved:
    """Euclid's algorithm; the last divisor is the answer: "48=36*1+12, 36=12*3+0. 12"."""
    a, b = _numbers(question)
    return f"{', '.join(_euclid(a, b))}. {gcd(a, b)}", str(gcd(a, b))


def least_common_multiple(question: str) -> Solved:
    """Euclid's algorithm, then one number divided by the last divisor and multiplied by the other number:
    "48=36*1+12, 36=12*3+0. 48/12=4, 4*36=144"."""
    a, b = _numbers(question)
    large, small, divisor = max(a, b), min(a, b), gcd(a, b)
    part, answer = large // divisor, large // divisor * small
    return f"{', '.join(_euclid(a, b))}. {large}/{divisor}={part}, {part}*{small}={answer}", str(answer)


def count_bits(question: str) -> Solved:
    """The number is halved until 1 is left; behind each comes the count of odd ones so far: "13:1 6:1 3:2 1:3"."""
    number, count, steps = int(_find(r"the number (\d+)", question)[1]), 0, []
    while number:
        count += number % 2
        steps.append(f"{number}:{count}")
        number //= 2
    return " ".join(steps), str(count)


def simple_equations(question: str) -> Solved:
    """Linear equations with one constant beside the unknown's term: the constant goes to the other side, then both sides are
    divided: "3*x + 5 = 17" gives "17-5=12, 12/3=4"; "5 - 3*x = -7" gives "5+7=12, 12/3=4"."""
    left, right = (side.strip() for side in question.rsplit(": ", 1)[1].split("="))
    result = int(right)
    factor, constant, sign = _linear(left)
    steps = []
    if sign < 0:  # constant - factor * x = result
        steps.append(f"{constant}{-result:+d}={constant - result}" if result else f"{constant}-0={constant}")
        result = constant - result
    elif constant:
        steps.append(f"{result}{-constant:+d}={result - constant}")
        result -= constant
    if factor != 1:
        steps.append(f"{result}/{factor}={result // factor}")
    return ", ".join(steps) or f"x={result // factor}", str(result // factor)


def _linear(left: str) -> tuple[int, int, int]:
    """(factor, constant, +1) of "3*x + 5" or "3*x - 5"; (factor, constant, -1) of "5 - 3*x"."""
    term = r"(?:(\d+)\*)?[a-z]"
    if found := re.fullmatch(rf"{term}(?: ([+-]) (\d+))?", left):
        return int(found[1] or 1), int((found[2] or "") + (found[3] or "0")), 1
    if found := re.fullmatch(rf"(\d+) - {term}", left):
        return int(found[2] or 1), int(found[1]), -1
    raise ValueError(f"only equations with one term and one constant are worked out, not {left}")


def prime_factorization(question: str) -> Solved:
    """The smallest factor is split off until a prime is left: "84=2*42, 42=2*21, 21=3*7, 7 prime"."""
    number, steps, primes = int(_find(r"factorization of (\d+)", question)[1]), [], []
    while True:
        divisor = next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
        primes.append(str(divisor))
        if divisor == number:
            return ", ".join([*steps, f"{number} prime"]), " × ".join(primes)
        steps.append(f"{number}={divisor}*{number // divisor}")
        number //= divisor


# Legs as reasoning-gym counts them.
_LEGS = {
    0: ("snake", "sea slug", "jellyfish", "flatworm", "leech"),
    2: ("chicken", "bird", "human", "duck"),
    4: ("dog", "cat", "cow", "horse", "lion", "elephant", "giraffe", "tiger", "deer", "sheep"),
    5: ("starfish",),
    6: (
        "insect",
        "ant",
        "butterfly",
        "beetle",
        "bee",
        "wasp",
        "grasshopper",
        "cricket",
        "cockroach",
        "praying mantis",
        "firefly",
    ),
    8: ("spider", "scorpion"),
    10: ("crab", "lobster", "shrimp"),
    14: ("woodlouse",),
}
_LEGS_OF = {animal + plural: legs for legs, animals in _LEGS.items() for animal in animals for plural in ("", "s")}


def _animals(question: str) -> list[tuple[int, str]]:
    listed = _find(r"if you have (.*)\?", question)[1].split(", ")
    return [(int(number), animal) for number, _, animal in (each.partition(" ") for each in listed)]


def leg_counting(question: str) -> Solved:
    """The legs of each kind of animal, then their sum, one after the other, digit by digit (see `_sum_columns`): 3 lobsters and
    4 dogs as "3*10=30, 4*4=16, 0+6=06, 3+1+0=04"."""
    legs = [(number, _LEGS_OF[animal]) for number, animal in _animals(question) if animal in _LEGS_OF]
    if len(legs) < len(_animals(question)):
        raise ValueError("an animal that nobody has counted")
    steps = [f"{number}*{each}={number * each}" for number, each in legs]
    total = legs[0][0] * legs[0][1]
    for number, each in legs[1:]:
        steps.append(_sum_columns(total, number * each))
        total += number * each
    return ", ".join(steps), str(total)


SOLVERS: dict[str, Callable[[str], Solved]] = {
    "chain_sum": chain_sum,
    "products": products,
    "spell_backward": spell_backward,
    "word_sequence_reversal": word_sequence_reversal,
    "letter_counting": letter_counting,
    "gcd": greatest_common_divisor,
    "lcm": least_common_multiple,
    "count_bits": count_bits,
    "simple_equations": simple_equations,
    "prime_factorization": prime_factorization,
    "leg_counting": leg_counting,
}

# Short cuts that are right for some tasks of a family only; ValueError for the others.
SHORTCUTS: dict[str, Callable[[str], Solved]] = {"spell_backward": swap_ends}


def solve(family: str, question: str, answer: str, shortcut: bool = False) -> Solved | None:
    """(trace, final answer) if the family has a solver, its answer is exactly `answer`, and all equations of it are true;
    by the family's `shortcut` if asked for, None where that fails."""
    solvers = SHORTCUTS if shortcut else SOLVERS
    if family not in solvers:
        return None
    try:
        trace, final = solvers[family](question)
    except ValueError:  # a kind of question that the solver does not work out
        return None
    return (trace, final) if trace and final == answer and not untrue_steps(trace) else None


# ---------------------------------------------------------------- checks

_EQUATION = re.compile(r"(?<![\d\s])\s*([\d+*/-]+)((?:=-?\d[\d+*/-]*(?: \d)*)+)")


def untrue_steps(trace: str) -> list[str]:
    """The equations of a trace that are not true; empty if all are. An equation is `expression=expression` without blanks but
    in a final run of digits."""
    wrong = []
    for found in _EQUATION.finditer(trace):
        sides = [found[1], *found[2].removeprefix("=").split("=")]
        if any(_value(a) != _value(b) for a, b in pairwise(sides)):
            wrong.append(found[0].strip())
    return wrong


def _value(expression: str) -> Fraction:
    """The value of sums of products of numbers; a run of digits with blanks is one number, `-1 5` is -10 + 5."""
    if found := re.fullmatch(r"(-?\d+)((?: \d)+)", expression):
        total = Fraction(int(found[1]))
        for digit in found[2].split():
            total = total * 10 + int(digit)
        return total
    total = Fraction(0)
    for sign, term in re.findall(r"([+-]*)([\d*/]+)", expression):
        value = Fraction(1)
        for op, number in re.findall(r"([*/]?)(\d+)", term):
            value = value / int(number) if op == "/" else value * int(number)
        total += -value if sign.count("-") % 2 else value
    return total


def group_of_question(family: str, question: str) -> str:
    """What makes two tasks the same task: equal for questions that differ only in the order of terms, factors or numbers, in
    upper and lower case of a word to spell, or in blanks. Records are held out by it."""
    try:
        key = _canonical(family, question)
    except (ValueError, IndexError):
        key = " ".join(question.split())
    if len(key) > 160:
        key = hashlib.sha256(key.encode()).hexdigest()[:32]
    return f"{family}:{key}"


def _canonical(family: str, question: str) -> str:
    if family == "chain_sum":
        return " ".join(f"{value:+d}" for value in sorted(_terms(question)))
    if family == "products":
        return " ".join(map(str, sorted(_factors(question))))
    if family in ("gcd", "lcm"):
        return " ".join(map(str, sorted(_numbers(question))))
    if family == "spell_backward":
        return question.rsplit(": ", 1)[1].lower()
    if family == "word_sequence_reversal":
        return question.rsplit("words: ", 1)[1].strip()
    if family in ("count_bits", "prime_factorization"):
        return _find(r"(?:number|factorization of) (\d+)", question)[1]
    if family == "simple_equations":
        # "Solve for x" and "Find the value of x" ask the same; so do other names of the unknown.
        return re.sub(r"[a-z]", "x", question.rsplit(": ", 1)[1])
    if family == "letter_counting":
        return question.split("letter ", 1)[1]
    if family == "leg_counting":
        return ", ".join(sorted(f"{number} {animal.removesuffix('s')}" for number, animal in _animals(question)))
    return " ".join(question.split())
