"""The interface of a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from phantomgrad._progress import Agree
from phantomgrad._report import Report
from phantomgrad._samples import Samples
from phantomgrad._solution import AdjointSolve
from phantomgrad._solve import Solved
from phantomgrad._state import Leaves, Map
from phantomgrad.solvers import Solver


@dataclass
class Refinement:
    """How a value that was refined after the solve compares with the solution."""

    away: Tensor | None = None
    """The samples that it led away from the solution, bool of shape (samples,); None where there are none."""


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
    report: Report
    """Tells the caller how a further solve went, by the caller's `on_failure`."""
    adjoint: AdjointSolve
    """Where a gradient that decides while it runs says what it took."""
    refinement: Refinement
    """Where a gradient that changes the solution's value says what became of it."""
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

    reads_memory: ClassVar[bool] = False
    """Whether it reads `problem.solved.memory`, which must then be that of the whole batch."""

    @property
    def connects_last_evaluation(self) -> bool:
        """Whether the evaluation made last by `connect` has the solution's gradient in its input, so that what the map
        returns beside the state has its whole gradient too."""
        return self.records_solve

    def solver_for(self, solver: Solver) -> Solver:
        """The solver to run where `solver` was asked for; an `AttachError` where the gradient cannot work with it."""
        return solver

    @abstractmethod
    def connect(self, problem: Problem) -> Leaves:
        """The solution with a graph to everything `problem.evaluate` depends on; called with grad mode on."""

    def without_grad(self, problem: Problem) -> Leaves:
        """The solution where no gradient is recorded."""
        return problem.solved.image
