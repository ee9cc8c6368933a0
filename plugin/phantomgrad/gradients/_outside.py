"""Tensors that a map takes from outside: parameters, further inputs, and whatever its closure has captured.

Note [Tensors from outside]
A second derivative must reach everything the map depends on, including tensors nobody passed. Every torch operation goes
through a `TorchFunctionMode`, so a mode around the recorded evaluation sees each tensor that requires grad but was not
made by that evaluation. A later evaluation can then work on aliases of these tensors, which makes them distinct from what its
own point depends on. What no mode sees (the arguments of a custom autograd Function) is found by walking the graph, and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from phantomgrad._state import Leaves


class Discovery(TorchFunctionMode):
    """Collects the tensors from outside that the operations within this context use."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, Tensor] = {}
        # Nodes of the graph are numbered in the order in which a thread makes them.
        marker = torch.zeros((), requires_grad=True).view(()).grad_fn
        self._first = 0 if marker is None else marker._sequence_nr()  # type: ignore[attr-defined]

    @property
    def tensors(self) -> Leaves:
        """The tensors found, in the order of their first use."""
        return tuple(self._found.values())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            if tensor.requires_grad and id(tensor) not in self._found and self._is_outside(tensor):
                self._found[id(tensor)] = tensor
        return func(*args, **(kwargs or {}))

    def _is_outside(self, tensor: Tensor) -> bool:
        node = tensor.grad_fn
        return node is None or node._sequence_nr() < self._first  # type: ignore[attr-defined]


class Aliasing(TorchFunctionMode):
    """Puts an alias in the place of each of the given tensors in the operations within this context."""

    def __init__(self, tensors: Leaves) -> None:
        super().__init__()
        self.aliases: Leaves = aliases(tensors)
        self._alias_of = {id(tensor): alias for tensor, alias in zip(tensors, self.aliases, strict=True)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*self._replaced(args), **self._replaced(kwargs or {}))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._alias_of.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(map(self._replaced, value))
        return {key: self._replaced(part) for key, part in value.items()} if type(value) is dict else value


def aliases(tensors: Leaves) -> Leaves:
    """The same values with nodes of their own in the graph."""
    return tuple(tensor.view_as(tensor) for tensor in tensors)


def reaches_a_leaf(outputs: Leaves, stops: Iterable[Tensor]) -> bool:
    """Whether the graph of `outputs` leads to a leaf that requires grad by a way that passes none of `stops`."""
    seen = {tensor.grad_fn for tensor in stops}
    pending = [leaf.grad_fn for leaf in outputs if leaf.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        if hasattr(node, "variable"):  # the node that accumulates into a leaf's `.grad`
            return True
        seen.add(node)
        pending += [following for following, _ in node.next_functions if following is not None]
    return False


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
