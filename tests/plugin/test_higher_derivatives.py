"""Derivatives of derivatives: the exact gradient is right to any order, for everything the map depends on; Krylov ones are finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import DTYPE
from tanh_cell import EXACT, Cell
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck

from phantomgrad import (
    AdaptivePhantom,
    Anderson,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    PhantomGradError,
    Solver,
    attach,
    fixed_point,
)

SOLVER = FixedPointIteration(max_steps=1000, rtol=1e-13, atol=1e-14)


def _solve(fn: Callable[..., Any], start: Any, *inputs: Any, gradient: Implicit | None = None) -> Any:
    return fixed_point(fn, start, *inputs, gradient=gradient or Implicit(), solver=SOLVER).value


def test_three_derivatives_of_a_scalar_are_the_closed_forms() -> None:
    # x* = b / (1 - a)
    a, b = (torch.tensor(value, dtype=DTYPE, requires_grad=True) for value in (0.5, 1.0))
    x = _solve(lambda x: a * x + b, torch.tensor(0.0, dtype=DTYPE))
    (first,) = grad(x, a, create_graph=True)
    second, mixed = grad(first, (a, b), create_graph=True)
    (third,) = grad(second, a)
    assert [v.item() for v in (x, first, second, mixed, third)] == pytest.approx([2, 4, 16, 4, 96], rel=1e-9)


@pytest.mark.parametrize("solver", [None, Anderson(max_steps=200, rtol=1e-13)], ids=repr)
def test_gradgradcheck_of_inputs(solver: Any) -> None:
    x = torch.randn(2, 3, dtype=DTYPE, requires_grad=True)
    w = (0.3 * torch.randn(3, 3, dtype=DTYPE)).requires_grad_()

    def solve(x: Tensor, w: Tensor) -> Tensor:
        start = torch.zeros(2, 3, dtype=DTYPE)
        return _solve(lambda z, x, w: torch.tanh(z @ w.T + x), start, x, w, gradient=Implicit(solver=solver))

    assert gradcheck(solve, (x, w))
    assert gradgradcheck(solve, (x, w))


@pytest.mark.parametrize("leaf", [True, False])
def test_gradgradcheck_of_what_a_closure_captured(leaf: bool) -> None:
    x = torch.randn(2, 3, dtype=DTYPE, requires_grad=True)
    w = (0.3 * torch.randn(3, 3, dtype=DTYPE)).requires_grad_()

    def solve(x: Tensor, w: Tensor) -> Tensor:
        if not leaf:
            x, w = x.sin(), 0.5 * w.exp().log1p()
        return _solve(lambda z: torch.tanh(z @ w.T + x), torch.zeros(2, 3, dtype=DTYPE))

    assert gradgradcheck(solve, (x, w))
    # A second derivative that is missing would be None, and could pass unseen.
    (first,) = grad(solve(x, w).sum(), w, create_graph=True)
    for second in grad(first.square().sum(), (x, w), allow_unused=True):
        assert second is not None
        assert second.abs().max() > 1e-3


@pytest.mark.parametrize("structure", ["tuple", "list", "dict"])
def test_gradgradcheck_of_nested_states(structure: str) -> None:
    def pack(a: Tensor, b: Tensor) -> Any:
        return {"tuple": (a, b), "list": [a, b], "dict": {"a": a, "b": b}}[structure]

    def unpack(state: Any) -> tuple[Tensor, Tensor]:
        return tuple(state.values()) if isinstance(state, dict) else tuple(state)  # type: ignore[return-value]

    def solve(x: Tensor) -> Tensor:
        def cell(state: Any) -> Any:
            a, b = unpack(state)
            return pack(0.4 * torch.sin(b) + x, 0.3 * a.sum(dim=1, keepdim=True) * b.cos())

        start = pack(torch.zeros(2, 2, dtype=DTYPE), torch.zeros(2, 1, dtype=DTYPE))
        a, b = unpack(_solve(cell, start))
        return (a * b).sum(dim=1)

    x = torch.randn(2, 2, dtype=DTYPE, requires_grad=True)
    assert gradcheck(solve, x)
    assert gradgradcheck(solve, x)


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.inputs = nn.Linear(2, 4)
        self.dropout = nn.Dropout(0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.dropout(self.recurrent(z)) + self.inputs(x))


def test_a_module_with_weight_norm_and_dropout_against_differentiating_many_steps() -> None:
    cell, x = _Cell().double(), torch.randn(3, 2, dtype=DTYPE, requires_grad=True)
    attach(cell, Implicit(), solver=SOLVER)
    variables = (x, *cell.parameters())
    weights = torch.randn(3, 4, dtype=DTYPE)

    def unrolled() -> Tensor:
        state = torch.get_rng_state()
        z = torch.zeros(3, 4, dtype=DTYPE)
        for _ in range(80):
            torch.set_rng_state(state)
            z = type(cell).forward(cell, z, x)
        return z

    results = []
    for solve in (lambda: cell(torch.zeros(3, 4, dtype=DTYPE), x), unrolled):
        torch.manual_seed(3)
        loss = (solve().square() * weights).sum()
        firsts = grad(loss, variables, create_graph=True)
        seconds = grad(sum(first.square().sum() for first in firsts), variables)
        results.append((*firsts, *seconds))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-9)
        assert truth.abs().max() > 0


def test_a_gradient_penalty_trains() -> None:
    cell = nn.Linear(3, 3, dtype=DTYPE)
    x = torch.randn(8, 3, dtype=DTYPE, requires_grad=True)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    penalties = []
    for _ in range(10):
        z = _solve(lambda z: torch.tanh(0.5 * cell(z) + x), torch.zeros_like(x).detach())
        (gradient,) = grad(z.square().sum(), x, create_graph=True)
        penalty = gradient.square().mean()
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        penalties.append(penalty.item())
    assert penalties == sorted(penalties, reverse=True)


def test_autocast_is_entered_again_where_the_map_is_evaluated_again() -> None:
    linear = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)
    seconds = []
    for enabled in (True, False):
        seen: list[torch.dtype] = []

        def cell(z: Tensor, seen: list[torch.dtype] = seen) -> Tensor:
            image = linear(z)
            seen.append(image.dtype)
            return torch.tanh(0.3 * image + x)

        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = fixed_point(
                cell, torch.zeros(4, 8), gradient=Implicit(), solver=FixedPointIteration(max_steps=30)
            ).value
        (first,) = grad(z.square().sum(), x, create_graph=True)
        seconds.append(grad(first.square().sum(), x)[0])
        assert set(seen) == {torch.bfloat16 if enabled else torch.float32}
    torch.testing.assert_close(seconds[0], seconds[1], rtol=0.1, atol=0.1)


def test_what_no_second_derivative_can_follow_is_refused_in_one_sentence() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return g * b, g * a

    w = torch.tensor([0.5], dtype=DTYPE, requires_grad=True)
    x = _solve(lambda z: Product.apply(z, w) + 1.0, torch.zeros(1, dtype=DTYPE))
    assert grad(x.sum(), w, retain_graph=True)[0].item() == pytest.approx(4.0)
    with pytest.raises(
        PhantomGradError, match=r"^The map uses a tensor that requires grad in a way that its second deriv"
    ):
        grad(x.sum(), w, create_graph=True)
    # As an input of another operation it is seen.
    x = _solve(lambda z: Product.apply(z, 1.0 * w) + 1.0, torch.zeros(1, dtype=DTYPE))
    (first,) = grad(x.sum(), w, create_graph=True)
    assert grad(first.sum(), w)[0].item() == pytest.approx(16.0)


def test_a_second_backward_and_several_solves_in_one_graph() -> None:
    w = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    one = torch.tensor(1.0, dtype=DTYPE)
    x = _solve(lambda x: w * x + 1.0, one)
    y = _solve(lambda y: w * torch.sin(y) + x, one)

    def truth() -> Tensor:
        x = y = one
        for _ in range(200):
            x = w * x + 1.0
        for _ in range(200):
            y = w * torch.sin(y) + x
        return y

    (first,) = grad(y, w, create_graph=True)
    (expected,) = grad(truth(), w, create_graph=True)
    for _ in range(2):
        second = grad(first, w, retain_graph=True)[0]
        assert second.item() == pytest.approx(grad(expected, w, retain_graph=True)[0].item(), rel=1e-8)


@pytest.mark.parametrize("gradient", [KrylovPhantom(), KrylovPhantom(steps=9), AdaptivePhantom(target=0.01)], ids=repr)
def test_krylov_gradients_of_degenerate_blocks_can_be_differentiated(gradient: Gradient) -> None:
    u = torch.tensor([[0.5], [0.2], [0.1]], dtype=DTYPE, requires_grad=True)
    mask = torch.tensor([[1.0], [0.0]], dtype=DTYPE)  # the second sample's cotangent is zero
    for scale in (1.0, 0.0):  # a Jacobian of rank one, and none at all

        def cell(z: Tensor, x: Tensor, scale: float = scale) -> Tensor:
            return scale * z @ u @ u.T + x

        x = torch.ones(2, 3, dtype=DTYPE, requires_grad=True)
        value = fixed_point(cell, torch.zeros(2, 3, dtype=DTYPE), x, gradient=gradient, solver=EXACT).value
        (first,) = torch.autograd.grad((mask * value.square()).sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, u], allow_unused=True)
        assert first[0].abs().max() > 0
        assert torch.isfinite(second[0]).all()
        assert second[0].abs().max() > 0
        if scale:
            assert torch.isfinite(second[1]).all()


def test_a_second_backward_draws_no_random_numbers() -> None:
    class Dropping(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(z, 0.3), x)

    cell, x = Dropping(), torch.randn(2, 4, dtype=DTYPE, requires_grad=True)
    attach(cell, Implicit(), solver=EXACT)
    z = cell(torch.zeros(2, 4, dtype=DTYPE), x)
    before = torch.get_rng_state()
    torch.autograd.grad(z.square().sum(), x, create_graph=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_norm_and_a_start_that_is_the_solution_can_be_differentiated_twice() -> None:
    cell, x = Cell(), torch.randn(2, 4, dtype=DTYPE, requires_grad=True)
    nn.utils.parametrizations.weight_norm(cell.recurrent)
    attachment = attach(cell, Implicit(rtol=1e-10), solver=EXACT)
    with torch.no_grad():
        solution = cell(torch.zeros(2, 4, dtype=DTYPE), x)

    def second(start: Tensor, solver: Solver) -> Tensor:
        with attachment.using(solver=solver):
            (first,) = torch.autograd.grad(cell(start, x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    found = second(solution, FixedPointIteration(max_steps=0))
    torch.testing.assert_close(found, second(torch.zeros_like(solution), EXACT), rtol=1e-5, atol=1e-6)
