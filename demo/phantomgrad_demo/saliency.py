"""Which pixels an answer depends on, by the exact gradient and by phantom ones, all at the same equilibrium."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from phantomgrad import (
    Anderson,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    PhantomGradError,
    UnrolledPhantom,
    fixed_point,
)
from phantomgrad_hub import MDEQ
from phantomgrad_hub.photos import ImageSource

from .settings import Settings
from .trajectory import Settling, Trajectory, WatchedBlock

MOST_PHANTOM_STEPS = 12
EXACT = "exact"
_EXACT_RTOL = 1e-4
_EXACT_STEPS = 60
_SHARPEST = 1e-4


class UnsolvedError(PhantomGradError, RuntimeError):
    """A solve ended without a solution: in time, or with a state that is not finite."""


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """One gradient of the answer's score with respect to the pixels."""

    map: Tensor
    """(H, W): the largest size over colours of the derivative at each pixel of what the model sees."""
    cosine: float
    """With the exact gradient, over all pixels and colours."""
    products: int
    """Vector-Jacobian products of the block that it took."""
    seconds: float
    """From the equilibrium to the gradient: what is recorded there, and the backward pass."""
    settled: bool
    """Whether the exact gradient's own solve met its tolerance; True for the others, which solve nothing."""


@dataclass(frozen=True, kw_only=True)
class Saliencies:
    """The same derivative by several gradients, by their names; the exact one first."""

    label: str
    """The class whose score is differentiated: the answer."""
    solve: Trajectory
    found: Mapping[str, Saliency]


def gradients(steps: int, damping: float) -> dict[str, Gradient]:
    """The gradients that are compared, by the names they have on the page."""
    return {
        EXACT: Implicit(solver=Anderson(max_steps=_EXACT_STEPS, rtol=_EXACT_RTOL)),
        "unrolled phantom": UnrolledPhantom(steps=steps, damping=damping),
        "Neumann phantom": NeumannPhantom(steps=steps, damping=damping),
        "Krylov phantom": KrylovPhantom(steps=steps),
        "one step": OneStep(),
    }


def saliencies(model: MDEQ, photo: ImageSource, settings: Settings, *, steps: int, damping: float) -> Saliencies:
    """Solve for the equilibrium of `photo`, then differentiate the answer's score by every gradient from there.

    Raises `ImageError` where the photo cannot be read, `ValueError` for `steps` or `damping` out of range, and
    `UnsolvedError` where there is no solution.
    """
    methods = gradients(steps, damping)
    # The gradients are defined at a solution: one that a visitor stopped early would compare nothing.
    precise = replace(settings, tolerance=min(settings.tolerance, _SHARPEST), max_steps=max(settings.max_steps, 40))
    solve = Settling(model, photo, precise).run()
    if solve.state is None or not solve.steps:
        raise UnsolvedError("the network found no equilibrium of this photo to differentiate at; try another photo")
    parameter = next(model.parameters())
    images = model.preprocess(photo).to(parameter.device, parameter.dtype)
    target = int(solve.probabilities.argmax())
    # The first pass through autograd also pays for what torch sets up once.
    _differentiate(model, images, solve.state, methods["one step"], target)
    derivatives = {
        name: _differentiate(model, images, solve.state, gradient, target) for name, gradient in methods.items()
    }
    exact = derivatives[EXACT][0]
    return Saliencies(
        label=model.labels[target],
        solve=solve,
        found={
            name: Saliency(
                map=derivative[0].abs().amax(dim=0).cpu(),
                cosine=min(float(functional.cosine_similarity(derivative.flatten(), exact.flatten(), dim=0)), 1.0),
                products=products,
                seconds=seconds,
                settled=settled,
            )
            for name, (derivative, products, seconds, settled) in derivatives.items()
        },
    )


def _differentiate(
    model: MDEQ, images: Tensor, state: tuple[Tensor, ...], gradient: Gradient, target: int
) -> tuple[Tensor, int, float, bool]:
    """The derivative of the target's score (1, 3, H, W), its products, seconds, and whether it is what it claims."""
    began = time.perf_counter()
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        injection = model.inject(pixels)
        solution = fixed_point(
            WatchedBlock(model),
            state,
            *model.block_inputs(injection),
            gradient=gradient,
            solver=Anderson(max_steps=0),
            on_failure="ignore",
        )
        [derivative] = torch.autograd.grad(model.head(solution.value)[0, target], pixels)
    seconds = time.perf_counter() - began
    if isinstance(gradient, Implicit):
        adjoint = solution.adjoint
        return derivative, adjoint.steps or 0, seconds, adjoint.worst <= _EXACT_RTOL
    return derivative, getattr(gradient, "steps", 1), seconds, True
