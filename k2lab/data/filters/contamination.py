"""Drops records that contain texts of the evaluation: word n-grams shared with the targets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from k2lab.core.errors import DataError, RecipeError
from k2lab.data import files
from k2lab.data.filtering import Log
from k2lab.data.records import Record, check_record, text_of
from k2lab.data.words import Words

_CHUNK = 4096  # records looked at together


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """Drops records that share word n-grams with evaluation texts.

    An n-gram (lower-cased words, punctuation ignored) shared with any target marks its words; a record goes when more than
    `max_share` of its words are marked. A target of fewer than `ngram` but at least `min_words` words is looked for as a
    whole; a shorter one is ignored: it would match by chance.
    """

    ngram: int = 13  # words (GPT-3's choice, Brown et al. 2020, appendix C)
    min_words: int = 6  # of a target
    max_share: float = 0.0  # share of a record's words inside shared n-grams; 0 = one shared n-gram is too many
    path: str | tuple[str, ...] = ()  # JSON lines with evaluation records: a file, a glob, or a list of those
    texts: tuple[str, ...] = ()  # more evaluation texts, literally; stages add theirs by `with_targets`

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            object.__setattr__(self, "path", tuple(map(str, self.path)))
        object.__setattr__(self, "texts", tuple(self.texts))
        if not 1 <= self.min_words <= self.ngram:
            got = f"min_words = {self.min_words}, ngram = {self.ngram}"
            raise RecipeError("the lengths do not fit", got=got, allowed="1 <= min_words <= ngram")

    def with_targets(self, texts: Iterable[str]) -> Contamination:
        """A new filter that also looks for `texts`."""
        return dataclasses.replace(self, texts=(*self.texts, *texts))

    def apply(self, records: Iterator[Record], log: Log) -> Iterator[Record]:
        """Yields the clean records. Raises DataError if there is no target long enough to look for."""
        wanted = self._wanted()
        while chunk := list(islice(records, _CHUNK)):
            words = Words([text_of(record) for record in chunk])
            marked = np.zeros(len(words.hashes_N), dtype=bool)
            for n, hashes in wanted.items():
                found, first = words.ngrams(n)
                hit = first[np.isin(found, hashes)]
                for k in range(n):
                    marked[hit + k] = True
            number = np.bincount(words.text_N[marked], minlength=len(chunk))
            share = number / np.maximum(np.diff(words.starts_S1), 1)
            for record, count, part in zip(chunk, number.tolist(), share.tolist()):
                if count and part > self.max_share:
                    log.drop(record, f"{count} of its words ({part:.0%}) lie in n-grams of an evaluation text")
                else:
                    yield record

    def _wanted(self) -> dict[int, np.ndarray]:
        """{n: sorted hashes u64 of the n-grams to look for}."""
        texts = [*self.texts, *self._from_files()]
        words = Words(texts)
        lengths = np.diff(words.starts_S1)
        wanted = {}
        for n in sorted({min(int(length), self.ngram) for length in lengths if length >= self.min_words}):
            hashes, first = words.ngrams(n)
            length = lengths[words.text_N[first]]
            wanted[n] = np.unique(hashes[(length == n) | (n == self.ngram)])
        if not wanted:
            what = f"there is no evaluation text of {self.min_words} or more words to compare with"
            raise DataError(
                what, where="filter contamination", got=f"{len(texts)} texts", next="Set `path`, or lower `min_words`"
            )
        return wanted

    def _from_files(self) -> Iterator[str]:
        if self.path:
            for _, path in files.expand(self.path):
                for number, value in files.read_jsonl(path):
                    yield text_of(check_record(value, f"{path}:{number}"))

    def fingerprint(self) -> str:
        """sha256 hex over the settings but the path, the texts and the files' bytes."""
        own = dataclasses.replace(self, path=())
        content = files.digest_files(files.expand(self.path)) if self.path else ""
        return hashlib.sha256(f"{own!r}\0{content}".encode()).hexdigest()

    @staticmethod
    def examples() -> list[Contamination]:
        return [
            Contamination(texts=("Write a function that returns the n-th prime number in less than a second.",)),
            Contamination(path="eval/tasks.jsonl", ngram=8, min_words=5),
        ]
