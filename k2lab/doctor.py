"""`k2 doctor`: what this machine has, what of it is tested, what to install."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

EXTRAS = {
    "pyarrow": ("parquet", "the `parquet` source"),
    "datasets": ("hf", "the `hf` source"),
    "tensorboard": ("tensorboard", "K2_TENSORBOARD=1"),
    "wandb": ("wandb", "K2_WANDB=project"),
    "tiktoken": ("kimi", "Kimi's own tokenizer files"),
    "numba": ("cpu", "INT4 and FP8 on a CPU (`k2 convert`) up to twice as fast, with the same bits"),
}
CORE = {
    "torch": ((2, 11), (2, 14)),
    "transformers": ((5, 17), (5, 24)),
    "tokenizers": ((0, 22), None),
    "safetensors": ((0, 6), None),
    "numpy": ((1, 26), None),
}


def examine() -> dict[str, Any]:
    """Facts and findings. `ok` is False if something that every run needs is missing or too small."""
    checks: list[dict[str, str]] = []

    def add(name: str, state: str, text: str, advice: str = "") -> None:
        checks.append({"name": name, "state": state, "text": text, "advice": advice})

    tested = sys.version_info[:2] in ((3, 11), (3, 12))
    add("python", "ok" if tested else "untested", platform.python_version(), "" if tested else "tested on 3.11 and 3.12")
    system = f"{platform.system()} {platform.machine()}"
    linux = platform.system() == "Linux" and platform.machine() == "x86_64"
    add(
        "system",
        "ok" if linux else "untested",
        system,
        "" if linux else "tested on Linux x86-64; written for arm64, macOS and WSL",
    )
    for name, (low, high) in CORE.items():
        _package(add, name, low, high)
    _hardware(add)
    _sandbox(add)
    for name, (extra, use) in EXTRAS.items():
        try:
            add(name, "ok", version(name))
        except PackageNotFoundError:
            add(name, "optional", "not installed", f"pip install 'k2lab[{extra}]' for {use}")
    return {"ok": all(check["state"] != "missing" for check in checks), "checks": checks}


def _package(add: Any, name: str, low: tuple[int, ...], high: tuple[int, ...] | None) -> None:
    try:
        found = version(name)
    except PackageNotFoundError:
        add(name, "missing", "not installed", f"pip install {name}")
        return
    digits = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
    fits = digits >= low and (high is None or digits < high)
    span = f">={'.'.join(map(str, low))}" + (f",<{'.'.join(map(str, high))}" if high else "")
    add(name, "ok" if fits else "untested", found, "" if fits else f"tested with {span}")


def _hardware(add: Any) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    add("memory", "ok" if memory > 4 else "missing", f"{memory:.1f} GB", "" if memory > 4 else "`k2 run tiny` needs about 3 GB")
    free = shutil.disk_usage(".").free / 1e9
    add(
        "disk",
        "ok" if free > 1 else "missing",
        f"{free:.1f} GB free here",
        "" if free > 1 else "a run of `tiny` needs about 0.3 GB",
    )
    try:
        import torch
    except ImportError:
        return
    add("threads", "ok", f"{torch.get_num_threads()} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    matrix = torch.ones(1024, 1024)
    matrix @ matrix
    began = time.perf_counter()
    for _ in range(5):
        matrix @ matrix
    rate = 5 * 2 * 1024**3 / (time.perf_counter() - began)
    slow = rate < 20e9
    add(
        "matrix speed",
        "slow" if slow else "ok",
        f"{rate / 1e9:.0f} GFLOP/s in fp32",
        "`k2 run tiny` will take longer" if slow else "",
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            add(f"gpu {index}", "ok", f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}")
    else:
        add("gpu", "optional", "none", "the recipes under tiny/ need none")


def _sandbox(add: Any) -> None:
    """Which sandbox runs the programs of models: found by running one in it."""
    from k2lab import sandbox

    try:
        add("sandbox", "ok", sandbox.pick().describe())
    except sandbox.SandboxError as error:
        add("sandbox", "optional", "none works: stages with tools will not run", error.next or str(error))


def text(facts: dict[str, Any]) -> str:
    """The findings as a table."""
    marks = {"ok": "ok", "optional": "--", "untested": "??", "slow": "!!", "missing": "XX"}
    width = max(len(check["name"]) for check in facts["checks"])
    lines = []
    for check in facts["checks"]:
        advice = f"   ({check['advice']})" if check["advice"] else ""
        lines.append(f"  {marks[check['state']]}  {check['name']:<{width}}  {check['text']}{advice}")
    lines.append("ready: try `k2 run tiny`" if facts["ok"] else "something that every run needs is missing: see XX above")
    return "\n".join(lines)
