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
    evaluation's. It needs no damping and does not diverge where a Neumann series does, at the price of `2 * steps` stored
    cotangents during backward.
    """

    steps: int = 5
    """How many vector-Jacobian products backward makes: `k`."""

    def __post_init__(self) -> None:
        check_integer(self, "steps", minimum=1)

    def connect(self, problem: Problem) -> Leaves:
        return record(
            problem.evaluate, problem.solved.point, partial(minimal_residual, steps=self.steps, samples=problem.samples)
        )


def minimal_residual(vjp: VJP, cotangent: Leaves, *, steps: int, samples: Samples) -> Leaves:
    """The vector of the Krylov space of `steps - 1` products with the smallest adjoint residual, per sample."""
    if steps == 1:
        return cotangent
    target = samples.to_matrix(cotangent)
    directions: list[Tensor] = []
    images: list[Tensor] = []
    direction = target
    for _ in range(min(steps - 1, target.shape[1])):
        direction = _orthonormal(direction, directions)
        product = samples.to_matrix(vjp(samples.from_matrix(direction)))
        directions.append(direction)
        images.append(direction - product)
        direction = product
    basis, image = torch.stack(directions, dim=2), torch.stack(images, dim=2)
    return samples.from_matrix((basis @ _least_squares(image, target.unsqueeze(2))).squeeze(2))


def _orthonormal(vector: Tensor, directions: list[Tensor]) -> Tensor:
    """`vector` without its components along `directions`, at length 1; zero where only rounding errors are left."""
    before = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    if directions:
        basis = torch.stack(directions, dim=2)
        for _ in range(2):  # once more, since the first pass leaves rounding errors
            vector = vector - (basis @ (basis.mT.conj() @ vector.unsqueeze(2))).squeeze(2)
    length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return torch.where(length > 100 * torch.finfo(length.dtype).eps * before, vector / length, 0.0)


def _least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """The minimiser of `||target - matrix x||`, per sample, with directions that carry nothing left out."""
    q, r = torch.linalg.qr(matrix)
    diagonal = r.diagonal(dim1=1, dim2=2).abs()
    negligible = diagonal <= torch.finfo(diagonal.dtype).eps * diagonal.amax(dim=1, keepdim=True)
    r = r + torch.diag_embed(negligible.to(r.dtype))
    solved = torch.linalg.solve_triangular(r, q.mT.conj() @ target, upper=True)
    return torch.where(negligible.unsqueeze(2), 0.0, solved)
