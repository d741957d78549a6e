"""Reads a run directory into one `RunView`: which artifact of each stage is the present one, and what its log says.

A run directory may hold artifacts of several versions of its recipe, half-written ones, and a log of attempts that were killed.
The present artifact of a stage is the one whose recorded stage table agrees with `recipe.resolved.toml` and whose parents are
the present artifacts of the earlier stages.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from k2lab.core import artifacts, events
from k2lab.core.errors import DataError
from k2lab.report.figures import number

Status = Literal["done", "failed", "unfinished", "waiting", "skipped"]
RESULTS = "results.json"
TIMINGS = "timings.json"  # of the same form, apart because it differs from run to run
RESULTS_FORMATS = (0, 1)  # of results.json: this version's and the one before
PREFERENCE = "preference.json"
PASS_RATES = "pass_rates.jsonl"


@dataclass(frozen=True)
class StageView:
    """One stage of the run: its artifact (if finished) and its events.

    `steps` holds one event per optimizer step in order; `seconds` and `peak_rss_mb` come from the manifest, or for a stage
    that is not finished from its events; `log_matches` is False when the log on disk was written for another artifact.
    `preference` is what preference tuning found on held-out pairs, `pass_rates` the share of tries that solved each task.
    """

    name: str
    type: str
    status: Status
    table: dict[str, Any] = field(default_factory=dict)
    directory: Path | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    valid: list[dict[str, Any]] = field(default_factory=list)
    funnel: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    reached: int | None = None
    total: int | None = None
    unit: str = "steps"
    started: float | None = None
    seconds: float | None = None
    peak_rss_mb: float | None = None
    error: str = ""
    log_matches: bool = True
    results: dict[str, Any] | None = None
    preference: dict[str, Any] = field(default_factory=dict)
    pass_rates: list[float] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Kind of the artifact that the stage wrote."""
        return str(self.manifest.get("kind", ""))

    @property
    def identity(self) -> str:
        return str(self.manifest.get("identity", ""))

    @property
    def num_bytes(self) -> int:
        """Size of the artifact's files as its manifest lists them."""
        files = self.manifest.get("files") or {}
        return sum(int(number(facts.get("size")) or 0) for facts in files.values() if isinstance(facts, dict))

    def parents(self) -> list[tuple[str, str, str]]:
        """(role, name, identity) of every parent; list fields give one entry each."""
        return parents_of(self.manifest)


@dataclass(frozen=True)
class RunView:
    """A whole run directory. `stages` are in the recipe's order; `others` are artifacts that the present recipe does not use."""

    path: Path
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    resolved_text: str
    env: dict[str, Any]
    run_start: dict[str, Any]
    stages: list[StageView]
    others: list[str]
    problems: list[str]

    def stage(self, name: str) -> StageView | None:
        """The stage called `name`, or None."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def finished(self) -> bool:
        return bool(self.stages) and all(stage.status == "done" for stage in self.stages)

    @property
    def total_seconds(self) -> float:
        """Sum over stages: what making everything from nothing took, stages reused from an earlier command included."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def started(self) -> Any:
        """When the first stage began (seconds since 1970, or what the oldest manifest says), or None."""
        times = [stage.started for stage in self.stages if stage.started is not None]
        if times:
            return min(times)
        return self.run_start.get("t") or next((s.manifest["created"] for s in self.stages if s.manifest.get("created")), None)


def collect(run_dir: Path) -> RunView:
    """Reads everything the report needs from `run_dir`.

    Unreadable optional files are listed in `problems`, not raised. Raises DataError if `run_dir` is no run directory.
    """
    run_dir = Path(run_dir)
    marks = ("recipe.resolved.toml", "recipe.toml", "events", "stages", "env.json")
    if not any((run_dir / mark).exists() for mark in marks):
        raise DataError(
            "this is not a run directory",
            where=str(run_dir),
            allowed="a folder with " + ", ".join(marks),
            next="Give the --run-dir of a run",
        )
    problems: list[str] = []
    resolved_text = _text(run_dir / "recipe.resolved.toml", problems)
    recipe_text = _text(run_dir / "recipe.toml", problems)
    recipe = _toml(resolved_text, "recipe.resolved.toml", problems) or _toml(recipe_text, "recipe.toml", problems)
    env = _json(run_dir / "env.json", problems)
    history = events.read(run_dir / "events")
    manifests = _manifests(run_dir / "stages", problems)
    run_start: dict[str, Any] = next((event for event in reversed(history) if event["kind"] == "run_start"), {})
    stages = _stages(recipe, run_start, history, manifests, problems)
    used = {stage.directory for stage in stages}
    others = sorted(path.name for path in manifests if path not in used)
    name = recipe.get("name") or _recipe_name(run_start.get("recipe") or env.get("recipe")) or run_dir.resolve().name
    return RunView(run_dir, str(name), recipe, recipe_text, resolved_text, env, run_start, stages, others, problems)


def parents_of(manifest: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(role, name, identity) of every parent recorded in a manifest."""
    found = []
    for role, value in (manifest.get("parents") or {}).items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                found.append((str(role), str(item.get("name") or item.get("path") or role), str(item.get("identity", ""))))
            elif isinstance(item, str):
                found.append((str(role), item, ""))
    return found


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error.strerror}")
        return ""


def _toml(text: str, name: str, problems: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{name} is not TOML: {error}")
        return {}


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(path, problems)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        problems.append(f"{path.name} in {path.parent.name} is not JSON: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _manifests(folder: Path, problems: list[str]) -> dict[Path, dict[str, Any]]:
    """Finished artifacts by directory. A `.partial` directory is not finished, whatever it holds."""
    found = {}
    for path in sorted(folder.glob(f"*/{artifacts.MANIFEST}")):
        if path.parent.name.endswith(".partial"):
            continue
        manifest = _json(path, problems)
        if manifest.get("format") in (artifacts.FORMAT, artifacts.FORMAT - 1):
            found[path.parent] = manifest
        elif manifest:
            problems.append(
                f"{path.parent.name} has artifact format {manifest.get('format')!r}, which this version does not read"
            )
    return found


def _recipe_name(value: Any) -> str:
    """The recipe's name from a run_start event, which may carry a name, a path or a table."""
    if isinstance(value, dict):
        value = value.get("name") or value.get("path")
    if not isinstance(value, str):
        return ""
    return Path(value).stem if value.endswith(".toml") else value


def _stages(
    recipe: dict[str, Any],
    run_start: dict[str, Any],
    history: list[dict[str, Any]],
    manifests: dict[Path, dict[str, Any]],
    problems: list[str],
) -> list[StageView]:
    given = run_start.get("stages")
    planned: dict[str, Any] = given if isinstance(given, dict) else {}
    tables: dict[str, dict[str, Any]] = {}
    listed = recipe.get("stage")
    for table in listed if isinstance(listed, list) else []:
        if isinstance(table, dict) and not table.get("skip"):
            tables[str(table.get("name") or table.get("type") or "stage")] = table
    logs: dict[str, list[dict[str, Any]]] = {}
    for event in history:
        if event.get("stage"):
            logs.setdefault(event["stage"], []).append(event)
    names = list(tables)
    if not names:  # no recipe: every stage that left a trace, in the order in which it did
        names = list(logs)
        for manifest in sorted(manifests.values(), key=lambda item: str(item.get("created", ""))):
            if str(manifest.get("name", "")) not in names:
                names.append(str(manifest.get("name", "")))
    chosen: dict[str, str] = {}
    stages = []
    for name in names:
        log = logs.get(name, [])
        if log and log[-1]["kind"] == "stage_skipped":
            log = log[-1:]  # what came before tells of another artifact, or of an attempt that is void
        if planned.get(name):  # the run itself said which artifact it wants
            fitting = (path for path, m in manifests.items() if _same(str(m.get("identity", "")), str(planned[name])))
            directory = next((path for path in fitting if manifests[path].get("name") == name), None)
        else:
            directory = _present(name, tables.get(name), recipe, log, manifests, chosen)
        if directory is None and any(_same(str(m.get("identity", "")), _logged_identity(log)) for m in manifests.values()):
            log = []  # it tells of a finished artifact that is not the present one
        stage = _stage(name, tables.get(name, {}), log, directory, manifests.get(directory, {}) if directory else {}, problems)
        chosen[name] = stage.identity  # empty if there is none: what was made from an older one does not fit either
        stages.append(stage)
    return stages


def _present(
    name: str,
    table: dict[str, Any] | None,
    recipe: dict[str, Any],
    log: list[dict[str, Any]],
    manifests: dict[Path, dict[str, Any]],
    chosen: dict[str, str],
) -> Path | None:
    """The directory of the artifact that belongs to the present recipe, or None if there is none (yet)."""
    logged = _logged_identity(log)
    fitting = []
    for path, manifest in manifests.items():
        if manifest.get("name") != name:
            continue
        is_logged = _same(str(manifest.get("identity", "")), logged)
        parents_fit = all(_same(identity, chosen[parent]) for _, parent, identity in parents_of(manifest) if parent in chosen)
        table_fits = table is None or _agree(manifest.get("stage"), table)
        table_fits = table_fits and all(_agree(manifest.get(key), recipe.get(key)) for key in ("seed", "model"))
        if parents_fit and (is_logged or (table_fits and (table is not None or not logged))):
            fitting.append(((table_fits, is_logged, str(manifest.get("created", ""))), path))
    return max(fitting)[1] if fitting else None


def _logged_identity(log: list[dict[str, Any]]) -> str:
    return next((str(e.get("identity") or "") for e in reversed(log) if e["kind"] == "stage_start"), "")


def _same(left: str, right: str) -> bool:
    """Identities are compared by their common prefix: directories and logs may carry the first 8 digits only."""
    length = min(len(left), len(right))
    return length >= 8 and left[:length] == right[:length]


def _agree(left: Any, right: Any) -> bool:
    """True if no key that both tables have differs. Paths do not count: they are no part of an artifact's identity."""
    if isinstance(left, dict) and isinstance(right, dict):
        return all(_agree(left[key], right[key]) for key in (left.keys() & right.keys()) - {"path", "paths"})
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_agree(a, b) for a, b in zip(left, right))
    if left is None or right is None or isinstance(left, (dict, list)) or isinstance(right, (dict, list)):
        return True  # absent on one side, or a name on one side and its table on the other: nothing to compare
    return bool(left == right)


def _stage(
    name: str,
    table: dict[str, Any],
    log: list[dict[str, Any]],
    directory: Path | None,
    manifest: dict[str, Any],
    problems: list[str],
) -> StageView:
    logged = _logged_identity(log)
    identity = str(manifest.get("identity", ""))
    matches = not (logged and identity) or _same(logged, identity)
    if not matches:
        log = []
    starts = [event for event in log if event["kind"] == "stage_start"]
    ends = [event for event in log if event["kind"] == "stage_end"]
    error = next((str(e.get("error") or e.get("text") or "failed") for e in reversed(log) if _is_failure(e, log)), "")
    skipped = next((str(e.get("reason", "")) for e in reversed(log) if e["kind"] == "stage_skipped"), None)
    status: Status = "done" if directory else "failed" if error else "unfinished" if log else "waiting"
    if skipped is not None and not directory:
        status, error = "skipped", skipped
    steps = {e["step"]: e for e in log if e["kind"] == "step" and number(e.get("step")) is not None}
    results = None
    if directory and (directory / RESULTS).is_file():
        results = _json(directory / RESULTS, problems)
        if results.get("format", 1) not in RESULTS_FORMATS:
            problems.append(f"{RESULTS} of {directory.name} has format {results['format']!r}, which this version does not read")
            results = None
        elif (directory / TIMINGS).is_file():
            results = _with_timings(results, _json(directory / TIMINGS, problems))
    reached = max((int(e["step"]) for e in log if e["kind"] in ("step", "progress")), default=None)
    total = number(starts[-1].get("total")) if starts else None
    kind = str(table.get("type") or manifest.get("type") or (starts[-1].get("type") if starts else None) or name)
    return StageView(
        name=name,
        type=kind,
        status=status,
        table=table or manifest.get("stage") or {},
        directory=directory,
        manifest=manifest,
        steps=[steps[step] for step in sorted(steps)],
        valid=sorted((e for e in log if e["kind"] == "valid"), key=lambda e: e["step"]),
        funnel=_last_of_each_filter(log),
        notes=list(dict.fromkeys(str(e.get("text", "")) for e in log if e["kind"] == "note")),
        resumed_at=[int(e["step"]) for e in starts if e.get("resumed")],
        reached=reached,
        total=int(total) if total is not None else None,
        unit=str(starts[-1].get("unit") or "steps") if starts else "steps",
        started=min((t for t in (number(e["t"]) for e in log) if t is not None), default=None),
        seconds=None
        if status == "skipped"
        else _first(manifest.get("seconds"), ends[-1].get("seconds") if ends else None, _logged_seconds(log)),
        peak_rss_mb=_first(
            manifest.get("peak_rss_mb"),
            max((v for v in (number(e.get("peak_rss_mb")) for e in ends) if v is not None), default=None),
            max((v for v in (number(e.get("rss_mb")) for e in log) if v is not None), default=None),
        ),
        error="" if directory else error,
        log_matches=matches,
        results=results,
        preference=_json(directory / PREFERENCE, problems) if directory else {},
        pass_rates=_pass_rates(directory / PASS_RATES, problems) if directory else [],
    )


def _pass_rates(path: Path, problems: list[str]) -> list[float]:
    found = []
    for line in _text(path, problems).splitlines():
        try:
            rate = number(json.loads(line)["pass_rate"])
        except (ValueError, KeyError, TypeError):
            problems.append(f"a line of {path.name} in {path.parent.name} cannot be read")
            break
        if rate is not None:
            found.append(rate)
    return found


def _is_failure(event: dict[str, Any], log: list[dict[str, Any]]) -> bool:
    """A failure counts only if no later attempt began after it."""
    if event["kind"] not in ("stage_failed", "error") and not (event["kind"] == "stage_end" and event.get("error")):
        return False
    return all(e["attempt"] <= event["attempt"] for e in log if e["kind"] == "stage_start")


def _with_timings(results: dict[str, Any], timings: dict[str, Any]) -> dict[str, Any]:
    """The results with the metrics of a `timings.json` beside each model's own."""
    found = {
        model["name"]: model["metrics"]
        for model in timings.get("models") or []
        if isinstance(model, dict) and isinstance(model.get("metrics"), list) and isinstance(model.get("name"), str)
    }
    models = [
        {**model, "metrics": [*(model.get("metrics") or []), *found.get(str(model.get("name")), [])]}
        for model in results.get("models") or []
        if isinstance(model, dict)
    ]
    return {**results, "models": models}


def _first(*values: Any) -> float | None:
    return next((found for found in (number(value) for value in values) if found is not None), None)


def _logged_seconds(log: list[dict[str, Any]]) -> float | None:
    """Time between the first and the last event of each attempt, summed: pauses between attempts do not count."""
    spans: dict[Any, list[float]] = {}
    for event in log:
        moment = number(event.get("t"))
        if moment is not None:
            spans.setdefault(event.get("attempt"), []).append(moment)
    return sum(max(span) - min(span) for span in spans.values()) if spans else None


def _last_of_each_filter(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for event in log:
        if event["kind"] == "funnel":
            found[str(event.get("source", "")), str(event.get("filter", ""))] = event
    return list(found.values())
