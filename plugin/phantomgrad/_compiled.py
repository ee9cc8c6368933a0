"""A module's forward, compiled, with its weights as inputs.

Note [Compiled cells]
A compiled function does all that was traced, at every call. Two things that plain autograd and autocast spare are spared here:

- Autocast keeps its casts of parameters while it lasts, but a compiled evaluation casts them again. The weights of layers that
  autocast casts are cast once per call, with grad, and passed in; parametrized ones: Note [Parametrizations].
- A compiled backward computes the gradient of everything that required grad, where the products with the Jacobian
  need that of the state alone and autograd would compute no other. They have an evaluation of their own in which all else is
  held constant.

A mode that was asked for holds where nothing is recorded, in the solve: there each evaluation is over before the next begins, so
CUDA graphs ("reduce-overhead") may write all results to the same memory. Copies are taken out of it.

The compiler sees that the weights are put into the module and taken out again, and leaves both out of what it makes. Where a
parameter is no plain tensor (sharded by FSDP, say) the module is left as it is: slower, with the same results.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.stateless import _reparametrize_module

from phantomgrad._arguments import Call
from phantomgrad._parametrizations import casts_its_weights
from phantomgrad._transforms import compiled

Weights = dict[str, Tensor]
"""Tensors by the name of the parameter that they replace."""


class CompiledForward:
    """The forward of `module`, compiled, without grad in a `mode` of its own; `previous` where it had one of its own."""

    def __init__(self, module: nn.Module, previous: Callable[..., Any] | None, mode: str | None) -> None:
        forward = type(module).forward if previous is None else _without_module(previous)

        def evaluate(weights: Weights, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not weights:
                return forward(module, *args, **kwargs)
            with _reparametrize_module(module, weights):
                return forward(module, *args, **kwargs)

        self._evaluate = compiled(evaluate)
        self._without_grad = None if mode is None else compiled(evaluate, mode)

    def __call__(self, weights: Weights, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._without_grad is None or torch.is_grad_enabled():
            return self._evaluate(weights, module, *args, **kwargs)
        return _tensors_mapped(Tensor.clone, self._without_grad(weights, module, *args, **kwargs))

    def with_weights(self, weights: Weights, module: nn.Module) -> Callable[..., Any]:
        """A function of the other arguments that uses these weights."""
        return functools.partial(self, weights, module)


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
        args, kwargs = _tensors_mapped(Tensor.detach, (call.args, call.kwargs))
        return replace(call, step=self._forward.with_weights(weights, self._module), args=args, kwargs=kwargs)


def _tensors_mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` of every tensor in its tuples, lists and dicts, of whatever class they are."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = copy.copy(value)
        for key, part in value.items():
            mapped[key] = _tensors_mapped(function, part)
        return mapped
    if isinstance(value, tuple | list):
        parts = [_tensors_mapped(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


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
