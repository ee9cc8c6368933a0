"""Broyden's method."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from phantomgrad._options import check_integer
from phantomgrad._samples import Samples
from phantomgrad._state import Leaves
from phantomgrad.solvers._base import Solver


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Solve `g(z) = f(z) - z = 0` with a low-rank estimate of the inverse Jacobian of `g`, per sample.

    Starts from the inverse `-I`, which makes the first step a plain iteration, and corrects it by one rank a step so that it
    maps the last change of `g` to the last change of `z` (Broyden's "good" method, 1965). Converges superlinearly near a
    solution, where `f` need not be a contraction; far from one it may wander. A sample whose residual has grown tenfold
    learns from that step and goes on from its best iterate.
    """

    memory: int = 30
    """How many corrections are kept; after as many the estimate starts anew from `-I`. Each takes two states."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "memory", minimum=1)

    def start(self, z: Leaves, samples: Samples) -> InverseEstimate:
        return InverseEstimate(self.memory)

    def advance(self, z: Leaves, fz: Leaves, memory: InverseEstimate, samples: Samples) -> Leaves:
        point = samples.to_matrix(z)
        point, residual = memory.learn(point, samples.to_matrix(fz) - point)
        following = point - memory.apply(residual)
        wild = ~torch.isfinite(following).all(dim=1, keepdim=True)
        memory.forget(wild)
        return samples.from_matrix(torch.where(wild, point + residual, following))

    def select(self, memory: InverseEstimate, rows: Tensor) -> InverseEstimate:
        return memory.select(rows)


_TOLERATED_GROWTH = 10.0
"""How far a residual may grow beyond the best one of its sample before the solve goes back to that."""


class InverseEstimate:
    """`H = -I + sum u_i v_i^H`, the estimated inverse Jacobian of `f(z) - z`, per sample."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._left: Tensor | None = None
        self._right: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._best: tuple[Tensor, Tensor, Tensor] | None = None

    def learn(self, point: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Correct the estimate by the step from the last point to `point`, both of shape (samples, entries).

        Returns the point to go on from and its residual: a sample's best ones where this residual is out of proportion.
        """
        size = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
        if self._last is None or self._best is None:
            self._last, self._best = (point, residual), (point, residual, size)
            return point, residual
        self._correct(point - self._last[0], residual - self._last[1])
        best_point, best_residual, best_size = self._best
        lost = ~(size <= _TOLERATED_GROWTH * best_size)
        better = size < best_size
        self._best = (
            torch.where(better, point, best_point),
            torch.where(better, residual, best_residual),
            torch.where(better, size, best_size),
        )
        self._last = torch.where(lost, best_point, point), torch.where(lost, best_residual, residual)
        return self._last

    def select(self, rows: Tensor) -> InverseEstimate:
        """That of the samples `rows` alone."""
        selected = copy.copy(self)
        selected._left = None if self._left is None else self._left[rows]
        selected._right = None if self._right is None else self._right[rows]
        if self._last is not None and self._best is not None:
            selected._last = self._last[0][rows], self._last[1][rows]
            selected._best = self._best[0][rows], self._best[1][rows], self._best[2][rows]
        return selected

    def forget(self, which: Tensor) -> None:
        """Let the samples in `which`, of shape (samples, 1), have the estimate `-I` again."""
        if self._left is not None and self._right is not None:
            self._left = torch.where(which.unsqueeze(2), 0.0, self._left)
            self._right = torch.where(which.unsqueeze(2), 0.0, self._right)

    def _correct(self, step: Tensor, change: Tensor) -> None:
        if self._left is None or self._right is None:
            self._left = step.new_zeros((step.shape[0], self._capacity, step.shape[1]))
            self._right = torch.zeros_like(self._left)
        if self._size == self._capacity:
            self._size = 0
        right = self.apply_adjoint(step)
        denominator = (right.conj() * change).sum(dim=1, keepdim=True)
        left = (step - self.apply(change)) / denominator
        # A sample that did not move, or moved along what the estimate cannot see, teaches nothing.
        usable = torch.isfinite(left).all(dim=1, keepdim=True) & (denominator != 0)
        self._left[:, self._size] = torch.where(usable, left, 0.0)
        self._right[:, self._size] = torch.where(usable, right, 0.0)
        self._size += 1

    def apply(self, vector: Tensor) -> Tensor:
        """`H vector`, shape (samples, entries)."""
        return self._product(self._right, self._left, vector)

    def apply_adjoint(self, vector: Tensor) -> Tensor:
        """`H^H vector`, shape (samples, entries): `H^T vector` for real states."""
        return self._product(self._left, self._right, vector)

    def _product(self, inner: Tensor | None, outer: Tensor | None, vector: Tensor) -> Tensor:
        if self._size == 0 or inner is None or outer is None:
            return -vector
        weights = torch.bmm(inner[:, : self._size].conj(), vector.unsqueeze(-1))
        return torch.bmm(weights.transpose(1, 2), outer[:, : self._size]).squeeze(1) - vector
