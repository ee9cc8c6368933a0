"""A caller's own test of when a sample is done: what `on_step` returns."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phantomgrad import (
    Anderson,
    Broyden,
    FixedPointIteration,
    Implicit,
    NeumannPhantom,
    NotConvergedError,
    NotConvergedWarning,
    Solver,
    UnrolledPhantom,
    attach,
    fixed_point,
)

SOLVERS: list[Solver] = [
    FixedPointIteration(rtol=1e-12, damping=0.8),
    Anderson(rtol=1e-12),
    Broyden(rtol=1e-12),
]


class Affine(nn.Module):
    """`z -> z A^T + x`, a sample a row."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        random = torch.randn(size, size, generator=torch.Generator().manual_seed(3))
        self.weight = nn.Parameter(0.7 * random / torch.linalg.matrix_norm(random, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.weight.T + x


def _inputs(samples: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(samples))
    return torch.zeros_like(x), x


def _stopping_at(stops: list[int]) -> Any:
    """An `on_step` that stops sample `i` at step `stops[i]`."""
    return lambda step, image, residual: torch.tensor([step >= stop for stop in stops])


@pytest.fixture(autouse=True)
def _strict_in_float64() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConvergedWarning)
        yield
    torch.set_default_dtype(before)


def test_a_sample_stops_where_the_caller_says() -> None:
    solution = fixed_point(
        lambda z: 0.5 * z + 1.0,
        torch.zeros(3, 1),
        solver=FixedPointIteration(rtol=1e-3, atol=0.0),
        on_step=_stopping_at([2, 99, 5]),
    )
    # After n steps from 0 the image is 2 - 2^(1 - n); without a choice the residual 2^(1 - n) / 2 / 2 must be below 1e-3.
    assert solution.steps.tolist() == [2, 10, 5]
    torch.testing.assert_close(solution.value[:, 0], torch.tensor([1.5, 2 - 2**-9, 2 - 2**-4]))
    torch.testing.assert_close(solution.residual, torch.tensor([0.5 / 1.5, 2**-9 / (2 - 2**-9), 2**-4 / (2 - 2**-4)]))
    assert solution.converged.all()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@settings(max_examples=20, deadline=None)
@given(stops=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_each_sample_is_that_of_a_solve_of_so_many_steps(solver: Solver, compact: bool, stops: list[int]) -> None:
    cell = Affine()
    last = replace(solver, keep="last")
    z, x = _inputs(len(stops))
    attachment = attach(cell, solver=last, on_step=_stopping_at(stops), batched_inputs=("x",) if compact else None)
    with torch.no_grad():
        value = attachment.module(z, x)
        assert attachment.solution is not None
        assert attachment.solution.steps.tolist() == stops
        for row, stop in enumerate(stops):
            alone = fixed_point(
                attachment.step,
                z[row : row + 1],
                x[row : row + 1],
                solver=replace(last, max_steps=stop, rtol=0.0, atol=0.0),
                on_failure="ignore",
            )
            torch.testing.assert_close(value[row : row + 1], alone.value, rtol=1e-9, atol=1e-11)


def test_the_image_at_which_a_sample_stops_is_the_solution_even_if_an_earlier_one_was_better() -> None:
    factors = torch.tensor([[0.5], [1.5]])
    solution = fixed_point(
        lambda z: factors * z + 1.0,
        torch.zeros(2, 1),
        solver=FixedPointIteration(keep="best"),
        on_step=_stopping_at([99, 3]),
    )
    # 1, 2.5, 4.75: it moves away, and the smallest relative residual is that of the third step or not, no matter.
    torch.testing.assert_close(solution.value[1], torch.tensor([4.75]))
    assert solution.steps[1] == 3


def test_none_and_false_change_nothing() -> None:
    z, x = _inputs(3)
    cell = Affine()
    plain, none, false = (
        fixed_point(cell, z, x, solver=Anderson(), on_step=each)
        for each in (None, lambda *_: None, lambda step, image, residual: torch.zeros(3, dtype=torch.bool))
    )
    for other in (none, false):
        assert torch.equal(plain.value, other.value)
        assert torch.equal(plain.steps, other.steps)


def test_gradients_are_those_at_the_image_where_it_stopped() -> None:
    """`NeumannPhantom(steps=1, damping=1)` is one evaluation's gradient, and the exact one solves `(I - A)^T u = v`."""
    z, x = _inputs(2)
    for gradient in (NeumannPhantom(steps=1, damping=1.0), Implicit(rtol=1e-12)):
        cell = Affine()
        attachment = attach(cell, gradient, solver=FixedPointIteration(), on_step=_stopping_at([3, 4]))
        inputs = x.clone().requires_grad_()
        cell(z, inputs).sum().backward()
        assert attachment.solution is not None
        assert attachment.solution.steps.tolist() == [3, 4]
        ones = torch.ones(2, 4)
        exact = torch.linalg.solve((torch.eye(4) - cell.weight.detach()).T, ones.T).T
        expected = ones if isinstance(gradient, NeumannPhantom) else exact
        torch.testing.assert_close(inputs.grad, expected)


def test_a_block_that_couples_its_samples_stops_as_one() -> None:
    solution = fixed_point(
        lambda z: 0.5 * z + 1.0, torch.zeros(3), batch_dim=None, on_step=lambda step, z, r: torch.tensor([step == 4])
    )
    assert solution.steps.tolist() == [4]


@pytest.mark.parametrize(
    ("chosen", "got"),
    [
        (True, "True"),
        (torch.ones(2, dtype=torch.bool), "torch.bool of shape (2,)"),
        (torch.ones(3, dtype=torch.float64), "torch.float64 of shape (3,)"),
    ],
)
def test_anything_else_is_refused(chosen: Any, got: str) -> None:
    expected = f"on_step must return None, or which samples are to stop as a bool tensor of shape (3,), got {got}."
    with pytest.raises(TypeError, match=rf"^{re.escape(expected)}$"):
        fixed_point(lambda z: 0.5 * z + 1.0, torch.zeros(3, 1), on_step=lambda *_: chosen)


def test_it_can_be_set_for_a_while() -> None:
    z, x = _inputs(2)
    cell = Affine()
    attachment = attach(cell, solver=FixedPointIteration())
    with torch.no_grad(), attachment.using(on_step=_stopping_at([1, 2])):
        cell(z, x)
        assert attachment.solution is not None
        assert attachment.solution.steps.tolist() == [1, 2]
    with torch.no_grad():
        cell(z, x)
    assert attachment.solution.steps.min() > 2


def test_unrolled_steps_are_not_held_to_a_tolerance_that_was_not_asked_for() -> None:
    z, x = _inputs(8)
    inputs = x.clone().requires_grad_()
    solution = fixed_point(
        Affine(),
        z,
        inputs,
        gradient=UnrolledPhantom(),
        on_failure="raise",
        on_step=lambda step, image, residual: residual < 0.5,
    )
    assert solution.converged.all()
    assert int(solution.steps.max()) < 10


def test_unrolled_steps_that_lead_away_from_where_it_stopped_are_still_reported() -> None:
    factors = torch.tensor([[0.5], [-40.0]], requires_grad=True)
    with pytest.raises(NotConvergedError, match="led away from the solution: 1 of 2 samples"):
        fixed_point(
            lambda z: factors * z + 1.0,
            torch.tensor([[1.9], [1 / 41 + 1e-6]]),
            gradient=UnrolledPhantom(),
            on_failure="raise",
            on_step=_stopping_at([1, 1]),
        )


def test_the_residual_that_is_reported_is_that_of_samples_that_did_not_converge() -> None:
    with pytest.raises(NotConvergedError, match=r"2 of 4 samples .* with a relative residual of up to 7\.9e-03\."):
        fixed_point(
            lambda z: 0.5 * z + 1.0,
            torch.tensor([[0.0], [0.0], [1.9], [1.0]]),
            solver=FixedPointIteration(max_steps=6),
            on_failure="raise",
            on_step=_stopping_at([1, 1, 99, 99]),
        )
