"""Typed edits of nested frozen dataclasses from `KEY=VALUE` texts, and their JSON form."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from phantomgrad_hub.typed_fields import describe, members

from .errors import SettingError

ConfigT = TypeVar("ConfigT")
Tree = dict[str, Any]
_VALUE = "="


def apply_settings(config: ConfigT, settings: Iterable[str], *, given: Mapping[str, Any] | None = None) -> ConfigT:
    """`config` with the fields that `settings` name replaced, all at once; they edit what `given` has for a field, if it does.

    `optimizer.lr=0.01`, `model.channels=(32,64,128)`, `model.gradient=NeumannPhantom(steps=3)`,
    `model.gradient.steps=3`. Raises `SettingError` for a key that is no field (naming near ones), a value of another
    type, and a value that the config refuses.
    """
    tree: Tree = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise SettingError(f"--set {setting}: expected KEY=VALUE, for example optimizer.lr=0.01")
        node = tree
        for part in key.strip().split("."):
            node = node.setdefault(part, {})
        node[_VALUE] = value.strip()
    given = {} if given is None else given
    known = [key for key in _all_keys(config) if key.partition(".")[0] not in given]
    known += [key for name, value in given.items() for key in (name, *_all_keys(value, f"{name}."))]
    return _edited(config, tree, "", known, given)


def to_json(value: Any) -> Any:
    """A config as JSON values: dataclasses become objects, those of a choice of classes with their `type`."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {
            entry.name: to_json(getattr(value, entry.name)) for entry in fields(value)
        }
    if isinstance(value, tuple | list):
        return [to_json(entry) for entry in value]
    return value


def differing_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The dotted keys at which two JSON trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        missing = object()
        return [
            found
            for key in keys
            for found in differing_keys(
                old.get(key, missing), new.get(key, missing), f"{prefix}.{key}" if prefix else key
            )
        ]
    return [] if old == new else [prefix]


def _edited(
    config: Any, tree: Tree, prefix: str, known: list[str], given: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    hints = get_type_hints(type(config))
    changes = dict(given)
    for name, node in tree.items():
        key = f"{prefix}{name}"
        if name not in {entry.name for entry in fields(config) if entry.init}:
            raise SettingError(f"--set {key}: no such field{_near(key, known)}")
        changes[name] = _new_value(given.get(name, getattr(config, name)), node, hints[name], key, known)
    try:
        return replace(config, **changes)
    except (TypeError, ValueError) as error:
        # Fields that are checked together are named together: the first one stands for where to look.
        first = None if given else next(iter(tree))
        named = next((name for name in tree if str(error).startswith(f"{name} ")), first)
        raise SettingError(str(error) if named is None else f"--set {prefix}{named}: {error}") from error


def _new_value(old: Any, node: Tree, hint: Any, key: str, known: list[str]) -> Any:
    edits = {name: entry for name, entry in node.items() if name != _VALUE}
    value = _parse(node[_VALUE], hint, key) if _VALUE in node else old
    if not edits:
        return value
    if not is_dataclass(value):
        classes = [member.__name__ for member in _classes(hint)]
        cure = f"set {key} to one of {', '.join(classes)} first" if classes else "it has no fields"
        raise SettingError(f"--set {key}.{next(iter(edits))}: {key} is {value!r}; {cure}")
    return _edited(value, edits, f"{key}.", known)


def _classes(hint: Any) -> list[type[Any]]:
    """The dataclasses that a field of this type may hold."""
    return [member for member in members(hint) if isinstance(member, type) and is_dataclass(member)]


def _parse(text: str, hint: Any, key: str) -> Any:
    classes = {member.__name__: member for member in _classes(hint)}
    try:
        expression = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        return _coerced(text, hint, key)
    if isinstance(expression, ast.Name) and expression.id in classes:
        return classes[expression.id]()
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name) and expression.func.id in classes:
        return _constructed(expression, classes[expression.func.id], key)
    try:
        value = ast.literal_eval(expression)
    except ValueError:
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return _coerced(value, hint, key)


def _constructed(call: ast.Call, cls: type, key: str) -> Any:
    try:
        if call.args:
            raise TypeError(f"{cls.__name__} takes NAME=VALUE options")
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise SettingError(f"--set {key}: {error}") from error


def _coerced(value: Any, hint: Any, key: str) -> Any:
    for member in members(hint):
        matched, result = _as_type(value, member, key)
        if matched:
            return result
    raise SettingError(f"--set {key}: expected {describe(hint)}, not {value!r}")


def _as_type(value: Any, hint: Any, key: str) -> tuple[bool, Any]:
    """Whether `value` can stand for `hint`, and the value in that type."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint), value
    if hint is type(None):
        return value is None, None
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number, float(value) if number else None
    if origin is tuple:
        return _as_tuple(value, get_args(hint), key)
    if is_dataclass(hint) and isinstance(hint, type):
        return _as_dataclass(value, hint, key)
    return type(value) is hint, value


def _as_tuple(value: Any, entries: tuple[Any, ...], key: str) -> tuple[bool, Any]:
    if isinstance(value, str) and entries == (str, Ellipsis):
        value = tuple(name.strip() for name in value.split(","))
    if isinstance(value, str) or value is None:
        return False, None
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    kinds = [entries[0]] * len(items) if entries[-1] is Ellipsis else list(entries)
    if len(kinds) != len(items):
        return False, None
    return True, tuple(_coerced(item, kind, key) for item, kind in zip(items, kinds, strict=True))


def _as_dataclass(value: Any, cls: type, key: str) -> tuple[bool, Any]:
    """A row of values stands for the fields of `cls` in their order: `(0.5, 4, 3)` is one solver phase."""
    hints, names = get_type_hints(cls), [entry.name for entry in fields(cls)]
    if not isinstance(value, tuple | list) or len(value) > len(names):
        return False, None
    options = {name: _coerced(entry, hints[name], key) for name, entry in zip(names, value, strict=False)}
    try:
        return True, cls(**options)
    except (TypeError, ValueError) as error:
        raise SettingError(f"--set {key}: {error}") from error


def _all_keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for entry in fields(config):
        value = getattr(config, entry.name)
        keys.append(f"{prefix}{entry.name}")
        if is_dataclass(value):
            keys += _all_keys(value, f"{prefix}{entry.name}.")
    return keys


def _near(key: str, known: list[str]) -> str:
    last = key.rsplit(".", 1)[-1]
    same_name = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == last]
    near = same_name + [
        name for name in difflib.get_close_matches(key, known, n=4, cutoff=0.6) if name not in same_name
    ]
    if near:
        return f"; did you mean {' or '.join(near[:4])}?"
    return f"; fields are {', '.join(name for name in known if '.' not in name)}"
