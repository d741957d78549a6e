"""Questions about Python's standard library with answers from its docstrings: instruction records.

"What does `shutil.copyfile` do?" -> "`shutil.copyfile`: Copy data from src to dst in the most efficient way possible."
Licence PSF-2.0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from k2lab.core.rng import derive
from k2lab.data.records import Record
from k2lab.data.sources import _stdlib

_CALLABLE = (
    "What does `{}` do?",
    "What is `{}` for?",
    "Explain `{}` in one sentence.",
    "Describe the Python {kind} `{}`.",
    "Tell me what `{}` does.",
)
_THING = (
    "What is `{}`?",
    "What is `{}` for?",
    "Explain `{}` in one sentence.",
    "Describe the Python {kind} `{}`.",
    "Tell me what `{}` is.",
)


@dataclass(frozen=True, kw_only=True)
class DocstringQa:
    """Questions about the standard library, answered by the first sentence of the asked object's docstring.

    Objects whose first sentence is too short, too long or no sentence are passed over.
    """

    shortest: int = 16  # characters of the sentence
    longest: int = 160  # characters of the sentence; the object's name comes on top
    longest_name: int = 48  # characters of the object's qualified name
    phrasings: int = 1  # differently worded questions per object, at most 5
    seed: int = 0  # chooses the wording
    domain: str = "docstring_qa"

    def records(self) -> Iterator[Record]:
        """Instruction records; `object` is the asked object's qualified name, `module` what hold-out goes by."""
        for each in _stdlib.collect():
            sentence = _stdlib.first_sentence(each.doc)
            if len(each.name) > self.longest_name or not _stdlib.is_sentence(sentence, self.shortest, self.longest):
                continue
            patterns = _CALLABLE if each.kind in ("function", "method") else _THING
            first = derive(self.seed, "docstring_qa", "wording", each.name)
            for k in range(min(self.phrasings, len(patterns))):
                question = patterns[(first + k) % len(patterns)].format(each.name, kind=each.kind)
                yield {
                    "key": f"docstring_qa:{each.name}" + (f":{k}" if k else ""),
                    "instruction": question,
                    "input": "",
                    "output": f"`{each.name}`: {sentence}",
                    "source": "docstring_qa",
                    "domain": self.domain,
                    "license": _stdlib.LICENSE,
                    "module": each.module,
                    "object": each.name,
                }

    def fingerprint(self) -> str:
        """sha256 hex over the settings, the interpreter's build and its library's files."""
        return hashlib.sha256(f"{self!r}\0{_stdlib.digest()}".encode()).hexdigest()

    @staticmethod
    def examples() -> list[DocstringQa]:
        return [DocstringQa(), DocstringQa(phrasings=2, longest=80)]
