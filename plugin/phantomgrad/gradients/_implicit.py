"""The exact gradient by the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from phantomgrad._errors import PhantomGradError
from phantomgrad._options import check_number
from phantomgrad._solve import solve
from phantomgrad._state import Leaves
from phantomgrad.gradients._adjoint import VJP, record
from phantomgrad.gradients._base import Gradient, Problem
from phantomgrad.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class Implicit(Gradient):
    """Solve `v = J^T v + g` to a tolerance in every backward pass: the exact gradient.

    By the implicit function theorem `dL/dz = dF/dz (I - J)^-1 g` (Bai et al., "Deep Equilibrium Models", 2019). As
    exact as its tolerance and the forward solution's; costs a second solve, each step of which is one vector-Jacobian product.
    """

    solver: Solver | None = None
    """The solver of the adjoint equation; None takes the forward pass's."""
    rtol: float | None = None
    """Relative tolerance of the adjoint solve, in place of the solver's own."""

    def __post_init__(self) -> None:
        if self.solver is not None and not isinstance(self.solver, Solver):
            raise ValueError(f"solver of Implicit must be a Solver or None, got {self.solver!r}.")
        if self.rtol is not None:
            check_number(self, "rtol", minimum=0.0)

    def connect(self, problem: Problem) -> Leaves:
        return record(problem.evaluate, problem.solved.point, partial(self._solve_adjoint, problem))

    def _solve_adjoint(self, problem: Problem, vjp: VJP, cotangent: Leaves) -> Leaves:
        if torch.is_grad_enabled():
            raise PhantomGradError(
                "Implicit gives first derivatives only: call backward or torch.autograd.grad with create_graph=False, "
                "or use UnrolledPhantom, which can be differentiated twice with the solution held constant."
            )
        solver = replace(self.solver or problem.solver, trace=None)
        if self.rtol is not None:
            solver = replace(solver, rtol=self.rtol, atol=None)
        solved = solve(
            lambda v: tuple(map(torch.add, vjp(v), cotangent)),
            cotangent,
            solver,
            problem.samples,
            tolerance_dtype=problem.tolerance_dtype,
            stop_on_divergence=True,
        )
        problem.report(solved, "the adjoint equation of Implicit")
        return solved.image
