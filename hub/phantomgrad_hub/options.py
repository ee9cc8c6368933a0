"""Gradients and solvers of the plugin as JSON: `{"type": "UnrolledPhantom", "steps": 5, ...}`, known classes only."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from phantomgrad import (
    Anderson,
    Broyden,
    FixedPointIteration,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    UnrolledPhantom,
)
from phantomgrad_hub.errors import ConfigError
from phantomgrad_hub.text import summarise

Gradient = UnrolledPhantom | NeumannPhantom | KrylovPhantom | OneStep | Implicit
Solver = FixedPointIteration | Anderson | Broyden

GRADIENTS: dict[str, type[Gradient]] = {
    kind.__name__: kind for kind in (UnrolledPhantom, NeumannPhantom, KrylovPhantom, OneStep, Implicit)
}
SOLVERS: dict[str, type[Solver]] = {kind.__name__: kind for kind in (FixedPointIteration, Anderson, Broyden)}

_MAX_COUNTS = {"steps": 10_000, "max_steps": 10_000, "check_every": 10_000, "memory": 100}
"""A config comes with a downloaded checkpoint, so it may not ask for days of work."""


def encode_options(value: Gradient | Solver) -> dict[str, Any]:
    """A gradient or solver as a JSON object that names its class and every option."""
    encoded: dict[str, Any] = {"type": type(value).__name__}
    for option in fields(value):
        entry = getattr(value, option.name)
        encoded[option.name] = encode_options(entry) if type(entry) in SOLVERS.values() else entry
    return encoded


def decode_options(values: Any, registry: dict[str, Any], name: str, *, complete: bool = True) -> Any:
    """The object that `encode_options` wrote; `name` is the config key that errors cite.

    Every option must be there if `complete`; else those that are not take their defaults.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be an object with a 'type', got {values!r:.60}")
    options = dict(values)
    kind = options.pop("type", None)
    if not isinstance(kind, str) or kind not in registry:
        raise ConfigError(f"{name}: unknown type {kind!r:.60}; known are {', '.join(registry)}")
    known = {option.name for option in fields(registry[kind])}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"{name}: {kind} has no option {summarise(map(repr, unknown))}")
    for key, entry in options.items():
        if isinstance(entry, dict):
            options[key] = decode_options(entry, SOLVERS, f"{name}.{key}", complete=complete)
    if complete and (missing := sorted(known - set(options))):
        raise ConfigError(f"{name}: {kind} lacks {', '.join(missing)}")
    try:
        return registry[kind](**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


def check_options(value: Any, registry: dict[str, Any], name: str) -> None:
    """Raise `ConfigError` unless `value` is of a known class, within the bounds of a config."""
    if type(value) not in registry.values():
        raise ConfigError(f"{name} must be one of {', '.join(registry)}, got {value!r:.60}")
    for option in fields(value):
        entry = getattr(value, option.name)
        bound = _MAX_COUNTS.get(option.name)
        if bound is not None and entry is not None and entry > bound:
            raise ConfigError(f"{name}: {option.name} must be at most {bound}, got {entry}")
        if option.name == "solver" and entry is not None:
            check_options(entry, SOLVERS, f"{name}.solver")
