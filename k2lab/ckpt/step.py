"""Step checkpoints: what a killed stage continues from, bit for bit.

`<work>/checkpoints/step-00000100/{model.safetensors, optim.safetensors, state.json}`, written under a temporary name and renamed,
`state.json` last, so a directory with that name is complete. Only these are ever deleted, and only the oldest of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from k2lab.core.artifacts import disk_errors, write_json
from k2lab.core.errors import CheckpointError

FORMAT = 1


def save(
    folder: Path, step: int, model: dict[str, torch.Tensor], optim: dict[str, torch.Tensor], state: dict[str, Any], keep: int = 2
) -> None:
    """Writes the checkpoint of `step` and removes all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"tmp-{step:08d}"
    for leftover in (temporary, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    with disk_errors(temporary):
        temporary.mkdir()
        for name, tensors in (("model", model), ("optim", optim)):
            _save(tensors, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", {"format": FORMAT, "step": step, **state})
        os.replace(temporary, final)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except Exception as error:  # safetensors hides the operating system's number in the text of its own error
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    found = []
    for path in folder.glob("step-*") if folder.is_dir() else ():
        match = re.fullmatch(r"step-(\d{8})", path.name)
        if match and (path / "state.json").is_file():
            found.append(int(match[1]))
    return sorted(found)


def load(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(model tensors, optimizer tensors, state) of one checkpoint."""
    path = folder / f"step-{step:08d}"
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        model, optim = load_file(path / "model.safetensors"), load_file(path / "optim.safetensors")
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", next="Remove that directory; the stage then continues from the one before"
        ) from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {state.get('format')!r}", allowed=str(FORMAT))
    return model, optim, state


def discard_unfinished(folder: Path) -> None:
    """Removes what a killed save left behind."""
    for path in folder.glob("tmp-*") if folder.is_dir() else ():
        shutil.rmtree(path)
