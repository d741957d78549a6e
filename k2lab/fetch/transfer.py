"""Bringing files over an unsteady connection: continued where they broke off, and renamed only when their checksum is right.

The hub's own library throws a half-loaded file away when its process ends, and a shard of Kimi K2 is 17 GB. Here a file grows in
`.k2fetch/` under the hash of its content, so that a later attempt, of this process or the next, asks for the rest only.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2lab.core import threads
from k2lab.core.artifacts import disk_errors
from k2lab.core.errors import DataError, K2Error, MachineError
from k2lab.plan.lines import size as bytes_text

PARTIAL = ".k2fetch"
CHUNK = 1 << 20
AT_ONCE = 4  # files loaded side by side
ATTEMPTS = 5  # connections that may break in a row without a byte gained
TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class RemoteFile:
    """One file on the hub: `algorithm` "sha256" (large files) or "git-sha1" (git's blob hash, small ones) with its `digest`."""

    name: str
    size: int
    algorithm: str
    digest: str


def digest_of(path: Path | None, algorithm: str, length: int) -> Any:
    """A hash object fed with the file's bytes (none if it does not exist); "git-sha1" begins with git's header for a blob of
    `length` bytes."""
    digest = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(f"blob {length}\0".encode(), usedforsecurity=False)
    if path is not None and path.is_file():
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
    return digest


def scrub(text: str) -> str:
    """`text` without the token."""
    token = os.environ.get("HF_TOKEN")
    return text.replace(token, "***") if token else text


class _KeepTokenHome(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but takes the token off when they leave the host: the hub's files lie at other companies' addresses."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and urllib.parse.urlsplit(newurl)[:2] != urllib.parse.urlsplit(req.full_url)[:2]:
            following.remove_header("Authorization")
        return following


class _Broken(Exception):
    """The connection ended early; what came is kept."""


@dataclass
class _Part:
    """A growing file and the hash of what it holds."""

    file: RemoteFile
    path: Path
    have: int = 0
    digest: Any = field(init=False)

    def __post_init__(self) -> None:
        if self.path.is_file() and self.path.stat().st_size > self.file.size:
            self.path.unlink()
        self.have = self.path.stat().st_size if self.path.is_file() else 0
        self.digest = digest_of(self.path, self.file.algorithm, self.file.size)

    def restart(self) -> None:
        self.have, self.digest = 0, digest_of(None, self.file.algorithm, self.file.size)


class Loader:
    """Loads files from `base`/NAME into the folder `to`.

    `what` names the repository in errors, `progress(done, total)` hears of every piece, `pause` is the wait in seconds before the
    first new attempt after a broken connection (doubled each time), `denied()` makes the error for a refused access.
    """

    def __init__(
        self,
        base: str,
        files: Iterable[RemoteFile],
        to: Path,
        *,
        what: str,
        denied: Callable[[], K2Error],
        progress: Callable[[int, int], None],
        pause: float = 1.0,
    ) -> None:
        self.base, self.files, self.to, self.what = base, tuple(files), to, what
        self.denied, self.progress, self.pause = denied, progress, pause
        self.parts = to / PARTIAL
        self.done, self.total = 0, sum(file.size for file in self.files)
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._opener = urllib.request.build_opener(_KeepTokenHome())

    def present(self) -> int:
        """Bytes that lie here already, whole files and parts."""
        number = 0
        for file in self.files:
            for path in (self.to / file.name, self._partial(file)):
                if path.is_file():
                    number += min(path.stat().st_size, file.size)
                    break
        return number

    def run(self) -> None:
        """Loads everything, `config.json` last: until then the folder is no model. Raises MachineError for connections that keep
        breaking and for the disk, DataError for a wrong checksum or refused access."""
        with disk_errors(self.to):
            self.parts.mkdir(parents=True, exist_ok=True)
            last = [file for file in self.files if file.name == "config.json"]
            # Large files first: the last thread to end should not have begun late.
            first = sorted((file for file in self.files if file not in last), key=lambda file: -file.size)
            for files in (first, last):
                threads.each(files, self._load, AT_ONCE, self._stop)
            shutil.rmtree(self.parts)

    def _partial(self, file: RemoteFile) -> Path:
        name = hashlib.sha256(file.name.encode()).hexdigest()[:8]  # two files may have the same content
        return self.parts / f"{file.digest}-{name}.partial"

    def _load(self, file: RemoteFile) -> None:
        final = self.to / file.name
        if final.is_file():
            if final.stat().st_size == file.size and digest_of(final, file.algorithm, file.size).hexdigest() == file.digest:
                self._count(file.size)
                return
            final.unlink()
        part = _Part(file, self._partial(file))
        part.path.touch()
        self._count(part.have)
        failures = 0
        while part.have < file.size:
            before = part.have
            try:
                self._read_on(part)
            except _Broken as error:
                failures = 1 if part.have > before else failures + 1
                if failures > ATTEMPTS:
                    raise MachineError(
                        f"the connection broke {failures} times at {bytes_text(part.have)} of {bytes_text(file.size)}: {error}",
                        where=f"{self.what}: {file.name}",
                        next="Give the same command again: it continues there",
                    ) from None
                self._stop.wait(self.pause * 2 ** (failures - 1))
            if self._stop.is_set():
                return
        self._check(part)
        final.parent.mkdir(parents=True, exist_ok=True)
        with part.path.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part.path, final)

    def _check(self, part: _Part) -> None:
        file, found = part.file, part.digest.hexdigest()
        if found != file.digest or part.have != file.size:
            part.path.unlink()
            raise DataError(
                f"the file's {file.algorithm} is not what the hub says it is; it was removed",
                where=f"{self.what}: {file.name}",
                got=f"{found} over {part.have:,} bytes",
                allowed=f"{file.digest} over {file.size:,} bytes",
                next="Give the same command again to load that file anew; the others are kept",
            )

    def _read_on(self, part: _Part) -> None:
        headers = {"User-Agent": "k2lab", "Accept-Encoding": "identity"}
        if part.have:
            headers["Range"] = f"bytes={part.have}-"
        if token := os.environ.get("HF_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(f"{self.base}/{urllib.parse.quote(part.file.name)}", headers=headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                if part.have and answer.status != 206:  # the server began anew
                    self._count(-part.have)
                    part.restart()
                self._write(part, answer)
            if part.have < part.file.size and not self._stop.is_set():
                raise _Broken("it ended early")
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self.denied() from None
            if error.code < 500 and error.code not in (408, 429):
                raise MachineError(
                    f"the hub refuses this file: HTTP {error.code} {error.reason}",
                    where=f"{self.what}: {part.file.name}",
                    next="Give the same command again later; what was loaded is kept",
                ) from None
            raise _Broken(f"HTTP {error.code}") from None
        except MachineError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise _Broken(scrub(f"{type(error).__name__}: {error}")) from None

    def _write(self, part: _Part, answer: Any) -> None:
        with disk_errors(part.path), part.path.open("ab" if part.have else "wb") as target:
            while not self._stop.is_set() and part.have <= part.file.size and (piece := answer.read(CHUNK)):
                target.write(piece)
                target.flush()
                part.digest.update(piece)
                part.have += len(piece)
                self._count(len(piece))

    def _count(self, number: int) -> None:
        with self._lock:
            self.done += number
            self.progress(self.done, self.total)
