"""Artifacts: directories that either exist completely or not at all.

An artifact is written under `<name>-<id8>.partial/`, its `manifest.json` last, and then renamed to `<name>-<id8>/`. No manifest
means that it does not exist. Its identity is a hash of the stage's table (without paths and run flags), the identities of its
parents, the stage file's `version` and the seed, so an edited recipe makes new directories from the first changed stage on and
reuses the rest. The manifest records sha256 and size of every file, versions, device, licences and `format`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2lab.core.errors import CheckpointError, MachineError

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: `path` of its directory and its parsed manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def identity(self) -> str:
        return self.manifest["identity"]


def identity(table: dict[str, Any], parents: dict[str, str], version: int, seed: int) -> str:
    """sha256 hex of everything that decides what a stage computes."""
    text = json.dumps(
        {"stage": table, "parents": parents, "version": version, "seed": seed}, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON through a temporary file and a rename, synced to disk: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path), temporary.open("w", encoding="utf-8") as file:
        # Lone surrogates can come from file names and broken data; they are escaped rather than refused.
        json.dump(value, file, indent=1, ensure_ascii=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class disk_errors:
    """Context that turns operating-system errors about `path` into one MachineError paragraph."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError) or isinstance(error, MachineError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise MachineError(
                "the disk (or the quota) is full",
                where=str(self.path),
                next="Free space and give the same command again; finished work is kept",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise MachineError("no permission to write", where=str(self.path), next="Choose another --run-dir") from error


def finish(partial: Path, final: Path, manifest: dict[str, Any]) -> Artifact:
    """Turns the directory `partial` into the artifact `final`: hashes its files, writes the manifest, syncs, renames."""
    files = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(partial).as_posix()] = {"sha256": file_sha256(path), "size": path.stat().st_size}
            with path.open("rb") as file:
                os.fsync(file.fileno())
    manifest = {"format": FORMAT, **manifest, "files": files}
    write_json(partial / MANIFEST, manifest)
    with disk_errors(final):
        os.replace(partial, final)
        _sync_folder(final.parent)
    return Artifact(final, manifest)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exists(path: Path) -> bool:
    """True if `path` is a complete artifact."""
    return (path / MANIFEST).is_file()


def folder_name(name: str, identity: str) -> str:
    """The directory of a stage's artifact within `stages/`."""
    return f"{name}-{identity[:8]}"


def beside(artifact: Artifact, role: str) -> Artifact | None:
    """What `artifact` was made from in this role, if it lies beside it, as in a run; None if it was made from nothing there, or
    that lies elsewhere."""
    parent = artifact.manifest.get("parents", {}).get(role)
    if parent is None:
        return None
    path = artifact.path.parent / folder_name(parent["name"], parent["identity"])
    return open_artifact(path) if exists(path) else None


def open_artifact(path: Path, kind: str | None = None, verify: bool = False) -> Artifact:
    """Reads an artifact's manifest. Sizes are always checked; `verify=True` also checks every sha256.

    Raises CheckpointError when the directory is not an artifact, was edited, is of another kind or of a format not read here.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a finished artifact: it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST} is not JSON: {error}", next=_REMAKE) from None
    found = manifest.get("format")
    if found not in (FORMAT, FORMAT - 1):
        raise CheckpointError(
            f"{path} has artifact format {found!r}", allowed=f"{FORMAT - 1} or {FORMAT}", next="Run `k2 convert` on it"
        )
    if kind is not None and manifest.get("kind") != kind:
        raise CheckpointError(f"{path} is a {manifest.get('kind')!r} artifact", allowed=f"a {kind!r} artifact")
    listed = manifest.get("files", {})
    for name, facts in listed.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing although the manifest lists it", next=_REMAKE)
        if file.stat().st_size != facts["size"]:
            raise CheckpointError(
                f"{file} was changed after it was written",
                got=f"{file.stat().st_size} bytes",
                allowed=f"{facts['size']} bytes, as in {MANIFEST}",
                next=_REMAKE,
            )
        if verify and file_sha256(file) != facts["sha256"]:
            raise CheckpointError(f"{file} was changed after it was written: its sha256 differs", next=_REMAKE)
    return Artifact(path, manifest)


_REMAKE = "Remove that directory and give the same command again to remake it, or put the original file back"
