"""A phantom gradient that takes as many products as it needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phantomgrad._options import check_integer, check_number
from phantomgrad._progress import Agree
from phantomgrad._samples import Samples
from phantomgrad._solution import AdjointSolve
from phantomgrad._state import Leaves
from phantomgrad.gradients._adjoint import VJP, record
from phantomgrad.gradients._base import Gradient, Problem
from phantomgrad.gradients._krylov import KrylovSpace, LeastSquares


@dataclass(frozen=True, kw_only=True)
class AdaptivePhantom(Gradient):
    """Add vector-Jacobian products until the estimated relative error of the adjoint is below `target`.

    The error of the adjoint is `(I - J)^-T r` with `r = g - (I - J)^T v`, so `||r|| / s` estimates it, where `s` is the least
    factor by which `I - J^T` stretches a vector of the Krylov space: both come with GMRES (Saad and Schultz, 1986)
    for free. All samples get as many products as the slowest needs; each product waits for the device once.
    `attachment.solution.adjoint` says how many products the last backward took and where the estimate ended; one above
    `target` is reported like a solve that did not converge.
    """

    target: float = 0.1
    """The relative error `||v - v*|| / ||v*||` to stop at."""
    max_steps: int = 20
    """The most vector-Jacobian products of one backward pass."""

    def __post_init__(self) -> None:
        check_number(self, "target", above=0.0, maximum=1.0)
        check_integer(self, "max_steps", minimum=1)

    def connect(self, problem: Problem) -> Leaves:
        samples, statistics, agree, report = problem.samples, problem.adjoint, problem.agree, problem.report
        settled = problem.solved.all_converged

        def transform(vjp: VJP, cotangent: Leaves) -> Leaves:
            adjoint, met = self._adjoint(vjp, cotangent, samples, statistics, agree)
            # Where the solve itself fell short, which was reported, no adjoint is worth a word.
            if settled and not met:
                report.failed(
                    "adaptive",
                    lambda: (
                        f"AdaptivePhantom stopped{report.where()} after {statistics.steps} products with an estimated "
                        f"relative error of up to {statistics.worst:.1e}, above its target of {self.target:g}. Raise "
                        'max_steps or target, or pass on_failure="ignore".'
                    ),
                )
            return adjoint

        return record(problem.evaluate, problem.solved.point, transform, products=self.max_steps - 1)

    def _adjoint(
        self, vjp: VJP, cotangent: Leaves, samples: Samples, statistics: AdjointSolve, agree: Agree | None
    ) -> tuple[Leaves, bool]:
        """The adjoint, and whether its estimated error met the target; with one product there is nothing to estimate."""
        if self.max_steps == 1:
            statistics.record(1, torch.full((samples.count,), torch.nan, device=samples.device))
            return cotangent, True
        overflowed = ~torch.isfinite(samples.norm(cotangent))
        space = KrylovSpace(vjp, cotangent, samples)
        most = min(self.max_steps - 1, space.dimension)
        taken = 0
        while True:
            space.extend()
            taken += 1
            found = space.solve()
            error = _estimated_error(found)
            # An overflow is the caller's, not the equation's: loss scaling looks for it, to skip the step. In float16 a
            # finite cotangent may have an adjoint that overflows as well.
            given_up = error.isnan() if torch.float16 in samples.dtypes else overflowed
            met = ((error <= self.target) | given_up).all()
            enough = bool(met if agree is None else agree(met))
            if enough or taken == most:
                statistics.record(taken + 1, error)
                return samples.from_matrix(found.improved), enough


def _estimated_error(found: LeastSquares) -> Tensor:
    """The estimated relative error of the adjoint, per sample; 0 where the cotangent is."""
    size = torch.linalg.vector_norm(found.improved, dim=1)
    error = found.residual / (found.smallest_stretch * size).clamp_min(torch.finfo(size.dtype).tiny)
    return torch.where(found.residual == 0, 0.0, error).detach()
