"""From TOML tables to frozen dataclasses: strict types, every error with its key path, defaults made visible."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, Union

from k2lab.core import slots
from k2lab.core.errors import RecipeError, did_you_mean
from k2lab.core.slots import Slot

_MISSING = dataclasses.MISSING


def build(cls: type, table: Any, where: str, skip: tuple[str, ...] = ()) -> Any:
    """An instance of the dataclass `cls` from a TOML table. Keys in `skip` are ignored.

    Raises RecipeError for unknown keys (with "did you mean"), missing required keys and wrong types, each with its key path.
    """
    if not isinstance(table, dict):
        raise RecipeError("a table is needed here", where=where, got=table, allowed=f"a table of {_fields_text(cls)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {item.name: item for item in dataclasses.fields(cls) if item.init}
    values = {}
    for key, value in table.items():
        if key in skip:
            continue
        if key not in known:
            raise RecipeError(
                f"unknown key {key!r}",
                where=f"{where}.{key}" if where else key,
                allowed=", ".join(known) or "no keys at all",
                next=did_you_mean(key, known),
            )
        values[key] = convert(value, hints[key], f"{where}.{key}" if where else key)
    for name, item in known.items():
        if name not in values and item.default is _MISSING and item.default_factory is _MISSING:
            raise RecipeError(
                "this key is required and missing", where=f"{where}.{name}" if where else name, allowed=type_text(hints[name])
            )
    try:
        return cls(**values)
    except RecipeError as error:
        if error.where is None or not error.where.startswith(where):
            error.where = f"{where}.{error.where}" if error.where else where
        raise


def convert(value: Any, annotation: Any, where: str) -> Any:
    """`value` checked against and converted to `annotation`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        base, *extras = typing.get_args(annotation)
        marker = next((extra for extra in extras if isinstance(extra, Slot)), None)
        if marker is not None:
            return build_slot(marker.kind, value, where)
        return convert(value, base, where)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, annotation, where)
    if origin is Literal:
        if value in typing.get_args(annotation):
            return value
        allowed = typing.get_args(annotation)
        raise RecipeError(
            "not one of the allowed values",
            where=where,
            got=value,
            allowed=type_text(annotation),
            next=did_you_mean(str(value), [str(item) for item in allowed]),
        )
    if origin in (list, tuple):
        inner = typing.get_args(annotation)[0]
        if not isinstance(value, (list, tuple)):
            raise _wrong(value, annotation, where)
        items = [convert(item, inner, f"{where}[{n}]") for n, item in enumerate(value)]
        return tuple(items)
    if origin is dict:
        inner = typing.get_args(annotation)[1]
        if not isinstance(value, dict):
            raise _wrong(value, annotation, where)
        return {key: convert(item, inner, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(annotation):
        return build(typing.cast(type, annotation), value, where)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is type(None):
        annotation = types.NoneType
    if isinstance(annotation, type):
        # bool is an int in Python, but `steps = true` is a mistake
        if isinstance(value, bool) and annotation is not bool:
            raise _wrong(value, annotation, where)
        if isinstance(value, annotation):
            return value
    raise _wrong(value, annotation, where)


def _convert_union(value: Any, annotation: Any, where: str) -> Any:
    members = typing.get_args(annotation)
    if (value is None or value == "none") and types.NoneType in members:
        return None
    first: RecipeError | None = None
    for member in members:
        if member is types.NoneType:
            continue
        try:
            return convert(value, member, where)
        except RecipeError as error:
            # An error from inside a table is more telling than "none of the union's members fits".
            if error.where != where:
                raise
            first = first or error
    if first is not None and len([m for m in members if m is not types.NoneType]) == 1:
        raise first
    raise _wrong(value, annotation, where)


def build_slot(kind: str, value: Any, where: str) -> Any:
    """A slot instance from a table with `type`, or from the bare name of a slot without required fields."""
    if isinstance(value, str):
        value = {"type": value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return value  # a default that is already built
    if not isinstance(value, dict):
        raise RecipeError("a table with a `type` is needed here", where=where, got=value, allowed=", ".join(slots.names(kind)))
    if "type" not in value:
        raise RecipeError(
            "this key is required and missing",
            where=f"{where}.type",
            allowed=", ".join(slots.names(kind)) + ", or a path to a .py file",
        )
    cls = slots.load(kind, value["type"], where=f"{where}.type")
    return build(cls, value, where, skip=("type",))


def _wrong(value: Any, annotation: Any, where: str) -> RecipeError:
    return RecipeError(f"wrong type {type(value).__name__}", where=where, got=value, allowed=type_text(annotation))


def type_text(annotation: Any) -> str:
    """A type as a user would say it: `int or "none"`, `one of "a", "b"`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        base, *extras = typing.get_args(annotation)
        marker = next((extra for extra in extras if isinstance(extra, Slot)), None)
        return f"a {marker.kind} table" if marker else type_text(base)
    if origin in (Union, types.UnionType):
        return " or ".join('"none"' if m is types.NoneType else type_text(m) for m in typing.get_args(annotation))
    if origin is Literal:
        return "one of " + ", ".join(f'"{item}"' if isinstance(item, str) else str(item) for item in typing.get_args(annotation))
    if origin in (list, tuple):
        return f"a list of {type_text(typing.get_args(annotation)[0])}"
    if origin is dict:
        return f"a table of {type_text(typing.get_args(annotation)[1])}"
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _fields_text(cls: type) -> str:
    return ", ".join(item.name for item in dataclasses.fields(cls))


def to_table(value: Any) -> Any:
    """The plain TOML-able form of a configured value, defaults included. None becomes "none"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        table = {}
        name = getattr(type(value), "slot_path", "") or getattr(type(value), "slot_name", "")
        if name:
            table["type"] = name
        for item in dataclasses.fields(value):
            table[item.name] = to_table(getattr(value, item.name))
        return table
    if isinstance(value, (list, tuple)):
        return [to_table(item) for item in value]
    if isinstance(value, dict):
        return {key: to_table(item) for key, item in value.items()}
    return "none" if value is None else value
