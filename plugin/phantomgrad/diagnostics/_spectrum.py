"""The spectral radius of the Jacobian at the solution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phantomgrad._options import check_integer, check_number
from phantomgrad._report import OnFailure
from phantomgrad.diagnostics._linearised import Linearisation, linearise
from phantomgrad.diagnostics._subject import Target, examine
from phantomgrad.diagnostics._subspace import Leading, leading_eigenvalue
from phantomgrad.diagnostics._text import eigenvalue
from phantomgrad.solvers import Solver


@dataclass(frozen=True)
class SpectralRadius:
    """The spectral radius at the solution, per sample; `float()` is the largest."""

    value: Tensor
    """Modulus of the leading eigenvalue, shape (samples,)."""
    eigenvalue: Tensor
    """The leading eigenvalue itself, complex, shape (samples,); of a conjugate pair the one above the real axis."""
    residual: Tensor
    """`||B y - t y||` of the eigenvalue `t` and its unit vector `y`, shape (samples,). `t` is an exact eigenvalue of a
    matrix that differs from `B` by as much; for a normal `B` it lies as close to one of `B` itself."""
    converged: Tensor
    """Whether the residual is at most `rtol` times the value, bool of shape (samples,)."""
    products: int
    """How many vector-Jacobian products were made."""
    damping: float
    """Of which `B = damping J + (1 - damping) I` this is the radius."""

    @property
    def worst(self) -> complex:
        """The eigenvalue of the sample with the largest radius."""
        return complex(self.eigenvalue[int(self.value.argmax())])

    def __float__(self) -> float:
        return float(self.value.max())

    def __str__(self) -> str:
        of = "J" if self.damping == 1.0 else f"{self.damping:g} J + {1 - self.damping:g} I"
        doubt = (
            "" if self.converged.all() else f"; not settled after {self.products} products: take it as a lower bound"
        )
        return (
            f"spectral radius of {of}: {float(self):.4g}, the largest of {self.value.numel()} samples "
            f"(eigenvalue {eigenvalue(self.worst)}, residual {float(self.residual.max()):.1e}{doubt})"
        )


@dataclass(frozen=True, kw_only=True)
class RadiusOptions:
    """Options of the search, checked together."""

    damping: float
    rtol: float
    max_products: int

    def __post_init__(self) -> None:
        check_number(self, "damping", above=0.0, maximum=2.0)
        check_number(self, "rtol", above=0.0)
        check_integer(self, "max_products", minimum=1)


def spectral_radius(
    module: Target,
    *inputs: Any,
    damping: float = 1.0,
    rtol: float = 1e-3,
    max_products: int = 200,
    seed: int = 0,
    solver: Solver | None = None,
    state: int | str = 0,
    output: int | str | None = None,
    batch_dim: int | None = 0,
    on_failure: OnFailure | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> SpectralRadius:
    """The spectral radius of the cell's Jacobian `J` at its solution, per sample along `batch_dim`.

    Damped iteration settles near the solution where the radius of `B = damping J + (1 - damping) I` is below 1: in the
    end each step multiplies the error by it. Found by Arnoldi's method with vector-Jacobian products only (Note
    [Rayleigh-Ritz]); complex pairs are no harder than real eigenvalues.

    module, inputs: the cell and the arguments of one call, the start of the solve among them.
    damping: 1 measures `J` itself.
    rtol: a sample has converged when its residual is at most `rtol` times the value.
    seed: of the random start vectors; no global generator is touched.
    solver, state, output, batch_dim: as in `attach`, for cells that are not attached; those that are use their own.
        `FixedPointIteration(max_steps=0)` measures at the start itself.
    on_failure: as in `attach`; by default the attached module's own, else "warn". What is measured where the solve has
        not converged belongs to the point it returned, not to a solution.
    kwargs: the call's keyword arguments.
    """
    options = RadiusOptions(damping=damping, rtol=rtol, max_products=max_products)
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
        return radius(linearise(subject), options, seed=seed)


def radius(at: Linearisation, options: RadiusOptions, *, seed: int) -> SpectralRadius:
    """The spectral radius of a recorded map."""
    return radius_of(leading_of(at, options, seed=seed), options)


def radius_of(leading: Leading, options: RadiusOptions) -> SpectralRadius:
    """The result that a leading eigenvalue makes."""
    value = leading.eigenvalue.abs()
    return SpectralRadius(
        value=value,
        eigenvalue=leading.eigenvalue,
        residual=leading.residual,
        converged=leading.residual <= options.rtol * value,
        products=leading.products,
        damping=options.damping,
    )


def leading_of(at: Linearisation, options: RadiusOptions, *, seed: int) -> Leading:
    """The leading eigenvalue of `B`, with all Ritz values of the last basis."""
    with torch.no_grad():
        return leading_eigenvalue(
            lambda rows: at.vjp_rows(rows, options.damping),
            at.random_rows(seed),
            rtol=options.rtol,
            max_products=options.max_products,
        )
