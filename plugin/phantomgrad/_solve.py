"""The loop that every solver runs in: it evaluates, measures, keeps the best iterate, freezes samples and stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phantomgrad._compaction import Batch, Narrow
from phantomgrad._progress import Agree, Progress
from phantomgrad._samples import Samples
from phantomgrad._solution import Trace
from phantomgrad._state import Leaves, Map
from phantomgrad.solvers import Solver

OnStep = Callable[[int, Leaves, Tensor], Tensor | None]


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
    """What the solver remembers of its steps: of the samples evaluated last, with `narrow`."""
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
    narrow: Narrow | None = None,
) -> Solved:
    """Iterate `evaluate` from `start` until every sample has converged or diverged, or the steps run out.

    A converged sample is frozen at its iterate, and so is one that `on_step` chooses. A diverged one (its residual is not
    finite) ends the solve at once if `stop_on_divergence`; otherwise it is frozen at its best finite iterate. With `recorded`
    the graph of all steps is kept; without `stop_early` no sample stops before the last of them. With `narrow` converged
    samples are no longer evaluated where that pays (Note [Compaction]); the result is the same, but for `memory`, which is
    that of the others.
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
            narrow=narrow,
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
    narrow: Narrow | None,
) -> Solved:
    rtol, atol = solver.tolerances(tolerance_dtype)
    like = torch.empty(samples.count, dtype=samples.dtype.to_real(), device=samples.device)
    progress = Progress(like, rtol=rtol, atol=atol, keep=solver.keep, stop_early=stop_early, agree=agree)
    trace = Trace(states=[] if solver.trace == "state" else None) if solver.trace else None

    batch = Batch(evaluate, samples, narrow if solver.can_select else None)
    best_point = best_image = z = start
    stopped: Tensor | None = None
    memory = solver.start(start, samples) if solver.max_steps > 0 else None
    watched = rtol > 0 or atol > 0 or solver.keep == "best" or trace is not None or on_step is not None
    check_every = solver.check_every if watched else solver.max_steps
    for step in range(1, solver.max_steps + 1):
        fz = batch.evaluate(z)
        if step % check_every == 0 or step == solver.max_steps:
            with torch.no_grad():
                gap, scale = samples.norm(tuple(map(torch.sub, fz, z))), samples.norm(fz)
                check = progress.check(step, gap, scale)
            improved, stopped = check.improved, check.stopped
            if trace is not None:
                trace.steps.append(step)
                trace.residuals.append(batch.whole_residual(check.residual))
                if trace.states is not None:
                    trace.states.append(batch.whole(fz))
            if on_step is not None:
                chosen = on_step(step, batch.whole(fz), batch.whole_residual(check.residual))
                if chosen is not None and stop_early:
                    accepted, stopped = progress.accept(batch.present(chosen), check.residual)
                    improved = None if improved is None else improved | accepted
            if improved is None:
                best_point, best_image = z, fz
            else:
                best_point = samples.where(improved, z, best_point)
                best_image = samples.where(improved, fz, best_image)
            if progress.all_stopped or (progress.any_diverged and stop_on_divergence) or step == solver.max_steps:
                break
            kept = None if stopped is None else batch.drop_converged(progress, best_point, best_image)
            if kept is not None and stopped is not None:
                stopped = stopped[kept]
                stopped = stopped if stopped.any() else None
                point, image = z, fz
                z, fz = samples.select(point, kept), samples.select(image, kept)
                best_point = z if best_point is point else samples.select(best_point, kept)
                best_image = fz if best_image is image else samples.select(best_image, kept)
                memory, samples = solver.select(memory, kept), batch.samples
        advanced = solver.advance(z, fz, memory, samples)
        z = advanced if stopped is None else samples.where(stopped, best_point, advanced)

    last = best_point is z and not batch.narrowed
    best_point, best_image, residual, outcome = batch.whole_result(progress, best_point, best_image)
    return Solved(
        point=best_point,
        image=best_image,
        converged=outcome.converged,
        steps=outcome.steps,
        residual=residual if solver.max_steps > 0 else torch.full_like(residual, torch.nan),
        all_converged=progress.all_converged,
        diverged=outcome.diverged,
        any_diverged=progress.any_diverged,
        last=last,
        memory=memory,
        trace=trace,
    )
