"""Whether the fields of a config have the types that they are annotated with."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from phantomgrad_hub.errors import ConfigError

_WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a text"}


def check_types(config: Any) -> None:
    """Raise `ConfigError` that names the first field whose value is of another type; an int may stand for a float."""
    hints = _hints(type(config))
    for entry in fields(config):
        value = getattr(config, entry.name)
        if not _is_a(value, hints[entry.name]):
            shown = (
                f"{value!r:.60}"
                if isinstance(value, str | int | float | None)
                else f"{type(value).__name__} {value!r:.60}"
            )
            raise ConfigError(f"{entry.name} must be {describe(hints[entry.name])}, not {shown}")


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself where it is none."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def describe(hint: Any) -> str:
    """A type in words."""
    words: list[str] = []
    for member in members(hint):
        if get_origin(member) is Literal:
            words += [repr(choice) for choice in get_args(member)]
        elif get_origin(member) is tuple:
            inner = [entry for entry in get_args(member) if entry is not Ellipsis]
            names = ", ".join(describe(entry) for entry in inner)
            words.append(f"({names}, ...)" if Ellipsis in get_args(member) else f"({names})")
        elif member is type(None):
            words.append("None")
        else:
            words.append(_WORDS.get(member) or str(member.__name__))
    return " or ".join(words)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_a(value: Any, hint: Any) -> bool:
    return any(_is_member(value, member) for member in members(hint))


def _is_member(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        # Which of the choices it is, the config says itself.
        return any(type(value) is type(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and _are_entries(value, get_args(hint))
    if hint is float:
        return type(value) in (int, float)
    if hint is type(None):
        return value is None
    kind: type = hint
    return isinstance(value, kind) if is_dataclass(hint) else type(value) is kind


def _are_entries(values: Sequence[Any], hints: tuple[Any, ...]) -> bool:
    kinds = [hints[0]] * len(values) if hints[-1] is Ellipsis else list(hints)
    return len(kinds) == len(values) and all(map(_is_a, values, kinds))
