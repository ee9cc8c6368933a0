"""Theorem 1 of the phantom-gradient paper: when a phantom gradient is sure to point uphill with the exact one.

Note [Layout]
The paper's `dF/dz` maps a cotangent of the state to a gradient, so it has one row for each entry of the
inputs and parameters `z` and one column for each entry of the state. Here it is stored transposed: one row for each
entry of the state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phantomgrad._report import OnFailure
from phantomgrad._samples import Samples
from phantomgrad._state import State
from phantomgrad.diagnostics._alignment import (
    ExactGradient,
    Loss,
    find_cotangent,
    gradient_of,
    pull_back,
    require_variables,
)
from phantomgrad.diagnostics._error import steps_and_damping
from phantomgrad.diagnostics._linearised import Linearisation, linearise
from phantomgrad.diagnostics._subject import Subject, Target, examine
from phantomgrad.diagnostics._subspace import leading_eigenvalue
from phantomgrad.diagnostics._text import short
from phantomgrad.gradients import Gradient, UnrolledPhantom
from phantomgrad.solvers import Solver

_DENSE_ENTRIES = 2**24
_DENSE_ROWS = 1024
_LINEAR_RTOL = 1e-3


@dataclass(frozen=True)
class AscentCondition:
    """Theorem 1 with its terms: `left <= bound` implies that the inner product of phantom and exact gradient is not
    negative."""

    gradient: Gradient
    applicable: bool
    """Whether the theorem says anything about this block and gradient."""
    reason: str
    """Why it does not; empty if it does."""
    holds: bool | None
    """Whether `left <= bound`; None where the theorem is not applicable or estimates cannot tell."""
    left: float
    """`||A (I - J) - dF/dz||_2` for the gradient `A g`; NaN where it was not computed."""
    bound: float
    """`s_min^2 / s_max`."""
    s_max: float
    """The largest singular value of `dF/dz`."""
    s_min: float
    """The smallest of its singular values, of which there are as many as state entries: 0 with fewer inputs and
    parameters."""
    state_entries: int
    variable_entries: int
    dense: bool
    """Whether the terms come from dense matrices; otherwise they are estimates, of which `s_min` and `bound` are upper
    bounds."""
    inner_product: float
    """Of the phantom and the exact gradient, measured for one cotangent."""
    cosine: float
    """The same for both at length 1."""

    @property
    def kappa(self) -> float:
        """The condition number `s_max / s_min` of `dF/dz`."""
        return self.s_max / self.s_min if self.s_min > 0 else math.inf

    def __str__(self) -> str:
        if not self.applicable:
            verdict = f"not applicable: {self.reason}"
        elif self.holds is None:
            verdict = "undecided: left is below the bound, but the bound is an estimate from above"
        else:
            verdict = "holds" if self.holds else "does not hold (it is sufficient, not necessary)"
        kind = "" if self.dense else " (estimates)"
        return "\n".join(
            [
                f"Ascent condition of {short(self.gradient)}: {verdict}",
                f"  left  = ||A (I - J) - dF/dz|| = {self.left:.4g}{kind}",
                f"  bound = s_min^2 / s_max = {self.bound:.4g}, s_max = {self.s_max:.4g}, s_min = {self.s_min:.4g}, "
                f"kappa = {self.kappa:.4g}",
                f"  {self.state_entries} state entries, {self.variable_entries} entries of inputs and parameters",
                f"  measured: <phantom, exact> = {self.inner_product:.4g}, cosine {self.cosine:.4f}",
            ]
        )


def ascent_condition(
    module: Target,
    *inputs: Any,
    gradient: Gradient | None = None,
    loss: Loss | None = None,
    cotangent: State | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    max_products: int = 400,
    seed: int = 0,
    solver: Solver | None = None,
    state: int | str = 0,
    output: int | str | None = None,
    batch_dim: int | None = 0,
    on_failure: OnFailure | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> AscentCondition:
    """Theorem 1 at the solution: `||A (I - J) - dF/dz|| <= s_min^2 / s_max` makes the gradient `A g` an ascent
    direction of the loss.

    With `s_max`, `s_min` the extreme singular values of `dF/dz` (Geng et al., "On Training Implicit Models", 2021). The
    whole batch counts as one state, since its samples share the parameters. The theorem needs a gradient that is linear
    in `g`, and at least as many entries of inputs and parameters as of the state; otherwise the result says "not
    applicable". The inner product is measured in every case, for one cotangent.

    Dense up to 1024 state entries and 2^24 matrix entries. Beyond, the terms are estimated from `max_products` products
    each, for the gradients of the form `damping (I + B + ... + B^(k-1))`, taken as linear at the solution.

    The other arguments are those of `gradient_alignment`.
    """
    with examine(
        module,
        inputs,
        kwargs,
        solver=solver,
        state=state,
        output=output,
        batch_dim=batch_dim,
        parameters=parameters,
        on_failure=on_failure,
    ) as subject:
        require_variables(subject)
        at = linearise(subject)
        gradient = gradient or subject.gradient or UnrolledPhantom()
        g = find_cotangent(at, subject, loss=loss, cotangent=cotangent, seed=seed)
        exact = ExactGradient(at, g)
        exact.warn_if_inexact()
        phantom = gradient_of(subject, gradient, g)
        at.samples = Samples(at.point, None)
        terms = _Terms.of(at, subject, gradient, exact, phantom, max_products, seed)
        alignment = exact.compare(gradient, phantom)
        pairs = zip(phantom, exact.values, strict=True)
        product = sum(float((a * b).sum()) for a, b in pairs if a is not None and b is not None)
    holds = terms.left <= terms.bound
    return AscentCondition(
        gradient=gradient,
        applicable=not terms.reason,
        reason=terms.reason,
        holds=None if terms.reason or (holds and not terms.dense) else holds,
        left=terms.left,
        bound=terms.bound,
        s_max=terms.s_max,
        s_min=terms.s_min,
        state_entries=at.shape[1],
        variable_entries=_entries(at),
        dense=terms.dense,
        inner_product=product,
        cosine=alignment.cosine,
    )


@dataclass(frozen=True)
class _Terms:
    left: float
    s_max: float
    s_min: float
    reason: str
    dense: bool

    @property
    def bound(self) -> float:
        return self.s_min**2 / self.s_max if self.s_max > 0 else 0.0

    @staticmethod
    def of(
        at: Linearisation,
        subject: Subject,
        gradient: Gradient,
        exact: ExactGradient,
        phantom: list[Tensor | None],
        max_products: int,
        seed: int,
    ) -> _Terms:
        n, p = at.shape[1], _entries(at)
        if n <= _DENSE_ROWS and n * p <= _DENSE_ENTRIES:
            return _dense(at, subject, gradient, exact, phantom)
        return _estimated(at, gradient, max_products, seed)


def _dense(
    at: Linearisation, subject: Subject, gradient: Gradient, exact: ExactGradient, phantom: list[Tensor | None]
) -> _Terms:
    """All terms from the matrices themselves, in double precision; also checks that the gradient is linear."""
    value = subject.solve(gradient, on_failure="ignore").value
    n, p = at.shape[1], _entries(at)
    units = torch.eye(n, dtype=at.samples.dtype, device=at.samples.device)
    exact_rows: list[Tensor] = []
    phantom_rows: list[Tensor] = []
    for unit in units:
        row = unit[None]
        applied = at.leaves(row - at.vjp_rows(row))
        exact_rows.append(_flat(at, at.variables_vjp(at.leaves(row))))
        phantom_rows.append(_flat(at, pull_back(value, subject, applied, retain_graph=True)))
    dF, A_applied = torch.stack(exact_rows), torch.stack(phantom_rows)
    singular = torch.linalg.svdvals(dF)
    s_max = float(singular[0])
    # (I - J) v = g, so the phantom gradient of g is the same combination of the rows as v is of the unit cotangents.
    combined = at.rows(exact.adjoint)[0].to(A_applied) @ A_applied
    measured = _flat(at, phantom)
    is_linear = bool((combined - measured).norm() <= _LINEAR_RTOL * measured.norm())
    negligible = s_max * max(n, p) * torch.finfo(at.samples.dtype).eps
    s_min = 0.0 if p < n or float(singular[-1]) <= negligible else float(singular[-1])
    reason = ""
    if not is_linear:
        reason = f"{short(gradient)} is not a linear function of its cotangent here"
    elif s_min == 0:
        reason = _too_few(n, p)
    left = float(torch.linalg.matrix_norm(A_applied - dF, 2)) if is_linear else math.nan
    return _Terms(left=left, s_max=s_max, s_min=s_min, reason=reason, dense=True)


@torch.no_grad()
def _estimated(at: Linearisation, gradient: Gradient, max_products: int, seed: int) -> _Terms:
    """Estimates from products: `s_max` and `left` from below, `s_min` from above."""
    n, p = at.shape[1], _entries(at)

    def gram(rows: Tensor) -> Tensor:
        return at.variables_jvp_rows(at.variables_vjp(at.leaves(rows)))

    def largest(product: Any, cost: int) -> float:
        leading = leading_eigenvalue(
            product, at.random_rows(seed), rtol=1e-4, max_products=max(1, max_products // cost)
        )
        return float(leading.eigenvalue.real.clamp_min(0.0))

    top = largest(gram, 2)
    bottom = top - largest(lambda rows: top * rows - gram(rows), 2) if p >= n else 0.0
    s_max, s_min = math.sqrt(top), math.sqrt(max(bottom, 0.0))
    series = steps_and_damping(gradient)
    if series is None:
        reason = f"with {n} state entries the dense matrices that {short(gradient)} needs are too large"
        return _Terms(left=math.nan, s_max=s_max, s_min=s_min, reason=reason, dense=False)
    steps, damping = series

    def missed(rows: Tensor) -> Tensor:  # A (I - J) - dF/dz = -dF/dz B^k, times its transpose
        return at.jvp_rows(gram(at.vjp_rows(rows, damping, steps)), damping, steps)

    left = math.sqrt(largest(missed, 2 + 2 * steps))
    return _Terms(left=left, s_max=s_max, s_min=s_min, reason="" if s_min > 0 else _too_few(n, p), dense=False)


def _too_few(n: int, p: int) -> str:
    if p < n:
        return f"the inputs and parameters have fewer entries ({p}) than the state ({n}), so s_min = 0"
    return "dF/dz has not the full rank of the state, so s_min = 0"


def _entries(at: Linearisation) -> int:
    return sum(variable.numel() for variable in at.variables.values())


def _flat(at: Linearisation, grads: list[Tensor | None]) -> Tensor:
    """Gradients of all variables side by side, in double precision on the CPU."""
    parts = [
        torch.zeros(variable.numel(), dtype=torch.float64) if g is None else g.flatten().to("cpu", torch.float64)
        for g, variable in zip(grads, at.variables.values(), strict=True)
    ]
    return torch.cat(parts)
