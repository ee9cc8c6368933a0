"""How exact the adjoint solve is: for a loss of any scale, in half precision, and under absolute tolerances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import DTYPE
from tanh_cell import Cell
from torch import Tensor, nn

from phantomgrad import Anderson, Implicit, Solver, attach, attachments, fixed_point


@pytest.mark.parametrize("solver", [None, Anderson(max_steps=200)], ids=["forward's", "its own"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9, 1e6])
def test_the_exact_gradient_is_as_exact_for_a_loss_of_any_scale(scale: float, solver: Solver | None) -> None:
    cell, start, x = Cell(6, gain=0.95), torch.zeros(3, 6, dtype=DTYPE), torch.randn(3, 6, dtype=DTYPE)
    attach(cell, Implicit(rtol=1e-5, solver=solver), solver=Anderson(max_steps=300), on_failure="raise")
    found = torch.autograd.grad(scale * cell(start, x).square().mean(), list(cell.parameters()))
    with attach_exact(cell):
        exact = torch.autograd.grad(cell(start, x).square().mean(), list(cell.parameters()))
    for one, other in zip(found, exact, strict=True):
        assert (one / scale - other).norm() < 1e-3 * other.norm()


def attach_exact(cell: Cell) -> Any:
    """The same cell with an adjoint to rounding."""
    [attachment] = attachments(cell)
    return attachment.using(gradient=Implicit(rtol=1e-12))


def test_an_adjoint_of_subnormal_numbers_settles_as_far_as_they_can() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.copy_(0.7 * torch.linalg.qr(torch.randn(64, 64)).Q)
    layer.half()
    x = torch.randn(64, 64, dtype=torch.float16)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(layer(z) + x)

    solution = fixed_point(cell, torch.zeros_like(x), x, gradient=Implicit(), solver=Anderson(), on_failure="raise")
    solution.value.backward(torch.full_like(x, 3e-7))  # warnings and NotConvergedError would be errors
    assert solution.adjoint.steps is not None
    assert solution.adjoint.steps < 30


@pytest.mark.parametrize("scale", [1e4, 6e4])
def test_an_adjoint_that_overflows_float16_is_the_loss_scalers_to_skip(scale: float) -> None:
    x = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    value = fixed_point(
        lambda z: 0.97 * z + 0.01 * x,
        torch.zeros(2, 3, dtype=torch.float16),
        gradient=Implicit(),
        solver=Anderson(),
        on_failure="ignore",
    ).value
    value.backward(torch.full_like(value, scale))
    assert x.grad is not None
    assert not torch.isfinite(x.grad).all()


def test_a_forward_tolerance_that_is_absolute_alone_is_not_the_adjoints() -> None:
    cell, x = Cell(gain=0.9), torch.randn(3, 4, dtype=DTYPE)
    for rtol in (0.0, 1e-20):
        attachment = attach(cell, Implicit(), solver=Anderson(rtol=rtol, atol=1e-9), on_failure="raise")
        cell(torch.zeros_like(x), x).sum().backward()
        assert attachment.solution is not None
        assert attachment.solution.adjoint.residual is not None
        assert attachment.solution.adjoint.residual.max() <= 1e-8
        attachment.remove()
