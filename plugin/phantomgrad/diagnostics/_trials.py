"""What `check` tries: solvers from the start, gradients at the solution."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from phantomgrad._solution import Solution
from phantomgrad._state import Leaves, State, Structure
from phantomgrad.diagnostics._alignment import ExactGradient, GradientAlignment, gradient_of, pull_back
from phantomgrad.diagnostics._linearised import Linearisation
from phantomgrad.diagnostics._subject import Subject
from phantomgrad.gradients import (
    AdaptivePhantom,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    UnrolledPhantom,
)
from phantomgrad.solvers import FixedPointIteration, Solver

Result = TypeVar("Result")


@dataclass(frozen=True)
class SolverTrial:
    """How one solver fares from the start of the call."""

    solver: Solver
    residual: Tensor
    """The relative residual of the worst sample after each evaluation, shape (evaluations,), on the CPU."""
    best: float
    """The relative residual of the worst sample at its best iterate."""
    converged: int
    samples: int
    steps: int
    """Evaluations until the last sample stopped."""
    seconds: float

    @property
    def settles(self) -> bool:
        """Whether every sample met its tolerance."""
        return self.converged == self.samples

    @property
    def diverges(self) -> bool:
        """Whether a sample became infinite or NaN."""
        return not bool(self.residual.isfinite().all())

    def after(self, evaluations: int) -> float | None:
        """The worst residual after so many evaluations, or where the solve had ended before; None before the first
        check."""
        seen = self.residual[: max(0, evaluations)]
        return float(seen[-1]) if len(seen) else None


def try_solver(subject: Subject, solver: Solver) -> SolverTrial:
    """Solve from the call's start, looking at every step."""
    watched = replace(solver, trace="residual", check_every=1)

    def run() -> Solution:
        with torch.no_grad():
            return subject.solve(OneStep(), solver=watched, on_failure="ignore")

    solution, seconds = _timed(subject, run, repeats=3, limit=0.2)
    assert solution.trace is not None
    trace = solution.trace.residual.cpu()
    worst = torch.where(trace.isnan(), torch.inf, trace).amax(dim=1) if trace.numel() else trace.flatten()
    return SolverTrial(
        solver=solver,
        residual=worst,
        best=float(solution.residual.max()),
        converged=int(solution.converged.sum()),
        samples=solution.converged.numel(),
        steps=int(solution.steps.max()),
        seconds=seconds,
    )


@dataclass(frozen=True)
class GradientTrial:
    """How one gradient compares with the exact one, and what it costs beyond the solve."""

    gradient: Gradient
    alignment: GradientAlignment
    seconds: float | None
    """One recorded evaluation, or several, and backward: the shortest of a few runs; None if it needs its own solve."""


_FROM_THE_SOLUTION = (UnrolledPhantom, NeumannPhantom, KrylovPhantom, AdaptivePhantom, OneStep, Implicit)
"""Gradients that need the solution only, not how it was found."""


def try_gradient(
    subject: Subject, at: Linearisation, exact: ExactGradient, gradient: Gradient, *, solver: Solver
) -> GradientTrial:
    """Differentiate at the solution, a few times; `solver` is the one that found it."""
    seconds = None
    if isinstance(gradient, _FROM_THE_SOLUTION):
        point = Structure.of(subject.call.start).unflatten(tuple(leaf.detach() for leaf in at.point))
        at_solution = gradient
        if isinstance(gradient, Implicit) and gradient.solver is None:
            at_solution = replace(gradient, solver=solver)
        values, seconds = _timed(
            subject, lambda: _at_solution(subject, point, at_solution, exact.cotangent), repeats=6, limit=1.0
        )
    else:
        values = gradient_of(subject, gradient, exact.cotangent)
    return GradientTrial(gradient=gradient, alignment=exact.compare(gradient, values), seconds=seconds)


def _at_solution(subject: Subject, point: State, gradient: Gradient, cotangent: Leaves) -> list[Tensor | None]:
    solution = subject.solve(gradient, solver=FixedPointIteration(max_steps=0), start=point, on_failure="ignore")
    return pull_back(solution.value, subject, cotangent)


def _timed(subject: Subject, run: Callable[[], Result], *, repeats: int, limit: float) -> tuple[Result, float]:
    """What `run` returns, and the shortest of its durations: what else the machine does only ever adds to them."""
    start = _now(subject)
    result = run()
    end = _now(subject)
    shortest = end - start
    for _ in range(repeats - 1):
        if end - start > limit:
            break
        begin = end
        result = run()
        end = _now(subject)
        shortest = min(shortest, end - begin)
    return result, shortest


def _now(subject: Subject) -> float:
    """The time once the device has finished its work."""
    device = subject.call.leaves[0].device
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()
