"""Shapes of Kimi K2, Kimi Linear, Moonlight, dense students and tiny models, and what follows from shapes alone: parameters,
bytes, flops, tensor names, config.json. No torch; importing it takes milliseconds.

`specs.get("kimi-k2")` gives a `ModelSpec`; so does `specs.get("path/to/model")` for a directory with a config.json, or the file.
Each file here without a leading underscore (but `spec.py`) holds one family as `SPECS`, a tuple; there is no table to edit.
"""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from k2lab.core.errors import RecipeError, did_you_mean
from k2lab.specs import _recomputation as recomputation
from k2lab.specs._activations import activation_bytes
from k2lab.specs._fused import Piece, pieces
from k2lab.specs.spec import FORMATS, ModelSpec

__all__ = ["FORMATS", "ModelSpec", "Piece", "activation_bytes", "from_recipe", "get", "names", "pieces", "recomputation"]


@cache
def _known() -> dict[str, ModelSpec]:
    found: dict[str, ModelSpec] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name.startswith("_") or path.stem == "spec":
            continue
        for spec in importlib.import_module(f"{__name__}.{path.stem}").SPECS:
            assert spec.name not in found, f"two specs are called {spec.name}"
            found[spec.name] = spec
    return found


def names() -> tuple[str, ...]:
    """Names of all shipped specs."""
    return tuple(_known())


def get(name: str, where: str | None = None) -> ModelSpec:
    """The spec called `name`, or that of a config.json (or a directory that holds one) if `name` is a path with a slash or .json.

    Raises RecipeError if there is none; `where` is the recipe's key path for the message.
    """
    known = _known()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix == ".json" or "/" in name:
        file = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError(
                f"there is no model configuration {str(file)!r}", where=where, next="Give a path that exists"
            ) from None
        except (OSError, ValueError) as error:
            raise RecipeError(f"{file} cannot be read: {error}", where=where) from None
        return ModelSpec.from_config(config, name=path.name if path.is_dir() else path.parent.name or path.stem)
    raise RecipeError(
        f"there is no model spec called {name!r}",
        where=where,
        allowed=", ".join(known) + ", or a path to a directory with a config.json",
        next=did_you_mean(name, known),
    )


def from_recipe(model: Any) -> ModelSpec:
    """The spec that a recipe's `model` means: a name or path as for `get`, or a table with `spec` (such a name) and changed
    fields, `model = { spec = "tiny-k2", num_layers = 4 }`. Raises RecipeError with the key path."""
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, str):
        return get(model, where="model")
    if not isinstance(model, dict):
        raise RecipeError(
            "wrong type", where="model", got=model, allowed="the name of a spec, or a table with `spec` and changes"
        )
    if not isinstance(model.get("spec"), str):
        raise RecipeError(
            "this key is required and missing", where="model.spec", got=model, allowed=", ".join(names()), next=_typo(model)
        )
    return get(model["spec"], where="model.spec").replace(**{key: value for key, value in model.items() if key != "spec"})


def _typo(model: dict[str, Any]) -> str | None:
    return next((f"Did you mean `spec` instead of `{key}`?" for key in model if did_you_mean(key, ["spec"])), None)
