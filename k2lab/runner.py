"""Walks a recipe's stages: what exists is reused, what was begun is resumed, the rest is made. Never deletes finished work."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k2lab import __version__
from k2lab.core import artifacts, memory
from k2lab.core.artifacts import Artifact, write_json
from k2lab.core.errors import K2Error, MachineError, RecipeError, SandboxError
from k2lab.core.events import EventWriter
from k2lab.core.recipe import Recipe, StageEntry, to_toml
from k2lab.core.stage import StageContext, identity_table


@dataclass
class PlannedStage:
    """A stage with its identity and what will happen to it: "reuse", "resume" or "new"."""

    entry: StageEntry
    identity: str
    path: Path
    action: str

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".partial")


@dataclass
class Outcome:
    """What a run did: finished artifacts by stage name, stages that this machine could not run (and why), and seconds in all."""

    done: dict[str, Artifact] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def survey(recipe: Recipe, run_dir: Path, only: str | None = None) -> list[PlannedStage]:
    """Every stage of the recipe with its identity and whether it is reused, resumed or new. Reads only."""
    planned: list[PlannedStage] = []
    identities: dict[str, str] = {}
    needed = _needed(recipe, only)
    for entry in recipe.stages:
        if entry.name not in needed:
            continue
        parents = {
            f"{role}[{n}]": identities[ref] if ref in identities else outside_identity(ref)
            for role, refs in entry.parents.items()
            for n, ref in enumerate(refs)
        }
        table = identity_table(entry.config)
        if type(entry.config).uses_model and "start[0]" not in parents:
            table["model"] = model_table(recipe.model)
        identity = artifacts.identity(table, parents, type(entry.config).version, recipe.seed)
        identities[entry.name] = identity
        path = run_dir / "stages" / artifacts.folder_name(entry.name, identity)
        stage = PlannedStage(entry, identity, path, "new")
        if artifacts.exists(path):
            stage.action = "reuse"
        elif stage.partial.is_dir():
            stage.action = "resume"
        planned.append(stage)
    return planned


def _needed(recipe: Recipe, only: str | None) -> set[str]:
    if only is None:
        return {entry.name for entry in recipe.stages}
    needed, todo = set(), [recipe.stage(only).name]
    while todo:
        entry = recipe.stage(todo.pop())
        needed.add(entry.name)
        for refs in entry.parents.values():
            todo += [ref for ref in refs if ref not in needed and ref in {e.name for e in recipe.stages}]
    return needed


def model_table(model: Any) -> Any:
    """The recipe's model as the plain table of its spec: what the identity depends on."""
    from k2lab import specs

    if model is None:
        return None
    spec = specs.from_recipe(model)
    return {**spec.config(), "local_heads": list(spec.local_heads)}  # how it begins is no part of config.json


def outside_identity(reference: str) -> str:
    """Identity of an artifact or model directory outside the run: its manifest's, else a hash of its files."""
    path = Path(reference)
    if artifacts.exists(path):
        return artifacts.open_artifact(path).identity
    if not path.is_dir():
        return f"missing:{reference}"
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(path).as_posix()}:{size}:".encode())
            with file.open("rb") as handle:
                digest.update(handle.read(1 << 20))
                if size > 2 << 20:
                    handle.seek(-(1 << 20), os.SEEK_END)
                    digest.update(handle.read())
    return digest.hexdigest()


def open_outside(reference: str, kind: str) -> Artifact:
    """A parent given by path: an artifact, or a bare model directory treated as a checkpoint."""
    path = Path(reference)
    if artifacts.exists(path):
        return artifacts.open_artifact(path, kind=kind)
    if kind == "checkpoint" and (path / "config.json").is_file():
        return Artifact(path, {"kind": kind, "name": path.name, "identity": outside_identity(reference), "files": {}})
    raise RecipeError(f"{reference!r} is not a {kind} here", next="Give the path of one that exists on this machine")


def run(
    recipe: Recipe,
    run_dir: Path,
    *,
    only: str | None = None,
    device: str = "auto",
    command: str = "",
    listeners: Callable[[EventWriter], list[Callable[[dict[str, Any]], None]]] | None = None,
    say: Callable[[str], None] = print,
    own_recipe: bool = True,
) -> Outcome:
    """Runs every stage that is not finished yet. Raises K2Error with the earlier stages' work intact.

    A stage class may have `provision() -> str`, which says in one line what of the machine the stage uses, or raises; it is asked
    before anything runs. If it raises SandboxError or MachineError and the class says `optional = True`, the stage (and what is
    made from it) is skipped, the others run, and the outcome says so; a SandboxError while such a stage runs does the same.
    `own_recipe=False` (an evaluation inside somebody's run) leaves the run directory's recipe and environment files as they are.
    """
    began = time.perf_counter()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with artifacts.disk_errors(run_dir):
        (run_dir / "stages").mkdir(parents=True, exist_ok=True)
    lock = _lock(run_dir) if rank == 0 else None
    events = EventWriter(run_dir / "events", writer=f"rank{rank}", run=recipe.name, enabled=rank == 0)
    events.listeners = listeners(events) if listeners is not None and rank == 0 else []
    outcome = Outcome()
    try:
        if rank == 0 and (own_recipe or not (run_dir / "recipe.resolved.toml").is_file()):
            _write_facts(recipe, run_dir, device, command)
        planned = survey(recipe, run_dir, only)
        for stage in planned:
            if stage.action != "reuse":
                stage.entry.config.check_ranks(f"stage.{stage.entry.name}", world)
        identities = {stage.entry.name: stage.identity for stage in planned}
        events.emit("run_start", step=0, recipe=recipe.name, versions=_versions(), device=device, stages=identities)
        finished = outcome.done
        outcome.skipped = _provision(planned, say if rank == 0 else lambda text: None)
        for stage in planned:
            name = stage.entry.name
            reason = outcome.skipped.get(name) or _lacks_parent(stage, outcome.skipped)
            if not reason:
                try:
                    finished[name] = _run_stage(stage, recipe, finished, events, rank, world, device, say)
                except SandboxError as error:
                    if not _is_optional(stage) or world > 1:  # other ranks know nothing of it
                        raise
                    reason = str(error)
            if reason:
                outcome.skipped[name] = reason
                events.stage, events.step = name, 0
                events.emit("stage_skipped", reason=reason)
                _remove_empty(stage.partial)
                if rank == 0:
                    say(f"{name}: not run. {reason}")
        outcome.seconds = time.perf_counter() - began
        return outcome
    finally:
        events.close()
        if lock is not None:
            lock.close()


def _is_optional(stage: PlannedStage) -> bool:
    return getattr(type(stage.entry.config), "optional", False)


def _provision(planned: list[PlannedStage], say: Callable[[str], None]) -> dict[str, str]:
    """Asks the stages that are to run whether the machine has what they need; {optional stage: what is missing}."""
    skipped = {}
    for stage in planned:
        ask = getattr(stage.entry.config, "provision", None)
        if ask is None or stage.action == "reuse":
            continue
        try:
            say(f"{stage.entry.name}: {ask()}")
        except (SandboxError, MachineError) as error:
            if not _is_optional(stage):
                raise
            skipped[stage.entry.name] = str(error)
    return skipped


def _lacks_parent(stage: PlannedStage, skipped: dict[str, str]) -> str:
    lacking = [ref for refs in stage.entry.parents.values() for ref in refs if ref in skipped]
    return f"It needs {lacking[0]}, which was not run." if stage.action != "reuse" and lacking else ""


def _remove_empty(partial: Path) -> None:
    """Removes a directory in which a skipped stage has left nothing but the runner's own note."""
    if partial.is_dir() and {path.name for path in partial.iterdir()} <= {SECONDS}:
        shutil.rmtree(partial)


def _run_stage(
    stage: PlannedStage,
    recipe: Recipe,
    finished: dict[str, Artifact],
    events: EventWriter,
    rank: int,
    world: int,
    device: str,
    say: Callable[[str], None],
) -> Artifact:
    entry = stage.entry
    events.stage, events.step = entry.name, 0
    if stage.action == "reuse":
        if rank == 0:
            say(f"{entry.name}: reused ({stage.path.name})")
        return artifacts.open_artifact(stage.path, kind=type(entry.config).kind)
    parents: dict[str, Any] = {}
    hints = {role: isinstance(getattr(entry.config, role), tuple) for role in entry.parents}
    from k2lab.core.stage import parent_fields

    markers = parent_fields(type(entry.config))
    for role, refs in entry.parents.items():
        opened = [finished[ref] if ref in finished else open_outside(ref, markers[role].kind) for ref in refs]
        parents[role] = opened if hints[role] else opened[0]
    partial = stage.partial
    resumed = partial.is_dir()
    began, seconds_before = time.perf_counter(), _seconds_before(partial)
    if rank == 0:
        say(f"{entry.name}: {'resumed' if resumed else 'new'} ({stage.path.name})")
        with artifacts.disk_errors(partial):
            partial.mkdir(parents=True, exist_ok=True)
    memory.reset_peak()
    ctx = StageContext(
        name=entry.name,
        identity=stage.identity,
        seed=recipe.seed,
        work=partial,
        model=recipe.model,
        parents=parents,
        events=events,
        rank=rank,
        world=world,
        device=device,
        options={"resumed": resumed, "type": entry.type, "seconds_before": seconds_before},
    )
    try:
        _execute(entry, ctx, rank, world)
    except BaseException as error:
        events.emit("stage_failed", error=str(error) or type(error).__name__)
        with artifacts.disk_errors(partial):
            raise
    finally:
        if rank == 0 and partial.is_dir():
            _note_seconds(partial, seconds_before + time.perf_counter() - began)
    seconds = seconds_before + time.perf_counter() - began
    if rank == 0:
        _finish(stage, recipe, parents, ctx, seconds)
    _barrier(world)
    artifact = artifacts.open_artifact(stage.path, kind=type(entry.config).kind)
    events.emit("stage_end", seconds=round(seconds, 3), peak_rss_mb=memory.peak_rss_mb(), artifact=stage.path.name)
    return artifact


def _execute(entry: StageEntry, ctx: StageContext, rank: int, world: int) -> None:
    if type(entry.config).distributed or rank == 0:
        if not type(entry.config).distributed:
            ctx.events.emit("stage_start", step=0, type=entry.type, identity=ctx.identity, total=None, unit="", resumed=False)
        entry.config.run(ctx)
    _barrier(world)


def _barrier(world: int) -> None:
    if world > 1:
        from k2lab.dist import mesh

        mesh.init()
        mesh.barrier()


def _finish(stage: PlannedStage, recipe: Recipe, parents: dict[str, Any], ctx: StageContext, seconds: float) -> None:
    from k2lab.core import schema

    listed = {}
    for role, value in parents.items():
        many = value if isinstance(value, list) else [value]
        for n, item in enumerate(many):
            listed[role if len(many) == 1 else f"{role}[{n}]"] = {"name": item.name, "identity": item.identity}
    licences = list(ctx.facts.pop("licences", []))
    for value in parents.values():
        for item in value if isinstance(value, list) else [value]:
            licences += [text for text in item.manifest.get("licences", []) if text not in licences]
    manifest = {
        "kind": type(stage.entry.config).kind,
        "name": stage.entry.name,
        "type": stage.entry.type,
        "identity": stage.identity,
        "parents": listed,
        "stage": schema.to_table(stage.entry.config),
        "seed": recipe.seed,
        "seconds": round(seconds, 3),
        "peak_rss_mb": memory.peak_rss_mb(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": _versions(),
        "device": ctx.options.get("device", "cpu"),
        "licences": licences,
        **ctx.facts,
    }
    for scratch in ("checkpoints", "best", SECONDS):
        path = ctx.work / scratch
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    artifacts.finish(stage.partial, stage.path, manifest)


SECONDS = ".seconds"


def _seconds_before(partial: Path) -> float:
    try:
        return float((partial / SECONDS).read_text())
    except (OSError, ValueError):
        return 0.0


def _note_seconds(partial: Path, seconds: float) -> None:
    try:
        (partial / SECONDS).write_text(f"{seconds:.3f}")
    except OSError:
        pass


def _lock(run_dir: Path):
    handle = (run_dir / ".lock").open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise MachineError(
            f"another run (process {holder}) is using this directory",
            where=str(run_dir),
            next="Wait for it to end, or choose another --run-dir; nothing was changed",
        ) from None
    handle.seek(0)
    handle.truncate()
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def _write_facts(recipe: Recipe, run_dir: Path, device: str, command: str) -> None:
    with artifacts.disk_errors(run_dir):
        if recipe.source.resolve() != (run_dir / "recipe.resolved.toml").resolve():
            (run_dir / "recipe.toml").write_text(recipe.source.read_text(encoding="utf-8"), encoding="utf-8")
        text = f"# Resolved from {recipe.name}; every value, defaults included.\n{to_toml(recipe.resolved())}"
        (run_dir / "recipe.resolved.toml").write_text(text, encoding="utf-8")
        write_json(run_dir / "env.json", environment(recipe.name, device, command))


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"k2lab": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def environment(recipe: str, device: str, command: str) -> dict[str, Any]:
    """Facts about machine and versions, without names, tokens or paths of the user."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    facts: dict[str, Any] = {
        "recipe": recipe,
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": _versions(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": device,
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
    try:
        facts["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError):
        pass
    return facts


def write_report(run_dir: Path) -> Path | None:
    """The report of a run directory; a failure to write it is said, and never hides the run's own result."""
    from k2lab.report import html

    try:
        return html.write(run_dir)
    except (K2Error, OSError, ValueError, KeyError) as error:
        print(f"the report could not be written: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def ignore_hangup() -> None:
    """SIGTERM ends a run like Ctrl-C: the report is still written and the lock released."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
