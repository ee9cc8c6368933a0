"""What a report means, in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator

from phantomgrad.diagnostics._report import CheckReport
from phantomgrad.diagnostics._text import eigenvalue, short
from phantomgrad.diagnostics._trials import GradientTrial, SolverTrial
from phantomgrad.gradients import Implicit

GOOD_COSINE = 0.97
"""From here on a gradient is called good: between what the paper measured for one step (.96) and for five (.98 and
above)."""
_MOST_NORM_RATIO = 2.0
"""A gradient longer than this times the exact one is not called good: training would take it for a larger learning rate."""

_FAR_FROM_NORMAL = 1.5
"""A 2-norm above this is called far from normal where the spectral radius is below 1."""


def advise(report: CheckReport) -> tuple[str, ...]:
    """Sentences that say what to do, the most urgent first."""
    return tuple(_sentences(report))


def _sentences(report: CheckReport) -> Iterator[str]:
    if not math.isfinite(report.chosen.best):
        yield (
            "The first evaluation is not finite already: look for an overflow or a division by zero in the forward, or "
            "take another start."
        )
        return
    if not report.repeatable:
        yield (
            "Two evaluations at the same state differ, so there is no fixed point to find: the forward draws random "
            "numbers of its own, or changes what it reads. Draw them once per call and pass them in (dropout needs no "
            "care)."
        )
    if report.coupled:
        yield (
            "The map couples the samples, so they cannot stop one by one: attach it with batch_dim=None, or put batch "
            "norm in eval mode. The Jacobian here is that of all samples together."
        )
    yield from _about_settling(report)
    yield from _about_damping(report)
    yield from _about_gradients(report)


def _about_settling(report: CheckReport) -> Iterator[str]:
    own = report.solvers[0]
    name = f"Your {short(own.solver)}" if report.gradient is not None else short(own.solver)
    settled = [trial for trial in report.solvers if trial.settles]
    if own.settles:
        yield f"{name} settles every sample within {_steps(own.steps)}."
        return
    if not settled:
        closest = min(report.solvers, key=lambda trial: trial.best)
        yield (
            f"Nothing that was tried settles; the closest is {short(closest.solver)} with a residual of "
            f"{closest.best:.1e} after {_steps(closest.steps)}."
        )
        yield from _about_patience(report, closest)
        return
    best = min(settled, key=lambda trial: trial.steps)
    yield (
        f"{name} does not settle within {_steps(own.steps)}, but {short(best.solver)} does within "
        f"{_steps(best.steps)}: take solver={short(best.solver)}."
    )


def _about_patience(report: CheckReport, closest: SolverTrial) -> Iterator[str]:
    """How much longer it would take, where plain iteration contracts near its end."""
    rate = float(report.damped_radius)
    if report.damping is not None and rate < 0.999:
        digit = math.ceil(math.log(10) / -math.log(rate)) if rate > 0 else 1
        yield (
            f"Near its end every further digit takes plain iteration about {_steps(digit)}: raise max_steps, or loosen "
            f"rtol if a residual of {closest.best:.0e} is enough."
        )


def _about_damping(report: CheckReport) -> Iterator[str]:
    damped = report.damped_radius
    if report.damping == 1.0:
        yield f"Plain iteration needs no damping: near the solution a step multiplies the error by {float(damped):.2g}."
    elif report.damping is not None:
        gain = f"{float(damped):.2g} instead of {float(report.radius):.2g}"
        yield f"Plain iteration wants damping={report.damping:g}: a step then multiplies the error by {gain}."
    else:
        yield (
            f"No damping up to 1 makes plain iteration contract: at best, {damped.damping:g}, the spectral radius is "
            f"{float(damped):.3g} (eigenvalue {eigenvalue(damped.worst)}). Normalise the block (weight norm, a "
            "LayerNorm, a factor below 1 on the state's weights), or add jacobian_penalty to the loss."
        )


def _about_gradients(report: CheckReport) -> Iterator[str]:
    if not report.gradients:
        yield f"No gradients were compared: {_why_no_gradients(report)}."
        return
    cheap = [trial for trial in report.gradients if not isinstance(trial.gradient, Implicit)]
    yours = next((trial for trial in report.gradients if trial.gradient == report.gradient), None)
    if yours is not None and not _is_good(yours):
        yield (
            f"Your {short(yours.gradient)} has a cosine of {yours.alignment.cosine:.2f} with the exact gradient: take "
            "a better one for training."
        )
    good = [trial for trial in cheap if _is_good(trial) and trial.seconds is not None]
    if good:
        cheapest = min(good, key=lambda trial: trial.seconds or 0.0)
        yield (
            f"gradient={short(cheapest.gradient)} is the cheapest with a cosine of at least {GOOD_COSINE}: it has "
            f"{cheapest.alignment.cosine:.3f}{_against_exact(report, cheapest)}."
        )
    else:
        best = max(cheap, key=lambda trial: trial.alignment.cosine)
        if math.isnan(best.alignment.cosine):
            yield (
                "Every gradient is zero: the image depends on no parameter and no input as far as autograd sees. Look for "
                "torch.no_grad() or .detach() in the block."
            )
            return
        yield (
            f"No cheap gradient reaches a cosine of {GOOD_COSINE}; the best is {short(best.gradient)} with "
            f"{best.alignment.cosine:.3f}. Raise its steps, or take Implicit()."
        )
    if report.norm is not None and float(report.norm) > _FAR_FROM_NORMAL > 1 > float(report.radius):
        yield (
            f"The block is far from normal (2-norm {float(report.norm):.2g}, spectral radius "
            f"{float(report.radius):.2g}): errors grow before they shrink. KrylovPhantom allows for that; leave "
            "NeumannPhantom its safeguard."
        )


def _why_no_gradients(report: CheckReport) -> str:
    if not report.variables:
        return "no parameter requires grad and no input is a floating-point tensor"
    if report.exact_residual is None:
        return "far from a solution they mean nothing; make the block settle first"
    return (
        f"the exact adjoint could be solved only to a relative residual of {report.exact_residual:.0e}, since I - J is "
        "nearly singular"
    )


def _is_good(trial: GradientTrial) -> bool:
    return trial.alignment.cosine >= GOOD_COSINE and trial.alignment.norm_ratio <= _MOST_NORM_RATIO


def _against_exact(report: CheckReport, trial: GradientTrial) -> str:
    exact = next((each.seconds for each in report.gradients if isinstance(each.gradient, Implicit)), None)
    if not exact or not trial.seconds:
        return ""
    ratio = trial.seconds / exact
    return (
        f" and takes {100 * ratio:.2g} % of the exact one's time"
        if ratio < 0.95
        else ", though the exact one is as fast"
    )


def _steps(count: int) -> str:
    return f"{count} step" + ("" if count == 1 else "s")
