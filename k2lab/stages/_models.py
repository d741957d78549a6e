"""Models for stages and commands: checkpoints of any format, and adapter folders, which are loaded on their base.

An adapter folder is PEFT's (`ckpt.peft`) with a `base.json` beside it: {"format", "path" of the base, absolute, and "relative" to
the folder, "identity" of the base, "experts" "dense" or "packed"}. Adapters of others, without that file, name their base in
adapter_config.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from k2lab.core.artifacts import exists, open_artifact, write_json
from k2lab.core.errors import CheckpointError

BASE = "base.json"


def load_model(path: Path | str, dtype: Any = None, device: Any = "cpu", *, merge: bool = False) -> Any:
    """The TrainModel in `path`, fp32 by default. Of an adapter folder it is the base with the adapter on, experts as they were in
    training; with `merge` a dense model that trains like any other, the adapter added to its weights.

    Raises CheckpointError for folders that are incomplete or damaged, and adapters whose base is not there or has changed.
    """
    import torch

    from k2lab.ckpt.folder import open_folder
    from k2lab.ckpt.peft import Adapter, is_adapter
    from k2lab.models import build, lora

    dtype = torch.float32 if dtype is None else dtype
    if not is_adapter(path):
        return build.load(open_folder(path), dtype=dtype, device=device)
    adapter = Adapter.open(path)
    base, experts = base_of(Path(path), adapter.base)
    model = build.load(open_folder(base), dtype=dtype, device=device, experts="dense" if merge else experts)
    lora.load(model, adapter.of(lora.names(model)), settings_of(adapter))
    return lora.merge(model) if merge else model


def settings_of(adapter: Any) -> Any:
    """An adapter's rank and scale as `lora.Settings`."""
    from k2lab.models import lora

    return lora.Settings(rank=adapter.rank, alpha=adapter.alpha, rslora=adapter.rslora)


def base_of(folder: Path, named: str | None) -> tuple[Path, Any]:
    """(the base's folder, "dense" or "packed") of an adapter folder; `named` is the base in adapter_config.json."""
    from k2lab.ckpt.strict import read_object

    if not (folder / BASE).is_file():
        path = Path(named or "")
        if not named or not (path / "config.json").is_file():
            raise CheckpointError(
                "the adapter's base is not here", where=f"base_model_name_or_path in {folder}", got=named or "none",
                allowed="the folder of a model on this machine",
            )  # fmt: skip
        return path, "dense"
    table = read_object(folder / BASE)
    texts = [table.get(key) for key in ("path", "relative", "identity")]
    if table.get("format") != 1 or not all(isinstance(text, str) for text in texts) or table.get("experts") not in _EXPERTS:
        raise CheckpointError("this file is damaged or of another version", where=str(folder / BASE))
    for path in (folder / table["relative"], Path(table["path"])):
        if not (path / "config.json").is_file():
            continue
        if exists(path) and open_artifact(path).identity != table["identity"]:
            raise CheckpointError(
                "the adapter was made for another base than the one that is there now", where=str(folder),
                got=f"{path}, identity {open_artifact(path).identity[:12]}", allowed=f"identity {table['identity'][:12]}",
            )  # fmt: skip
        return Path(os.path.normpath(path)), table["experts"]
    raise CheckpointError(
        "the adapter's base is not here any more", where=str(folder), got=table["path"], next="Put it back, or edit base.json"
    )


_EXPERTS = ("dense", "packed")


def write_base(folder: Path, base: Path, identity: str, experts: str) -> None:
    """Writes `base.json`."""
    table = {"format": 1, "path": str(base.resolve()), "relative": os.path.relpath(base.resolve(), folder.resolve())}
    write_json(folder / BASE, {**table, "identity": identity, "experts": experts})
