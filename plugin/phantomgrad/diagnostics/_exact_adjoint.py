"""The exact adjoint, to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from phantomgrad._state import Leaves
from phantomgrad.diagnostics._linearised import Linearisation
from phantomgrad.diagnostics._subspace import orthonormal

_CYCLE = 30
_MAX_PRODUCTS = 1000


def adjoint_tolerance(at: Linearisation) -> float:
    """The relative residual at which the adjoint counts as solved, for the coarsest dtype that takes part."""
    return max(1e-10, 20 * torch.finfo(at.rounding).eps)


def exact_adjoint(at: Linearisation, cotangent: Leaves) -> tuple[Leaves, float]:
    """Solve `v = J^T v + g` by GMRES, restarted after 30 products; returns `v` and the largest relative residual of a sample.

    Works whatever the spectral radius, and with up to 30 entries a sample it ends exactly after as many products
    (Saad and Schultz, "GMRES", 1986).
    """
    target = at.rows(cotangent)
    scale = torch.linalg.vector_norm(target, dim=1).clamp_min(torch.finfo(target.dtype).tiny)
    v, rest, residual = torch.zeros_like(target), target, torch.inf
    for _ in range(_MAX_PRODUCTS // _CYCLE):
        candidate = v + _smallest_residual(at, rest)
        rest = target - candidate + at.vjp_rows(candidate)
        reached = float((torch.linalg.vector_norm(rest, dim=1) / scale).max())
        if not reached < residual:  # rounding, or products that are not finite: more cycles do not help
            break
        stalled = reached > 0.999 * residual
        v, residual = candidate, reached
        if residual <= adjoint_tolerance(at) or stalled:
            break
    return at.leaves(v), residual


def _smallest_residual(at: Linearisation, target: Tensor) -> Tensor:
    """The vector `v` of the Krylov space with the smallest `||target - (I - J^T) v||`, per sample."""
    basis = target[:, None, :][:, :0]
    images = basis
    candidate = target
    for _ in range(min(_CYCLE, target.shape[1])):
        direction = orthonormal(candidate, basis)
        candidate = at.vjp_rows(direction)
        basis = torch.cat((basis, direction[:, None]), dim=1)
        images = torch.cat((images, (direction - candidate)[:, None]), dim=1)
    return (_weights(images, target)[:, None, :] @ basis).squeeze(1)


def _weights(images: Tensor, target: Tensor) -> Tensor:
    """The combination of `images` (samples, size, entries) nearest to `target`, by QR; images that add nothing get none."""
    q, r = torch.linalg.qr(images.mT)
    diagonal = r.diagonal(dim1=1, dim2=2).abs()
    idle = diagonal <= 10 * torch.finfo(diagonal.dtype).eps * diagonal.amax(dim=1, keepdim=True)
    r = r + torch.diag_embed(idle.to(r.dtype))
    weights = torch.linalg.solve_triangular(r, q.mT @ target[:, :, None], upper=True).squeeze(2)
    return torch.where(idle, 0.0, weights)
