"""Backward through attached modules: once, twice, nested, with parametrizations, autocast and results changed in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attached_model import SOLVER, Cell, Model, batch, equilibrium_of
from torch import Tensor, nn

from phantomgrad import Implicit, NeumannPhantom, OneStep, UnrolledPhantom, attach


def test_only_the_solve_runs_where_nothing_requires_grad() -> None:
    cell, x = Cell(), batch()
    attachment = attach(cell, NeumannPhantom(), solver=SOLVER)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    cell.recurrent.register_forward_hook(count)

    def evaluations(*, frozen: bool, inputs_require_grad: bool = False) -> int:
        nonlocal calls
        cell.requires_grad_(not frozen)
        calls = 0
        result = cell(torch.zeros_like(x), batch(inputs_require_grad))
        assert result.requires_grad == (torch.is_grad_enabled() and (not frozen or inputs_require_grad))
        assert attachment.solution is not None
        return calls - int(attachment.solution.steps.max())

    assert evaluations(frozen=True) == 0
    assert evaluations(frozen=False) == 1
    assert evaluations(frozen=True, inputs_require_grad=True) == 1
    with torch.no_grad():
        assert evaluations(frozen=False) == 0


def test_captured_tensors_get_gradients_though_nothing_visible_requires_grad() -> None:
    captured = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)

    class Closing(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 0.5 * z + captured

    cell = Closing()
    attach(cell, Implicit(), solver=SOLVER)
    cell(torch.zeros(2, 4, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(captured.grad, torch.full((4,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_parametrizations_are_computed_once_per_solve_and_get_gradients() -> None:
    class Count(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            Count.calls += 1
            return 0.9 * weight

    for gradient in (UnrolledPhantom(), UnrolledPhantom(recompute=True), NeumannPhantom(), Implicit()):
        model, plain, x = Model(), Model(), batch()
        plain.load_state_dict(model.state_dict())
        nn.utils.parametrize.register_parametrization(model.cell.recurrent, "weight", Count())
        with torch.no_grad():
            plain.cell.recurrent.weight.mul_(0.9)
        attach(model.cell, gradient, solver=SOLVER)
        attach(plain.cell, gradient, solver=SOLVER)
        Count.calls = 0
        for _ in range(2):
            model(x).sum().backward()
            plain(x).sum().backward()
        assert Count.calls == 2
        grad = model.cell.recurrent.parametrizations.weight.original.grad
        torch.testing.assert_close(grad, 0.9 * plain.cell.recurrent.weight.grad)
        # An optimizer step between calls is seen.
        with torch.no_grad():
            model.cell.recurrent.parametrizations.weight.original.zero_()
            expected = torch.tanh(0.4 * model.cell.recurrent.bias + x)
        torch.testing.assert_close(model(x), expected)


def test_nested_attachments() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Cell()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.3 * self.inner(torch.zeros_like(z), z + x)

    outer, x = Outer(), batch(True)
    inner = attach(outer.inner, Implicit(), solver=SOLVER)
    attach(outer, Implicit(), solver=SOLVER)
    z = outer(torch.zeros_like(x), x)
    with torch.no_grad():
        torch.testing.assert_close(0.3 * equilibrium_of(outer.inner, z + x), z, rtol=1e-8, atol=1e-8)
    assert torch.autograd.gradcheck(lambda x: outer(torch.zeros_like(x), x), (x,))
    assert inner.solution is not None


def test_called_twice_and_two_forwards_before_one_backward() -> None:
    for gradient in (UnrolledPhantom(), NeumannPhantom(), Implicit()):
        model, x = Model(), batch()
        attach(model.cell, gradient, solver=SOLVER)
        grads = []
        for inputs in (x, 2 * x):
            model.zero_grad()
            model(inputs).sum().backward()
            grads.append(model.cell.recurrent.weight.grad.clone())  # type: ignore[union-attr]
        model.zero_grad()
        first, second = model(x), model(2 * x)
        (first.sum() + second.sum()).backward()
        torch.testing.assert_close(model.cell.recurrent.weight.grad, grads[0] + grads[1])


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
def test_a_second_backward_with_retain_graph_gives_the_same_gradient(gradient: Any) -> None:
    model, x = Model(), batch()
    attach(model.cell, gradient, solver=SOLVER)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, model.cell.recurrent.weight, retain_graph=True)[0]
    second = torch.autograd.grad(loss, model.cell.recurrent.weight)[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
def test_the_result_may_be_changed_in_place(gradient: Any) -> None:
    class Sum(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.scale * self.recurrent(z)) + x  # a sum does not save its result for backward

    model, x = Model(), batch()
    model.cell = Sum()
    attach(model.cell, gradient, solver=SOLVER)
    expected = torch.autograd.grad((2 * model(x)).square().sum(), model.cell.recurrent.weight)[0]
    z = model(x)
    z.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(z.square().sum(), model.cell.recurrent.weight)[0], expected)


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_state_dtype_and_the_weights_gradients(gradient: Any, dtype: torch.dtype) -> None:
    model = Model().float()
    x = batch().float()
    attach(model.cell, gradient)
    reference = torch.autograd.grad(model(x).sum(), model.cell.recurrent.weight)[0]
    with torch.autocast("cpu", dtype):
        z = model(x)
    assert z.dtype is torch.float32
    z.sum().backward()
    grad = model.cell.recurrent.weight.grad
    assert grad is not None
    assert ((grad - reference).norm() / reference.norm()).item() < 0.03
