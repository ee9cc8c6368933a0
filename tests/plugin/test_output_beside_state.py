"""What a cell returns beside its state: values, gradients, and what they cost."""

from __future__ import annotations

import gc
import weakref
from collections import UserDict
from typing import Any

import pytest
import torch
from compat import GRADIENTS
from problems import DTYPE
from tanh_cell import EXACT, Cell
from torch import Tensor, nn

from phantomgrad import (
    Backprop,
    Broyden,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    Shine,
    StateMismatchError,
    UnrolledPhantom,
    attach,
)


class WithHead(Cell):
    """Returns the new state, and a head's result on the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2).double()

    def forward(self, z: Tensor, x: Tensor) -> Any:
        return super().forward(z, x), self.head(z)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_what_is_returned_beside_the_state_has_the_gradient_through_the_solution(gradient: Gradient) -> None:
    solver = Broyden(max_steps=300, rtol=1e-12) if isinstance(gradient, Shine) else EXACT
    cell, start = WithHead(), torch.zeros(3, 4, dtype=DTYPE)
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with attach(cell, gradient, solver=solver, output=0, on_failure="ignore"):
        z, beside = cell(start, x)
        inputs = [x, *cell.parameters()]
        found = torch.autograd.grad(beside.sum(), inputs, retain_graph=True)
        expected = torch.autograd.grad(cell.head(z).sum(), inputs)
    exact = isinstance(gradient, (Implicit, Backprop))
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0
        cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert cosine > (1 - 1e-9 if exact else 0.9)
        if exact:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gradient", [g for g in GRADIENTS if not isinstance(g, Backprop)], ids=repr)
def test_values_beside_the_state_are_the_same_with_and_without_grad(gradient: Gradient) -> None:
    solver = Broyden(max_steps=300, rtol=1e-12) if isinstance(gradient, Shine) else EXACT
    cell, start, x = WithHead(), torch.zeros(3, 4, dtype=DTYPE), torch.randn(3, 4, dtype=DTYPE)
    attach(cell, gradient, solver=solver, output=0)
    recorded = cell(start, x)
    with torch.no_grad():
        constant = cell(start, x)
    torch.testing.assert_close(recorded, constant, rtol=1e-9, atol=1e-9)


def test_refined_values_agree_in_evaluation_beside_the_state_too() -> None:
    # An expanding map, whose best iterate is not the last one.
    cell, x = WithHead(), torch.full((1, 4), 0.1, dtype=DTYPE)
    with torch.no_grad():
        cell.recurrent.weight.mul_(3)
    start = torch.zeros(1, 4, dtype=DTYPE)
    solver = FixedPointIteration(max_steps=5)
    attach(cell, UnrolledPhantom(steps=2, refine_in_eval=True), solver=solver, output=0, on_failure="ignore")
    recorded = cell(start, x)
    with torch.no_grad():
        constant = cell(start, x)
    assert torch.equal(recorded[0], constant[0])
    assert torch.equal(recorded[1], constant[1])


def test_the_rest_of_the_return_comes_back_where_the_start_is_the_solution() -> None:
    cell, start = WithHead(), torch.ones(2, 4, dtype=DTYPE)
    attach(cell, Implicit(), solver=FixedPointIteration(max_steps=0), output=0)
    with torch.no_grad():
        z, beside = cell(start, start)
        assert torch.equal(z, start)
        torch.testing.assert_close(beside, cell.head(start))
        z.add_(1)
    assert torch.equal(start, torch.ones_like(start))  # the result is not the start itself


def test_output_of_a_cell_that_returns_a_tensor() -> None:
    cell = Cell()
    attach(cell, output=0)
    with pytest.raises(StateMismatchError, match=r"returned a tensor in Cell, .* no parts: leave out output=0\."):
        cell(torch.zeros(1, 4, dtype=DTYPE), torch.zeros(1, 4, dtype=DTYPE))


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("use", ["nothing", "state", "beside", "both"])
def test_no_graph_is_left_by_what_is_returned_beside_the_state(gradient: Gradient, use: str) -> None:
    solver = Broyden(max_steps=100) if isinstance(gradient, Shine) else EXACT
    cell = WithHead()
    attach(cell, gradient, solver=solver, output=0, on_failure="ignore")
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True) * 1
    left = weakref.ref(x)
    gc.disable()
    try:
        z, beside = cell(torch.zeros(3, 4, dtype=DTYPE), x)
        parts = {"nothing": [], "state": [z], "beside": [beside], "both": [z, beside]}[use]
        if parts:
            sum(part.sum() for part in parts).backward()
        del z, beside, parts, x
        assert left() is None
    finally:
        gc.enable()


def test_what_depends_on_a_captured_tensor_alone_has_its_gradient() -> None:
    w = torch.ones(3, dtype=DTYPE, requires_grad=True)

    class Beside(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Any:
            return torch.tanh(0.3 * z + x), (z * w).sum()

    for gradient in (NeumannPhantom(), Implicit(), UnrolledPhantom(), OneStep()):
        cell = Beside()
        attach(cell, gradient, output=0)
        z, beside = cell(torch.zeros(2, 3, dtype=DTYPE), torch.ones(2, 3, dtype=DTYPE))
        torch.testing.assert_close(torch.autograd.grad(beside, w)[0], z.detach().sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beside", [None, 3, "text", torch.zeros(2), {"a": [torch.zeros(1)]}], ids=repr)
def test_what_carries_no_gradient_costs_no_evaluation(beside: Any) -> None:
    counts = []
    for rest in (beside, None):
        evaluations = []

        class Counting(Cell):
            def forward(self, z: Tensor, x: Tensor, rest: Any = rest, seen: list[int] = evaluations) -> Any:
                seen.append(1)
                return super().forward(z, x), rest

        cell = Counting()
        attach(cell, KrylovPhantom(), solver=EXACT, output=0)
        cell(torch.zeros(2, 4, dtype=DTYPE), torch.ones(2, 4, dtype=DTYPE))
        counts.append(len(evaluations))
    bare = Cell()
    attachment = attach(bare, KrylovPhantom(), solver=EXACT)
    bare(torch.zeros(2, 4, dtype=DTYPE), torch.ones(2, 4, dtype=DTYPE))
    assert attachment.solution is not None
    assert counts == [int(attachment.solution.steps.max()) + 1] * 2


def test_a_mapping_that_is_no_dict_is_refused() -> None:
    class Mapped(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Any:
            return UserDict(z=super().forward(z, x))

    cell = Mapped()
    attach(cell, output="z")
    with pytest.raises(StateMismatchError, match=r"returned a UserDict in Mapped, which has no part output='z'\."):
        cell(torch.zeros(1, 4, dtype=DTYPE), torch.zeros(1, 4, dtype=DTYPE))
