"""The `k2` command. Verbs are thin: each parses its flags, calls one function and prints what it returned.

Flags describe the command (`--run-dir`, `--dry-run`, `--only`, `--quiet`); `key=value` arguments describe the run. Exit codes:
0 done, 1 our bug, 2 user's recipe or data, 3 machine, 4 numerics.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

EPILOG = """\
examples:
  k2 run tiny                                  the whole life cycle on a laptop, into runs/tiny
  k2 run tiny stage.pretrain.steps=50          the same with one value changed
  k2 run my.toml --dry-run                     what would be reused, resumed and made
  k2 plan k2/continual_pretrain --machine p5.48xlarge
  k2 eval runs/tiny/sft --prompts-jsonl prompts.jsonl
  k2 chat runs/tiny --tools python             talk to the model, which may run Python in a sandbox
  k2 convert models/k2-thinking k2-bf16 --to bf16
  k2 list sources                              what can stand in a recipe
"""


Verb = Callable[[str, str], argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The whole command-line surface (frozen by a test)."""
    top = argparse.ArgumentParser(
        prog="k2",
        description="Train, measure and use Kimi-family models, from a laptop to a cluster.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_true", help="print the version and end")
    top.add_argument("--traceback", action="store_true", help="show Python tracebacks of errors")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, description=help)
        added.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help="show Python tracebacks of errors")
        return added

    _recipe_verbs(verb)
    _other_verbs(verb)
    return top


def _recipe_verbs(verb: Verb) -> None:
    """What runs, plans and evaluates."""
    run = verb("run", "run a recipe; what exists is reused, what was begun is resumed")
    run.add_argument("recipe", help="a shipped name (see `k2 list recipes`) or a path to a .toml file")
    run.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values changed for this run, e.g. stage.sft.optim.lr=1e-4"
    )
    run.add_argument("--run-dir", help="directory of the run (default: runs/<recipe>)")
    run.add_argument("--only", metavar="STAGE", help="stop after this stage; only it and what it needs are run")
    run.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    run.add_argument("--dry-run", action="store_true", help="say what would be reused, resumed and made, and end")
    run.add_argument("--print", action="store_true", dest="show", help="print the whole recipe with each value's origin, and end")
    run.add_argument("--quiet", action="store_true", help="no progress lines")

    plan = verb("plan", "parameters, memory, time and money of a recipe, before anything runs")
    plan.add_argument("recipe", help="a shipped name or a path to a .toml file")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--machine", help="a machine of the price table (default: laptop)")
    plan.add_argument("--machines", metavar="FILE", help="your own price table instead of the shipped one")
    plan.add_argument("--gpus", type=int, help="GPUs in all (default: those of one machine)")
    plan.add_argument("--measured", metavar="RUN", help="replace assumed throughput by that of this run directory")
    plan.add_argument("--json", action="store_true", help="the same numbers for programs")

    evaluate = verb("eval", "evaluate any stage or model directory")
    evaluate.add_argument("path", help="RUN, RUN/STAGE, a stage's directory or a model directory")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="fields of the evaluate stage, e.g. k=4 max_tokens=64"
    )
    evaluate.add_argument("--prompts-jsonl", metavar="FILE", help='prompts to answer, one {"prompt": ...} a line')
    evaluate.add_argument("--run-dir", help="where results go (default: the run, or runs/eval)")
    evaluate.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    evaluate.add_argument("--quiet", action="store_true", help="no progress lines")
    evaluate.add_argument("--json", action="store_true", help="the results as JSON on standard output")


def _other_verbs(verb: Verb) -> None:
    """What reads, lists, talks, fetches, writes and checks."""
    report = verb("report", "write report.html of a run directory and print its summary table")
    report.add_argument("run", help="a run directory, e.g. runs/tiny")
    report.add_argument("--out", metavar="FILE", help="where to write the page (default: RUN/report.html)")
    report.add_argument("--json", action="store_true", help="the summary for programs; no page is written")

    doctor = verb("doctor", "what this machine has, what is tested on it, what to install")
    doctor.add_argument("--json", action="store_true", help="the same facts for programs")

    listing = verb("list", "what can stand in a recipe")
    listing.add_argument(
        "what", nargs="?", default="all", help="recipes, specs, machines, or a slot kind such as stages or filters"
    )

    chat = verb("chat", "talk to a model; tool calls and their results are shown")
    chat.add_argument("model", help="RUN (its last trained model), RUN/STAGE, a stage's directory or a model directory")
    chat.add_argument("--tools", action="append", metavar="NAME", help="a tool that it may call, e.g. python (may be repeated)")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--temperature", type=float, default=0.0, help="0 = always the most probable token (default)")
    chat.add_argument("--top-p", type=float, default=1.0, help="draw from the most probable tokens of this share (default: 1)")
    chat.add_argument("--max-tokens", type=int, default=512, help="most tokens of one answer (default: 512)")
    chat.add_argument("--seed", type=int, default=0, help="other seeds draw other answers (default: 0)")
    chat.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")

    fetch = verb("fetch", "download a model or a data set from the Hugging Face hub, checked against its checksums")
    fetch.add_argument("name", nargs="?", help="a known name (see --list) or owner/name of the hub")
    fetch.add_argument("--to", metavar="DIR", help="folder (default: models/NAME or data/NAME)")
    fetch.add_argument("--list", action="store_true", dest="listing", help="the known names with licence and size, and end")
    fetch.add_argument("--dry-run", action="store_true", help="ask the hub for files, sizes and licence, and end")
    fetch.add_argument("--dataset", action="store_true", help="owner/name is a data set, not a model")
    fetch.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: the table's, else main)")
    fetch.add_argument("--files", action="append", metavar="PATTERN", help="only files of this pattern (may be repeated)")
    fetch.add_argument("--table", metavar="FILE", help="your own table of names instead of the shipped one")
    fetch.add_argument("--quiet", action="store_true", help="no progress lines")

    convert = verb("convert", "write a checkpoint in another format, shard by shard; what was begun is continued")
    convert.add_argument("source", metavar="SRC", help="FP8, INT4, bf16 or fp32 model directory, DCP folder, RUN or RUN/STAGE")
    convert.add_argument("target", metavar="DST", help="a new folder, or one that the same command has begun")
    convert.add_argument("--to", required=True, choices=["bf16", "fp32", "fp8", "int4", "dcp"], help="the format to write")
    convert.add_argument(
        "--original", metavar="DIR", help="the quantised checkpoint whose bytes unchanged tensors take (default: see origin.json)"
    )
    convert.add_argument("--adapter", metavar="DIR", help="a PEFT LoRA folder to merge while converting")
    convert.add_argument(
        "--shard-bytes", metavar="N", type=int, default=5 << 30, help="bytes of a file, at most (default: 5368709120)"
    )
    convert.add_argument("--workers", metavar="N", type=int, default=0, help="threads (default: two per core, at most 16)")
    convert.add_argument("--dry-run", action="store_true", help="say what would be written and what space there is, and end")
    convert.add_argument("--quiet", action="store_true", help="no progress lines")

    diff = verb("diff", "compare two checkpoints of any formats tensor by tensor")
    diff.add_argument("a", metavar="A", help="a model directory, DCP folder, RUN or RUN/STAGE")
    diff.add_argument("b", metavar="B", help="another one")
    diff.add_argument("--json", action="store_true", help="everything, every tensor, for programs")
    diff.add_argument("--exit-code", action="store_true", help="end with 5 unless all values have the same bits (default: 0)")
    diff.add_argument("--quiet", action="store_true", help="no progress lines")

    new = verb("new", "write a commented starting point: a recipe or a slot file of your own")
    new.add_argument("what", help="recipe, source, filter, task, reward, schedule or stage")
    new.add_argument("name", help="its name; NAME.toml or NAME.py is written and never overwritten")
    new.add_argument("--base", default="tiny", help="for recipes: the recipe to start from (default: tiny)")

    check = verb("check", "verify a data set, an artifact, a run directory or a recipe")
    check.add_argument("path", help="a directory, a recipe file or a shipped recipe's name")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    # argparse takes positionals in one place only; `k2 run tiny --quiet seed=2` should work like `k2 run tiny seed=2 --quiet`.
    if rest and hasattr(arguments, "overrides") and not any(text.startswith("-") for text in rest):
        arguments.overrides += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.version:
        from k2lab import __version__

        print(__version__)
        return 0
    if arguments.verb is None:
        parser().print_help()
        return 0
    from k2lab.core.errors import K2Error

    # OpenMP threads that spin while they wait make a busy machine crawl (measured: 5,000 -> 150 tokens/s beside one other
    # process) and gain nothing on a quiet one. Read when torch loads its OpenMP library, so it must be set before that.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from k2lab import verbs

        return getattr(verbs, f"do_{arguments.verb}")(arguments)
    except K2Error as error:
        if arguments.traceback:
            raise
        print(f"\nk2 {arguments.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nstopped; give the same command again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if arguments.traceback:
            raise
        print(
            f"\nk2 {arguments.verb}: this is a bug of ours: {type(error).__name__}: {error}. "
            "Finished work is kept. Give the same command with --traceback and report what it prints.",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
