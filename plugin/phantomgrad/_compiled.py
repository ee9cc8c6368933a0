"""A module's forward, compiled, with its weights as inputs.

Note [Compiled cells]
A compiled function does all that was traced, at every call. Two things that plain autograd and autocast spare are spared here:

- Autocast keeps its casts of parameters while it lasts, but a compiled evaluation casts them again. The weights of layers that
  autocast casts are cast once per call, with grad, and passed in; parametrized ones: Note [Parametrizations].
- A compiled backward computes the gradient of everything that required grad, where the products with the Jacobian
  need that of the state alone and autograd would compute no other. They have an evaluation of their own in which all else is
  held constant.

The compiler sees that the weights are put into the module and taken out again, and leaves both out of what it makes. Where a
parameter is no plain tensor (sharded by FSDP, say) the module is left as it is: slower, with the same results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._pytree import tree_map_only

from phantomgrad._arguments import Call
from phantomgrad._parametrizations import casts_its_weights
from phantomgrad._transforms import compiled

Weights = dict[str, Tensor]
"""Tensors by the name of the parameter that they replace."""


class CompiledForward:
    """The forward of `module`, compiled; `previous` where it had one of its own."""

    def __init__(self, module: nn.Module, previous: Callable[..., Any] | None) -> None:
        forward = type(module).forward if previous is None else _without_module(previous)

        def evaluate(weights: Weights, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not weights:
                return forward(module, *args, **kwargs)
            with _reparametrize_module(module, weights):
                return forward(module, *args, **kwargs)

        self._evaluate = compiled(evaluate)

    def with_weights(self, weights: Weights, module: nn.Module) -> Callable[..., Any]:
        """A function of the other arguments that uses these weights."""
        return functools.partial(self._evaluate, weights, module)


def _without_module(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, *args, **kwargs: forward(*args, **kwargs)


class CompiledCall:
    """One call of a compiled module."""

    def __init__(self, forward: CompiledForward, module: nn.Module) -> None:
        self._forward, self._module = forward, module
        self._weights = _cast_weights(module)
        self.step = forward.with_weights(self._weights, module)

    def constant(self, call: Call) -> Call | None:
        """`call` with nothing to be differentiated but the state; None where that cannot be."""
        weights = _constant_weights(self._module, self._weights)
        if weights is None:
            return None
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (call.args, call.kwargs))
        return replace(call, step=self._forward.with_weights(weights, self._module), args=args, kwargs=kwargs)


def _cast_weights(module: nn.Module) -> Weights:
    """The weights that autocast, as it is now, would cast at every use, cast."""
    if not _all_plain(module):
        return {}
    cast: dict[int, Tensor] = {}
    found: Weights = {}
    for name, weight, layer in _named(module):
        device = weight.device.type
        if not casts_its_weights(layer) or weight.dtype != torch.float32 or not torch.is_autocast_enabled(device):
            continue
        if id(weight) not in cast:
            with torch.enable_grad():
                cast[id(weight)] = weight.to(torch.get_autocast_dtype(device))
        found[name] = cast[id(weight)]
    return found


def _constant_weights(module: nn.Module, weights: Weights) -> Weights | None:
    """All weights of `module`, or what replaces them in `weights`, without their history; None where that cannot be."""
    if not _all_plain(module):
        return None
    return {name: weights.get(name, weight).detach() for name, weight, _ in _named(module)}


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """The weights in `module` with name and owner: a tied one for each owner, but each owner once, whatever its names."""
    for path, owner in module.named_modules():
        for name, weight in owner._parameters.items():
            if weight is not None and not isinstance(owner, ParametrizationList):
                yield f"{path}.{name}" if path else name, weight, owner


def _all_plain(module: nn.Module) -> bool:
    return all(type(weight) in (Tensor, nn.Parameter) for weight in module.parameters())
