"""The decorator on classes that others inherit from, and on functions with every kind of argument."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from compat import Cell
from torch import Tensor, nn

from phantomgrad import (
    FixedPointIteration,
    Implicit,
    NeumannPhantom,
    NotConvergedWarning,
    OneStep,
    attachments,
    equilibrium,
    is_attached,
)

SOLVER = FixedPointIteration(max_steps=200, rtol=1e-12)


@equilibrium(OneStep(), solver=SOLVER)
class Decorated(Cell):
    """At module level, so that it can be pickled."""


@equilibrium(Implicit(), solver=SOLVER, state="h")
class Redecorated(Decorated):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h, x)


@equilibrium(solver=SOLVER)
def halve(z: Tensor, x: Tensor) -> Tensor:
    return 0.5 * z + x


def _x() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_a_subclass_is_attached_once_with_the_options_of_its_base() -> None:
    class Wider(Decorated):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.extra = nn.Linear(size, size)

    cell = Wider(4)
    [attachment] = attachments(cell)
    assert attachment.module is cell
    assert attachment.gradient == OneStep()
    assert list(cell.state_dict()) == ["recurrent.weight", "recurrent.bias", "extra.weight", "extra.bias"]


def test_the_last_decoration_holds() -> None:
    cell = Redecorated().double()
    [attachment] = attachments(cell)
    assert attachment.gradient == Implicit()
    x = _x().double()
    z = cell(x, torch.zeros_like(x))
    torch.testing.assert_close(z, torch.tanh(0.4 * cell.recurrent(z) + x))
    assert next(attachments(Decorated())).gradient == OneStep()
    twice = equilibrium(NeumannPhantom())(equilibrium(OneStep())(type("Twice", (Cell,), {})))
    assert next(attachments(twice())).gradient == NeumannPhantom()


def test_an_init_that_raises_or_runs_twice() -> None:
    @equilibrium()
    class Refusing(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            if size < 1:
                raise ValueError("size must be positive")

        def forward(self, z: Tensor) -> Tensor:
            return 0.5 * z

    with pytest.raises(ValueError, match=r"^size must be positive$"):
        Refusing(0)
    cell = Refusing(1)
    Refusing.__init__(cell, 2)
    assert len(list(attachments(cell))) == 1


def test_instances_of_a_decorated_class_are_pickled_and_copied_attached() -> None:
    cell = Decorated()
    stored = io.BytesIO()
    torch.save(cell, stored)
    stored.seek(0)
    for other in (copy.deepcopy(cell), torch.load(stored, weights_only=False)):
        [attachment] = attachments(other)
        assert attachment.module is other
        with torch.no_grad():
            other.recurrent.weight.zero_()
        torch.testing.assert_close(other(torch.zeros(3, 4), _x()), torch.tanh(0.4 * other.recurrent.bias + _x()))


@pytest.mark.parametrize("call", ["positional", "keyword", "all by keyword"])
def test_a_decorated_function_takes_its_inputs_by_position_or_keyword(call: str) -> None:
    x = _x().requires_grad_()
    zeros = torch.zeros(3, 4)
    z = {
        "positional": lambda: halve(zeros, x),
        "keyword": lambda: halve(zeros, x=x),
        "all by keyword": lambda: halve(x=x, z=zeros),
    }[call]()
    torch.testing.assert_close(z, 2 * x, rtol=1e-4, atol=1e-6)
    (grad,) = torch.autograd.grad(z.sum(), x)
    # On a linear block the unrolled gradient is the exact one, 2, times 1 - B^k with B = 0.75.
    torch.testing.assert_close(grad, torch.full_like(x, 2 * (1 - 0.75**5)))


def test_every_option_holds_for_functions_too() -> None:
    steps: list[int] = []

    @equilibrium(
        Implicit(),
        solver=SOLVER,
        state=1,
        output="state",
        eval_solver=FixedPointIteration(max_steps=3),
        on_step=lambda step, z, residual: steps.append(step),
    )
    def cell(x: Tensor, z: Tensor, *, gain: float = 1.0) -> dict[str, Tensor]:
        return {"state": 0.5 * z + gain * x, "sum": z.sum()}

    x = _x().requires_grad_()
    result = cell(x, torch.zeros(3, 4), gain=2.0)
    torch.testing.assert_close(result["state"], 4 * x)
    torch.testing.assert_close(result["sum"], 4 * x.sum())
    torch.testing.assert_close(torch.autograd.grad(result["state"].sum(), x)[0], torch.full_like(x, 4.0))
    assert steps == list(range(1, len(steps) + 1))
    with (
        torch.no_grad(),
        pytest.warns(NotConvergedWarning, match=r"^The fixed point did not converge in cell: 3 of 3 samples"),
    ):
        cell(x, torch.zeros(3, 4))
    assert steps[-3:] == [1, 2, 3]


def test_a_method_takes_its_state_after_self() -> None:
    class Holder:
        def __init__(self) -> None:
            self.gain = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

        @equilibrium(Implicit(), solver=SOLVER, state=1)
        def settle(self, z: Tensor, x: Tensor) -> Tensor:
            return self.gain * z + x

    holder = Holder()
    z = holder.settle(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    z.sum().backward()
    torch.testing.assert_close(z.detach(), torch.tensor([2.0], dtype=torch.float64))
    torch.testing.assert_close(holder.gain.grad, torch.tensor(4.0, dtype=torch.float64))


def test_a_decorated_function_is_not_a_module_of_the_model_that_calls_it() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return halve(torch.zeros_like(x), x)

    net = Net()
    net(_x())
    assert list(net.modules()) == [net]
    assert not is_attached(net)
