"""Sources made from the running Python: reference, docstrings, questions; and general instructions."""

import ast
import inspect
import re
import shutil
import sys

import pytest

from k2lab.core import slots
from k2lab.core.errors import MachineError, RecipeError
from k2lab.core.rng import rng
from k2lab.data.records import check_record, kind_of
from k2lab.data.sources import _general, _stdlib


def records(name, **settings):
    return list(slots.load("source", name)(**settings).records())


def by_object(found):
    return {record["object"]: record for record in found}


def test_reference_has_a_record_per_topic():
    from pydoc_data.topics import topics

    found = records("python_reference")
    assert [record["topic"] for record in found] == sorted(topics)
    assert all(record["license"] == "PSF-2.0" and record["domain"] == "reference" for record in found)
    assert next(r for r in found if r["topic"] == "while")["text"].startswith('The "while" statement')


def test_reference_without_topics_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(MachineError, match="without its help topics"):
        records("python_reference")


def test_docstrings_carry_name_signature_and_doc():
    found = by_object(records("python_docstrings"))
    copy = found["shutil.copyfile"]
    doc = inspect.cleandoc(shutil.copyfile.__doc__)
    assert copy["text"] == f"shutil.copyfile(src, dst, *, follow_symlinks=True)\n\n{doc}"
    assert (copy["module"], copy["license"], copy["domain"]) == ("shutil", "PSF-2.0", "docstrings")
    # The first parameter of a method is left out, a class shows how it is made, a module says that it is one.
    assert found["fractions.Fraction.limit_denominator"]["text"].startswith(
        "fractions.Fraction.limit_denominator(max_denominator=1000000)\n\n"
    )
    assert found["textwrap.TextWrapper"]["text"].startswith("class textwrap.TextWrapper(width=70,")
    assert found["bisect"]["text"].startswith("module bisect\n\nBisection algorithms.")


def test_docstrings_reach_modules_written_in_c():
    found = by_object(records("python_docstrings"))
    assert found["math.gcd"]["text"].startswith("math.gcd(*integers)\n\nGreatest Common Divisor.")
    assert found["len"]["module"] == "builtins"
    assert "itertools.chain" in found
    assert found["str.upper"]["text"].startswith("str.upper()\n\n")
    # Written in C, passed on by a public module.
    assert found["collections.deque"]["module"] == "collections"
    assert "struct.pack" in found
    assert "os.getpid" in found and "posix.getpid" not in found


def test_docstrings_leave_out_what_is_private_or_odd():
    found = records("python_docstrings")
    modules = {record["module"] for record in found}
    for word in ("test", "tests", "idlelib", "lib2to3", "antigravity", "this", "encodings"):
        assert not any(word in module.split(".") for module in modules)
    assert not [r["object"] for r in found if any(part.startswith("_") for part in r["object"].split("."))]
    assert not any("site-packages" in module for module in modules)
    keys = [record["key"] for record in found]
    assert len(set(keys)) == len(keys) > 5000


def test_parsing_imports_no_module_with_source():
    # In a fresh process: collecting must not have run the library's odd modules.
    import subprocess

    code = "from k2lab.data.sources import _stdlib; import sys; _stdlib.collect(); print(sorted(sys.modules))"
    root = slots.folder("source").parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    loaded = set(ast.literal_eval(out.stdout))
    assert not loaded & {"tkinter", "turtle", "webbrowser", "smtplib", "asyncio", "antigravity", "this", "readline", "torch"}
    assert out.stderr == ""


def test_definitions_under_if_and_try_are_found_once_and_the_first_wins():
    source = '''
"""Doc."""
if True:
    def f(a, /, b: int = 2, *c, d=None, **e):
        """First."""
else:
    def f():
        """Second."""
try:
    class C:
        """Class."""
        def __init__(self, x=1): ...
        @property
        def p(self):
            """Prop."""
        @staticmethod
        def s(y):
            """Static."""
        @classmethod
        def k(cls, z=0):
            """Made."""
        def _hidden(self):
            """No."""
        def bare(self): ...
except ImportError:
    async def g():
        """Async."""
'''
    found = [(d.name, d.kind, d.signature, d.doc) for d in _stdlib._from_tree("m", ast.parse(source))]
    assert found == [
        ("m", "module", "", "Doc."),
        ("m.f", "function", "(a, /, b: int=2, *c, d=None, **e)", "First."),
        ("m.C", "class", "(x=1)", "Class."),
        ("m.C.p", "property", "", "Prop."),
        ("m.C.s", "method", "(y)", "Static."),
        ("m.C.k", "method", "(z=0)", "Made."),
        ("m.g", "function", "()", "Async."),
    ]


@pytest.mark.parametrize(
    "doc, sentence",
    [
        ("Copy data from src to dst.\n\nMore.", "Copy data from src to dst."),
        ("Copy data\nover lines. And more.", "Copy data over lines."),
        ("Return e.g. the first item. Then stop.", "Return e.g. the first item."),
        ("f(x) -> y\n\nReturn the value of x.", "Return the value of x."),
        ("array.append(x)\nAppend an item.", "Append an item."),
        ("Return the foo", "Return the foo."),
        ("Version 3.14 is out. Yes.", "Version 3.14 is out."),
        ("", ""),
    ],
)
def test_first_sentence(doc, sentence):
    assert _stdlib.first_sentence(doc) == sentence


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("Copy data from src to dst.", True),
        ("Two words.", False),
        ("lower case at the start.", False),
        ("Usage: foo(a) -> bar is odd.", False),
        ("Return the value (or not.", False),
        ("The following are supported:.", False),
        ("A" * 10 + " b c " + "d" * 300 + ".", False),
    ],
)
def test_is_sentence(text, is_one):
    assert _stdlib.is_sentence(text, 10, 160) is is_one


def test_questions_name_their_object_and_answers_begin_with_it():
    found = records("docstring_qa")
    assert len(found) > 4000
    for record in found:
        assert check_record(record, record["key"], "instruction")
        assert f"`{record['object']}`" in record["instruction"]
        assert record["output"].startswith(f"`{record['object']}`: ")
        assert len(record["output"]) <= 200 + 12
        assert (
            record["object"] == record["module"]
            or record["module"] in (record["object"].rpartition(".")[0], "builtins")
            or (record["object"].startswith(record["module"] + "."))
        )
    copy = by_object(found)["shutil.copyfile"]
    assert copy["output"] == "`shutil.copyfile`: Copy data from src to dst in the most efficient way possible."
    assert len({re.sub("`.*`", "X", record["instruction"]) for record in found}) >= 8  # several wordings


def test_questions_can_have_several_wordings_and_follow_the_seed():
    one, two = records("docstring_qa"), records("docstring_qa", phrasings=2)
    assert len(two) == 2 * len(one)
    assert len({record["key"] for record in two}) == len(two)
    assert len({record["instruction"] for record in two}) == len(two)
    other = records("docstring_qa", seed=1)
    assert [r["output"] for r in other] == [r["output"] for r in one]
    assert [r["instruction"] for r in other] != [r["instruction"] for r in one]


@pytest.mark.parametrize("name", ["python_reference", "python_docstrings", "docstring_qa", "general_instructions"])
def test_made_sources_repeat_themselves_exactly(name):
    cls = slots.load("source", name)
    assert list(cls().records()) == list(cls().records())
    assert cls().fingerprint() == cls().fingerprint() != cls(domain="other").fingerprint()
    assert all(kind_of(record) in ("text", "instruction") for record in cls().records())


# ---------------------------------------------------------------- general instructions

CHECKS = {
    "repeat": lambda i, x: x,
    "spell": lambda i, x: "-".join(x),
    "uppercase": lambda i, x: x.upper(),
    "first_word": lambda i, x: x.split(" ")[0],
    "last_word": lambda i, x: x.split(" ")[-1],
    "count_words": lambda i, x: str(x.count(" ") + 1),
    "reverse_list": lambda i, x: ", ".join(reversed(x.split(", "))),
    "sort_words": lambda i, x: ", ".join(sorted(x.split(", "))),
    "join_words": lambda i, x: x.replace(" ", "-"),
    "letters": lambda i, x: str(len(x)),
    "sort_numbers": lambda i, x: ", ".join(map(str, sorted(map(int, x.split(", "))))),
    "compare": lambda i, x: str((max if "larger" in i else min)(int(n) for n in re.findall(r"\d+", i))),
    "even": lambda i, x: _even(*re.findall(r"(\d+) (even|odd)", i)[0]),
    "arithmetic": lambda i, x: _sum(re.search(r"(\d+) ([-+*]) (\d+)", i)),
}


def _even(number, asked):
    actual = ("even", "odd")[int(number) % 2]
    return f"{'Yes' if actual == asked else 'No'}, {number} is {actual}."


def _sum(match):
    a, sign, b = int(match[1]), match[2], int(match[3])
    return f"{match[0]} = {a + b if sign == '+' else a - b if sign == '-' else a * b}"


def test_general_answers_are_right():
    found = records("general_instructions", count=1700)
    seen = set()
    for record in found:
        check_record(record, record["key"], "instruction")
        seen.add(record["task"])
        if record["task"] in CHECKS:
            assert record["output"] == CHECKS[record["task"]](record["instruction"], record["input"]), record
    assert seen == set(_general.TASKS)
    keywords = [r for r in found if r["task"] == "keyword"]
    import keyword

    for record in keywords:
        word = re.search("`(.*?)`", record["instruction"])[1]
        assert record["output"].startswith("Yes" if keyword.iskeyword(word) else "No")
    assert 0.2 < sum(r["output"].startswith("Yes") for r in keywords) / len(keywords) < 0.8


def test_general_questions_are_unique_and_grouped_over_wordings():
    found = records("general_instructions", count=1700)
    assert len({(r["instruction"], r["input"]) for r in found}) == len(found) > 1500
    assert len({r["key"] for r in found}) == len(found)
    groups = {}
    for record in found:
        if record["task"] == "spell":
            groups.setdefault(record["group"], set()).add(record["input"])
    assert all(len(words) == 1 for words in groups.values())
    assert len(groups) < sum(r["task"] == "spell" for r in found)  # some words were asked in two wordings


def test_general_settings_are_checked():
    assert {r["task"] for r in records("general_instructions", count=10, tasks=["spell"])} == {"spell"}
    with pytest.raises(RecipeError, match="Did you mean 'spell'"):
        records("general_instructions", tasks=("spel",))
    with pytest.raises(RecipeError, match="positive"):
        records("general_instructions", count=0)
    assert _general.TASKS["arithmetic"](rng(0, "a")) == _general.TASKS["arithmetic"](rng(0, "a"))


def test_made_up_names_are_copied_and_exist_nowhere():
    found = records("made_up_names", count=200)
    known = {each.name for each in _stdlib.collect()}
    for record in found:
        assert check_record(record, "here", "instruction") and record["split"] == "train"
        assert record["output"] == f"`{record['object']}`" and f"`{record['object']}`" in record["instruction"]
        assert 1 <= len(record["object"].split(".")) <= 3
    assert len({record["object"] for record in found} - known) > 190
    assert found == records("made_up_names", count=200)
    assert found[:50] == records("made_up_names", count=50)


def test_made_up_names_settings():
    assert all("split" not in record for record in records("made_up_names", count=5, split="any"))
    assert {len(r["object"].split(".")) for r in records("made_up_names", count=30, parts=(2, 2))} == {2}
    for bad in ({"count": 0}, {"parts": (3, 1)}, {"parts": (1,)}, {"repeat": 1.0}):
        with pytest.raises(RecipeError):
            records("made_up_names", **bad)
