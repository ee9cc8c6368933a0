"""Maps with known Jacobians, and their dense Jacobians, for the tests of diagnostics."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import FixedPointIteration

EXACT = FixedPointIteration(max_steps=2000, rtol=1e-14, atol=1e-14)
AT_START = FixedPointIteration(max_steps=0)


class Tanh(nn.Module):
    """A nonlinear cell whose Jacobian differs from sample to sample."""

    def __init__(self, size: int = 5, inputs: int = 3, gain: float = 0.8) -> None:
        super().__init__()
        self.recurrent = nn.Linear(size, size).double()
        self.inputs = nn.Linear(inputs, size).double()
        with torch.no_grad():
            self.recurrent.weight.copy_(gain * torch.linalg.qr(torch.randn(size, size, dtype=DTYPE))[0])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + self.inputs(x))


def solved(cell: Callable[..., Tensor], z: Tensor, *inputs: Tensor) -> Tensor:
    """The state after as many plain steps as a contraction needs."""
    with torch.no_grad():
        for _ in range(500):
            z = cell(z, *inputs)
    return z


def dense_jacobians(cell: Callable[..., Tensor], z: Tensor, *inputs: Tensor) -> Tensor:
    """The dense Jacobian of every row's image with respect to that row, shape (rows, size, size)."""
    rows = [
        torch.autograd.functional.jacobian(lambda row, i=i: cell(row[None], *(x[i : i + 1] for x in inputs))[0], z[i])
        for i in range(z.shape[0])
    ]
    return torch.stack(rows)


def linear_map(J: Tensor) -> Callable[[Tensor], Tensor]:
    """A linear map of rows with this Jacobian; its solution is zero."""
    return lambda z: z @ J.T


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that depend on the seed alone."""
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def rotation(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=DTYPE)


def non_normal() -> Tensor:
    """Spectral radius 0.4, 2-norm above 3."""
    J = torch.diag(torch.linspace(-0.4, 0.4, 6, dtype=DTYPE))
    return J + torch.diag(torch.full((5,), 3.0, dtype=DTYPE), 1)
