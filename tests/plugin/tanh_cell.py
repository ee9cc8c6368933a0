"""A contraction whose gain is chosen, and a solver to rounding."""

from __future__ import annotations

from typing import Any

import torch
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import Anderson

EXACT = Anderson(max_steps=300, rtol=1e-12)


class Cell(nn.Module):
    """`tanh(W z + x)` with a `W` that is orthogonal but for its gain, in float64."""

    def __init__(self, size: int = 4, gain: float = 0.6) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.recurrent = nn.Linear(size, size).double()
        with torch.no_grad():
            self.recurrent.weight.copy_(gain * torch.linalg.qr(torch.randn(size, size, dtype=DTYPE)).Q)

    def forward(self, z: Tensor, x: Tensor) -> Any:
        return torch.tanh(self.recurrent(z) + x)
