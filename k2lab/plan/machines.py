"""The table of machines: devices, memory, peak rates and price, from `machines.toml` or the user's own file of the same form."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from k2lab.core import schema
from k2lab.core.errors import RecipeError, did_you_mean

SHIPPED = Path(__file__).with_name("machines.toml")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of machine; rates are per device, 10^9 bytes/s and dense 10^12 flop/s. `machines.toml` says what each field means.

    Raises RecipeError for numbers that no machine has.
    """

    name: str
    device: Literal["cuda", "cpu"]
    gpus: int
    gpu: str
    memory_gb: float
    bf16_tflops: float
    fp32_tflops: float
    assumed_mfu: float
    assumed_attention_mfu: float
    memory_gb_per_s: float = 0.0
    link_gb_per_s: float = 0.0
    network_gb_per_s: float = 0.0
    dollars_per_hour: float | None = None
    runtime_gb: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for field, low in (("memory_gb", 0.0), ("bf16_tflops", 0.0), ("fp32_tflops", 0.0)):
            if not getattr(self, field) > low:
                raise self._wrong(field, "a number above 0")
        for field in ("assumed_mfu", "assumed_attention_mfu"):
            if not 0 < getattr(self, field) <= 1:
                raise self._wrong(field, "a share of the peak, above 0 and at most 1")
        for field in ("memory_gb_per_s", "link_gb_per_s", "network_gb_per_s", "runtime_gb", "dollars_per_hour", "gpus"):
            if (getattr(self, field) or 0) < 0:
                raise self._wrong(field, "a number that is not negative")
        if self.device == "cuda" and self.gpus < 1:
            raise self._wrong("gpus", "at least 1 on a cuda machine")

    def _wrong(self, field: str, allowed: str) -> RecipeError:
        where = f"machine.{self.name}.{field}"
        return RecipeError("this number does not make a machine", where=where, got=getattr(self, field), allowed=allowed)

    @property
    def devices(self) -> int:
        """What a process can be placed on: the GPUs, or the one CPU."""
        return max(1, self.gpus)

    def peak(self, precision: str) -> float:
        """Dense peak in flop/s of one device for matrix work in `precision` ("fp32" or "bf16")."""
        return 1e12 * (self.fp32_tflops if precision == "fp32" else self.bf16_tflops)

    def describe(self) -> str:
        """One line: devices, memory, peak, price."""
        count = f"{self.gpus} x " if self.gpus else ""
        price = "no price" if self.dollars_per_hour is None else f"${self.dollars_per_hour:g}/h"
        return f"{count}{self.gpu}, {self.memory_gb:g} GB, {self.bf16_tflops:g} TFLOP/s bf16 dense, {price}"


@cache
def _read(path: Path) -> dict[str, Machine]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no machine table {str(path)!r}", next="Give a path that exists") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"{path} cannot be read as TOML: {error}", next=f"Copy {SHIPPED} and edit it") from None
    rows: Any = tree.get("machine")
    if not isinstance(rows, dict) or not rows:
        raise RecipeError("this file holds no machines", where=str(path), allowed="tables [machine.NAME]")
    machines = {}
    for name, row in rows.items():
        row = {"name": name, **row} if isinstance(row, dict) else row
        machines[name] = schema.build(Machine, row, f"machine.{name}")
    return machines


def table(path: Path | None = None) -> dict[str, Machine]:
    """All machines of the shipped table, or of the user's at `path`, by name."""
    return dict(_read(Path(path).resolve() if path else SHIPPED))


def get(name: str, path: Path | None = None) -> Machine:
    """The machine called `name`. Raises RecipeError if the table has none."""
    known = table(path)
    if name not in known:
        raise RecipeError(
            f"there is no machine called {name!r}",
            where=str(path) if path else None,
            allowed=", ".join(known) + ("" if path else ", or your own table"),
            next=did_you_mean(name, known),
        )
    return known[name]
