"""Layers of dense students under torch.compile: what stands between matrix products (norms, rotation, SwiGLU, sums) becomes a few
kernels. Attention over packs stays ours.

One function is compiled for all layers of a shape and for packs of any length; weights are inputs. Only training passes take it:
evaluation and decoding run as ever. Inductor's cache lies in the user's cache folder, so that later processes are warm.

Layers of Kimi K2 and Kimi Linear are not compiled: on a GPU all that could be fused is fused by hand there.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch

from k2lab.core.errors import MachineError

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def prepare(device: torch.device) -> None:
    """Gives the compiler a cache that stays, unless TORCHINDUCTOR_CACHE_DIR names another. Raises MachineError where the compiler
    cannot run."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        if not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
            raise MachineError("compiled layers on a CPU need a C++ compiler", got="neither g++ nor clang++", next="Install g++")
    elif device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            raise MachineError("compiled layers on a GPU need triton", next="Run: pip install triton") from None
    # once imported, the compiler has put its own choice there: a folder for temporary files, which are gone after a restart
    if Path(os.environ.get(CACHE, "torchinductor_")).name.startswith("torchinductor_"):
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ[CACHE] = str(base / "k2lab" / "inductor")


@cache
def layer() -> Any:
    """The compiled form of `RecomputingLayer.k2_blocks`."""
    return torch.compile(_blocks, dynamic=True)


def _blocks(module: torch.nn.Module, x: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    return module.k2_blocks(x, kwargs)
