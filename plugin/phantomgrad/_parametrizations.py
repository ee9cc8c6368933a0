"""Parametrized weights inside a map: computed once per solve.

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


class SharedParametrizations:
    """The parametrized weights of one call of an attached module; as a context they are shared by one more evaluation."""

    def __init__(self, parametrizations: list[ParametrizationList]) -> None:
        self._parametrizations = parametrizations
        self._cache: dict[int, Tensor | None] = {id(each): None for each in parametrizations}
        for each in parametrizations:
            if "forward" not in each.__dict__:
                each.__dict__["forward"] = _Shared(each)

    def compute(self) -> None:
        """Compute all weights now."""
        with self():
            for each in self._parametrizations:
                each()

    @contextmanager
    def __call__(self) -> Generator[None, None, None]:
        _active.caches.append(self._cache)
        try:
            yield
        finally:
            _active.caches.pop()


def release(module: nn.Module) -> None:
    """Give the parametrizations in `module` their own `forward` back."""
    for each in module.modules():
        if isinstance(each.__dict__.get("forward"), _Shared):
            del each.__dict__["forward"]
