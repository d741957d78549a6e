"""The language reference that Python carries for `help()`: one record per topic, read from the running interpreter.

Licence PSF-2.0. About 0.5 MB in 80 topics. No network, no files of yours.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from k2lab.core.errors import MachineError
from k2lab.data.records import Record

_LICENSE = "PSF-2.0"


@dataclass(frozen=True, kw_only=True)
class PythonReference:
    """The language reference that Python carries for `help()`: one record per topic.

    `domain`: the tag of every record, by which `mixture` weighs it.
    """

    domain: str = "reference"

    def records(self) -> Iterator[Record]:
        """Text records in order of topic; the key names the topic. Raises MachineError if this Python has no topics."""
        for topic, text in sorted(topics().items()):
            key = f"python_reference:{topic}"
            yield {
                "key": key,
                "text": text.strip(),
                "source": "python_reference",
                "domain": self.domain,
                "license": _LICENSE,
                "topic": topic,
            }

    def fingerprint(self) -> str:
        """sha256 hex over all topics."""
        return topics_fingerprint(self)

    @staticmethod
    def examples() -> list[PythonReference]:
        return [PythonReference()]


def topics() -> dict[str, str]:
    """Text by topic. Raises MachineError if this Python comes without them."""
    try:
        carried = importlib.import_module("pydoc_data.topics")
    except ImportError:
        raise MachineError(
            "this Python comes without its help topics (pydoc_data)",
            where=sys.prefix,
            next="Install the full standard library, or use another source (jsonl, text_folder)",
        ) from None
    return carried.topics


def topics_fingerprint(source: object) -> str:
    """sha256 hex over the settings of a source that is made of the topics, and over all topics."""
    digest = hashlib.sha256(repr(source).encode())
    for topic, text in sorted(topics().items()):
        digest.update(f"{topic}\0{text}\0".encode())
    return digest.hexdigest()
