"""Backpropagation, SHINE and the adaptive phantom gradient, against closed forms and dense Jacobians in float64."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, LinearBlock
from torch import Tensor, nn
from torch.autograd import grad
from torch.autograd.graph import get_gradient_edge

from phantomgrad import (
    AdaptivePhantom,
    Anderson,
    AttachError,
    Backprop,
    Broyden,
    FixedPointIteration,
    Gradient,
    KrylovPhantom,
    NotConvergedWarning,
    OneStep,
    Shine,
    Solution,
    attach,
    fixed_point,
)
from phantomgrad._samples import Samples
from phantomgrad.gradients._engine import by_autograd, by_engine
from phantomgrad.gradients._shine import apply_inverse_estimate
from phantomgrad.solvers._broyden import InverseEstimate

EXACT = FixedPointIteration(max_steps=2000, rtol=1e-15, atol=1e-15)
AT_SOLUTION = FixedPointIteration(max_steps=0)


def _adjoint(block: LinearBlock, gradient: Gradient, cotangent: Tensor, solver: Any = EXACT) -> Tensor:
    """The adjoint that the recorded evaluation has seen, row by row: with `f = z J^T + c`, that is `dL/dc` per sample."""
    offset = torch.zeros_like(block.start, requires_grad=True)
    z = fixed_point(lambda z: block(z) + offset, block.start, gradient=gradient, solver=solver).value
    return grad((z * cotangent).sum(), offset)[0]


# -- backpropagation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [None, "residual"])
def test_backprop_is_the_autograd_of_the_loop_and_reaches_the_start(trace: Any) -> None:
    w = (0.4 * torch.randn(3, 3, dtype=DTYPE)).requires_grad_()
    x, start = (torch.randn(2, 3, dtype=DTYPE, requires_grad=True) for _ in range(2))
    solver = FixedPointIteration(max_steps=1, rtol=0.5, trace=trace)  # a tolerance that is met at once stops nothing
    solution = fixed_point(lambda z: torch.tanh(z @ w.T + x), start, gradient=Backprop(steps=7), solver=solver)
    z = start
    for _ in range(7):
        z = torch.tanh(z @ w.T + x)
    torch.testing.assert_close(solution.value, z, rtol=0, atol=0)
    assert solution.steps.tolist() == [7, 7]
    assert solution.converged.all()
    for ours, truth in zip(
        grad(solution.value.square().sum(), (w, x, start)), grad(z.square().sum(), (w, x, start)), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)
    if trace:
        assert solution.trace is not None
        assert len(solution.trace) == 7
    with torch.no_grad():
        without = fixed_point(lambda z: torch.tanh(z @ w.T + x), start, gradient=Backprop(steps=7), solver=solver)
    assert torch.equal(without.value, z)
    assert without.steps.tolist() == [7, 7]


def test_backprop_of_an_attached_module_neither_warns_about_its_start_nor_runs_another_solver() -> None:
    cell = nn.Linear(3, 3, dtype=DTYPE)
    attachment = attach(cell, Backprop(steps=4), solver=Anderson(), on_failure="ignore")
    start = torch.randn(2, 3, dtype=DTYPE, requires_grad=True)
    cell(start).sum().backward()
    assert attachment.solution is not None
    assert attachment.solution.steps.tolist() == [4, 4]
    power = torch.linalg.matrix_power(cell.weight.detach(), 4)
    torch.testing.assert_close(start.grad, power.sum(dim=0).expand(2, 3))


def test_backprop_of_a_long_run_is_the_exact_gradient() -> None:
    block = LinearBlock.random(6, radius=0.6)
    g = torch.randn(block.start.shape, dtype=DTYPE)
    torch.testing.assert_close(_adjoint(block, Backprop(steps=120), g), block.adjoint(g), rtol=1e-9, atol=1e-9)


# -- SHINE ---------------------------------------------------------------------------------------------------------------


def test_shine_applies_the_transpose_of_broydens_estimate() -> None:
    block = LinearBlock.random(7, size=6, batch=2)
    samples, memory = Samples((block.start,), 0), InverseEstimate(30)
    for _ in range(4):
        point = torch.randn(block.start.shape, dtype=DTYPE)
        memory.learn(point, (block(point) - point).detach())
    identity = torch.eye(6, dtype=DTYPE)
    for row in range(2):
        dense = torch.stack([memory.apply(unit.expand(2, 6))[row] for unit in identity], dim=1)
        for g in torch.randn(3, 6, dtype=DTYPE):
            (v,) = apply_inverse_estimate(
                lambda v: (v[0] @ block.J.detach(),), (g.expand(2, 6),), memory=memory, refine=0, samples=samples
            )
            torch.testing.assert_close(v[row], -dense.T @ g, rtol=1e-12, atol=1e-12)


def test_shine_is_closer_than_one_step_and_refinement_makes_it_exact() -> None:
    solver = Broyden(max_steps=200, rtol=1e-12)
    errors: dict[str, list[float]] = {"shine": [], "one step": [], "refined": []}
    for seed in range(12):
        block = LinearBlock.random(seed, size=8, radius=0.8)
        g = torch.randn(block.start.shape, dtype=DTYPE)
        exact = block.adjoint(g)
        gradients = {"shine": Shine(), "one step": OneStep(), "refined": Shine(refine=40)}
        for name, gradient in gradients.items():
            found = _adjoint(block, gradient, g, solver)
            errors[name].append(((found - exact).norm() / exact.norm()).item())
    assert sum(errors["shine"]) < 0.7 * sum(errors["one step"])
    assert max(errors["refined"]) < 1e-6


def test_a_refinement_never_raises_the_residual() -> None:
    block = LinearBlock.random(9, size=8, radius=0.95)
    g = torch.randn(block.start.shape, dtype=DTYPE)
    residuals = []
    for refine in range(6):
        v = _adjoint(block, Shine(refine=refine), g, Broyden(max_steps=60, rtol=1e-9))
        residuals.append((g - v + v @ block.J.detach()).norm(dim=1))
    for before, after in itertools.pairwise(residuals):
        assert (after <= before * (1 + 1e-9)).all()


def test_shine_without_broyden_is_refused_wherever_the_two_meet() -> None:
    text = r"^Shine reuses the inverse estimate of Broyden's method, but the solver is FixedPointIteration"
    cell = nn.Linear(2, 2)
    with pytest.raises(AttachError, match=text):
        attach(cell, Shine())
    with pytest.raises(AttachError, match=text):
        fixed_point(torch.cos, torch.zeros(1), gradient=Shine())
    attachment = attach(cell, Shine(), solver=Broyden(), eval_solver=Anderson())
    with pytest.raises(AttachError, match=text):
        attachment.solver = FixedPointIteration()
    with pytest.raises(AttachError, match=text), attachment.using(solver=FixedPointIteration()):
        pass
    assert attachment.solver == Broyden()
    attachment.remove()
    attachment = attach(cell)
    with pytest.raises(AttachError, match=text):
        attachment.gradient = Shine()
    with attachment.using(gradient=Shine(), solver=Broyden()):
        assert not is_shine(attachment.gradient)


def is_shine(gradient: Gradient) -> bool:
    return isinstance(gradient, Shine)


# -- adaptive ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    target=st.sampled_from([0.3, 0.1, 0.03, 1e-3]),
    size=st.integers(2, 12),
    radius=st.floats(0.1, 0.95),
)
def test_adaptive_reaches_its_target_or_says_how_far_it_came(
    seed: int, target: float, size: int, radius: float
) -> None:
    block = LinearBlock.random(seed, size=size, radius=radius)
    g = torch.randn(block.start.shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))
    gradient = AdaptivePhantom(target=target, max_steps=40)
    offset = torch.zeros_like(block.start, requires_grad=True)
    solution = fixed_point(
        lambda z: block(z) + offset, block.solution().detach(), gradient=gradient, solver=AT_SOLUTION
    )
    (v,) = grad((solution.value * g).sum(), offset)
    exact = block.adjoint(g)
    statistics = solution.adjoint
    assert statistics.steps is not None
    assert statistics.residual is not None
    assert 2 <= statistics.steps <= size + 1
    assert (statistics.residual <= target).all()  # a space of full dimension holds the exact adjoint
    # The estimate is no bound: the least stretch of the space may exceed that of the whole map. It is rarely far off.
    error = (v - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error <= 10 * target).all()


def test_the_estimate_of_the_error_is_rarely_far_below_it() -> None:
    ratios: list[float] = []
    for seed in range(40):
        block = LinearBlock.random(seed, size=10, radius=0.3 + 0.015 * seed)
        g = torch.randn(block.start.shape, dtype=DTYPE)
        offset = torch.zeros_like(block.start, requires_grad=True)
        gradient = AdaptivePhantom(target=0.1)
        z = fixed_point(
            lambda z, b=block, o=offset: b(z) + o, block.solution().detach(), gradient=gradient, solver=AT_SOLUTION
        )
        (v,) = grad((z.value * g).sum(), offset)
        exact = block.adjoint(g)
        error = (v - exact).norm(dim=1) / exact.norm(dim=1)
        assert z.adjoint.residual is not None
        ratios += (error / z.adjoint.residual).tolist()
    assert torch.tensor(ratios).quantile(0.7) < 1.1
    assert torch.tensor(ratios).quantile(0.95) < 3


def test_adaptive_stops_at_its_limit_and_at_one_step_is_one_step() -> None:
    block = LinearBlock.random(3, size=10, radius=0.9)
    g = torch.randn(block.start.shape, dtype=DTYPE)
    for steps in (1, 4):
        with (
            pytest.warns(NotConvergedWarning, match="after 4 products .* target of 1e-09")
            if steps > 1
            else nullcontext()
        ):
            found = _adjoint(block, AdaptivePhantom(target=1e-9, max_steps=steps), g)
        torch.testing.assert_close(found, _adjoint(block, KrylovPhantom(steps=steps), g), rtol=1e-12, atol=1e-12)
    assert torch.equal(_adjoint(block, AdaptivePhantom(), torch.zeros_like(g)), torch.zeros_like(g))


def test_adaptive_needs_fewer_products_over_a_training_run_than_the_fixed_number_that_suffices() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8, bias=False))
            self.gain = nn.Parameter(torch.tensor(-4.0))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:  # a contraction however training goes
            return torch.sigmoid(self.gain) * self.recurrent(z) + x

    # To amplify its input the block has to learn a long memory: its spectral radius rises as it trains.
    target = 1e-2
    cell, x = Cell().double(), torch.randn(32, 8, dtype=DTYPE)
    attachment = attach(cell, AdaptivePhantom(target=target), solver=Anderson(max_steps=100, rtol=1e-6))
    optimizer = torch.optim.Adam(cell.parameters(), lr=5e-2)
    taken: list[int] = []
    for _ in range(120):
        loss = (cell(torch.zeros_like(x), x) - 5 * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        solution: Solution | None = attachment.solution
        assert solution is not None
        assert solution.adjoint.steps is not None
        assert solution.adjoint.residual is not None
        assert (solution.adjoint.residual <= target).all()
        taken.append(solution.adjoint.steps)
    # The fixed number of products that reaches the target at every step is the largest of them.
    assert sum(taken) / len(taken) < 0.8 * max(taken), taken


def test_adaptive_leaves_an_overflow_to_the_caller_and_stops_at_once() -> None:
    block = LinearBlock.random(33)
    g = torch.ones(block.start.shape, dtype=DTYPE)
    g[1] = torch.inf
    result = fixed_point(block, block.start, gradient=AdaptivePhantom(target=1e-3), solver=EXACT, on_failure="raise")
    assert not torch.isfinite(grad((result.value * g).sum(), block.c)[0]).any()
    assert result.adjoint.steps <= 6  # what the other samples need
    assert result.adjoint.residual[[0, 2, 3]].max() <= 1e-3


def _rough(z: Tensor, w: Tensor) -> Tensor:
    return w * z.abs().sqrt()  # zero is a fixed point, where the derivative is not finite


def test_products_that_overflow_give_no_gradient_but_no_failed_decomposition() -> None:
    w, z = torch.ones((), dtype=DTYPE, requires_grad=True), torch.zeros(2, 3, dtype=DTYPE)
    krylov = fixed_point(_rough, z, w, gradient=KrylovPhantom())
    assert grad(krylov.value.sum(), w)[0].isnan()
    adaptive = fixed_point(_rough, z, w, gradient=AdaptivePhantom())
    with pytest.warns(NotConvergedWarning, match="AdaptivePhantom stopped after 4 products .* of up to nan"):
        assert grad(adaptive.value.sum(), w)[0].isnan()


def test_products_by_the_engine_are_those_of_autograd() -> None:
    a, b, unused = (torch.randn(3, dtype=DTYPE, requires_grad=True) for _ in range(3))
    outputs = (get_gradient_edge(a * b), get_gradient_edge(a.exp()))
    inputs = tuple(get_gradient_edge(leaf) for leaf in (a, b, unused))
    cotangents = tuple(torch.randn(3, dtype=DTYPE, requires_grad=True) for _ in outputs)
    for create_graph in (False, True):
        with torch.set_grad_enabled(create_graph):
            ours, theirs = by_engine(outputs, inputs, cotangents), by_autograd(outputs, inputs, cotangents)
        assert ours[2] is theirs[2] is None
        for one, other in zip(ours[:2], theirs[:2], strict=True):
            assert torch.equal(one, other)
            assert one.requires_grad == other.requires_grad == create_graph
