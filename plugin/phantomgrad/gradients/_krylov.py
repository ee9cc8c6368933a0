"""The Krylov phantom gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phantomgrad._options import check_integer
from phantomgrad._samples import Samples
from phantomgrad._state import Leaves
from phantomgrad.gradients._adjoint import VJP, record
from phantomgrad.gradients._base import Gradient, Problem


@dataclass(frozen=True, kw_only=True)
class KrylovPhantom(Gradient):
    """Solve the adjoint equation as well as `steps` vector-Jacobian products allow.

    Of all combinations of `g, J g, ..., J^(k-2) g` it takes the one with the smallest adjoint residual
    `||g - (I - J) v||`, per sample: GMRES (Saad and Schultz, 1986) with `steps - 1` products, the last being the recorded
    evaluation's. Adding what is left of the residual costs nothing and is one more fixed-point step, `g + J v`, so that as many
    powers of `J` take part as in a series of `steps` terms. It needs no damping and does not diverge where a Neumann series
    does, at the price of `2 * steps` stored cotangents during backward.
    """

    steps: int = 5
    """How many vector-Jacobian products backward makes: `k`."""

    def __post_init__(self) -> None:
        check_integer(self, "steps", minimum=1)

    def connect(self, problem: Problem) -> Leaves:
        transform = partial(minimal_residual, steps=self.steps, samples=problem.samples)
        return record(problem.evaluate, problem.solved.point, transform, products=self.steps - 1)


def minimal_residual(vjp: VJP, cotangent: Leaves, *, steps: int, samples: Samples) -> Leaves:
    """One fixed-point step from the best vector of the Krylov space of `steps - 1` products, per sample."""
    if steps == 1:
        return cotangent
    space = KrylovSpace(vjp, cotangent, samples)
    for _ in range(min(steps - 1, space.dimension)):
        space.extend()
    return samples.from_matrix(space.solve().improved)


@dataclass(frozen=True, kw_only=True)
class LeastSquares:
    """The vector `v` of a Krylov space with the smallest adjoint residual, per sample."""

    improved: Tensor
    """`g + J^T v`, the fixed-point step from it, shape (samples, entries)."""
    residual: Tensor
    """`||g - (I - J^T) v||`, shape (samples,); NaN where a product was not finite."""
    triangle: Tensor
    """The triangular factor of the space's image under `I - J^T`."""

    @property
    def smallest_stretch(self) -> Tensor:
        """The least factor by which `I - J^T` stretches a vector of the space, shape (samples,)."""
        return torch.linalg.svdvals(self.triangle).amin(dim=1)


class KrylovSpace:
    """The span of `g, J^T g, (J^T)^2 g, ...`, per sample, and its image under `I - J^T`."""

    def __init__(self, vjp: VJP, cotangent: Leaves, samples: Samples) -> None:
        self._vjp = vjp
        self._samples = samples
        self._target = samples.to_matrix(cotangent)
        self._next = self._target
        self._directions: list[Tensor] = []
        self._images: list[Tensor] = []

    @property
    def dimension(self) -> int:
        """The dimension of a sample's state, which no Krylov space exceeds."""
        return self._target.shape[1]

    def extend(self) -> None:
        """Add one dimension, by one vector-Jacobian product."""
        direction = _orthonormal(self._next, self._directions)
        product = self._samples.to_matrix(self._vjp(self._samples.from_matrix(direction)))
        self._directions.append(direction)
        self._images.append(direction - product)
        self._next = product

    def solve(self) -> LeastSquares:
        """The vector of the space with the smallest adjoint residual, and the step that its products have paid for."""
        basis, image = torch.stack(self._directions, dim=2), torch.stack(self._images, dim=2)
        target = self._target.unsqueeze(2)
        # Where a product has overflowed the result is NaN, but no decomposition sees it: those raise.
        finite = torch.isfinite(image).all(dim=2, keepdim=True).all(dim=1, keepdim=True)
        image = torch.where(finite, image, 0.0)
        target = torch.where(finite, target, torch.nan)
        weights, triangle = _least_squares(*_with_full_rank(basis, image, target))
        remainder = target - image @ weights
        return LeastSquares(
            improved=(basis @ weights + remainder).squeeze(2),
            residual=torch.linalg.vector_norm(remainder, dim=(1, 2)),
            triangle=triangle,
        )


def _orthonormal(vector: Tensor, directions: list[Tensor]) -> Tensor:
    """`vector` without its components along `directions`, at length 1; zero where only rounding errors are left."""
    before = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    if directions:
        basis = torch.stack(directions, dim=2)
        for _ in range(2):  # once more, since the first pass leaves rounding errors
            vector = vector - (basis @ (basis.mT.conj() @ vector.unsqueeze(2))).squeeze(2)
    length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    left = length > 100 * torch.finfo(length.dtype).eps * before
    # Where nothing is left the quotient is kept away from zero, at which its derivatives are not finite.
    return torch.where(left, vector / torch.where(left, length, 1.0), 0.0)


def _with_full_rank(basis: Tensor, image: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares problem with an equation `x_j = 0` more for every direction that is zero.

    It has the same solution; a decomposition of columns that are zero could not be differentiated.
    """
    if not torch.is_grad_enabled():
        return image, target
    missing = torch.diag_embed((basis.detach() == 0).all(dim=1).to(image.dtype))
    return torch.cat([image, missing], dim=1), torch.cat([target, torch.zeros_like(missing[:, :, :1])], dim=1)


def _least_squares(matrix: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The minimiser of `||target - matrix x||`, per sample, and the triangular factor of `matrix`.

    Directions that carry nothing are left out of the one, and stretch by 1 in the other.
    """
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal(dim1=1, dim2=2).abs()
    negligible = diagonal <= torch.finfo(diagonal.dtype).eps * diagonal.amax(dim=1, keepdim=True)
    r = r + torch.diag_embed(negligible.to(r.dtype))
    solved = torch.linalg.solve_triangular(r, q.mT.conj() @ target, upper=True)
    return torch.where(negligible.unsqueeze(2), 0.0, solved), r.detach()
