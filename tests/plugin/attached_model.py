"""A model around one contraction, for the tests of what attaching changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from phantomgrad import FixedPointIteration

SOLVER = FixedPointIteration(max_steps=200, rtol=1e-12)


class Cell(nn.Module):
    """A contraction with parameters and a buffer."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.recurrent = nn.Linear(size, size).double()
        self.register_buffer("scale", torch.tensor(0.4, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.recurrent(z) + x)


class Model(nn.Module):
    """A model that is its cell, called with a start of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(torch.zeros_like(x), x)


def batch(requires_grad: bool = False) -> Tensor:
    """The same input every time."""
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(
        requires_grad
    )


def equilibrium_of(cell: Cell, x: Tensor) -> Tensor:
    """What plain iteration ends at; differentiable."""
    z = torch.zeros_like(x)
    for _ in range(300):
        z = torch.tanh(cell.scale * cell.recurrent(z) + x)
    return z
