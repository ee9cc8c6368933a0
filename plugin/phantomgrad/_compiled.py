"""A module's forward, compiled, with casts of its weights, or constants in their place, as inputs.

Note [Compiled cells]
A compiled function does all that was traced, at every call. Two things that plain autograd and autocast spare are spared here:

- Autocast keeps its casts of parameters while it lasts, but a compiled evaluation casts them again. The weights of layers that
  autocast casts are cast once per call, with grad, and passed in. Where an operation would cast a weight it takes this instead;
  whatever else uses the weight, such as its norm or a layer for which autocast is switched off, gets it as it is.
- A compiled backward computes the gradient of everything that required grad, where the products with the Jacobian
  need that of the state alone and autograd would compute no other. They have an evaluation of their own in which all else is
  held constant.

A mode that was asked for holds where nothing is recorded, in the solve: there each evaluation is over before the next begins, so
CUDA graphs ("reduce-overhead") may write all results to the same memory. Copies are taken out of it.

The compiler sees that constants are put into the module and taken out again, and leaves both out of what it makes. Where a
parameter is no plain tensor (sharded by FSDP, say) the module is left as it is: slower, with the same results. So it is where
Python runs the function instead, after a graph break or too many recompilations: another thread would find there what was put in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode

from phantomgrad._arguments import Call
from phantomgrad._parametrizations import CASTING_OPERATIONS, casts_its_weights, running_casts
from phantomgrad._state import tensors_mapped
from phantomgrad._transforms import compiled

Casts = list[tuple[Tensor, Tensor]]
"""Weights, each with what autocast makes of it."""
Constants = dict[str, Tensor]
"""By the name of the parameter that they replace."""


class _UsingCasts(TorchFunctionMode):
    """Gives the operations that would cast a weight its cast; not the compiled function but the compiler runs this."""

    def __init__(self, casts: Casts) -> None:
        super().__init__()
        self._casts = casts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in CASTING_OPERATIONS:
            args = tuple([self._cast(each) for each in args])
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any) -> Any:
        for weight, cast in self._casts:
            if value is weight:
                device = weight.device.type
                fits = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == cast.dtype
                return cast if fits else value
        return value


class CompiledForward:
    """The forward of `module`, compiled, without grad in a `mode` of its own; `previous` where it had one of its own."""

    def __init__(self, module: nn.Module, previous: Callable[..., Any] | None, mode: str | None) -> None:
        forward = type(module).forward if previous is None else _without_module(previous)

        def evaluate(constants: Constants, casts: Casts, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():
                return forward(module, *args, **kwargs)
            casts = casts + running_casts()
            with (
                _reparametrize_module(module, constants) if constants else nullcontext(),
                _UsingCasts(casts) if casts else nullcontext(),
            ):
                return forward(module, *args, **kwargs)

        self._copies = mode is not None
        # Each with a limit of recompilations of its own, of which a new size takes one in each.
        self._solving, self._recording, self._holding = compiled(evaluate, mode), compiled(evaluate), compiled(evaluate)

    def __call__(self, casts: Casts, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """One evaluation, in which these casts are used."""
        if torch.is_grad_enabled():
            return self._recording({}, casts, module, *args, **kwargs)
        returned = self._solving({}, casts, module, *args, **kwargs)
        return tensors_mapped(Tensor.clone, returned) if self._copies else returned

    def holding(self, constants: Constants, casts: Casts, module: nn.Module) -> Callable[..., Any]:
        """An evaluation as a function of the arguments, with constants in the place of the weights."""
        return functools.partial(self._holding, constants, casts, module)


def _without_module(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, *args, **kwargs: forward(*args, **kwargs)


class CompiledCall:
    """One call of a compiled module."""

    def __init__(self, forward: CompiledForward, module: nn.Module) -> None:
        self._forward, self._module = forward, module
        self._casts = _casts(module)
        self.step = functools.partial(forward, self._casts, module)

    def constant(self, call: Call) -> Call | None:
        """`call` with nothing to be differentiated but the state; None where that cannot be."""
        if not _all_plain(self._module):
            return None
        held = {id(weight): weight.detach() for weight in self._module.parameters()}
        constants = {name: held[id(weight)] for name, weight, _ in _named(self._module)}
        casts = [(held[id(weight)], cast.detach()) for weight, cast in self._casts]
        args, kwargs = tensors_mapped(Tensor.detach, (call.args, call.kwargs))
        return replace(call, step=self._forward.holding(constants, casts, self._module), args=args, kwargs=kwargs)


def _casts(module: nn.Module) -> Casts:
    """The weights that autocast, as it is now, would cast at every use."""
    if not _all_plain(module):
        return []
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for name, weight, layer in _named(module):
        device = weight.device.type
        used = name.rpartition(".")[2] in ("weight", "bias") and casts_its_weights(layer)
        if used and id(weight) not in found and weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
            with torch.enable_grad():
                found[id(weight)] = weight, weight.to(torch.get_autocast_dtype(device))
    return list(found.values())


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """The weights in `module` with name and owner: a tied one for each owner, but each owner once, whatever its names."""
    for path, owner in module.named_modules():
        for name, weight in owner._parameters.items():
            if weight is not None and not isinstance(owner, ParametrizationList):
                yield f"{path}.{name}" if path else name, weight, owner


def _all_plain(module: nn.Module) -> bool:
    return all(type(weight) in (Tensor, nn.Parameter) for weight in module.parameters())
