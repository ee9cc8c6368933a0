"""Checks of option values: a wrong one is a `ValueError` that names the option, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def check_integer(owner: object, name: str, *, minimum: int) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{_option(owner, name)} must be an integer of at least {minimum}, got {value!r}.")


def check_number(
    owner: object, name: str, *, above: float | None = None, minimum: float | None = None, maximum: float | None = None
) -> None:
    value = getattr(owner, name)
    bounds = [
        text
        for bound, text in (
            (above, f"above {above}"),
            (minimum, f"at least {minimum}"),
            (maximum, f"at most {maximum}"),
        )
        if bound is not None
    ]
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    good = good and (above is None or value > above)
    good = good and (minimum is None or value >= minimum) and (maximum is None or value <= maximum)
    if not good:
        raise ValueError(f"{_option(owner, name)} must be a finite number {' and '.join(bounds)}, got {value!r}.")


def check_choice(owner: object, name: str, choices: Sequence[Any]) -> None:
    value = getattr(owner, name)
    if value not in choices:
        raise ValueError(f"{_option(owner, name)} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_boolean(owner: object, name: str) -> None:
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise ValueError(f"{_option(owner, name)} must be True or False, got {value!r}.")


def _option(owner: object, name: str) -> str:
    return f"{name} of {type(owner).__name__}"
