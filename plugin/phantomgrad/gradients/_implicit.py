"""The exact gradient by the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from phantomgrad._options import check_number
from phantomgrad._samples import Samples
from phantomgrad._solve import solve
from phantomgrad._state import Leaves
from phantomgrad.gradients._adjoint import VJP
from phantomgrad.gradients._base import Gradient, Problem
from phantomgrad.gradients._differentiable_adjoint import record_exact
from phantomgrad.solvers import Solver


@dataclass(frozen=True, kw_only=True)
class Implicit(Gradient):
    """Solve `v = J^T v + g` to a tolerance in every backward pass: the exact gradient.

    By the implicit function theorem `dL/dz = dF/dz (I - J)^-1 g` (Bai et al., "Deep Equilibrium Models", 2019). As
    exact as its tolerance and the forward solution's; costs a second solve, each step of which is one vector-Jacobian product.
    Differentiable to any order: `create_graph=True` evaluates the map again and solves its adjoint equation as another
    fixed-point problem (Note [Higher derivatives]).
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
        solver = replace(self.solver or problem.solver, trace=None)
        if solver.max_steps == 0:  # the start was taken as the solution; its adjoint still has to be solved for
            solver = replace(solver, max_steps=Solver.max_steps)
        samples, dtype = problem.samples, problem.tolerance_dtype
        solver = self._with_relative_tolerance(solver, samples)
        statistics, report, agree = problem.adjoint, problem.report, problem.agree

        def solve_adjoint(vjp: VJP, cotangent: Leaves) -> tuple[Leaves, Leaves]:
            finite = torch.stack([torch.isfinite(g).all() for g in cotangent]).all()
            if not bool(finite if agree is None else agree(finite)):
                # The overflow is the caller's, not the equation's: loss scaling looks for it, to skip the step.
                return _nothing(cotangent)
            solved = solve(
                lambda v: tuple(map(torch.add, vjp(v), cotangent)),
                cotangent,
                solver,
                samples,
                tolerance_dtype=dtype,
                stop_on_divergence=True,
                agree=agree,
            )
            statistics.record(int(solved.steps.max()) + 1, solved.residual)
            if solved.any_diverged and torch.float16 in samples.dtypes:
                return _nothing(cotangent)  # the adjoint of a finite cotangent may overflow as well
            report(solved, "the adjoint equation of Implicit", solver)
            return solved.point, solved.image

        return record_exact(problem.evaluate, problem.solved.point, solve_adjoint, twice=not problem.compiled)

    def _with_relative_tolerance(self, solver: Solver, samples: Samples) -> Solver:
        """`solver` without an absolute tolerance, unless it was asked for: cotangents may have any scale.

        What is left is the rounding of numbers so small that they have fewer digits, which is coarse in float16.
        """
        if self.rtol is None and self.solver is not None and solver.atol is not None:
            return solver
        numbers = max(map(torch.finfo, samples.dtypes), key=lambda finfo: finfo.tiny * finfo.eps)
        rounding = numbers.tiny * numbers.eps * samples.entries**0.5
        rtol = solver.rtol if self.rtol is None else self.rtol
        if self.rtol is None and rtol is not None and rtol < numbers.eps and solver.atol:
            rtol = None  # a forward tolerance that is absolute alone says nothing about the adjoint's
        return replace(solver, rtol=rtol, atol=rounding)


def _nothing(cotangent: Leaves) -> tuple[Leaves, Leaves]:
    """An adjoint that is not finite, and its image."""
    nothing = tuple(torch.full_like(g, torch.nan) for g in cotangent)
    return nothing, nothing
