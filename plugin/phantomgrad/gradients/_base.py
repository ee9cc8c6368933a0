"""The interface of a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from phantomgrad._progress import Agree
from phantomgrad._samples import Samples
from phantomgrad._solution import AdjointSolve
from phantomgrad._solve import Map, Solved
from phantomgrad._state import Leaves
from phantomgrad.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A solved fixed-point problem, as a gradient sees it."""

    evaluate: Map
    """The map `f`; it records a graph where grad mode is on."""
    solved: Solved
    samples: Samples
    solver: Solver
    """The solver of the forward pass."""
    tolerance_dtype: torch.dtype
    """The dtype whose rounding bounds the residuals, autocast's included."""
    report: Callable[[Solved, str], None]
    """Tells the caller how a further solve went, by the caller's `on_failure`."""
    adjoint: AdjointSolve
    """Where a gradient that decides while it runs says what it took."""
    agree: Agree | None = None
    """Makes the processes of a group stop together."""
    compiled: bool = False
    """Whether the map is compiled."""


class Gradient(ABC):
    """Which estimate of the gradient a solution carries.

    With `h* = F(h*, z)` the exact gradient is `dF/dz (I - J)^-1 g`; every gradient here replaces the inverse by
    something cheaper, or solves for it. The start of the solve gets no gradient.

    To write one, implement `connect`: return values equal to the solution whose graph yields the wanted gradient.
    """

    records_solve: ClassVar[bool] = False
    """Whether the solve itself is recorded, all steps of it, from a start that may require grad."""

    def solver_for(self, solver: Solver) -> Solver:
        """The solver to run where `solver` was asked for; an `AttachError` where the gradient cannot work with it."""
        return solver

    @abstractmethod
    def connect(self, problem: Problem) -> Leaves:
        """The solution with a graph to everything `problem.evaluate` depends on; called with grad mode on."""

    def without_grad(self, problem: Problem) -> Leaves:
        """The solution where no gradient is recorded."""
        return problem.solved.image
