"""The loop that every solver runs in: it evaluates, measures, keeps the best iterate, freezes samples and stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phantomgrad._samples import Samples
from phantomgrad._solution import Trace
from phantomgrad._state import Leaves
from phantomgrad.solvers import Solver

Map = Callable[[Leaves], Leaves]
OnStep = Callable[[int, Leaves, Tensor], None]
Agree = Callable[[Tensor], Tensor]
"""Combines host decisions over processes: a bool tensor becomes the logical and of everybody's."""


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
    device = samples.device
    best_residual = torch.full((samples.count,), torch.inf, dtype=samples.dtype.to_real(), device=device)
    converged = torch.zeros(samples.count, dtype=torch.bool, device=device)
    diverged = torch.zeros_like(converged)
    steps = torch.zeros(samples.count, dtype=torch.int64, device=device)
    trace = Trace(states=[] if solver.trace == "state" else None) if solver.trace else None

    best_point = best_image = z = start
    all_converged = any_diverged = False
    memory = solver.start(start, samples) if solver.max_steps > 0 else None
    watched = rtol > 0 or atol > 0 or solver.keep == "best" or trace is not None or on_step is not None
    check_every = solver.check_every if watched else solver.max_steps
    for step in range(1, solver.max_steps + 1):
        fz = evaluate(z)
        if step % check_every != 0 and step != solver.max_steps:
            z = solver.advance(z, fz, memory, samples)
            continue

        with torch.no_grad():
            gap = samples.norm(tuple(map(torch.sub, fz, z)))
            scale = samples.norm(fz)
        residual = gap / scale.clamp_min(torch.finfo(scale.dtype).tiny)
        stopped = converged | diverged if stop_early else diverged
        diverged = diverged | ~torch.isfinite(gap + scale)
        converged = (converged & stopped) | ((gap <= atol + rtol * scale) & ~diverged)
        steps = torch.where(stopped, steps, step)
        improved = ~diverged if solver.keep == "last" else (residual <= best_residual) & ~diverged
        improved = improved & (~stopped | (residual == best_residual))
        stopped = converged | diverged if stop_early else diverged
        ours = torch.stack((converged.all(), ~diverged.any(), stopped.all()))
        flags = torch.cat((ours if agree is None else agree(ours), torch.stack((improved.all(), ~stopped.any()))))
        # The only transfer to the host: one per check.
        all_converged, none_diverged, all_stopped, all_improved, none_stopped = flags.tolist()
        any_diverged = not none_diverged

        if all_improved:
            best_point, best_image, best_residual = z, fz, residual
        else:
            best_point = samples.where(improved, z, best_point)
            best_image = samples.where(improved, fz, best_image)
            best_residual = torch.where(improved, residual, best_residual)
        if trace is not None:
            trace.steps.append(step)
            trace.residuals.append(residual)
            if trace.states is not None:
                trace.states.append(fz)
        if on_step is not None:
            on_step(step, fz, residual)
        if all_stopped or (any_diverged and stop_on_divergence) or step == solver.max_steps:
            break
        advanced = solver.advance(z, fz, memory, samples)
        z = advanced if none_stopped else samples.where(stopped, best_point, advanced)

    return Solved(
        point=best_point,
        image=best_image,
        converged=converged,
        steps=steps,
        residual=best_residual if solver.max_steps > 0 else torch.full_like(best_residual, torch.nan),
        all_converged=all_converged,
        diverged=diverged,
        any_diverged=any_diverged,
        last=best_point is z,
        memory=memory,
        trace=trace,
    )
