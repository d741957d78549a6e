"""Recipes: TOML -> a frozen tree of stages, with the origin of every value.

    model = "tiny-k2"
    [[stage]]
    name = "domain_sft"            # default: its type; unique
    type = "sft"                   # the stage file k2lab/stages/sft.py
    start = "pretrain"             # an earlier stage, an artifact or model directory
    data = { type = "jsonl", path = "data/domain_sft.jsonl" }

With `base = "name"`, a `[[stage]]` of the same name merges into the base's, a new name is appended or placed by `after = "name"`,
`skip = true` drops one; other arrays replace; a changed `type` replaces its table. Overrides `key=value` use the same paths
(`stage.domain_sft.optim.lr=1e-4`), parsed as TOML with bare words as strings. Unknown key = error with "did you mean".
"""

from __future__ import annotations

import copy
import re
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from k2lab.core import schema, slots
from k2lab.core.errors import RecipeError, did_you_mean
from k2lab.core.stage import Stage, parent_fields

SHIPPED = Path(__file__).resolve().parents[1] / "recipes"
BARE = ("tiny", "mini")  # folders whose recipes are called without them
TOP_KEYS = ("model", "seed", "description", "base", "stage")
STAGE_KEYS = ("name", "type", "after", "skip")


@dataclass(frozen=True)
class StageEntry:
    """One stage of a recipe: its unique name, its configured instance and its parents by field."""

    name: str
    config: Stage

    @property
    def type(self) -> str:
        return type(self.config).slot_name

    @cached_property
    def parents(self) -> dict[str, list[str]]:
        """Field name -> referenced stages or paths (as written)."""
        found: dict[str, list[str]] = {}
        for name in parent_fields(type(self.config)):
            value = getattr(self.config, name)
            if value is not None:
                found[name] = list(value) if isinstance(value, tuple) else [value]
        return found


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: `name`, `model` (spec name or table), `seed`, `stages` in order, `origins` {key path: where from}."""

    name: str
    description: str
    model: Any
    seed: int
    stages: tuple[StageEntry, ...]
    origins: dict[str, str]
    source: Path

    def stage(self, name: str) -> StageEntry:
        """The stage called `name`; RecipeError with "did you mean" otherwise."""
        for entry in self.stages:
            if entry.name == name:
                return entry
        known = [entry.name for entry in self.stages]
        raise RecipeError(
            f"the recipe {self.name!r} has no stage {name!r}", allowed=", ".join(known), next=did_you_mean(name, known)
        )

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain tables, defaults included."""
        stages = []
        for entry in self.stages:
            table = schema.to_table(entry.config)
            stages.append({"name": entry.name, **table})
        return {"description": self.description, "model": self.model, "seed": self.seed, "stage": stages}


def shipped() -> list[str]:
    """Names of the recipes inside the package: `tiny`, `k2/continual_pretrain`, ..."""
    return [_name_of(path) for path in sorted(SHIPPED.rglob("*.toml"))]


def _name_of(path: Path) -> str:
    """A shipped recipe's name, or that of a user's file."""
    if not path.is_relative_to(SHIPPED):
        return path.stem
    inside = path.relative_to(SHIPPED).with_suffix("")
    return inside.name if inside.parts[0] in BARE else inside.as_posix()


def find(name: str) -> Path:
    """The file of a recipe given by shipped name or by path."""
    path = Path(name)
    if name.endswith(".toml"):
        if path.is_file():
            return path
        raise RecipeError(
            f"there is no recipe file {name!r}", next="Give a path that exists, or a shipped name from `k2 list recipes`"
        )
    for inside in (f"{name}.toml", *(f"{folder}/{name}.toml" for folder in BARE)):
        if (SHIPPED / inside).is_file():
            return SHIPPED / inside
    if path.is_dir() and (path / "recipe.resolved.toml").is_file():
        return path / "recipe.resolved.toml"
    known = shipped()
    raise RecipeError(
        f"there is no recipe called {name!r}",
        allowed=", ".join(known) + ", or a path to a .toml file",
        next=did_you_mean(name, known),
    )


def load(name: str, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Reads, merges, overrides and checks a recipe. Nothing heavy is imported."""
    path = find(name)
    origins: dict[str, str] = {}
    tree = _read(path, origins, seen=())
    for text in overrides:
        _override(tree, text, origins)
    return _build(_name_of(path), path, tree, origins)


# ---------------------------------------------------------------- reading and merging


def _read(path: Path, origins: dict[str, str], seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError("recipes form a circle through `base`", where=str(path), got=" -> ".join(map(str, (*seen, path))))
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text: {error}", where=str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from None
    for key in tree:
        if key not in TOP_KEYS:
            raise RecipeError(
                f"unknown key {key!r}", where=str(path), allowed=", ".join(TOP_KEYS), next=did_you_mean(key, TOP_KEYS)
            )
    stages = tree.get("stage", [])
    if not isinstance(stages, list) or not all(isinstance(item, dict) for item in stages):
        raise RecipeError("stages are written as [[stage]] tables", where=f"{path}: stage", got=stages)
    base = tree.pop("base", None)
    label = f"recipes/{path.relative_to(SHIPPED)}" if path.is_relative_to(SHIPPED) else str(path)
    if base is None:
        result: dict[str, Any] = {"stage": []}
    else:
        if not isinstance(base, str):
            raise RecipeError("`base` names one recipe", where=str(path), got=base)
        beside = path.parent / base
        result = _read(beside if base.endswith(".toml") and beside.is_file() else find(base), origins, (*seen, path))
    for key, value in tree.items():
        if key != "stage":
            result[key] = value
            _note(origins, key, value, label)
    for table in stages:
        _merge_stage(result["stage"], table, label, origins)
    return result


def _merge_stage(stages: list[dict[str, Any]], table: dict[str, Any], label: str, origins: dict[str, str]) -> None:
    table = dict(table)
    name = table.get("name", table.get("type"))
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise RecipeError("a stage needs a `type` (and a `name` of letters, digits, - and _)", where=f"{label}: stage", got=name)
    known = [item["name"] for item in stages]
    skip, after = table.pop("skip", False), table.pop("after", None)
    if skip:
        if name not in known:
            raise RecipeError(f"cannot skip {name!r}: the base has no such stage", where=label, next=did_you_mean(name, known))
        del stages[known.index(name)]
        return
    if name in known and origins.get(f"stage.{name}") == label:
        raise RecipeError(f"two stages are called {name!r}", where=label, next="Give one of them a `name`")
    if name in known:
        old = stages[known.index(name)]
        merged = _merge(old, table)
        stages[known.index(name)] = merged
    else:
        table["name"] = name
        index = len(stages)
        if after is not None:
            if after not in known:
                raise RecipeError(
                    f"after = {after!r}: no such stage", where=f"{label}: stage.{name}", next=did_you_mean(str(after), known)
                )
            index = known.index(after) + 1
        stages.insert(index, table)
    _note(origins, f"stage.{name}", table, label)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if "type" in new and new["type"] != old.get("type", new["type"]):
        return {**({"name": old["name"]} if "name" in old else {}), **new}
    result = dict(old)
    for key, value in new.items():
        both_tables = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merge(result[key], value) if both_tables else value
    return result


def _note(origins: dict[str, str], key: str, value: Any, label: str) -> None:
    origins[key] = label
    if isinstance(value, dict):
        for inner, item in value.items():
            _note(origins, f"{key}.{inner}", item, label)


# ---------------------------------------------------------------- overrides


def parse_value(text: str) -> Any:
    """A value as TOML; a bare word is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if re.fullmatch(r"[^\s\"'\[\]{}=]+", text) or " " in text:
            return text
        raise RecipeError("not a TOML value", got=text, next="Quote texts with special characters: key='\"a=b\"'") from None


def _override(tree: dict[str, Any], text: str, origins: dict[str, str]) -> None:
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise RecipeError("an override is written key=value", got=text, next="For example stage.pretrain.steps=100")
    value = parse_value(raw.strip())
    parts = key.split(".")
    where = f"override {text!r}"
    if parts[0] not in TOP_KEYS or parts[0] == "base":
        raise RecipeError(
            f"unknown key {parts[0]!r}", where=where, allowed=", ".join(TOP_KEYS), next=did_you_mean(parts[0], TOP_KEYS)
        )
    if parts[0] == "stage":
        if len(parts) < 3:
            raise RecipeError("overrides of stages are written stage.<name>.<key>=value", where=where)
        known = [item["name"] for item in tree["stage"]]
        if parts[1] not in known:
            raise RecipeError(
                f"there is no stage {parts[1]!r}", where=where, allowed=", ".join(known), next=did_you_mean(parts[1], known)
            )
        index = known.index(parts[1])
        tree["stage"][index] = _set(copy.deepcopy(tree["stage"][index]), parts[2:], value, where)
    elif len(parts) == 1:
        tree[key] = value
    else:
        tree[parts[0]] = _set(copy.deepcopy(tree.get(parts[0], {})), parts[1:], value, where)
    _note(origins, key, value, "override")


def _set(table: Any, parts: list[str], value: Any, where: str) -> Any:
    head, *rest = parts
    if isinstance(table, list):
        if not head.isdigit() or int(head) >= len(table):
            raise RecipeError(f"{head!r} is no index into a list of {len(table)}", where=where)
        table[int(head)] = _set(table[int(head)], rest, value, where) if rest else value
        return table
    if not isinstance(table, dict):
        table = {"type": table} if isinstance(table, str) else {}
    if not rest:
        if head == "type" and table.get("type") not in (None, value):
            return {**({"name": table["name"]} if "name" in table else {}), "type": value}
        table[head] = value
    else:
        table[head] = _set(table.get(head, {}), rest, value, where)
    return table


# ---------------------------------------------------------------- building


def _build(name: str, path: Path, tree: dict[str, Any], origins: dict[str, str]) -> Recipe:
    seed = tree.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise RecipeError("wrong type", where="seed", got=seed, allowed="an integer")
    model = tree.get("model")
    if model is not None and not isinstance(model, (str, dict)):
        raise RecipeError(
            "wrong type", where="model", got=model, allowed="the name of a spec, or a table with `spec` and changes"
        )
    if not tree["stage"]:
        raise RecipeError("the recipe has no [[stage]]", where=str(path), allowed=", ".join(slots.names("stage")))
    entries: list[StageEntry] = []
    for table in _with_datasets(tree["stage"]):
        entries.append(_build_stage(table, entries, model))
    description = tree.get("description", "")
    if not isinstance(description, str):
        raise RecipeError("wrong type", where="description", got=description, allowed="a text")
    return Recipe(name, description, model, seed, tuple(entries), origins, path)


def _with_datasets(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where a stage wants a data set and is given source tables, a `corpus` stage `<name>_<field>` is put before it."""
    result: list[dict[str, Any]] = []
    for table in stages:
        table = dict(table)
        kind = table.get("type")
        if isinstance(kind, str) and (kind in slots.names("stage") or kind.endswith(".py")):
            for key, marker in parent_fields(slots.load("stage", kind)).items():
                value = table.get(key)
                inline = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))
                if marker.kind == "dataset" and inline:
                    made = f"{table['name']}_{key}"
                    result.append({"name": made, "type": "corpus", "sources": value if isinstance(value, list) else [value]})
                    table[key] = made
        result.append(table)
    names = [table["name"] for table in result]
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two stages are called {name!r}", next="Give one of them another `name`")
    return result


def _build_stage(table: dict[str, Any], earlier: list[StageEntry], model: Any) -> StageEntry:
    name = table["name"]
    where = f"stage.{name}"
    if "type" not in table:
        raise RecipeError("this key is required and missing", where=f"{where}.type", allowed=", ".join(slots.names("stage")))
    if not isinstance(table["type"], str):
        raise RecipeError("wrong type", where=f"{where}.type", got=table["type"], allowed=", ".join(slots.names("stage")))
    cls: Any = slots.load("stage", table["type"], where=f"{where}.type")
    if cls.uses_model and model is None:
        raise RecipeError("this key is required and missing", where="model", allowed="the name of a spec (see `k2 list specs`)")
    config = schema.build(cls, table, where, skip=STAGE_KEYS)
    config.check(where)
    entry = StageEntry(name, config)
    _check_parents(entry, earlier, where)
    return entry


def _check_parents(entry: StageEntry, earlier: list[StageEntry], where: str) -> None:
    kinds = {item.name: type(item.config).kind for item in earlier}
    for role, marker in parent_fields(type(entry.config)).items():
        for reference in entry.parents.get(role, []):
            if reference in kinds:
                if kinds[reference] != marker.kind:
                    raise RecipeError(
                        f"stage {reference!r} makes a {kinds[reference]}, and a {marker.kind} is needed here",
                        where=f"{where}.{role}",
                        allowed=", ".join(n for n, k in kinds.items() if k == marker.kind) or "an earlier stage of that kind",
                    )
            elif not _outside(reference):
                fitting = [n for n, k in kinds.items() if k == marker.kind]
                raise RecipeError(
                    f"{reference!r} is no earlier stage and no directory",
                    where=f"{where}.{role}",
                    allowed=(", ".join(fitting) or "(no earlier stage makes one)") + f", or the path of a {marker.kind}",
                    next=did_you_mean(reference, kinds),
                )


def _outside(reference: str) -> bool:
    """True for an existing directory, and for a hub id `owner/name` of a model that some machine may have."""
    return Path(reference).is_dir() or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", reference) is not None


# ---------------------------------------------------------------- printing


def describe(recipe: Recipe) -> str:
    """The whole resolved recipe, one value a line, with each value's origin."""
    rows: list[tuple[str, str]] = [(f"model = {_toml(recipe.model)}", recipe.origins.get("model", "default"))]
    rows.append((f"seed = {recipe.seed}", recipe.origins.get("seed", "default")))
    for entry in recipe.stages:
        prefix = f"stage.{entry.name}"
        rows += [("", ""), (f"[stage.{entry.name}]   # {slots.first_line(type(entry.config))}", "")]
        for key, value in schema.to_table(entry.config).items():
            _describe(rows, recipe.origins, prefix, key, value)
    width = min(88, max(len(left) for left, right in rows if right))
    return "\n".join(f"{left:<{width}}  # {right}" if right else left for left, right in rows)


def _describe(rows: list[tuple[str, str]], origins: dict[str, str], prefix: str, key: str, value: Any) -> None:
    path = f"{prefix}.{key}"
    if isinstance(value, dict) and value:
        for inner, item in value.items():
            _describe(rows, origins, path, inner, item)
        return
    rows.append((f"{path.split('.', 2)[2]} = {_toml(value)}", _origin(origins, path)))


def _origin(origins: dict[str, str], path: str) -> str:
    if path in origins:
        return origins[path]
    parent = path.rpartition(".")[0]
    # `optim = "muonclip"` sets optim.type; a default slot's inner values are defaults
    if path.endswith(".type") and parent in origins:
        return origins[parent]
    return "default"


def to_toml(tree: dict[str, Any]) -> str:
    """A resolved recipe as TOML text that `load` reads back to the same recipe."""
    lines = [f"{key} = {_toml(value)}" for key, value in tree.items() if key != "stage" and value is not None]
    for table in tree["stage"]:
        lines += ["", "[[stage]]"]
        lines += [f"{key} = {_toml(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if value is None:
        return '"none"'
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        escaped = "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped)
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return "{ " + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + " }"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)
