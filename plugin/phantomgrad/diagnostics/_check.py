"""The first thing to run on a block: does it settle, and which gradient does it want."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from phantomgrad._attach import Attachment, attachments
from phantomgrad._bound import module_path
from phantomgrad._errors import PhantomGradError, StateMismatchError
from phantomgrad._options import check_integer
from phantomgrad._state import describe
from phantomgrad.diagnostics._advice import advise
from phantomgrad.diagnostics._alignment import ExactGradient, Loss, find_cotangent
from phantomgrad.diagnostics._error import ErrorOptions, PhantomError, power_norm
from phantomgrad.diagnostics._linearised import Linearisation, linearise
from phantomgrad.diagnostics._report import CheckReport
from phantomgrad.diagnostics._spectrum import RadiusOptions, leading_of, radius, radius_of
from phantomgrad.diagnostics._subject import Subject, Target, examine
from phantomgrad.diagnostics._trials import GradientTrial, SolverTrial, try_gradient, try_solver
from phantomgrad.gradients import Gradient, Implicit, KrylovPhantom, NeumannPhantom, OneStep, UnrolledPhantom
from phantomgrad.solvers import Anderson, Broyden, FixedPointIteration, Solver

_STEPS = 5
_MAX_STEPS = 50
_NEAR_A_SOLUTION = 0.1


def check(
    module: Target,
    *inputs: Any,
    loss: Loss | None = None,
    max_steps: int | None = None,
    show: bool = True,
    seed: int = 0,
    solver: Solver | None = None,
    state: int | str = 0,
    output: int | str | None = None,
    batch_dim: int | None = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> CheckReport:
    """Print one page about a block, attached or not: does it settle, which damping does it want, how good is each
    gradient.

        check(cell, torch.zeros(32, 64), x)

    Tries a few solvers from the given start, measures the spectral radius where the best one ended, and compares
    gradients with the exact one there. Parameters, their `.grad`, buffers, random generators and the attachment stay as
    they are; plain attributes that a forward changes cannot be protected.

    module, inputs: the block, and the arguments of one call as the training loop makes it. A small batch will do.
    loss: maps the solution to a scalar, whose gradients are then compared; without it, those of a random cotangent.
    max_steps: of every solver that is tried; by default the module's own solver keeps its own, and others get as many,
        or 50.
    show: print the page; the returned report's `str()` is the same text.

    The other arguments are those of `spectral_radius`.
    """
    if max_steps is not None:
        CheckOptions(max_steps=max_steps)
    where = _where(module)
    try:
        with examine(
            module, inputs, kwargs, solver=solver, state=state, output=output, batch_dim=batch_dim, on_failure="ignore"
        ) as subject:
            report = _examine(subject, where, loss=loss, max_steps=max_steps, seed=seed)
    except StateMismatchError as error:
        _point_at_the_cell(module, error)
        raise
    report = replace(report, advice=advise(report))
    if show:
        print(report)
    return report


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of `check`."""

    max_steps: int

    def __post_init__(self) -> None:
        check_integer(self, "max_steps", minimum=1)


def _where(module: Target) -> str:
    if isinstance(module, Attachment):
        module = module.module
    return module_path(module) if isinstance(module, nn.Module) else getattr(module, "__name__", type(module).__name__)


def _point_at_the_cell(module: Target, error: StateMismatchError) -> None:
    """A whole model is a common mistake for the cell inside it."""
    if isinstance(module, nn.Module):
        inside = [each.module for each in attachments(module) if each.module is not module]
        if inside:
            error.add_note(
                f"{type(module).__name__} is not attached, but {module_path(inside[0])} inside it is: check that one, "
                "with the arguments that it is called with."
            )


def _examine(subject: Subject, where: str, *, loss: Loss | None, max_steps: int | None, seed: int) -> CheckReport:
    own = subject.solver if max_steps is None else replace(subject.solver, max_steps=max_steps)
    limit = max(own.max_steps, _MAX_STEPS) if max_steps is None else max_steps
    if own.max_steps == 0:  # it takes the start itself, which says nothing about settling
        own = replace(own, max_steps=limit)
    others = (own, FixedPointIteration(), FixedPointIteration(damping=0.5), Anderson(), Broyden())
    solvers = list(dict.fromkeys([own, *(replace(s, max_steps=limit, rtol=own.rtol, atol=own.atol) for s in others)]))
    trials = [try_solver(subject, solver) for solver in solvers]
    chosen = next((trial for trial in trials if trial.settles), min(trials, key=lambda trial: trial.best))
    at = linearise(subject, solver=chosen.solver, on_failure="ignore", warn_of_coupling=False)

    options = RadiusOptions(damping=1.0, rtol=1e-3, max_products=200)
    leading = leading_of(at, options, seed=seed)
    undamped = radius_of(leading, options)
    damping = _best_damping(leading.ritz)
    damped = undamped if damping == 1.0 else radius(at, replace(options, damping=damping), seed=seed)
    contracts = float(damped) < 1
    extra = FixedPointIteration(damping=damping, max_steps=limit, rtol=own.rtol, atol=own.atol)
    if contracts and extra not in solvers:
        trials.append(try_solver(subject, extra))

    exact, gradients = _compare(subject, at, chosen, damping if contracts else 0.5, loss, seed)
    return CheckReport(
        where=where,
        gradient=subject.gradient,
        state=describe(subject.call.start),
        samples=chosen.samples,
        entries=sum(leaf.numel() for leaf in at.point) // chosen.samples,
        variables={name: variable.numel() for name, variable in subject.variables.items()},
        solvers=tuple(trials),
        chosen=chosen,
        radius=undamped,
        damped_radius=damped,
        norm=_norm(at, seed),
        coupled=at.coupled,
        repeatable=at.is_repeatable(),
        gradients=gradients,
        exact_residual=None if exact is None else exact.residual,
        random_cotangent=loss is None,
    )


def _best_damping(ritz: Tensor) -> float:
    """The damping in tenths for which the damped Ritz values are smallest in modulus; of equally good ones the
    largest."""
    tenths = [i / 10 for i in range(10, 0, -1)]
    factors = [float((1 - d + d * ritz).abs().max()) for d in tenths]
    return next(d for d, factor in zip(tenths, factors, strict=True) if not factor > 1.01 * min(factors))


def _compare(
    subject: Subject, at: Linearisation, chosen: SolverTrial, damping: float, loss: Loss | None, seed: int
) -> tuple[ExactGradient | None, tuple[GradientTrial, ...]]:
    """The table of gradients, where there is a solution to differentiate at and something to differentiate for."""
    if not subject.variables or not chosen.best < _NEAR_A_SOLUTION:
        return None, ()
    exact = ExactGradient(at, find_cotangent(at, subject, loss=loss, cotangent=None, seed=seed))
    if not exact.is_exact:
        return exact, ()
    candidates: list[Gradient | None] = [
        subject.gradient,
        OneStep(),
        UnrolledPhantom(steps=_STEPS),
        UnrolledPhantom(steps=_STEPS, damping=damping),
        NeumannPhantom(steps=_STEPS, damping=damping),
        KrylovPhantom(steps=_STEPS),
        Implicit(),
    ]
    unique = dict.fromkeys(gradient for gradient in candidates if gradient is not None)
    return exact, tuple(try_gradient(subject, at, exact, gradient, solver=chosen.solver) for gradient in unique)


def _norm(at: Linearisation, seed: int) -> PhantomError | None:
    options = ErrorOptions(steps=1, damping=1.0, norm="spectral", rtol=1e-2, max_products=60, probes=2)
    try:
        return power_norm(at, options, seed=seed)
    except PhantomGradError:  # a backward that cannot be differentiated
        return None
