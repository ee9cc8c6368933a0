"""How much of the exact adjoint a phantom gradient misses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from phantomgrad._options import check_choice, check_integer, check_number
from phantomgrad._report import OnFailure
from phantomgrad.diagnostics._linearised import Linearisation, linearise
from phantomgrad.diagnostics._subject import Target, examine
from phantomgrad.diagnostics._subspace import leading_eigenvalue
from phantomgrad.diagnostics._text import short
from phantomgrad.gradients import Gradient, NeumannPhantom, OneStep, UnrolledPhantom
from phantomgrad.solvers import Solver

Norm = Literal["spectral", "frobenius"]


@dataclass(frozen=True)
class PhantomError:
    """An estimate of `||B^k||`, per sample; `float()` is the largest."""

    value: Tensor
    """Shape (samples,)."""
    norm: Norm
    steps: int
    damping: float
    converged: Tensor
    """bool of shape (samples,). Spectral: whether the estimate, which grows towards the norm from below, has settled.
    Frobenius: whether its standard error is below a tenth of it."""
    products: int
    """How many products with `J`, from the left or the right, were made."""

    def __float__(self) -> float:
        return float(self.value.max())

    def __str__(self) -> str:
        name = "2-norm" if self.norm == "spectral" else "Frobenius norm"
        small = float(self) < 1
        verdict = "bounds the relative error of the adjoint" if small else "at 1 or above it bounds nothing useful"
        doubt = "" if self.converged.all() else f"; not settled after {self.products} products"
        return (
            f"{name} of B^{self.steps}, B = {self.damping:g} J + {1 - self.damping:g} I: {float(self):.3g}, the "
            f"largest of {self.value.numel()} samples; {verdict}{doubt}"
        )


@dataclass(frozen=True, kw_only=True)
class ErrorOptions:
    """Options of the estimate, checked together."""

    steps: int
    damping: float
    norm: Norm
    rtol: float
    max_products: int
    probes: int

    def __post_init__(self) -> None:
        check_integer(self, "steps", minimum=1)
        check_number(self, "damping", above=0.0, maximum=2.0)
        check_choice(self, "norm", ("spectral", "frobenius"))
        check_number(self, "rtol", above=0.0)
        check_integer(self, "max_products", minimum=1)
        check_integer(self, "probes", minimum=2)


def phantom_error(
    module: Target,
    *inputs: Any,
    steps: int | None = None,
    damping: float | None = None,
    norm: Norm = "spectral",
    rtol: float = 1e-2,
    max_products: int = 500,
    probes: int = 32,
    seed: int = 0,
    solver: Solver | None = None,
    state: int | str = 0,
    output: int | str | None = None,
    batch_dim: int | None = 0,
    on_failure: OnFailure | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> PhantomError:
    """An estimate of `||B^k||`, `B = damping J + (1 - damping) I`, at the solution, per sample along `batch_dim`.

    Writing a phantom gradient as `dF/dz D`, `D (I - J) = I - B^k` holds for `UnrolledPhantom` and `NeumannPhantom` of
    `k` steps, so the adjoint they use differs from the exact one by at most `||B^k||_2` relative to it (a gradient for
    parameters: times the condition number of `dF/dz`). Above 1 nothing is promised, though a given cotangent may fare
    well: see `gradient_alignment`.

    steps, damping: `k` and the weight of `J`; by default the attached gradient's, else those of `UnrolledPhantom()`.
    norm: "spectral" needs products from both sides, so a backward that can be differentiated; "frobenius", never
        smaller, gets by with vector-Jacobian products: `E ||B^k e||^2` over random signs `e` (Hutchinson).
    rtol: at which relative residual the spectral norm's squared estimate has settled.
    max_products: the most products with `J`, for the spectral norm.
    probes: how many random vectors, for the Frobenius norm.

    The other arguments are those of `spectral_radius`.
    """
    with examine(
        module,
        inputs,
        kwargs,
        solver=solver,
        state=state,
        output=output,
        batch_dim=batch_dim,
        on_failure=on_failure,
    ) as subject:
        own = steps_and_damping(subject.gradient or UnrolledPhantom())
        if own is None and (steps is None or damping is None):
            raise ValueError(
                f"The module is attached with {short(subject.gradient)}, which has no B^k to measure. Pass steps= and "
                "damping=, or see gradient_alignment."
            )
        own = own or (1, 1.0)
        options = ErrorOptions(
            steps=own[0] if steps is None else steps,
            damping=own[1] if damping is None else damping,
            norm=norm,
            rtol=rtol,
            max_products=max_products,
            probes=probes,
        )
        return power_norm(linearise(subject), options, seed=seed)


def steps_and_damping(gradient: Gradient) -> tuple[int, float] | None:
    """`k` and the damping of the gradients that are exact up to `B^k`."""
    if isinstance(gradient, (UnrolledPhantom, NeumannPhantom)):
        return gradient.steps, gradient.damping
    return (1, 1.0) if isinstance(gradient, OneStep) else None


@torch.no_grad()
def power_norm(at: Linearisation, options: ErrorOptions, *, seed: int) -> PhantomError:
    """`||B^k||` of a recorded map."""
    if options.norm == "spectral":
        value, converged, products = _spectral(at, options, seed)
    else:
        value, converged, products = _frobenius(at, options, seed)
    return PhantomError(
        value=value,
        norm=options.norm,
        steps=options.steps,
        damping=options.damping,
        converged=converged,
        products=products,
    )


def _spectral(at: Linearisation, options: ErrorOptions, seed: int) -> tuple[Tensor, Tensor, int]:
    """The square root of the largest eigenvalue of `(B^k)^T B^k`."""

    def gram(rows: Tensor) -> Tensor:
        pulled = at.vjp_rows(rows, options.damping, options.steps)
        return at.jvp_rows(pulled, options.damping, options.steps)

    cost = 2 * options.steps
    leading = leading_eigenvalue(
        gram, at.random_rows(seed), rtol=options.rtol, max_products=max(1, options.max_products // cost)
    )
    squared = leading.eigenvalue.real
    converged = leading.residual <= options.rtol * squared
    return squared.clamp_min(0.0).sqrt(), converged, leading.products * cost


def _frobenius(at: Linearisation, options: ErrorOptions, seed: int) -> tuple[Tensor, Tensor, int]:
    squares: list[Tensor] = []
    for probe in range(options.probes):
        signs = torch.where(at.random_rows(seed + probe) < 0, -1.0, 1.0).to(at.samples.dtype)
        pulled = at.vjp_rows(signs, options.damping, options.steps)
        squares.append(torch.linalg.vector_norm(pulled, dim=1).square())
    stacked = torch.stack(squares)
    mean = stacked.mean(dim=0)
    error = stacked.std(dim=0) / math.sqrt(options.probes)
    return mean.sqrt(), error / 2 <= 0.1 * mean, options.probes * options.steps
