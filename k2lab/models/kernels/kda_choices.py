"""Tuned kernel choices for flash-linear-attention's KDA: shipped per device, so that a fresh machine need not search.

The library tries every configuration of every kernel when it meets new shapes; on one H100 that took almost five minutes. Triton
keeps what it found in its own cache directory, which a fresh machine does not have. A file of `kda_cache/` holds the winners of
one device with one version of triton and of the library; number of heads and of tokens do not enter, head widths and dtype do.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
FOLDER = Path(__file__).parent / "kda_cache"
MODULES = (
    "fla.ops.kda.chunk_fwd",
    "fla.ops.kda.chunk_bwd",
    "fla.ops.kda.chunk_intra",
    "fla.ops.kda.chunk_intra_token_parallel",
    "fla.ops.kda.gate",
    "fla.ops.kda.wy_fast",
    "fla.ops.common.chunk_delta_h",
    "fla.ops.gla.chunk",
    "fla.ops.utils.cumsum",
)
FREE = {"H", "HV", "B"}  # constants of a kernel that do not enter the choice


def tuners() -> dict[str, Any]:
    """The autotuners of the library's kernels that KDA may use, by kernel name."""
    from triton.runtime.autotuner import Autotuner

    found = {}
    for name in MODULES:
        for thing in list(vars(sys.modules[name]).values()):
            while thing is not None and not isinstance(thing, Autotuner):
                thing = getattr(thing, "fn", None)
            if thing is not None:
                found[thing.base_fn.__name__] = thing
    return found


def _names(tuner: Any) -> list[str]:
    """Which arguments the leading entries of the tuner's keys are: those that no configuration sets."""
    return [name for name in tuner.keys if name not in tuner.configs[0].kwargs]


def _short(tuner: Any, key: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """(constants that matter, dtype of the first tensor) of a tuner's key; None if it looks otherwise."""
    names = _names(tuner)
    values = [part for part in key if not (isinstance(part, str) and part.startswith("torch."))]
    types = [part for part in key if isinstance(part, str) and part.startswith("torch.")]
    if len(values) != len(names) or not types:
        return None
    return (*(value for name, value in zip(names, values) if name not in FREE), types[0])


class Table(dict[Any, Any]):
    """An autotuner's table {key: configuration} which also knows keys that are alike in all that matters to `chosen`."""

    def __init__(self, tuner: Any, chosen: dict[tuple[Any, ...], Any]) -> None:
        super().__init__(tuner.cache)
        self.tuner, self.chosen = tuner, chosen

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        config = self.chosen.get(_short(self.tuner, key)) if isinstance(key, tuple) else None
        if config is not None:
            self[key] = config
        return config is not None


def _device() -> dict[str, Any]:
    import triton

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "triton": triton.__version__, "fla": version("fla-core")}


def _file(device: str) -> Path:
    """One file per device; an H100's variants (SXM5 80 GB, PCIe, NVL) are different devices."""
    return FOLDER / (re.sub(r"[^0-9a-z]+", "_", device.lower()).strip("_") + ".json")


def prime(path: Path | None = None) -> bool:
    """Gives the library's tuners the choices for this device. False, and says so, if there are none for it or the versions."""
    from triton import Config

    here = _device()
    path = path or _file(here["device"])
    stored = json.loads(path.read_text()) if path.exists() else {}
    if stored.get("format") != FORMAT or any(stored.get(name) != value for name, value in here.items()):
        warnings.warn(
            f"Kimi Delta Attention: no tuned kernel choices for {here['device']} with triton {here['triton']} and fla "
            f"{here['fla']} ({path.name}), so the first training step searches: up to 5 minutes, once (triton keeps them)",
            stacklevel=2,
        )
        return False
    found = tuners()
    for name, rows in stored["kernels"].items():
        if name in found:
            chosen = {}
            for row in rows:
                config = Config(row["kwargs"], num_warps=row["num_warps"], num_stages=row["num_stages"])
                chosen[(*row["constants"], row["dtype"])] = config
            found[name].cache = Table(found[name], chosen)
    return True


def record() -> dict[str, Any]:
    """What the tuners chose so far in this process, in the form of a file of `kda_cache/`."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for name, tuner in sorted(tuners().items()):
        rows = {}
        for key, config in tuner.cache.items():
            short = _short(tuner, key)
            if short is not None:
                rows[short] = {
                    "constants": list(short[:-1]),
                    "dtype": short[-1],
                    "kwargs": config.kwargs,
                    "num_warps": config.num_warps,
                    "num_stages": config.num_stages,
                }
        if rows:
            kernels[name] = [rows[short] for short in sorted(rows, key=str)]
    return {"format": FORMAT, **_device(), "kernels": kernels}
