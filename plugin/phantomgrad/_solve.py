"""The loop that every solver runs in: it evaluates, measures, keeps the best iterate, freezes samples and stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phantomgrad._progress import Agree, Progress
from phantomgrad._samples import Samples
from phantomgrad._solution import Trace
from phantomgrad._state import Leaves
from phantomgrad.solvers import Solver

Map = Callable[[Leaves], Leaves]
OnStep = Callable[[int, Leaves, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Where a solve ended: the best point, its image, and per sample how it went."""

    point: Leaves
    image: Leaves
    converged: Tensor
    steps: Tensor
    residual: Tensor
    all_converged: bool
    diverged: Tensor
    any_diverged: bool
    last: bool
    """Whether `point` is where the map was evaluated last, for every sample."""
    memory: Any
    """What the solver remembers of its steps."""
    trace: Trace | None


def solve(
    evaluate: Map,
    start: Leaves,
    solver: Solver,
    samples: Samples,
    *,
    tolerance_dtype: torch.dtype,
    stop_on_divergence: bool,
    on_step: OnStep | None = None,
    agree: Agree | None = None,
    recorded: bool = False,
    stop_early: bool = True,
) -> Solved:
    """Iterate `evaluate` from `start` until every sample has converged or diverged, or the steps run out.

    A converged sample is frozen at its iterate. A diverged one (its residual is not finite) ends the solve at once if
    `stop_on_divergence`; otherwise it is frozen at its best finite iterate. With `recorded` the graph of all steps is kept;
    without `stop_early` no sample stops before the last of them.
    """
    with torch.set_grad_enabled(recorded):
        return _iterate(
            evaluate,
            start,
            solver,
            samples,
            tolerance_dtype=tolerance_dtype,
            stop_on_divergence=stop_on_divergence,
            on_step=on_step,
            agree=agree,
            stop_early=stop_early,
        )


def _iterate(
    evaluate: Map,
    start: Leaves,
    solver: Solver,
    samples: Samples,
    *,
    tolerance_dtype: torch.dtype,
    stop_on_divergence: bool,
    on_step: OnStep | None,
    agree: Agree | None,
    stop_early: bool,
) -> Solved:
    rtol, atol = solver.tolerances(tolerance_dtype)
    like = torch.empty(samples.count, dtype=samples.dtype.to_real(), device=samples.device)
    progress = Progress(like, rtol=rtol, atol=atol, keep=solver.keep, stop_early=stop_early, agree=agree)
    trace = Trace(states=[] if solver.trace == "state" else None) if solver.trace else None

    best_point = best_image = z = start
    memory = solver.start(start, samples) if solver.max_steps > 0 else None
    watched = rtol > 0 or atol > 0 or solver.keep == "best" or trace is not None or on_step is not None
    check_every = solver.check_every if watched else solver.max_steps
    for step in range(1, solver.max_steps + 1):
        fz = evaluate(z)
        if step % check_every != 0 and step != solver.max_steps:
            z = solver.advance(z, fz, memory, samples)
            continue
        with torch.no_grad():
            check = progress.check(step, samples.norm(tuple(map(torch.sub, fz, z))), samples.norm(fz))
        if check.improved is None:
            best_point, best_image = z, fz
        else:
            best_point = samples.where(check.improved, z, best_point)
            best_image = samples.where(check.improved, fz, best_image)
        if trace is not None:
            trace.steps.append(step)
            trace.residuals.append(check.residual)
            if trace.states is not None:
                trace.states.append(fz)
        if on_step is not None:
            on_step(step, fz, check.residual)
        if progress.all_stopped or (progress.any_diverged and stop_on_divergence) or step == solver.max_steps:
            break
        advanced = solver.advance(z, fz, memory, samples)
        z = advanced if check.stopped is None else samples.where(check.stopped, best_point, advanced)

    outcome = progress.outcome
    return Solved(
        point=best_point,
        image=best_image,
        converged=outcome.converged,
        steps=outcome.steps,
        residual=progress.best if solver.max_steps > 0 else torch.full_like(progress.best, torch.nan),
        all_converged=progress.all_converged,
        diverged=outcome.diverged,
        any_diverged=progress.any_diverged,
        last=best_point is z,
        memory=memory,
        trace=trace,
    )
