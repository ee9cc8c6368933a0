"""States as tuples of tensors.

A state is a tensor, or a tuple, list or dict of states. Solvers and gradients work on its flat tuple of tensors, its
*leaves*; the `Structure` remembers how to put them back.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from phantomgrad._errors import StateMismatchError

Leaves = tuple[Tensor, ...]
"""The tensors of a state, in a fixed order."""
Map = Callable[[Leaves], Leaves]
"""What is iterated."""

State = Any
"""A tensor, or a tuple, list or dict of states (nested types cannot be spelt out without losing the user's own)."""


@dataclass(frozen=True)
class Structure:
    """How the leaves of a state are nested: a container type with its keys and children, or a tensor."""

    container: type | None = None
    keys: tuple[Any, ...] = ()
    children: tuple[Structure, ...] = ()

    @staticmethod
    def of(state: State, where: Callable[[], str] = lambda: "") -> Structure:
        """Describe `state`; anything but tensors, tuples, lists and dicts is a `StateMismatchError`."""
        if isinstance(state, Tensor):
            return _TENSOR
        if _is_rebuildable(state):
            return Structure(type(state), tuple(state), tuple(Structure.of(part, where) for part in state.values()))
        if isinstance(state, (tuple, list)) and len(state) > 0:
            return Structure(type(state), tuple(range(len(state))), tuple(Structure.of(part, where) for part in state))
        raise StateMismatchError(
            f"A state is a tensor, or a non-empty tuple, list or dict of states; got {describe(state)}{where()}."
        )

    def flatten(self, state: State) -> Leaves | None:
        """The leaves of `state` in this structure's order, or None if it is nested differently."""
        leaves: list[Tensor] = []
        return tuple(leaves) if self._collect(state, leaves) else None

    def _collect(self, state: State, leaves: list[Tensor]) -> bool:
        if self.container is None:
            if not isinstance(state, Tensor):
                return False
            leaves.append(state)
            return True
        if issubclass(self.container, dict):
            if not isinstance(state, dict) or len(state) != len(self.keys):
                return False
            return all(
                key in state and child._collect(state[key], leaves)
                for key, child in zip(self.keys, self.children, strict=True)
            )
        if type(state) is not self.container or len(state) != len(self.keys):
            return False
        return all(child._collect(part, leaves) for child, part in zip(self.children, state, strict=True))

    def unflatten(self, leaves: Leaves) -> State:
        """The state whose leaves these are."""
        return leaves[0] if self.container is None else self._rebuild(iter(leaves))

    def _rebuild(self, leaves: Iterator[Tensor]) -> State:
        if self.container is None:
            return next(leaves)
        parts = [child._rebuild(leaves) for child in self.children]
        if issubclass(self.container, dict):
            named = dict(zip(self.keys, parts, strict=True))
            return self.container(**named) if is_dataclass(self.container) else self.container(named)
        if self.container is list:
            return parts
        if hasattr(self.container, "_fields"):  # a namedtuple takes its fields one by one
            return self.container(*parts)
        return self.container(parts)


_TENSOR = Structure()


def _is_rebuildable(state: Any) -> TypeGuard[dict[Any, Any]]:
    """Whether it is a dict of a type that can be made again from its items, such as a `ModelOutput` of transformers."""
    return isinstance(state, dict) and (type(state) is dict or isinstance(state, OrderedDict))


def describe(state: Any) -> str:
    """A short text for error messages: shapes and dtypes, nested like the state."""
    if isinstance(state, Tensor):
        return f"{tuple(state.shape)} {str(state.dtype).removeprefix('torch.')} on {state.device}"
    name = "" if type(state) in (dict, list, tuple) else type(state).__name__
    if isinstance(state, dict):
        return name + "{" + ", ".join(f"{key!r}: {describe(part)}" for key, part in state.items()) + "}"
    if isinstance(state, list):
        return name + "[" + ", ".join(describe(part) for part in state) + "]"
    if isinstance(state, tuple):
        return name + "(" + ", ".join(describe(part) for part in state) + ("," if len(state) == 1 else "") + ")"
    return f"a {type(state).__name__}"


def detach(leaves: Leaves) -> Leaves:
    """The same values without their history."""
    return tuple(leaf.detach() for leaf in leaves)


def damped(point: Leaves, image: Leaves, damping: float) -> Leaves:
    """One damped step `(1 - damping) * point + damping * image`, leaf by leaf."""
    if damping == 1.0:
        return image
    return tuple(torch.lerp(z, fz, damping) for z, fz in zip(point, image, strict=True))


def tensors_mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` of every tensor in its tuples, lists and dicts, of whatever class they are."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = copy.copy(value)
        for key, part in value.items():
            mapped[key] = tensors_mapped(function, part)
        return mapped
    if isinstance(value, tuple | list):
        parts = [tensors_mapped(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def requires_grad(value: Any) -> bool:
    """Whether an argument or a result is, or holds, a tensor that requires grad."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(requires_grad(part) for part in value.values())
    if isinstance(value, (tuple, list)):
        return any(requires_grad(part) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return any(requires_grad(getattr(value, entry.name)) for entry in fields(value))
    return False
