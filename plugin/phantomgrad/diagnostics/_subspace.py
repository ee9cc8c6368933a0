"""The largest eigenvalue of a linear map that is known by its products only.

Note [Rayleigh-Ritz]
Arnoldi's method with thick restarts (Stewart, "A Krylov-Schur algorithm for large eigenproblems",
2001), per sample. An orthonormal basis `V` grows by one product a step; the eigenvalues of the small matrix `V^T A V`,
the Ritz values, approach the outermost of `A`. When the basis is full, the directions of the largest Ritz values are
kept and the rest are dropped. The basis stays real: a pair of conjugate eigenvectors is kept as its real and imaginary
parts. A plain power iteration oscillates on such a pair; here its modulus comes out as accurately as a real one's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_KEPT = 8
_CHECK_EVERY = 4


@dataclass(frozen=True)
class Leading:
    """The eigenvalue of largest modulus, per sample, and how well it is known."""

    eigenvalue: Tensor
    """Complex, shape (samples,); of a conjugate pair the one above the real axis."""
    residual: Tensor
    """`||A y - t y||` for the eigenvalue `t` and its unit vector `y`: `t` is an exact eigenvalue of some `A + E` with
    `||E||` as large."""
    ritz: Tensor
    """All Ritz values in double precision on the CPU, complex, shape (samples, basis)."""
    products: int


def leading_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, *, rtol: float, max_products: int, capacity: int = 24
) -> Leading:
    """Apply `product` to rows of shape (samples, entries) until every residual is at most `rtol` times its
    eigenvalue."""
    entries = start.shape[1]
    capacity = min(capacity, entries)
    basis, images = start[:, None, :][:, :0], start[:, None, :][:, :0]
    candidate = start
    products = 0
    while True:
        direction = orthonormal(candidate, basis)
        candidate = product(direction)
        products += 1
        basis = torch.cat((basis, direction[:, None]), dim=1)
        images = torch.cat((images, candidate[:, None]), dim=1)
        full, last = basis.shape[1] == capacity, products == max_products
        if not (full or last or products % _CHECK_EVERY == 0):
            continue
        values, vectors = _ritz_pairs(basis, images)
        parts = _residual(basis, images, values[:, 0], vectors[:, :, 0])
        residual = torch.linalg.vector_norm(torch.stack(parts), dim=(0, 2)).cpu()
        settled = residual <= rtol * values[:, 0].abs()
        if settled.all() or last or basis.shape[1] == entries or not values[:, 0].isfinite().any():
            leading = values[:, 0]
            leading = leading.to(start.device, start.dtype.to_complex())
            return Leading(leading, residual.to(start.device), values, products)
        if full:
            rotation = _kept_directions(values, vectors).to(basis)
            basis, images = rotation.mT @ basis, rotation.mT @ images
            real, imaginary = parts
            longer = real.norm(dim=1, keepdim=True) >= imaginary.norm(dim=1, keepdim=True)
            candidate = torch.where(longer, real, imaginary)


def orthonormal(vector: Tensor, basis: Tensor) -> Tensor:
    """`vector` (samples, entries) without its components along `basis` (samples, size, entries), at length 1; zero
    where only rounding errors are left."""
    before = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    for _ in range(2 if basis.shape[1] else 0):  # once more, since the first pass leaves rounding errors
        vector = vector - (basis.mT @ (basis @ vector[:, :, None])).squeeze(2)
    length = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
    return torch.where(length > 100 * torch.finfo(length.dtype).eps * before, vector / length, 0.0)


def _ritz_pairs(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values and vectors by falling modulus, in double precision on the CPU; NaN where products were not
    finite."""
    small = (basis @ images.mT).double().cpu()
    finite = small.isfinite().all(dim=2).all(dim=1)
    values, vectors = torch.linalg.eig(torch.where(finite[:, None, None], small, 0.0))
    # Stable: of a conjugate pair LAPACK lists the one above the real axis first.
    order = values.abs().argsort(dim=1, descending=True, stable=True)
    values = torch.where(finite[:, None], values.gather(1, order), torch.nan)
    return values, vectors.gather(2, order[:, None, :].expand_as(vectors))


def _residual(basis: Tensor, images: Tensor, value: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of `A y - t y` for one Ritz pair of each sample."""
    real, imaginary = (part.to(basis)[:, None, :] for part in (vector.real, vector.imag))
    t_real, t_imaginary = (part.to(basis)[:, None] for part in (value.real, value.imag))
    y_real, y_imaginary = (real @ basis).squeeze(1), (imaginary @ basis).squeeze(1)
    return (
        (real @ images).squeeze(1) - (t_real * y_real - t_imaginary * y_imaginary),
        (imaginary @ images).squeeze(1) - (t_real * y_imaginary + t_imaginary * y_real),
    )


def _kept_directions(values: Tensor, vectors: Tensor) -> Tensor:
    """An orthonormal basis of the leading Ritz vectors: one column each, since a pair's two are its real and imaginary
    part."""
    kept = min(_KEPT, values.shape[1] - 1)
    columns = torch.where(values.imag[:, None, :kept] >= 0, vectors.real[:, :, :kept], vectors.imag[:, :, :kept])
    return torch.linalg.qr(columns)[0]
