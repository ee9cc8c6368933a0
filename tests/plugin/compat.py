"""A cell in a model, and everything that may be attached to it, for the compatibility tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from phantomgrad import (
    AdaptivePhantom,
    Attachment,
    Backprop,
    Broyden,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    Shine,
    UnrolledPhantom,
    attach,
)

GRADIENTS: list[Gradient] = [
    UnrolledPhantom(),
    UnrolledPhantom(recompute=True),
    NeumannPhantom(),
    KrylovPhantom(),
    AdaptivePhantom(),
    OneStep(),
    Implicit(rtol=1e-10),
    Shine(refine=1),
    Backprop(steps=40),
]
RECORDING = GRADIENTS[2:5] + GRADIENTS[6:8]
"""Those that record one evaluation and differentiate it several times."""


def settings(gradient: Gradient, **options: Any) -> dict[str, Any]:
    """The arguments of `attach` for a gradient, with the solver it needs, to a tolerance that float64 reaches."""
    kind = Broyden if isinstance(gradient, Shine) else FixedPointIteration
    return {"gradient": gradient, "solver": kind(max_steps=200, rtol=1e-12), **options}


class Cell(nn.Module):
    """A contraction."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.recurrent = nn.Linear(size, size)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.4 * self.recurrent(z) + x)


class Counting(Cell):
    """A contraction that counts its evaluations."""

    evaluations = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        return super().forward(z, x)


class Model(nn.Module):
    """What computes the cell's input, the cell, and what reads its equilibrium."""

    def __init__(self, cell: Callable[[], nn.Module] = Cell) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 4)
        self.cell: Any = cell()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.head(self.cell(torch.zeros_like(x), x))


def attached(gradient: Gradient, *, cell: Callable[[], nn.Module] = Cell, **options: Any) -> tuple[Model, Attachment]:
    """A model in float64 with known weights whose cell is attached."""
    torch.manual_seed(7)
    model = Model(cell).double()
    return model, attach(model.cell, **settings(gradient, **options))


def batch(size: int = 3) -> Tensor:
    return torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The `.grad` of every parameter; one without is missing."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(gradient: Gradient, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """The gradients of `loss` in the plainest of set-ups."""
    model, _ = attached(gradient, **options)
    loss(model, x).backward()
    return gradients(model)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float = 1e-7) -> None:
    """Equal names, equal values, and none of them all zero."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
