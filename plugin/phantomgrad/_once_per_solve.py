"""What a map computes once per solve although it is evaluated many times.

Note [Parametrizations]
`torch.nn.utils.parametrizations` (weight norm, spectral norm, ...) recompute a weight at every access. During a solve the
weight cannot change, so it is computed once, with grad, at its first use, and every evaluation of that call, recorded or not,
gets the same tensor. torch's own `parametrize.cached()` would not do: it is global, so another thread's solve
without grad would cut this one's weights off from their parameters. Here each call has its own cache, and each thread sees
only the caches of its own calls.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from phantomgrad._bound import Bound


class _Active(threading.local):
    def __init__(self) -> None:
        self.caches: list[dict[int, Tensor | None]] = []


_active = _Active()


class _Shared(Bound):
    """The instance `forward` of a parametrization: asks the outermost running solve's cache first."""

    def __call__(self) -> Tensor:
        key = id(self.module)
        for cache in _active.caches:
            if key in cache:
                value = cache[key]
                if value is None:
                    with torch.enable_grad():
                        value = cache[key] = self._compute()
                return value
        return self._compute()

    def _compute(self) -> Tensor:
        module = self.module
        return type(module).forward(module)  # pyright: ignore[reportArgumentType, reportReturnType]


class OncePerSolve:
    """The cache of one call of an attached module; as a context it is active for one evaluation."""

    def __init__(self, parametrizations: list[ParametrizationList]) -> None:
        self._cache: dict[int, Tensor | None] = {id(each): None for each in parametrizations}
        for each in parametrizations:
            if "forward" not in each.__dict__:
                each.__dict__["forward"] = _Shared(each)

    @contextmanager
    def __call__(self) -> Generator[None, None, None]:
        _active.caches.append(self._cache)
        try:
            yield
        finally:
            _active.caches.pop()


def once_per_solve(module: nn.Module) -> OncePerSolve | None:
    """A fresh cache for a call of `module`, or None if nothing in it needs one."""
    found = [each for each in module.modules() if isinstance(each, ParametrizationList)]
    return OncePerSolve(found) if found else None


def release(module: nn.Module) -> None:
    """Give the parametrizations in `module` their own `forward` back."""
    for each in module.modules():
        if isinstance(each.__dict__.get("forward"), _Shared):
            del each.__dict__["forward"]
