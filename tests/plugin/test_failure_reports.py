"""Solves that fail: where it is reported, how often, whose failure it is, and what value is left."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from attached_model import Model, batch
from problems import DTYPE
from tanh_cell import EXACT, Cell
from torch import Tensor, nn

from phantomgrad import (
    AdaptivePhantom,
    Anderson,
    Broyden,
    DivergedError,
    FixedPointIteration,
    Gradient,
    Implicit,
    NeumannPhantom,
    NotConvergedError,
    NotConvergedWarning,
    OneStep,
    UnrolledPhantom,
    attach,
    attachments,
    fixed_point,
)


def test_unconverged_counts_and_the_warning_comes_once_with_the_path() -> None:
    model, x = Model(), batch()
    attachment = attach(model.cell, solver=FixedPointIteration(max_steps=2))
    text = r"^The fixed point did not converge in Model\.cell \(Cell\): 3 of 3 samples are above their tolerance after 2 steps"
    with pytest.warns(NotConvergedWarning, match=text):
        model(x)
    model(x)
    assert attachment.unconverged == 2
    assert attachment.solution is not None
    assert not attachment.solution.converged.any()


def test_unrolled_steps_that_lead_away_from_the_solution_are_reported() -> None:
    p = torch.tensor(-8.0, dtype=DTYPE, requires_grad=True)
    start = torch.full((4, 3), (1 + 1e-7) / 9, dtype=DTYPE)  # near the solution 1/9, from which a step leads away
    solver = FixedPointIteration(rtol=1e-6)
    with pytest.warns(NotConvergedWarning, match=r"^The 5 steps of UnrolledPhantom led away from the solution: 4 of 4"):
        solution = fixed_point(lambda z: p * z + 1, start, solver=solver)
    assert not solution.converged.any()
    with pytest.raises(NotConvergedError, match="led away"):
        fixed_point(lambda z: p * z + 1, start, solver=solver, on_failure="raise")
    assert fixed_point(lambda z: p * z + 1, start, solver=solver, gradient=NeumannPhantom()).converged.all()
    with torch.no_grad():
        assert fixed_point(lambda z: p * z + 1, start, solver=solver).converged.all()


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
def test_a_sample_that_was_never_finite_keeps_its_start_with_and_without_grad(gradient: Gradient) -> None:
    p = torch.ones((), dtype=DTYPE, requires_grad=True)
    x = torch.tensor([[0.5], [-1.0]], dtype=DTYPE)

    def cell(z: Tensor) -> Tensor:  # from zero the second sample is the root of a negative number
        return p * torch.sqrt(z + x)

    start = torch.zeros(2, 1, dtype=DTYPE)
    value = fixed_point(cell, start, gradient=gradient, on_failure="ignore").value
    with torch.no_grad():
        constant = fixed_point(cell, start, gradient=gradient, on_failure="ignore").value
    assert value[1] == constant[1] == 0.0
    torch.testing.assert_close(value.detach(), constant, rtol=1e-6, atol=1e-6)


def test_a_failed_call_leaves_its_solution_on_the_attachment_and_the_error() -> None:
    cell, x = Cell(gain=1.5), torch.full((2, 4), 0.1, dtype=DTYPE)
    attachment = attach(cell, solver=FixedPointIteration(max_steps=3), on_failure="raise")
    with pytest.raises(NotConvergedError) as failed:
        cell(torch.zeros_like(x), x)
    assert attachment.solution is failed.value.solution is not None
    assert attachment.solution.steps.tolist() == [3, 3]
    with pytest.raises(
        DivergedError, match=r"not finite after 1 step\. The first evaluation is not finite already"
    ) as lost:
        cell(torch.zeros_like(x), x * torch.nan)
    assert attachment.solution is lost.value.solution
    assert not attachment.solution.converged.any()


def test_the_advice_of_a_warning_fits_the_solver() -> None:
    def slow(z: Tensor) -> Tensor:
        return torch.roll(z, 1, 1) * 0.99 + torch.arange(8.0)

    for solver, text in (
        (FixedPointIteration(max_steps=3), r"Raise max_steps, use Anderson\(\) or damping below 1, or pass"),
        (Anderson(max_steps=3), r"Raise max_steps or rtol, or pass"),
        (Broyden(max_steps=3), r"Raise max_steps, use Anderson\(\), or pass"),
    ):
        with pytest.warns(NotConvergedWarning, match=text):
            fixed_point(slow, torch.zeros(1, 8), solver=solver)


def _steep(z: Tensor, a: Tensor, x: Tensor) -> Tensor:
    return torch.exp(a * z * x) * x


@pytest.mark.parametrize(
    "gradient", [UnrolledPhantom(steps=9, damping=1.0), UnrolledPhantom(steps=9, damping=1.0, recompute=True)]
)
def test_unrolled_steps_to_infinity_raise_or_keep_the_solution(gradient: Gradient) -> None:
    a, x = torch.ones((), dtype=DTYPE, requires_grad=True), torch.tensor([[0.2], [2.0]], dtype=DTYPE)
    start, solver = torch.full((2, 1), 0.1, dtype=DTYPE), FixedPointIteration(max_steps=1)
    text = r"^The 9 steps of UnrolledPhantom diverged: 1 of 2 samples are not finite"
    with pytest.warns(NotConvergedWarning), pytest.raises(DivergedError, match=text):
        fixed_point(_steep, start, a, x, gradient=gradient, solver=solver)
    solution = fixed_point(_steep, start, a, x, gradient=gradient, solver=solver, on_failure="ignore")
    with torch.no_grad():
        constant = fixed_point(_steep, start, a, x, gradient=gradient, solver=solver, on_failure="ignore")
    assert solution.value[1] == constant.value[1]
    (found,) = torch.autograd.grad(solution.value.sum(), a)
    alone = fixed_point(_steep, start[:1], a, x[:1], gradient=gradient, solver=solver, on_failure="ignore")
    torch.testing.assert_close(found, torch.autograd.grad(alone.value.sum(), a)[0])


def test_a_sample_that_did_not_converge_does_not_hide_one_that_was_led_away() -> None:
    slopes = torch.tensor([[-8.0], [0.999]], dtype=DTYPE, requires_grad=True)
    start = torch.tensor([[(1 + 1e-7) / 9], [0.0]], dtype=DTYPE)
    solution = fixed_point(
        lambda z: slopes * z + 1, start, solver=FixedPointIteration(rtol=1e-6, max_steps=5), on_failure="ignore"
    )
    assert solution.converged.tolist() == [False, False]
    assert not fixed_point(
        lambda z: slopes.detach() * z + 1,
        start,
        solver=FixedPointIteration(rtol=1e-6, max_steps=5),
        on_failure="ignore",
    ).converged[1]


class Nested(nn.Module):
    """A cell that calls a cell of another shape."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.inner = Cell(4, gain=gain)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inner = self.inner(torch.zeros(5, 4, dtype=DTYPE), torch.full((5, 4), 0.3, dtype=DTYPE))
        return 0.5 * z + x + inner.mean()


def test_the_failure_of_a_cell_inside_is_not_the_outer_ones() -> None:
    cell = Nested(gain=1.5)
    inner = attach(cell.inner, solver=FixedPointIteration(max_steps=2), on_failure="raise")
    outer = attach(cell)
    x = torch.zeros(2, 3, dtype=DTYPE)
    with pytest.raises(NotConvergedError, match=r"in Nested\.inner") as failed:
        cell(x, x)
    assert failed.value.solution is inner.solution is not None
    assert inner.solution.value.shape == (5, 4)
    assert outer.solution is None


def test_a_copy_and_a_pickle_warn_anew() -> None:
    model = nn.ModuleList([Cell(gain=1.5)])
    attach(model[0], solver=FixedPointIteration(max_steps=2))
    x = torch.full((1, 4), 0.3, dtype=DTYPE)
    with pytest.warns(NotConvergedWarning):
        model[0](x, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        [attachment] = attachments(other)
        assert attachment.unconverged == 0
        with pytest.warns(NotConvergedWarning):
            other[0](x, x)


def test_a_warning_made_an_error_is_one_every_time_and_leaves_the_solution() -> None:
    cell, x = Cell(gain=1.5), torch.full((1, 4), 0.3, dtype=DTYPE)
    attachment = attach(cell, solver=FixedPointIteration(max_steps=2))
    for _ in range(2):  # the tests' own filter
        with pytest.raises(NotConvergedWarning) as raised:
            cell(x, x)
        assert attachment.solution is raised.value.solution is not None


def test_a_warning_of_backward_points_at_the_callers_line() -> None:
    cell, x = Cell(gain=0.95), torch.randn(3, 4, dtype=DTYPE)
    attach(cell, AdaptivePhantom(target=1e-12, max_steps=2), solver=EXACT)
    z = cell(torch.zeros_like(x), x)
    with pytest.warns(NotConvergedWarning, match="AdaptivePhantom stopped") as caught:
        z.sum().backward()
    assert caught[0].filename == __file__


def test_adaptive_says_nothing_where_the_solve_has_been_reported() -> None:
    cell, x = Cell(gain=0.95), torch.randn(3, 4, dtype=DTYPE)
    attach(cell, AdaptivePhantom(target=1e-12, max_steps=2), solver=FixedPointIteration(max_steps=2))
    with pytest.warns(NotConvergedWarning, match="The fixed point did not converge") as caught:
        cell(torch.zeros_like(x), x).sum().backward()
    assert len(caught) == 1
