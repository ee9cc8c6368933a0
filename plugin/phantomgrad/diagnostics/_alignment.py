"""Gradients against the exact one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from phantomgrad._errors import NotConvergedWarning
from phantomgrad._report import OnFailure
from phantomgrad._state import Leaves, State, Structure, describe
from phantomgrad.diagnostics._exact_adjoint import adjoint_tolerance, exact_adjoint
from phantomgrad.diagnostics._linearised import Linearisation, linearise
from phantomgrad.diagnostics._subject import Subject, Target, examine
from phantomgrad.diagnostics._text import short
from phantomgrad.gradients import Gradient, UnrolledPhantom
from phantomgrad.solvers import Solver

Loss = Callable[[State], Tensor]


@dataclass(frozen=True)
class Alignment:
    """How one gradient lies to another."""

    cosine: float
    """1: the same direction; at 0 or below: no descent. NaN where one of them is zero."""
    norm_ratio: float
    """The gradient's norm over the exact one's."""

    def __str__(self) -> str:
        return f"cosine {self.cosine:.4f}, norm ratio {self.norm_ratio:.3f}"


@dataclass(frozen=True)
class GradientAlignment:
    """How a gradient lies to the exact one; `float()` is the overall cosine."""

    gradient: Gradient
    overall: Alignment
    """Over all parameters and inputs that require grad, as one vector."""
    by_name: dict[str, Alignment]
    """For each parameter by its name, and each input as `input x`."""
    exact_residual: float
    """The relative residual to which the exact adjoint was solved; if it is not small, the comparison means nothing."""

    @property
    def cosine(self) -> float:
        """The overall cosine."""
        return self.overall.cosine

    @property
    def norm_ratio(self) -> float:
        """The overall norm ratio."""
        return self.overall.norm_ratio

    def __float__(self) -> float:
        return self.cosine

    def __str__(self) -> str:
        width = max(map(len, self.by_name), default=0)
        rows = [f"  {name:<{width}}  {alignment}" for name, alignment in self.by_name.items()]
        return "\n".join([f"{short(self.gradient)} against the exact gradient: {self.overall}", *rows])


def gradient_alignment(
    module: Target,
    *inputs: Any,
    gradient: Gradient | None = None,
    loss: Loss | None = None,
    cotangent: State | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    solver: Solver | None = None,
    state: int | str = 0,
    output: int | str | None = None,
    batch_dim: int | None = 0,
    on_failure: OnFailure | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> GradientAlignment:
    """Cosine and norm ratio of a gradient against the exact one, overall and for every parameter and input.

    The exact gradient is `dF/dz (I - J)^-1 g` at the point where the solve ended, its adjoint solved by GMRES to
    rounding. Both get the same cotangent `g = dL/dh*`. Covers what requires grad; where nothing does, all
    floating-point inputs.

    gradient: the one to judge; by default the attached gradient, or `UnrolledPhantom()`.
    loss: maps the solution to the scalar that is differentiated, which gives `g`; or pass `cotangent` itself, nested
        like the state. Without either `g` is random: what the block does to typical cotangents, not to your loss's.
    parameters: by name, what the map has captured and gradients are taken for, in place of the module's parameters.

    The other arguments are those of `spectral_radius`. Warns (NotConvergedWarning) if the exact adjoint could not be
    solved.
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
        g = find_cotangent(at, subject, loss=loss, cotangent=cotangent, seed=seed)
        exact = ExactGradient(at, g)
        exact.warn_if_inexact()
        gradient = gradient or subject.gradient or UnrolledPhantom()
        return exact.compare(gradient, gradient_of(subject, gradient, g))


class ExactGradient:
    """The exact gradient of one cotangent, by the implicit function theorem."""

    def __init__(self, at: Linearisation, cotangent: Leaves) -> None:
        self.cotangent = cotangent
        self.adjoint, self.residual = exact_adjoint(at, cotangent)
        self.values = at.variables_vjp(self.adjoint)
        self._variables = at.variables
        self._sufficient = 100 * adjoint_tolerance(at)

    @property
    def is_exact(self) -> bool:
        """Whether the adjoint equation was solved."""
        return self.residual <= self._sufficient

    def warn_if_inexact(self) -> None:
        """Warn where a comparison would mean little."""
        if not self.is_exact:
            warnings.warn(
                f"The exact adjoint was solved only to a relative residual of {self.residual:.1e}, so what is "
                "compared with it is uncertain: I - J is nearly singular where the solve ended.",
                NotConvergedWarning,
                stacklevel=3,
            )

    def compare(self, gradient: Gradient, values: list[Tensor | None]) -> GradientAlignment:
        """Judge another gradient of the same cotangent."""
        products: dict[str, Tensor] = {}
        for (name, variable), value, truth in zip(self._variables.items(), values, self.values, strict=True):
            if value is None and truth is None:
                continue
            a, b = (torch.zeros_like(variable) if part is None else part for part in (value, truth))
            a, b = _real_vector(a), _real_vector(b)
            products[name] = torch.stack((a @ b, a @ a, b @ b))
        rows: list[list[float]] = torch.stack(list(products.values())).tolist() if products else []
        return GradientAlignment(
            gradient=gradient,
            overall=_alignment([sum(column) for column in zip(*rows, strict=True)] or [0.0] * 3),
            by_name={name: _alignment(row) for name, row in zip(products, rows, strict=True)},
            exact_residual=self.residual,
        )


def _real_vector(tensor: Tensor) -> Tensor:
    """All entries as one vector, real and imaginary parts side by side, as precise as the device allows."""
    vector = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).flatten()
    return vector.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _alignment(products: list[float]) -> Alignment:
    """From `<a, b>`, `<a, a>` and `<b, b>`."""
    ab, aa, bb = products
    nan = float("nan")
    return Alignment(
        cosine=ab / (aa * bb) ** 0.5 if aa * bb > 0 else nan,
        norm_ratio=(aa / bb) ** 0.5 if bb > 0 else nan,
    )


def gradient_of(subject: Subject, gradient: Gradient, cotangent: Leaves) -> list[Tensor | None]:
    """The gradient of every variable that a solution with `gradient` gives for `cotangent`."""
    value = subject.solve(gradient, on_failure="ignore").value
    return pull_back(value, subject, cotangent)


def pull_back(value: State, subject: Subject, cotangent: Leaves, *, retain_graph: bool = False) -> list[Tensor | None]:
    """The gradient of every variable that flows from `cotangent` at a solution's value."""
    leaves = Structure.of(value).flatten(value) or ()
    connected = [(leaf, g) for leaf, g in zip(leaves, cotangent, strict=True) if leaf.requires_grad]
    variables = list(subject.variables.values())
    if not connected:
        return [None] * len(variables)
    return list(
        torch.autograd.grad(
            [leaf for leaf, _ in connected],
            variables,
            [g for _, g in connected],
            retain_graph=retain_graph,
            allow_unused=True,
        )
    )


def require_variables(subject: Subject) -> None:
    """Refuse a call in which there is nothing to take gradients for."""
    if not subject.variables:
        raise ValueError(
            "There is nothing to take gradients for: no parameter requires grad and no further input is a "
            "floating-point tensor. For a function that has captured its parameters, pass parameters={'name': tensor}."
        )


def find_cotangent(
    at: Linearisation, subject: Subject, *, loss: Loss | None, cotangent: State | None, seed: int
) -> Leaves:
    """The cotangent of the solution: the loss's gradient, the given one, or a random one."""
    structure = Structure.of(subject.call.start)
    if loss is not None and cotangent is not None:
        raise ValueError("Pass loss or cotangent, not both: the cotangent is the loss's gradient at the solution.")
    if cotangent is not None:
        given = structure.flatten(cotangent)
        if given is None or [g.shape for g in given] != [leaf.shape for leaf in at.point]:
            raise ValueError(
                f"The cotangent must be nested and shaped like the state, {describe(subject.call.start)}; got "
                f"{describe(cotangent)}."
            )
        return tuple(g.detach().to(leaf) for g, leaf in zip(given, at.point, strict=True))
    if loss is None:
        return at.leaves(at.random_rows(seed))
    value = tuple(leaf.detach().clone().requires_grad_() for leaf in structure.flatten(at.solution.value) or ())
    scalar = loss(structure.unflatten(value))
    if not isinstance(scalar, Tensor) or scalar.numel() != 1 or not scalar.requires_grad:
        raise ValueError(
            f"loss must map the state to a scalar tensor that depends on it; it returned {describe(scalar)}."
        )
    grads = torch.autograd.grad(scalar.sum(), value, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, value, strict=True))
