"""The call of an attached module: where its state is, what it returns, and mistakes with the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from attached_model import SOLVER, Cell, Model, batch, equilibrium_of
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import NeumannPhantom, StateMismatchError, UnrolledPhantom, attach


@pytest.mark.parametrize("call", ["positional", "keyword", "second", "by name"])
def test_the_state_may_be_any_argument(call: str) -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor, z: Tensor, *, gain: float = 1.0) -> Tensor:
            return 0.5 * z + gain * x

    x = batch()
    zeros = torch.zeros_like(x)
    if call in ("positional", "keyword"):
        cell = Cell()
        attach(cell, state=0, solver=SOLVER)
        value = cell(zeros, x) if call == "positional" else cell(x=x, z=zeros)
        torch.testing.assert_close(value, equilibrium_of(cell, x))
    else:
        second = Second()
        attach(second, state=1 if call == "second" else "z", solver=SOLVER)
        torch.testing.assert_close(second(x, zeros, gain=2.0), 4 * x)
        torch.testing.assert_close(second(x, z=zeros), 2 * x)


class Out(NamedTuple):
    state: Tensor
    seen: Tensor


@pytest.mark.parametrize("kind", [tuple, list, dict, Out])
@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom()], ids=repr)
def test_the_rest_of_a_larger_return_value_comes_back(kind: Any, gradient: Any) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, z: Tensor, x: Tensor) -> Any:
            values = self.weight * z + x, z.sum()
            return (
                {"state": values[0], "seen": values[1]}
                if kind is dict
                else Out(*values)
                if kind is Out
                else kind(values)
            )

    cell, x = Wide(), batch()
    attach(cell, gradient, output="state" if kind is dict else 0, solver=SOLVER)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            result = cell(torch.zeros_like(x), x)
        assert type(result) is kind
        state, seen = result.values() if kind is dict else result
        torch.testing.assert_close(state.detach(), 2 * x)
        torch.testing.assert_close(seen.detach(), (2 * x).sum())
    wrong = Wide()
    attach(wrong, output=5)
    if kind is not dict:
        with pytest.raises(StateMismatchError, match=r"in Wide, which has no part output=5"):
            wrong(torch.zeros_like(x), x)


def test_silent_mistakes_with_the_start_warn_once_with_the_cure() -> None:
    model, x = Model(), batch()
    attach(model.cell, solver=SOLVER)
    z = torch.zeros_like(x)
    with pytest.warns(
        UserWarning,
        match=r"^The start of the solve in Model\.cell \(Cell\) is the previous call's result: .* z0\.detach\(\)",
    ):
        for _ in range(3):
            z = model.cell(z, x)
    encoder = nn.Linear(4, 4).double()
    other = Model()
    attach(other.cell, solver=SOLVER)
    with pytest.warns(UserWarning, match=r"requires grad and no other input does: a start gets no gradient"):
        other.cell(encoder(x), x)
    other.cell(encoder(x), x)


@pytest.mark.parametrize(
    ("cell", "start", "text"),
    [
        (
            lambda z: z[:, :2],
            torch.zeros(3, 4),
            r"takes the state \(3, 4\) float32 on cpu to \(3, 2\) float32 on cpu in Net\.cell \(Wrap\)\.",
        ),
        (lambda z: z.double(), torch.zeros(3, 4), r"to \(3, 4\) float64 on cpu in Net\.cell"),
        (lambda z: (z, z), torch.zeros(3, 4), r"pass output= with its position or key\."),
        (lambda z: None, torch.zeros(3, 4), r"to a NoneType in Net\.cell"),
        (
            lambda z: z.add_(1),
            torch.zeros(3, 4),
            r"^The map changed its state in place in Net\.cell .* write `z = z \+ \.\.\.`",
        ),
        (
            lambda z: z,
            torch.zeros(3, dtype=torch.int64),
            r"^A fixed point needs floating-point states in Net\.cell \(Wrap\); got \(3,\) int64",
        ),
        (
            lambda z: z,
            "state",
            r"^A state is a tensor, or a non-empty tuple, list or dict of states; got a str in Net\.cell \(Wrap\)\.",
        ),
        (lambda z: z, (), r"non-empty tuple, list or dict of states; got \(\) in Net\.cell \(Wrap\)\."),
    ],
)
def test_mismatching_states_are_refused_with_both_shown(cell: Any, start: Any, text: str) -> None:
    class Wrap(nn.Module):
        def forward(self, z: Any) -> Any:
            return cell(z)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Wrap()

    net = Net()
    attach(net.cell)
    with pytest.raises(StateMismatchError, match=text):
        net.cell(start)


def test_a_missing_state_says_where_and_what_to_do() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 4)

    net = Net()
    attach(net.cell, state="hx")
    with pytest.raises(TypeError, match=r"lacks the state argument 'hx' in Net\.cell \(GRUCell\): pass the start"):
        net.cell(torch.zeros(2, 3))


def test_an_input_inside_a_container_counts_as_an_input() -> None:
    class Tupled(Cell):
        def forward(self, z: Tensor, xs: tuple[Tensor]) -> Tensor:
            return super().forward(z, xs[0])

    cell = Tupled()
    attach(cell, solver=SOLVER)
    x = torch.randn(2, 4, dtype=DTYPE, requires_grad=True)
    cell(torch.zeros(2, 4, dtype=DTYPE, requires_grad=True), (x,)).sum().backward()  # warnings are errors
    assert x.grad is not None


def test_an_input_inside_a_dataclass_counts_as_an_input() -> None:
    @dataclass
    class Inputs:
        x: Tensor

    class Wrapped(Cell):
        def forward(self, z: Tensor, inputs: Inputs) -> Tensor:
            return super().forward(z, inputs.x)

    cell, x = Wrapped(), torch.randn(2, 4, dtype=DTYPE, requires_grad=True)
    attach(cell, solver=SOLVER)
    cell(torch.zeros(2, 4, dtype=DTYPE, requires_grad=True), Inputs(x)).sum().backward()  # warnings are errors
    assert x.grad is not None
