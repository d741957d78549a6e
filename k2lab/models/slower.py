"""Slower paths are taken openly: why, and what is done instead, is said once per process.

`say` is for a tensor, a device or a type that no kernel takes, `or_none` for kernels whose library is missing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import TypeVar

Found = TypeVar("Found")


@cache
def say(why: str, instead: str) -> None:
    """Warns once for these texts, at the caller's caller."""
    warnings.warn(f"{why}: {instead}", stacklevel=3)


def or_none(
    what: str, instead: str, errors: tuple[type[Exception], ...] = (ImportError,)
) -> Callable[[Callable[[], Found]], Callable[[], Found | None]]:
    """Decorates a function that imports and returns kernels: it runs once, and gives None, said once, where one of `errors` is
    raised. `what` names the kernels or their library."""

    def decorate(load: Callable[[], Found]) -> Callable[[], Found | None]:
        @cache
        @wraps(load)
        def find() -> Found | None:
            try:
                return load()
            except errors as error:
                say(f"{what} cannot be used ({error})", instead)
                return None

        return find

    return decorate
