"""The forward solver's inverse estimate, reused in backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from phantomgrad._errors import AttachError
from phantomgrad._options import check_integer
from phantomgrad._samples import Samples
from phantomgrad._state import Leaves
from phantomgrad.gradients._adjoint import VJP, record
from phantomgrad.gradients._base import Gradient, Problem
from phantomgrad.solvers import Broyden, Solver
from phantomgrad.solvers._broyden import InverseEstimate


@dataclass(frozen=True, kw_only=True)
class Shine(Gradient):
    """Take Broyden's estimate of the inverse Jacobian for the inverse itself, so that backward needs no solve.

    Broyden's method leaves `H`, an estimate of `(J - I)^-1`; backward uses `v = -H^T g` (Ramzi et al., "SHINE: SHaring the
    INverse Estimate from the forward pass for bi-level optimization and implicit models", 2022). As good as the estimate, which
    knows the directions that the solve has taken; `refine` improves it. With another solver than `Broyden` an `AttachError`.
    """

    reads_memory: ClassVar[bool] = True

    refine: int = 0
    """How many steps of minimal residual follow, preconditioned by the estimate; each makes one product."""

    def __post_init__(self) -> None:
        check_integer(self, "refine", minimum=0)

    def solver_for(self, solver: Solver) -> Solver:
        if not isinstance(solver, Broyden):
            raise AttachError(
                f"Shine reuses the inverse estimate of Broyden's method, but the solver is {solver!r}. Pass solver=Broyden(), or "
                "another gradient such as KrylovPhantom()."
            )
        return solver

    def connect(self, problem: Problem) -> Leaves:
        transform = partial(
            apply_inverse_estimate, memory=problem.solved.memory, refine=self.refine, samples=problem.samples
        )
        products = self.refine and self.refine + 1
        return record(problem.evaluate, problem.solved.point, transform, products=products)


def apply_inverse_estimate(
    vjp: VJP, cotangent: Leaves, *, memory: InverseEstimate | None, refine: int, samples: Samples
) -> Leaves:
    """`-H^T g`, then `refine` steps along `-H^T r` with the length that makes the residual `r = g - (I - J^T) v` smallest."""
    target = samples.to_matrix(cotangent)

    def inverse(vector: Tensor) -> Tensor:
        return vector if memory is None else -memory.apply_adjoint(vector)

    def operator(vector: Tensor) -> Tensor:
        return vector - samples.to_matrix(vjp(samples.from_matrix(vector)))

    v = inverse(target)
    residual = target - operator(v) if refine else target
    for left in range(refine - 1, -1, -1):
        direction = inverse(residual)
        change = operator(direction)
        squared = (change.conj() * change).sum(dim=1, keepdim=True).real
        length = (change.conj() * residual).sum(dim=1, keepdim=True) / squared.clamp_min(
            torch.finfo(squared.dtype).tiny
        )
        v = v + length * direction
        if left:
            residual = residual - length * change
    return samples.from_matrix(v)
