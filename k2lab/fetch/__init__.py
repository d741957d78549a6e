"""`k2 fetch`: models and data sets from the Hugging Face hub, each file checked against the hub's own checksum.

The hub's library says what a repository holds; `transfer` brings the bytes. `config.json` comes last and `fetched.json` after
it, so that a folder that looks like a model is one. The token is read from HF_TOKEN, sent to the hub's host only, never written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from k2lab.core import schema
from k2lab.core.artifacts import disk_errors, write_json
from k2lab.core.errors import DataError, MachineError, RecipeError, did_you_mean
from k2lab.fetch.transfer import PARTIAL, Loader, RemoteFile, digest_of, scrub
from k2lab.plan.lines import size as bytes_text

SHIPPED = Path(__file__).with_name("table.toml")
MANIFEST = "fetched.json"
FORMAT = 1
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "LICENSE*", "THIRD_PARTY*", "README.md")
# Folders of other frameworks' weights and of training logs in model repositories.
LEFT_OUT = ("onnx/*", "openvino/*", "runs/*", "figures/*", "docs/*", "original/*", "gguf/*", "coreml/*", ".gitattributes")
TIMEOUT = 60.0  # seconds that the hub's answer may take


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something to fetch; `table.toml` says what the fields mean."""

    name: str
    kind: Literal["model", "dataset"]
    repo: str
    revision: str = "main"
    files: tuple[str, ...] = ()
    licence: str = ""
    licence_url: str = ""
    terms: str = ""
    spec: str = ""
    format: str = ""
    recipe: str = ""
    note: str = ""

    @property
    def page(self) -> str:
        """Its page on the hub, as people call it."""
        return f"huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{self.repo}"

    def patterns(self) -> tuple[str, ...]:
        """Patterns of the files to get."""
        return self.files or (MODEL_FILES if self.kind == "model" else ("*",))

    def size(self) -> int | None:
        """Bytes of the weights as their shape and format make them; None where the table knows no shape."""
        from k2lab import specs

        return specs.get(self.spec).bytes(self.format) if self.spec else None


@dataclass(frozen=True)
class Listing:
    """What the hub says about a repository at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]
    licence: str
    gated: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


# ---------------------------------------------------------------- names


@cache
def _read(path: Path) -> dict[str, Item]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no table {str(path)!r}", next="Give a path that exists") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as TOML: {error}", next=f"Copy {SHIPPED} and edit it") from None
    items: dict[str, Item] = {}
    for kind, rows in tree.items():
        if kind not in ("model", "dataset") or not isinstance(rows, dict):
            raise RecipeError("this table holds something else than models and data sets", where=str(path), got=kind)
        for name, row in rows.items():
            if name in items:
                raise RecipeError("a model and a data set have the same name", where=str(path), got=name)
            row = {"name": name, "kind": kind, **row} if isinstance(row, dict) else row
            items[name] = schema.build(Item, row, f"{kind}.{name}")
    return items


def table(path: Path | None = None) -> dict[str, Item]:
    """All known names: the shipped table, or the user's at `path`."""
    return dict(_read(Path(path).resolve() if path else SHIPPED))


def find(name: str, *, dataset: bool = False, revision: str | None = None, path: Path | None = None) -> Item:
    """The item called `name`, or one made of a hub id `owner/name` (a data set if `dataset`). RecipeError for other names."""
    known = table(path)
    if name in known:
        item = known[name]
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        item = Item(name=name.split("/")[1].lower(), kind="dataset" if dataset else "model", repo=name)
        same = [other for other in known.values() if other.repo.lower() == name.lower() and not dataset]
        item = same[0] if len(same) == 1 else item
    else:
        raise RecipeError(
            f"nothing to fetch is called {name!r}",
            allowed=", ".join(known) + ", or owner/name of the hub",
            next=did_you_mean(name, known),
        )
    return replace(item, revision=revision) if revision else item


def spec_of(reference: str) -> Any:
    """The ModelSpec of what a recipe names as a model: a folder's config.json, or what the table knows of the folder's or the
    repository's name (`models/qwen2.5-7b`, `Qwen/Qwen2.5-7B`). None if neither says anything."""
    from k2lab import specs

    if (Path(reference) / "config.json").is_file():
        return specs.get(str(Path(reference).absolute()))
    last = reference.rstrip("/").rsplit("/", 1)[-1]
    item = table().get(last) or next((item for item in table().values() if item.repo == reference), None)
    return specs.get(item.spec) if item is not None and item.spec else None


def folder_of(item: Item) -> Path:
    """Where it goes by default: models/NAME or data/NAME."""
    return Path("models" if item.kind == "model" else "data") / item.name


# ---------------------------------------------------------------- the hub's answers


def endpoint() -> str:
    """Address of the hub; HF_ENDPOINT names another (a mirror)."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def ask(item: Item) -> Listing:
    """Asks the hub for commit, files with sizes and checksums, licence. Raises MachineError if it cannot be reached, DataError
    for a repository, revision or file pattern that is not there."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError:
        raise MachineError("asking the hub needs huggingface_hub", next="pip install huggingface_hub") from None
    token = os.environ.get("HF_TOKEN") or False
    try:
        api = hub.HfApi(endpoint=endpoint(), token=token, library_name="k2lab")
        info: Any = api.repo_info(item.repo, repo_type=item.kind, revision=item.revision, files_metadata=True, timeout=TIMEOUT)
    except errors.RevisionNotFoundError:
        raise DataError(f"{item.page} has no revision {item.revision!r}", next="Give a branch, tag or commit") from None
    except errors.GatedRepoError:
        raise _gated(item) from None
    except errors.RepositoryNotFoundError:
        raise DataError(
            f"the hub has no {item.kind} {item.repo!r}, or it is private",
            next="Check the name" + (" (for a data set add --dataset)" if item.kind == "model" else "") + _token_hint(),
        ) from None
    except errors.OfflineModeIsEnabled:
        raise MachineError(
            "the hub must be asked, and HF_HUB_OFFLINE forbids it", where=item.repo, next="Unset HF_HUB_OFFLINE"
        ) from None
    except Exception as error:  # httpx and its successors raise kinds of their own
        raise _unreachable(item, error) from None
    files = tuple(_remote(item, sibling) for sibling in info.siblings or () if _wanted(item, sibling.rfilename))
    if not files:
        raise DataError(
            f"{item.page} holds no file that is wanted",
            got=", ".join(sorted(s.rfilename for s in info.siblings or ())[:12]) or "no files",
            allowed=", ".join(item.patterns()),
            next="Name others with --files",
        )
    card = getattr(info, "card_data", None) or {}
    licence = card.get("license_name") or card.get("license") or ""
    text = ", ".join(licence) if isinstance(licence, list) else str(licence)
    return Listing(str(info.sha), files, text, bool(getattr(info, "gated", False)))


def _wanted(item: Item, name: str) -> bool:
    named = any(fnmatchcase(name, pattern) for pattern in item.patterns())
    return named and (bool(item.files) or not any(fnmatchcase(name, pattern) for pattern in LEFT_OUT))


def _remote(item: Item, sibling: Any) -> RemoteFile:
    name = sibling.rfilename
    if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or name.split("/")[0] in (PARTIAL, MANIFEST):
        raise DataError("the repository holds a file with a name that leaves its folder", where=item.page, got=name)
    large = getattr(sibling, "lfs", None)
    digest = large.sha256 if large else sibling.blob_id
    if not digest or sibling.size is None:
        raise DataError("the hub gives no checksum or size for a file", where=item.page, got=name)
    return RemoteFile(name, int(sibling.size), "sha256" if large else "git-sha1", digest)


def _token_hint() -> str:
    return "" if os.environ.get("HF_TOKEN") else "; if it is private or gated, put a token into HF_TOKEN"


def _gated(item: Item) -> DataError:
    sent = "the token in HF_TOKEN has no access yet" if os.environ.get("HF_TOKEN") else "no token was sent"
    return DataError(
        f"{item.page} is gated, and {sent}",
        next=f"Accept its terms at https://{item.page}, put a token of that account into HF_TOKEN, and give the command again",
    )


def _unreachable(item: Item, error: BaseException) -> MachineError:
    return MachineError(
        scrub(f"the hub at {endpoint()} did not answer as it should: {type(error).__name__}: {str(error).split(chr(10))[0]}"),
        where=item.repo,
        next="Check the network (HF_ENDPOINT names a mirror) and give the command again; what was loaded is kept",
    )


# ---------------------------------------------------------------- all files


def fetch(
    item: Item,
    to: Path,
    *,
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, total: None,
    dry_run: bool = False,
    pause: float = 1.0,
) -> Path:
    """Brings `item` into the folder `to`, quoting its licence first, and writes `fetched.json` with every checksum.

    The same call again does nothing if the folder is complete, and continues where it broke off otherwise. `pause` is as for
    `transfer.Loader`. Raises DataError (not there, gated, wrong checksum) or MachineError (network, disk).
    """
    done = read_manifest(to)
    if done is not None and (done["repo"], done["kind"]) != (item.repo, item.kind):
        raise DataError(
            f"{to} holds another repository", got=done["repo"], allowed=item.repo, next="Give another folder with --to"
        )
    if done is not None and not dry_run and _same(item, done) and not sizes(to, done):
        say(f"{to} is complete: {done['repo']} at {done['revision'][:12]}")
        return to
    listing = ask(item)
    for line in describe(item, listing):
        say(line)
    if dry_run:
        for file in sorted(listing.files, key=lambda file: file.name):
            say(f"  {bytes_text(file.size):>9}  {file.name}")
        return to
    prefix = "datasets/" if item.kind == "dataset" else ""
    base = f"{endpoint()}/{prefix}{item.repo}/resolve/{listing.commit}"
    loader = Loader(base, listing.files, to, what=item.repo, denied=lambda: _gated(item), progress=progress, pause=pause)
    with disk_errors(to):
        to.mkdir(parents=True, exist_ok=True)
        (to / MANIFEST).unlink(missing_ok=True)
    if there := loader.present():
        say(f"continuing: {bytes_text(there)} of {bytes_text(listing.size)} lie here already")
    free = shutil.disk_usage(to).free
    if listing.size - there > free:
        raise MachineError(
            f"{bytes_text(listing.size - there)} are still to be loaded and the disk has {bytes_text(free)} free",
            where=str(to),
            next="Free space, or give another folder with --to",
        )
    loader.run()
    write_json(to / MANIFEST, _manifest(item, listing))
    say(f"complete: {len(listing.files)} files, {bytes_text(listing.size)}, every checksum as the hub gives it -> {to}")
    return to


def describe(item: Item, listing: Listing) -> list[str]:
    """What is printed before anything is loaded: what, how much, under which licence."""
    lines = [f"{item.kind} {item.repo} at {listing.commit[:12]}: {len(listing.files)} files, {bytes_text(listing.size)}"]
    stated = listing.licence or "none stated"
    if item.licence:
        lines.append(f"licence: {item.licence} ({item.licence_url}); the hub's card says: {stated}")
    else:
        lines.append(f"licence: the hub's card says: {stated} (https://{item.page}); read it before you use the files")
    if item.terms:
        lines.append(f"  note its terms: {item.terms}")
    if listing.gated:
        lines.append("  gated: its terms must be accepted on its page by the account whose token is in HF_TOKEN")
    if item.note:
        lines.append(f"  note: {item.note}")
    return lines


def paste(item: Item, to: Path) -> str:
    """The line of a recipe that uses what lies in `to`."""
    if item.kind == "model":
        return f'start = "{to.as_posix()}"'
    if item.recipe or item.note:  # a known data set without a line cannot be read as it is; its note says what to do
        return item.recipe.replace("{to}", to.as_posix())
    kinds = {"*.parquet": "parquet", "*.jsonl": "jsonl", "*.jsonl.gz": "jsonl"}
    for pattern, source in kinds.items():
        if any(to.rglob(pattern)):
            return f'sources = [{{ type = "{source}", path = "{to.as_posix()}/**/{pattern}" }}]'
    return ""


# ---------------------------------------------------------------- the manifest


def _manifest(item: Item, listing: Listing) -> dict[str, Any]:
    files = {file.name: {"size": file.size, file.algorithm: file.digest} for file in listing.files}
    return {
        "format": FORMAT,
        "kind": item.kind,
        "repo": item.repo,
        "asked": item.revision,
        "revision": listing.commit,
        "patterns": list(item.patterns()),
        "licence": item.licence or listing.licence,
        "licence_on_hub": listing.licence,
        "licence_url": item.licence_url or f"https://{item.page}",
        "files": files,
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `k2 fetch` wrote about a folder, or None. Raises DataError for a manifest that cannot be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read: {error}", next="Remove it and fetch again") from None
    return found


def _same(item: Item, done: dict[str, Any]) -> bool:
    wanted = item.revision in (done["asked"], done["revision"])
    return done["repo"] == item.repo and done["kind"] == item.kind and wanted and done["patterns"] == list(item.patterns())


def sizes(folder: Path, done: dict[str, Any]) -> list[str]:
    """Files of a manifest that are missing or have another size; quick."""
    found = []
    for name, facts in done["files"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != facts["size"]:
            found.append(f"{name} has {path.stat().st_size:,} bytes instead of {facts['size']:,}")
    return found


def verify(folder: Path) -> list[str]:
    """Every file of a fetched folder against the hub's checksum; what is wrong, one line each. Reads everything."""
    done = read_manifest(folder)
    if done is None:
        return [f"{folder} has no {MANIFEST}: the download is not complete"]
    return [*sizes(folder, done), *_wrong(folder, done)]


def _wrong(folder: Path, done: dict[str, Any]) -> Iterator[str]:
    for name, facts in done["files"].items():
        algorithm = "sha256" if "sha256" in facts else "git-sha1"
        path = folder / name
        right_size = path.is_file() and path.stat().st_size == facts["size"]
        if right_size and digest_of(path, algorithm, facts["size"]).hexdigest() != facts[algorithm]:
            yield f"{name} was changed: its {algorithm} differs from the hub's"


# ---------------------------------------------------------------- on a terminal


def rows(path: Path | None = None) -> list[tuple[str, str]]:
    """(name, one line about it) of every known name."""
    found = []
    for item in table(path).values():
        number = item.size()
        about = f"{item.kind}, {item.repo}, {item.licence or 'licence: see its card'}"
        found.append((item.name, about + (f", about {bytes_text(number)} (computed)" if number else "")))
    return found


class Meter:
    """Prints progress: a line that is overwritten on a terminal, one every ten seconds elsewhere."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.began, self.last = stream, time.monotonic(), 0.0
        self.first: int | None = None
        self.live = bool(getattr(stream, "isatty", lambda: False)())

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.last < (0.5 if self.live else 10.0) and done < total:
            return
        self.last = now
        rate = (done - self.first) / max(1e-9, now - self.began)
        text = f"  {bytes_text(done)} of {bytes_text(total)}, {bytes_text(rate)}/s"
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(f"\r{text:<60}" if self.live else text + "\n")
            if self.live and done >= total:
                self.stream.write("\n")
            self.stream.flush()
