"""A model to watch, and a log that keeps what the monitor tells, for the tests of Monitor."""

from __future__ import annotations

from typing import Any

import torch
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import attach

KEYS = {"solver_steps", "solver_steps_max", "residual", "residual_max", "unconverged"}
"""What every report says of a cell."""


class Cell(nn.Module):
    """A contraction in float64."""

    def __init__(self, size: int = 6, gain: float = 0.5) -> None:
        super().__init__()
        self.recurrent, self.inputs = nn.Linear(size, size).double(), nn.Linear(3, size).double()
        self.gain = gain

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.gain * self.recurrent(z) + self.inputs(x))


class Model(nn.Module):
    """Calls its cell `calls` times a pass."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"cell": Cell()})
        self.readout = nn.Linear(6, 1).double()
        self.dropout = nn.Dropout(0.1)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros(x.shape[0], 6, dtype=DTYPE)
        for _ in range(self.calls):
            z = self.backbone["cell"](z.detach(), x)
        return self.readout(self.dropout(z))


def batch(seed: int = 0) -> Tensor:
    """An input of the model."""
    return torch.randn(5, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


class Log:
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []

    def __call__(self, values: dict[str, float], step: int) -> None:
        assert all(type(value) is float for value in values.values())
        self.entries.append((step, values))


def train(model: nn.Module, steps: int, *, lr: float = 0.05) -> list[float]:
    """Train on one batch a step, and return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses: list[float] = []
    for step in range(steps):
        loss = model(batch(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def attached(**options: Any) -> Model:
    """A model whose cell is attached with these options."""
    model = Model()
    attach(model.backbone["cell"], **options)
    return model
