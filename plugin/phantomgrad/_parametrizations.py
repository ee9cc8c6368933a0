"""Parametrized weights inside a map: computed, cast and laid out once per solve.

Note [Parametrizations]
`torch.nn.utils.parametrizations` (weight norm, spectral norm, ...) recompute a weight at every access. During a solve the
weight cannot change, so it is computed once, with grad, at its first use, and every evaluation of that call, recorded or not,
gets the same tensor. torch's own `parametrize.cached()` would not do: it is global, so another thread's solve
without grad would cut this one's weights off from their parameters. Here each call has its own cache, and each thread sees
only the caches of its own calls.

Two things more are done once that every evaluation would repeat. Autocast keeps its casts of parameters, but not those of a
weight that is computed: its layer gets one cast, and whatever else asks for the weight gets the weight itself. And what a
parametrization computes is laid out plainly where its parameter is channels last, which convolutions then undo each time (on a
CPU that takes as long as the convolution).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from copy import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from phantomgrad._bound import Bound


class _Cache:
    """What one call has computed, by the parametrization's id."""

    def __init__(self, parametrizations: dict[ParametrizationList, bool]) -> None:
        self.weights: dict[int, Tensor | None] = {id(each): None for each in parametrizations}
        self.casts: dict[tuple[int, torch.dtype], Tensor] = {}
        self.casting = {id(each) for each, cast in parametrizations.items() if cast}
        """Those whose weight is used as an argument that autocast casts, and for nothing else."""

    def constant(self) -> _Cache:
        """What has been computed, without its history."""
        held = copy(self)
        held.weights = {key: None if value is None else value.detach() for key, value in self.weights.items()}
        held.casts = {key: value.detach() for key, value in self.casts.items()}
        return held


class _Active(threading.local):
    def __init__(self) -> None:
        self.caches: list[_Cache] = []


_active = _Active()


class _Shared(Bound):
    """The instance `forward` of a parametrization: asks the outermost running solve's cache first."""

    def __call__(self) -> Tensor:
        key = id(self.module)
        for cache in _active.caches:
            if key in cache.weights:
                value = cache.weights[key]
                if value is None:
                    with torch.enable_grad():
                        value = cache.weights[key] = self._compute()
                if torch.compiler.is_dynamo_compiling():
                    return value  # `running_casts` are what the operations take then
                cast = key in cache.casting and torch.is_autocast_enabled(value.device.type) and _asked_by_a_layer()
                return _cast(key, value, cache) if cast else value
        return self._compute()

    def _compute(self) -> Tensor:
        module = self.module
        value: Tensor = type(module).forward(module)  # pyright: ignore[reportArgumentType, reportAssignmentType]
        return _laid_out_as(value, module.parameters())


def _cast(key: int, value: Tensor, cache: _Cache) -> Tensor:
    """`value` as autocast takes it here."""
    device = value.device.type
    if value.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return value
    dtype = torch.get_autocast_dtype(device)
    found = cache.casts.get((key, dtype))
    if found is None:
        with torch.enable_grad():
            found = cache.casts[key, dtype] = value.to(dtype)
    return found


def _asked_by_a_layer() -> bool:
    """Whether what asks for a parametrized weight is the forward of a layer that `casts_its_weights`."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _MACHINERY:
        frame = frame.f_back
    return frame.f_code in _CASTING_CODE


_MACHINERY = ("torch.nn.modules.module", "torch.nn.utils.parametrize")
"""Where the frames between an access and the parametrization's forward are."""


def running_casts() -> list[tuple[Tensor, Tensor]]:
    """The weights computed for this thread's solves that have been cast, each with its cast."""
    found: list[tuple[Tensor, Tensor]] = []
    for cache in _active.caches:
        for (key, _), cast in cache.casts.items():
            weight = cache.weights[key]
            if weight is not None:
                found.append((weight, cast))
    return found


def _laid_out_as(value: Tensor, parameters: Iterator[Tensor]) -> Tensor:
    """`value`, channels last where a parameter of its shape is."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    if layout is None or value.is_contiguous(memory_format=layout):
        return value
    if any(each.shape == value.shape and each.is_contiguous(memory_format=layout) for each in parameters):
        return value.contiguous(memory_format=layout)
    return value


class SharedParametrizations:
    """The parametrized weights of one call of an attached module; as a context they are shared by one more evaluation."""

    def __init__(self, parametrizations: dict[ParametrizationList, bool]) -> None:
        self._parametrizations = parametrizations
        self._cache = _Cache(parametrizations)
        for each in parametrizations:
            if "forward" not in each.__dict__:
                each.__dict__["forward"] = _Shared(each)

    def compute(self) -> None:
        """Compute all weights now, with what autocast, as it is now, makes of them."""
        with self():
            for each in self._parametrizations:
                weight = each()
                if id(each) in self._cache.casting:
                    _cast(id(each), weight, self._cache)

    @contextmanager
    def __call__(self, *, constant: bool = False) -> Generator[None, None, None]:
        _active.caches.append(self._cache.constant() if constant else self._cache)
        try:
            yield
        finally:
            _active.caches.pop()


_CASTING = {
    kind.forward
    for kind in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
}
"""What does nothing with its weight and bias but hand them to an operation for which autocast casts them."""

_CASTING_CODE = {forward.__code__ for forward in _CASTING}

CASTING_OPERATIONS = (
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
"""These operations."""


def casts_its_weights(module: nn.Module) -> bool:
    """Whether autocast casts the weights of `module` at every use."""
    return type(module).forward in _CASTING and "forward" not in module.__dict__


def parametrizations_of(module: nn.Module) -> Iterator[tuple[ParametrizationList, bool]]:
    """The parametrizations of `module` itself, and whether autocast casts the weight at every use."""
    lists = module._modules.get("parametrizations")
    if isinstance(lists, nn.ModuleDict):
        for each in lists.values():
            if isinstance(each, ParametrizationList):
                yield each, casts_its_weights(module)


def release(module: nn.Module) -> None:
    """Give the parametrizations in `module` their own `forward` back."""
    for each in module.modules():
        if isinstance(each.__dict__.get("forward"), _Shared):
            del each.__dict__["forward"]
