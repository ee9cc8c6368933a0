"""How the entries of a state group into samples.

A map that treats the entries along `batch_dim` independently has one fixed point per sample: each converges, fails and
is measured by itself. A map that couples them (`batch_dim=None`) is one sample: one norm, one stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from phantomgrad._errors import StateMismatchError
from phantomgrad._state import Leaves, describe

_HALF = (torch.float16, torch.bfloat16)


class Samples:
    """The samples of a state with these leaves along `batch_dim`.

    Norms are taken over all leaves of a sample together and accumulate in float32 or better.
    """

    def __init__(self, leaves: Leaves, batch_dim: int | None, where: Callable[[], str] = lambda: "") -> None:
        self.device = leaves[0].device
        self.shapes = tuple(leaf.shape for leaf in leaves)
        self.dtypes = tuple(leaf.dtype for leaf in leaves)
        dtype = leaves[0].dtype
        for other in self.dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        self.dtype = torch.float32 if dtype in _HALF else dtype
        """The dtype in which small systems, norms and tolerances are computed."""
        if all(leaf.dim() == 0 for leaf in leaves):
            batch_dim = None
        if len({dtype.is_complex for dtype in self.dtypes}) > 1:
            raise StateMismatchError(
                f"The state mixes real and complex tensors{where()}: {describe(leaves)}. Let the map take torch.view_as_real of "
                "the complex ones."
            )
        self._batch_dims = tuple(_batch_dim(leaf, batch_dim, where) for leaf in leaves)
        sizes = [1 if dim is None else leaf.shape[dim] for leaf, dim in zip(leaves, self._batch_dims, strict=True)]
        if any(size != sizes[0] for size in sizes[1:]):
            raise StateMismatchError(
                f"The tensors of the state have different sizes along batch_dim={batch_dim}{where()}: {describe(leaves)}. "
                "Pass the dimension along which the map treats samples independently, or batch_dim=None if it couples them."
            )
        self.count = sizes[0]
        self._reduced = tuple(
            None if dim is None else tuple(d for d in range(leaf.dim()) if d != dim)
            for leaf, dim in zip(leaves, self._batch_dims, strict=True)
        )

    def norm(self, leaves: Leaves) -> Tensor:
        """The Euclidean norm of every sample over all its tensors, shape (count,), real."""
        norms = [self._norm(leaf, dims) for leaf, dims in zip(leaves, self._reduced, strict=True)]
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)

    def _norm(self, leaf: Tensor, dims: tuple[int, ...] | None) -> Tensor:
        if dims is None:
            return torch.linalg.vector_norm(leaf, dtype=self.dtype).reshape(1)
        if not dims:  # an empty tuple of dimensions would mean all of them
            return leaf.to(self.dtype).abs()
        return torch.linalg.vector_norm(leaf, dim=dims, dtype=self.dtype)

    def where(self, mask: Tensor, chosen: Leaves, other: Leaves) -> Leaves:
        """`chosen` for the samples in `mask` (count,), `other` for the rest."""
        return tuple(
            torch.where(self._broadcast(mask, leaf, dim), leaf, rest)
            for leaf, rest, dim in zip(chosen, other, self._batch_dims, strict=True)
        )

    def select(self, leaves: Leaves, rows: Tensor) -> Leaves:
        """The leaves of the samples `rows`, integers of shape (samples,), alone."""
        return tuple(select_rows(leaf, rows, dim or 0) for leaf, dim in zip(leaves, self._batch_dims, strict=True))

    def replaced(self, leaves: Leaves, rows: Tensor, chosen: Leaves) -> Leaves:
        """A copy of `leaves` with those of the samples `rows` replaced by `chosen`."""
        copies = tuple(map(torch.clone, leaves))
        for leaf, new, dim in zip(copies, chosen, self._batch_dims, strict=True):
            leaf.movedim(dim or 0, 0)[rows] = new.movedim(dim or 0, 0)
        return copies

    def narrowed(self, count: int) -> Samples:
        """Those of leaves that differ from these in having `count` samples."""
        narrowed = copy(self)
        narrowed.count = count
        narrowed.shapes = tuple(
            shape if dim is None else torch.Size((*shape[:dim], count, *shape[dim + 1 :]))
            for shape, dim in zip(self.shapes, self._batch_dims, strict=True)
        )
        return narrowed

    @staticmethod
    def _broadcast(mask: Tensor, leaf: Tensor, dim: int | None) -> Tensor:
        shape = [1] * leaf.dim()
        if dim is not None:
            shape[dim] = -1
        return mask.reshape(shape)

    def to_matrix(self, leaves: Leaves) -> Tensor:
        """All tensors side by side as one matrix of shape (count, entries per sample), in `self.dtype`."""
        rows = [
            (leaf if dim is None else leaf.movedim(dim, 0)).reshape(self.count, self._width(leaf.shape)).to(self.dtype)
            for leaf, dim in zip(leaves, self._batch_dims, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def from_matrix(self, matrix: Tensor) -> Leaves:
        """The leaves that `to_matrix` would lay out as `matrix`, in their own dtypes."""
        leaves: list[Tensor] = []
        start = 0
        for shape, dtype, dim in zip(self.shapes, self.dtypes, self._batch_dims, strict=True):
            width = self._width(shape)
            rows = matrix[:, start : start + width].to(dtype)
            start += width
            if dim is None:
                leaves.append(rows.reshape(shape))
            else:
                moved = (shape[dim], *shape[:dim], *shape[dim + 1 :])
                leaves.append(rows.reshape(moved).movedim(0, dim))
        return tuple(leaves)

    @property
    def entries(self) -> int:
        """How many numbers a sample has."""
        return sum(map(self._width, self.shapes))

    def _width(self, shape: torch.Size) -> int:
        """How many entries of a tensor belong to each sample."""
        return math.prod(shape) // max(self.count, 1)


def select_rows(tensor: Tensor, rows: Tensor, dim: int) -> Tensor:
    """The entries `rows` of `tensor` along `dim`, laid out in memory as it is."""
    return tensor.movedim(dim, 0)[rows].movedim(0, dim)


def _batch_dim(leaf: Tensor, batch_dim: int | None, where: Callable[[], str]) -> int | None:
    if batch_dim is None:
        return None
    if not -leaf.dim() <= batch_dim < leaf.dim():
        raise StateMismatchError(
            f"The state has no dimension batch_dim={batch_dim}{where()}: {describe(leaf)}. Pass the dimension along which the "
            "map treats samples independently, or batch_dim=None if it couples them."
        )
    return batch_dim % leaf.dim()
