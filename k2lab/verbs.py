"""What the verbs of `k2` do; `cli` parses, this calls. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from k2lab.core import recipe as recipes
from k2lab.core import slots
from k2lab.core.artifacts import exists, open_artifact
from k2lab.core.errors import DataError, K2Error, MachineError, RecipeError, did_you_mean

KINDS = {f"{kind}s": kind for kind in slots.ROOMS}


def do_run(args: argparse.Namespace) -> int:
    """`k2 run`."""
    recipe = recipes.load(args.recipe, args.overrides)
    if args.show:
        print(f"# recipe {recipe.name} ({recipe.source})\n" + recipes.describe(recipe))
        return 0
    run_dir = Path(args.run_dir or f"runs/{recipe.name.replace('/', '-')}")
    if args.dry_run:
        return _dry_run(recipe, run_dir, args.only)
    rank = int(os.environ.get("RANK", "0"))
    say = _say if rank == 0 else _silent
    say(f"k2 run {recipe.name} -> {run_dir}" + (f"   ({recipe.description})" if recipe.description else ""))
    if not args.quiet:
        say(
            "# every value of this run, and where it comes from (also in recipe.resolved.toml)\n"
            + recipes.describe(recipe)
            + "\n"
        )
    return _execute(recipe, run_dir, args, say)


def _execute(recipe: recipes.Recipe, run_dir: Path, args: argparse.Namespace, say: Any) -> int:
    from k2lab import runner

    rank = int(os.environ.get("RANK", "0"))
    began = time.perf_counter()
    runner.ignore_hangup()
    failure: BaseException | None = None
    outcome = runner.Outcome()
    try:
        outcome = runner.run(
            recipe,
            run_dir,
            only=getattr(args, "only", None),
            device=args.device,
            command="k2 " + shlex.join(sys.argv[1:]),
            listeners=lambda events: _listeners(args.quiet, run_dir),
            say=say,
        )
    except (K2Error, KeyboardInterrupt) as error:
        failure = error
    finally:
        if "torch" in sys.modules and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from k2lab.dist import mesh

            mesh.close()
    in_use = isinstance(failure, K2Error) and "using this directory" in failure.what
    if rank == 0 and not in_use and (run_dir / "stages").is_dir():
        page = runner.write_report(run_dir)
        if failure is None:
            from k2lab.core.progress import clock
            from k2lab.report import rows

            print("\n" + rows.summary_text(run_dir))
            print(f"\ndone in {clock(time.perf_counter() - began)}")
            if page:
                print(f"report:   {page}")
            print(f"numbers:  k2 report {run_dir} --json")
            print(f"next:     k2 eval {run_dir} --prompts-jsonl prompts.jsonl   |   k2 plan k2/continual_pretrain")
    if failure is not None:
        raise failure
    for name, reason in outcome.skipped.items() if rank == 0 else ():
        print(f"\nk2 run: {name} was not run: {reason} Everything else is done.", file=sys.stderr)
    return MachineError.exit_code if outcome.skipped else 0


def _listeners(quiet: bool, run_dir: Path) -> list[Any]:
    from k2lab.core.progress import Progress
    from k2lab.core.trackers import from_environment

    return [Progress(quiet=quiet), *from_environment(run_dir)]


def _dry_run(recipe: recipes.Recipe, run_dir: Path, only: str | None) -> int:
    from k2lab import runner

    print(f"{recipe.name} -> {run_dir}")
    for stage in runner.survey(recipe, run_dir, only):
        print(f"  {stage.action:<7} {stage.entry.name:<24} {stage.entry.type:<12} {stage.path.name}")
    return 0


def do_plan(args: argparse.Namespace) -> int:
    """`k2 plan`."""
    from k2lab import specs
    from k2lab.plan import machines
    from k2lab.plan import report as planning

    recipe = recipes.load(args.recipe, args.overrides)
    machine = machines.get(args.machine or "laptop", Path(args.machines) if args.machines else None)
    gpus = args.gpus if args.gpus is not None else max(1, machine.gpus)
    spec = specs.from_recipe(recipe.model) if recipe.model is not None else None
    inputs, about = _plan_inputs(recipe, spec, gpus)
    measured = Path(args.measured) if args.measured else None
    result = planning.plan(inputs, machine, measured=measured, recipe=about)
    print(json.dumps(result.json(), indent=1) if args.json else result.text())
    return 0


def _plan_inputs(recipe: recipes.Recipe, spec: Any, gpus: int) -> tuple[list[Any], Any]:
    """What each stage tells the planner, and what it names beside. A stage's model is that of the checkpoint it begins from (an
    earlier stage's, a folder's, a fetched name's), else the recipe's."""
    from dataclasses import replace

    from k2lab import fetch
    from k2lab.core import schema
    from k2lab.core.stage import parent_fields
    from k2lab.plan.beside import Recipe

    inputs, tables, roles, made = [], {}, {}, {}
    for entry in recipe.stages:
        kinds = parent_fields(type(entry.config))
        named = {}
        for role, refs in entry.parents.items():
            if kinds[role].kind == "checkpoint":
                for n, ref in enumerate(refs):
                    key = role if len(refs) == 1 else f"{role}[{n}]"
                    named[key] = made[ref] if ref in made else fetch.spec_of(ref) or spec
        own = named.get("start") or next(iter(named.values()), spec)
        told = entry.config.plan_inputs(entry.name, own, gpus)
        if told.kind == "cpu" and named and own is not None:
            # It reads models and says nothing of itself: it asks or measures them, one after the other, whole.
            window = max(256, int(getattr(entry.config, "seq_len", 0)), int(getattr(entry.config, "max_tokens", 0)))
            largest = max(named.values(), key=lambda one: one.total())
            told = replace(told, kind="sample", model=largest, seq_len=window, per_device_batch=1, gpus=gpus)
        inputs.append(told)
        tables[entry.name] = schema.to_table(entry.config)
        roles[entry.name] = {key: value for key, value in named.items() if value is not None}
        if type(entry.config).kind == "checkpoint":
            made[entry.name] = told.model
    return inputs, Recipe(tables, roles)


def do_report(args: argparse.Namespace) -> int:
    """`k2 report`."""
    from k2lab.report import html, rows

    run_dir = Path(args.run)
    if not (run_dir / "stages").is_dir():
        raise DataError(f"{run_dir} is not a run directory: it has no stages/", next="Give a directory that `k2 run` wrote")
    if args.json:
        print(json.dumps(rows.summary(run_dir), indent=1))
        return 0
    page = html.write(run_dir, Path(args.out) if args.out else None)
    print(rows.summary_text(run_dir))
    print(f"\nreport:   {page}")
    return 0


def do_eval(args: argparse.Namespace) -> int:
    """`k2 eval`."""
    target, run_dir = _eval_target(Path(args.path))
    overrides = [
        f"stage.evaluate.{text}" if not text.startswith(("stage.", "seed", "model")) else text for text in args.overrides
    ]
    models = json.dumps(target)
    if args.prompts_jsonl:
        if not Path(args.prompts_jsonl).is_file():
            raise DataError(f"there is no file {args.prompts_jsonl}", next='Give a file of {"prompt": "..."} lines')
        overrides.append(f"stage.evaluate.prompts_jsonl={json.dumps(args.prompts_jsonl)}")
    source = str(run_dir / "recipe.resolved.toml") if run_dir else "eval"
    recipe = recipes.load(source, [f"stage.evaluate.models={models}", *overrides])
    out_dir = Path(args.run_dir) if args.run_dir else run_dir or Path("runs/eval")
    args.only = "evaluate"
    from k2lab import runner

    say = _silent if args.json else _say
    runner.ignore_hangup()
    done = runner.run(
        recipe,
        out_dir,
        only="evaluate",
        device=args.device,
        command="k2 " + shlex.join(sys.argv[1:]),
        listeners=lambda events: _listeners(args.quiet or args.json, out_dir),
        say=say,
        own_recipe=run_dir is None,
    )
    results = json.loads((done.done["evaluate"].path / "results.json").read_text(encoding="utf-8"))
    if args.json:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        return 0
    from k2lab.report import rows

    print(rows.results_text(results))
    print(f"\nresults:  {done.done['evaluate'].path / 'results.json'}")
    return 0


def _eval_target(path: Path) -> tuple[list[str], Path | None]:
    """What `models` of the evaluate stage become, and the run directory whose recipe and data apply (None: the shipped ones)."""
    if (path / "recipe.resolved.toml").is_file():
        recipe = recipes.load(str(path / "recipe.resolved.toml"))
        names = [entry.name for entry in recipe.stages if type(entry.config).kind == "checkpoint"]
        return [name for name in names if any((path / "stages").glob(f"{name}-*/manifest.json"))], path
    if path.is_dir() and (path / "config.json").is_file():
        run_dir = path.parent.parent
        if path.parent.name == "stages" and (run_dir / "recipe.resolved.toml").is_file() and exists(path):
            return [open_artifact(path).name], run_dir
        return [str(path)], None
    run_dir, name = path.parent, path.name
    if (run_dir / "recipe.resolved.toml").is_file():
        recipe = recipes.load(str(run_dir / "recipe.resolved.toml"))
        known = [entry.name for entry in recipe.stages if type(entry.config).kind == "checkpoint"]
        if name not in known:
            raise RecipeError(
                f"{run_dir} has no stage {name!r} with a model", allowed=", ".join(known), next=did_you_mean(name, known)
            )
        return [name], run_dir
    raise DataError(
        f"{path} is no run directory, no RUN/STAGE and no model directory (with config.json)",
        next="Give for example runs/tiny, runs/tiny/sft or a directory that holds config.json and *.safetensors",
    )


def do_doctor(args: argparse.Namespace) -> int:
    """`k2 doctor`."""
    from k2lab.doctor import examine, text

    facts = examine()
    print(json.dumps(facts, indent=1) if args.json else text(facts))
    return 0 if facts["ok"] else 3


def do_list(args: argparse.Namespace) -> int:
    """`k2 list`."""
    what = args.what
    sections: dict[str, Any] = {"recipes": _recipe_rows, "specs": _spec_rows, "machines": _machine_rows}
    sections |= {name: (lambda kind=kind: _slot_rows(kind)) for name, kind in KINDS.items()}
    if what != "all" and what not in sections:
        raise RecipeError(f"nothing is called {what!r}", allowed="all, " + ", ".join(sections), next=did_you_mean(what, sections))
    for name, rows in sections.items():
        if what in ("all", name):
            found = rows()
            width = max((len(left) for left, _ in found), default=0)
            print(f"{name}:")
            for left, right in found:
                print(f"  {left:<{width}}  {right}")
    return 0


def _slot_rows(kind: str) -> list[tuple[str, str]]:
    return [(name, slots.first_line(slots.load(kind, name))) for name in slots.names(kind)]


def _recipe_rows() -> list[tuple[str, str]]:
    return [(name, recipes.load(name).description) for name in recipes.shipped()]


def _spec_rows() -> list[tuple[str, str]]:
    from k2lab import specs

    rows = []
    for name in specs.names():
        spec = specs.get(name)
        rows.append((name, f"{spec.family}, {spec.total() / 1e6:,.1f} M parameters, {spec.active() / 1e6:,.1f} M active"))
    return rows


def _machine_rows() -> list[tuple[str, str]]:
    from k2lab.plan import machines

    return [(machine.name, machine.describe()) for machine in machines.table().values()]


def do_new(args: argparse.Namespace) -> int:
    """`k2 new`."""
    from k2lab.scaffold import write

    path = write(args.what, args.name, args.base)
    print(f"written: {path}")
    return 0


def do_chat(args: argparse.Namespace) -> int:
    """`k2 chat`."""
    from k2lab import chat
    from k2lab.core.types import SampleParams
    from k2lab.gym.agent import Toolbox

    folder = chat.model_directory(Path(args.model))
    toolbox = Toolbox(args.tools or ())
    for name, tool in toolbox.tools.items():
        print(f"{name}: {tool.describe() if hasattr(tool, 'describe') else 'ready'}", file=sys.stderr)
    from k2lab.dist import mesh
    from k2lab.sampling.local import LocalSampler, check_params
    from k2lab.stages._models import load_model
    from k2lab.text import tokenizer as text_tokenizer

    params = SampleParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    check_params(params)
    tokenizer = text_tokenizer.load(folder)
    model = load_model(folder, device=mesh.pick_device(args.device))
    printer = chat.Printer()
    session = chat.Session(
        LocalSampler(model.hf, tokenizer.pad_id, eos_id=tokenizer.im_end_id),
        tokenizer,
        printer,
        toolbox,
        params,
        system=args.system or "",
        default_system=chat.begins_with_default_system(folder),
        interruptible=sys.stdin.isatty(),
    )
    print(f"{folder}   (/help says what can be typed)", file=sys.stderr)
    chat.repl(session, printer)
    return 0


def do_fetch(args: argparse.Namespace) -> int:
    """`k2 fetch`."""
    from dataclasses import replace

    from k2lab import fetch

    table = Path(args.table) if args.table else None
    if args.listing:
        found = fetch.rows(table)
        width = max(len(left) for left, _ in found)
        print("\n".join(f"{left:<{width}}  {right}" for left, right in found))
        return 0
    if args.name is None:
        raise RecipeError("nothing was named", allowed=", ".join(fetch.table(table)) + ", or owner/name of the hub")
    item = fetch.find(args.name, dataset=args.dataset, revision=args.revision, path=table)
    if args.files:
        item = replace(item, files=tuple(args.files))
    to = Path(args.to) if args.to else fetch.folder_of(item)
    meter = (lambda done, total: None) if args.quiet else fetch.Meter(sys.stderr)
    fetch.fetch(item, to, say=_say, progress=meter, dry_run=args.dry_run)
    if line := fetch.paste(item, to):
        print(f"in a recipe:  {line}")
    return 0


def do_convert(args: argparse.Namespace) -> int:
    """`k2 convert`."""
    from k2lab import weights

    return weights.convert(args)


def do_diff(args: argparse.Namespace) -> int:
    """`k2 diff`."""
    from k2lab import weights

    return weights.diff(args)


def do_check(args: argparse.Namespace) -> int:
    """`k2 check`."""
    path = Path(args.path)
    if args.path.endswith(".toml") or not path.is_dir():
        recipe = recipes.load(args.path)
        print(f"{recipe.name}: {len(recipe.stages)} stages parse: " + ", ".join(entry.name for entry in recipe.stages))
        return 0
    from k2lab import fetch
    from k2lab.data import shards
    from k2lab.stages import _proofs

    if (path / fetch.MANIFEST).is_file() or (path / fetch.PARTIAL).is_dir():
        wrong = fetch.verify(path)
        print("\n  ".join([f"{path}: " + (f"{len(wrong)} problem(s)" if wrong else "ok, as the hub gives it"), *wrong]))
        return 2 if wrong else 0
    targets = [path]
    if (path / "stages").is_dir():
        targets = sorted(item for item in (path / "stages").iterdir() if exists(item))
    problems, sound = 0, []
    for target in targets:
        found: Any = []
        proved: list[str] = []
        try:
            artifact = open_artifact(target, verify=True) if exists(target) else None
            kind = artifact.kind if artifact is not None else "dataset"
            if kind in ("dataset", "tokens"):
                found = shards.check(target)
            if artifact is not None and not found:
                sound.append(artifact)
            if kind == "dataset" and not found:
                found, proved = _proofs.prove_tasks(target)
        except K2Error as error:
            found = [str(error)]
        problems += _tell(str(target), found, proved)
    shared, apart = _proofs.prove_disjoint(sound)
    if shared or apart:
        problems += _tell("test tasks and training data", shared, apart)
    return 2 if problems else 0


def _tell(what: str, problems: list[str], proved: list[str]) -> int:
    """Prints what was checked, with the problems or what was proved; returns the number of problems."""
    print(f"{what}: " + ("ok" if not problems else f"{len(problems)} problem(s)"))
    for text in [*problems, *proved]:
        print(f"  {text}")
    return len(problems)


def _say(text: str) -> None:
    print(text, flush=True)


def _silent(text: str) -> None:
    return None
