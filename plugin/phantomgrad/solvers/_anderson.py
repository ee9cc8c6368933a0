"""Anderson acceleration."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from phantomgrad._options import check_integer, check_number
from phantomgrad._samples import Samples
from phantomgrad._state import Leaves
from phantomgrad.solvers._base import Solver


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Combine the last `memory` iterates so that their combined residual is smallest, per sample.

    With residuals `g_i = f(z_i) - z_i` it minimises `||sum a_i g_i||` over `sum a_i = 1` and continues from
    `sum a_i (z_i + mixing * g_i)` (Walker and Ni, "Anderson Acceleration for Fixed-Point Iterations", 2011). Usually
    needs far fewer steps than plain iteration, at the price of `2 * memory` states. A sample whose small system is
    singular takes a plain damped step instead.
    """

    memory: int = 5
    """How many iterates are combined; 1 is plain iteration damped by `mixing`."""
    mixing: float = 1.0
    """How far to go from the combined iterates towards their images."""
    ridge: float = 1e-8
    """Tikhonov term of the small system, relative to the largest diagonal entry of its Gram matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self, "memory", minimum=1)
        check_number(self, "mixing", above=0.0, maximum=2.0)
        check_number(self, "ridge", minimum=0.0)

    def start(self, z: Leaves, samples: Samples) -> History:
        return History(self.memory)

    def advance(self, z: Leaves, fz: Leaves, memory: History, samples: Samples) -> Leaves:
        point, image = samples.to_matrix(z), samples.to_matrix(fz)
        memory.push(image - point, point + self.mixing * (image - point))
        if memory.size == 1:
            return samples.from_matrix(memory.targets[:, 0])
        weights = memory.weights(self.ridge)
        return samples.from_matrix(torch.bmm(weights.unsqueeze(1), memory.targets[:, : memory.size]).squeeze(1))

    def select(self, memory: History, rows: Tensor) -> History:
        return memory.select(rows)


class History:
    """A ring of the last residuals and of the points they lead to, with the residuals' Gram matrix."""

    residuals: Tensor
    targets: Tensor
    gram: Tensor

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._newest = -1

    def push(self, residual: Tensor, target: Tensor) -> None:
        """Store a pair of shape (samples, entries) in place of the oldest."""
        if self.size == 0:
            shape = (residual.shape[0], self.capacity, residual.shape[1])
            # Places that are not taken yet are never read.
            self.residuals = residual.new_empty(shape)
            self.targets = residual.new_empty(shape)
            # The Gram matrix squares the condition number, so it is kept in float64 where the device has it.
            exact = torch.promote_types(
                residual.dtype, torch.float64 if residual.device.type != "mps" else torch.float32
            )
            self.gram = torch.zeros((shape[0], self.capacity, self.capacity), dtype=exact, device=residual.device)
        self._newest = (self._newest + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)
        self.residuals[:, self._newest] = residual
        self.targets[:, self._newest] = target
        taken = self.residuals[:, : self.size]
        column = torch.bmm(taken.conj(), residual.unsqueeze(-1)).squeeze(-1).to(self.gram.dtype)
        self.gram[:, self._newest, : self.size] = column.conj()
        self.gram[:, : self.size, self._newest] = column

    def select(self, rows: Tensor) -> History:
        """That of the samples `rows` alone."""
        selected = copy.copy(self)
        if self.size > 0:
            selected.residuals, selected.targets = self._taken(self.residuals, rows), self._taken(self.targets, rows)
            selected.gram = self.gram[rows]
        return selected

    def _taken(self, ring: Tensor, rows: Tensor) -> Tensor:
        """The samples `rows` of a ring, of which only the places that are taken are copied."""
        selected = ring.new_empty((len(rows), *ring.shape[1:]))
        selected[:, : self.size] = ring[:, : self.size][rows]
        return selected

    def weights(self, ridge: float) -> Tensor:
        """The weights, shape (samples, size), with sum 1, of the combination with the smallest residual."""
        gram = self.gram[:, : self.size, : self.size]
        diagonal = gram.diagonal(dim1=1, dim2=2).real
        scale = diagonal.amax(dim=1).clamp_min(torch.finfo(diagonal.dtype).tiny)[:, None, None]
        identity = torch.eye(self.size, dtype=gram.dtype, device=gram.device)
        ones = torch.ones((*gram.shape[:2], 1), dtype=gram.dtype, device=gram.device)
        solved = torch.linalg.solve_ex(gram / scale + ridge * identity, ones)[0].squeeze(-1)
        weights = solved / solved.sum(dim=1, keepdim=True)
        newest = torch.zeros_like(weights)
        newest[:, self._newest] = 1.0
        usable = torch.isfinite(weights).all(dim=1, keepdim=True)
        return torch.where(usable, weights, newest).to(self.residuals.dtype)
