"""Docstrings of Python's standard library with names and signatures, read from the running interpreter.

Licence PSF-2.0. Modules with source are parsed, not imported; see `_stdlib`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from k2lab.data.records import Record
from k2lab.data.sources import _stdlib


@dataclass(frozen=True, kw_only=True)
class PythonDocstrings:
    """Docstrings of Python's standard library with names and signatures, one record per module, class or function.

    `domain`: the tag of every record, by which `mixture` weighs it.
    """

    domain: str = "docstrings"

    def records(self) -> Iterator[Record]:
        """Text records ordered by module; the key names the object; `module` is what hold-out goes by."""
        for each in _stdlib.collect():
            head = f"{each.kind} {each.name}" if each.kind in ("module", "class") else each.name
            yield {
                "key": f"python_docstrings:{each.name}",
                "text": f"{head}{each.signature}\n\n{each.doc}",
                "source": "python_docstrings",
                "domain": self.domain,
                "license": _stdlib.LICENSE,
                "module": each.module,
                "object": each.name,
            }

    def fingerprint(self) -> str:
        """sha256 hex over the interpreter's build and its library's files."""
        return hashlib.sha256(f"{self!r}\0{_stdlib.digest()}".encode()).hexdigest()

    @staticmethod
    def examples() -> list[PythonDocstrings]:
        return [PythonDocstrings()]
