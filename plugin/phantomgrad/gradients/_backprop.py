"""Plain backpropagation through the iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from phantomgrad._options import check_integer
from phantomgrad._state import Leaves
from phantomgrad.gradients._base import Gradient, Problem
from phantomgrad.solvers import FixedPointIteration, Solver


@dataclass(frozen=True, kw_only=True)
class Backprop(Gradient):
    """Differentiate `steps` plain iterations from the start: the baseline that implicit and phantom gradients replace.

    It takes the solver's place, with and without grad, and is the only gradient that reaches the start. No sample stops
    early. Memory and time of backward grow with `steps`; differentiable to any order.
    """

    steps: int = 50
    """How many iterations are run and recorded."""

    records_solve: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer(self, "steps", minimum=1)

    def solver_for(self, solver: Solver) -> Solver:
        return FixedPointIteration(
            max_steps=self.steps,
            rtol=solver.rtol,
            atol=solver.atol,
            check_every=self.steps if solver.trace is None else solver.check_every,
            trace=solver.trace,
            keep="last",
        )

    def connect(self, problem: Problem) -> Leaves:
        return problem.solved.image
