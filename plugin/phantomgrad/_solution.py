"""What a solve returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from phantomgrad._state import State


@dataclass(frozen=True)
class Trace(Sequence[Any]):
    """What a solver built with `trace=` saw at each of its checks, oldest first.

    As a sequence it holds what was asked for: residuals of shape (samples,), or states.
    """

    steps: list[int] = field(default_factory=list[int])
    """How many evaluations had been made at each check."""
    residuals: list[Tensor] = field(default_factory=list[Tensor])
    """The relative residual of every sample at each check, each of shape (samples,)."""
    states: list[State] | None = None
    """The image `f(z)` at each check; None unless the solver was built with `trace="state"`."""

    @property
    def residual(self) -> Tensor:
        """All residuals as one tensor of shape (checks, samples)."""
        return torch.stack(self.residuals) if self.residuals else torch.empty(0, 0)

    def _items(self) -> list[Any]:
        return self.residuals if self.states is None else self.states

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._items()[index]


@dataclass
class AdjointSolve:
    """What the latest backward pass through a solution took; filled in by gradients that decide while they run."""

    steps: int | None = None
    """How many vector-Jacobian products it made, the last one to parameters and inputs included; None before."""
    residual: Tensor | None = None
    """The relative residual of the adjoint equation, or the estimated relative error of `AdaptivePhantom`, shape (samples,)."""

    @property
    def worst(self) -> float:
        """The largest residual, or estimated error; NaN before a backward pass."""
        return float("nan") if self.residual is None else float(self.residual.max())

    def record(self, steps: int, residual: Tensor) -> None:
        """Called by a gradient in backward."""
        self.steps, self.residual = steps, residual.detach()


@dataclass(frozen=True)
class Solution:
    """A fixed point and how it was reached, per sample along `batch_dim`."""

    value: State
    """The solution `f(z_best)`, nested like the state; `UnrolledPhantom` refines it where gradients are recorded."""
    converged: Tensor
    """Whether `||f(z) - z|| <= atol + rtol * ||f(z)||` was met, or `on_step` let the sample stop; bool of shape (samples,)."""
    steps: Tensor
    """How many evaluations the solver made until the sample stopped, integers of shape (samples,)."""
    residual: Tensor
    """The relative residual `||f(z) - z|| / ||f(z)||` at `z_best`, shape (samples,); NaN where nothing was evaluated."""
    trace: Trace | None = None
    """What every check saw, if the solver was built with `trace`."""
    adjoint: AdjointSolve = field(default_factory=AdjointSolve, compare=False)
    """How the backward pass went, for `Implicit` and `AdaptivePhantom`."""

    def __repr__(self) -> str:
        total = self.converged.numel()
        return (
            f"Solution({int(self.converged.sum())} of {total} samples converged, "
            f"steps <= {int(self.steps.max()) if total else 0}, "
            f"residual <= {float(self.residual.max()) if total else 0.0:.2e})"
        )
