"""Gradients against closed forms, dense Jacobians and finite differences, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, PROBLEMS, LinearBlock
from torch import Tensor, nn

from phantomgrad import (
    Anderson,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    UnrolledPhantom,
    attach,
    fixed_point,
)

EXACT = FixedPointIteration(max_steps=2000, rtol=1e-15, atol=1e-15)
AT_SOLUTION = FixedPointIteration(max_steps=0)
PHANTOMS = (UnrolledPhantom, NeumannPhantom)


def _phantom(kind: type[Any], steps: int, damping: float) -> Gradient:
    options = {"safeguard": False} if kind is NeumannPhantom else {}
    return kind(steps=steps, damping=damping, **options)


@pytest.mark.parametrize("kind", PHANTOMS)
@pytest.mark.parametrize(("steps", "damping"), list(itertools.product((1, 2, 5, 10), (0.5, 1.0))))
def test_scalar_closed_form(kind: type[Any], steps: int, damping: float) -> None:
    a, b = (torch.tensor(value, dtype=DTYPE, requires_grad=True) for value in (0.5, 1.0))
    x = fixed_point(
        lambda x: a * x + b, torch.tensor(0.0, dtype=DTYPE), gradient=_phantom(kind, steps, damping), solver=EXACT
    )
    grads = torch.autograd.grad(x.value**2, (a, b))
    factor = 1 - (1 - damping * (1 - 0.5)) ** steps
    assert [g.item() for g in grads] == pytest.approx([16 * factor, 8 * factor], rel=1e-12)


def test_scalar_known_answers() -> None:
    expected = {
        UnrolledPhantom(steps=10): (15.0990, 7.5495),
        NeumannPhantom(steps=10): (15.0990, 7.5495),
        OneStep(): (8.0, 4.0),
        Implicit(): (16.0, 8.0),
    }
    for gradient, answer in expected.items():
        a, b = (torch.tensor(value, dtype=DTYPE, requires_grad=True) for value in (0.5, 1.0))
        x = fixed_point(lambda x, a=a, b=b: a * x + b, torch.tensor(0.0, dtype=DTYPE), gradient=gradient, solver=EXACT)
        assert [g.item() for g in torch.autograd.grad(x.value**2, (a, b))] == pytest.approx(answer, abs=5e-5)


def test_cosine_known_answers() -> None:
    t = torch.tensor([0.0, torch.pi / 2], dtype=DTYPE, requires_grad=True)
    solver = FixedPointIteration(damping=0.5, max_steps=500, rtol=1e-14)
    x = fixed_point(lambda x, t: torch.cos(x) + t, torch.zeros(2, dtype=DTYPE), t, gradient=Implicit(), solver=solver)
    (grad,) = torch.autograd.grad(x.value.sum(), t)
    torch.testing.assert_close(grad, 1 / (1 + torch.sin(x.value.detach())), rtol=1e-9, atol=1e-9)
    assert grad.tolist() == pytest.approx([0.5975, 0.5], abs=5e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 9),
    damping=st.floats(0.1, 1.2),
    size=st.integers(1, 7),
    kind=st.sampled_from(PHANTOMS),
)
def test_phantom_gradient_of_a_linear_block_is_exact_times_identity_minus_B_to_the_k(
    seed: int, steps: int, damping: float, size: int, kind: type[Any]
) -> None:
    block = LinearBlock.random(seed, size=size)
    g = torch.randn(block.start.shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))
    z = fixed_point(block, block.solution().detach(), gradient=_phantom(kind, steps, damping), solver=AT_SOLUTION)
    grads = torch.autograd.grad((z.value * g).sum(), block.parameters)
    # D (I - J) = I - B^k, applied to the cotangent: the adjoint that the one recorded evaluation must have seen.
    power = torch.linalg.matrix_power(block.damped_jacobian(damping), steps)
    adjoint = block.adjoint(g) @ (torch.eye(size, dtype=DTYPE) - power)
    expected = torch.autograd.grad((block(block.solution().detach()) * adjoint).sum(), block.parameters)
    for name, grad, truth in zip(("J", "U", "c", "x"), grads, expected, strict=True):
        error = (grad - truth).abs().max().item()
        assert error <= 1e-10 * max(1.0, truth.abs().max().item()), name


@pytest.mark.parametrize("kind", PHANTOMS)
def test_operator_identity_with_dense_matrices(kind: type[Any]) -> None:
    block = LinearBlock.random(7, size=6, batch=1)
    identity = torch.eye(6, dtype=DTYPE)
    offset = block.c
    for steps, damping in itertools.product((1, 3, 8), (0.4, 1.0)):
        # dL/dc for every unit cotangent: with f = zJ^T + c that is the operator D itself.
        rows = []
        for unit in identity:
            z = fixed_point(
                block, block.solution().detach(), gradient=_phantom(kind, steps, damping), solver=AT_SOLUTION
            )
            rows.append(torch.autograd.grad((z.value * unit).sum(), offset)[0])
        D = torch.stack(rows)
        power = torch.linalg.matrix_power(block.damped_jacobian(damping), steps)
        torch.testing.assert_close(D @ (identity - block.J.detach()), identity - power, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [None, Anderson(max_steps=200, rtol=1e-13)], ids=repr)
def test_implicit_is_the_dense_answer(solver: Any) -> None:
    block = LinearBlock.random(11)
    z = fixed_point(block, block.start, gradient=Implicit(solver=solver), solver=EXACT)
    g = torch.randn(block.start.shape, dtype=DTYPE)
    grads = torch.autograd.grad((z.value * g).sum(), block.parameters)
    expected = torch.autograd.grad((block.solution() * g).sum(), block.parameters)
    for grad, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-10)


def test_implicit_is_as_exact_as_its_tolerance() -> None:
    block = LinearBlock.random(12, radius=0.9)
    exact = torch.autograd.grad(block.solution().sum(), block.c)[0]
    errors = []
    for rtol in (1e-1, 1e-3, 1e-6):
        z = fixed_point(block, block.start, gradient=Implicit(rtol=rtol), solver=EXACT)
        (grad,) = torch.autograd.grad(z.value.sum(), block.c)
        errors.append(((grad - exact).norm() / exact.norm()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("structure", ["tensor", "tuple", "list", "dict"])
def test_implicit_passes_gradcheck_on_nonlinear_cells(structure: str) -> None:
    weight = 0.3 * torch.randn(3, 3, dtype=DTYPE)

    def pack(z: Tensor) -> Any:
        half = torch.tanh(z[:, :1]), z[:, 1:]
        return {"tensor": z, "tuple": half, "list": list(half), "dict": dict(zip("ab", half, strict=True))}[structure]

    def unpack(state: Any) -> Tensor:
        if isinstance(state, Tensor):
            return state
        return torch.cat(tuple(state.values()) if isinstance(state, dict) else tuple(state), dim=1)

    def solve(x: Tensor, w: Tensor) -> Tensor:
        solution = fixed_point(
            lambda s: pack(torch.tanh(unpack(s) @ w.T + x)),
            pack(torch.zeros(2, 3, dtype=DTYPE)),
            gradient=Implicit(),
            solver=FixedPointIteration(max_steps=500, rtol=1e-14),
        )
        return unpack(solution.value)

    x = torch.randn(2, 3, dtype=DTYPE, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (x, weight.requires_grad_()))


@pytest.mark.parametrize("recompute", [False, True])
def test_unrolled_is_the_autograd_of_its_own_steps(recompute: bool) -> None:
    w = (0.4 * torch.randn(3, 3, dtype=DTYPE)).requires_grad_()
    x = torch.randn(2, 3, dtype=DTYPE, requires_grad=True)
    start = torch.randn(2, 3, dtype=DTYPE)

    def cell(z: Tensor) -> Tensor:
        return torch.tanh(z @ w.T + x)

    z = fixed_point(
        cell, start, gradient=UnrolledPhantom(steps=4, damping=0.3, recompute=recompute), solver=AT_SOLUTION
    ).value
    h = start
    for _ in range(4):
        h = 0.7 * h + 0.3 * cell(h)
    torch.testing.assert_close(z, h, rtol=1e-14, atol=1e-14)
    for grad, truth in zip(torch.autograd.grad(z.sum(), (w, x)), torch.autograd.grad(h.sum(), (w, x)), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-13, atol=1e-13)


def test_neumann_is_the_algorithm_of_the_paper_on_a_nonlinear_cell() -> None:
    w = (0.4 * torch.randn(3, 3, dtype=DTYPE)).requires_grad_()
    x = torch.randn(2, 3, dtype=DTYPE, requires_grad=True)
    point, g = torch.randn(2, 3, dtype=DTYPE), torch.randn(2, 3, dtype=DTYPE)

    def cell(z: Tensor) -> Tensor:
        return torch.tanh(z @ w.T + x)

    value = fixed_point(
        cell, point, gradient=NeumannPhantom(steps=5, damping=0.3, safeguard=False), solver=AT_SOLUTION
    ).value
    grads = torch.autograd.grad((value * g).sum(), (w, x))

    h = point.clone().requires_grad_()
    f = 0.7 * h + 0.3 * cell(h)
    v = g
    for _ in range(4):
        v = g + torch.autograd.grad(f, h, v, retain_graph=True)[0]
    for grad, truth in zip(grads, torch.autograd.grad(f, (w, x), v), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", PHANTOMS)
def test_more_steps_approach_the_exact_gradient(kind: type[Any]) -> None:
    block = LinearBlock.random(21, radius=0.8)
    exact = torch.autograd.grad(block.solution().sum(), block.c)[0]
    errors = []
    for steps in (1, 4, 16, 64):
        z = fixed_point(block, block.start, gradient=_phantom(kind, steps, 0.9), solver=EXACT)
        errors.append((torch.autograd.grad(z.value.sum(), block.c)[0] - exact).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


def test_one_step_is_a_phantom_gradient_of_one_undamped_step() -> None:
    grads = []
    for gradient in (OneStep(), NeumannPhantom(steps=1, damping=1.0), UnrolledPhantom(steps=1, damping=1.0)):
        block = LinearBlock.random(5)
        z = fixed_point(block, block.start, gradient=gradient, solver=EXACT)
        grads.append(torch.autograd.grad(z.value.square().sum(), block.parameters))
    for other in grads[1:]:
        for grad, truth in zip(other, grads[0], strict=True):
            torch.testing.assert_close(grad, truth, rtol=1e-11, atol=1e-11)


def test_the_safeguard_changes_nothing_where_terms_shrink_and_bounds_a_divergent_series() -> None:
    block = LinearBlock.random(3, radius=0.5)
    with torch.no_grad():
        block.J.copy_(0.5 * torch.linalg.qr(block.J)[0])  # normal: every term shrinks
    results = [
        torch.autograd.grad(
            fixed_point(
                block, block.start, gradient=NeumannPhantom(steps=6, safeguard=guard), solver=EXACT
            ).value.sum(),
            block.c,
        )[0]
        for guard in (True, False)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)

    expanding = LinearBlock.random(4)
    with torch.no_grad():
        expanding.J.copy_(torch.diag(torch.tensor([-3.0, 0.2, 0.1, 0.1, 0.1], dtype=DTYPE)))
    start = expanding.solution().detach()
    exact = torch.autograd.grad(expanding.solution().sum(), expanding.c)[0]
    errors = {}
    for name, gradient in {
        "guarded": NeumannPhantom(steps=9, damping=1.0),
        "plain": NeumannPhantom(steps=9, damping=1.0, safeguard=False),
        "one step": OneStep(),
    }.items():
        z = fixed_point(expanding, start, gradient=gradient, solver=AT_SOLUTION)
        errors[name] = (torch.autograd.grad(z.value.sum(), expanding.c)[0] - exact).norm().item()
    assert errors["guarded"] <= errors["one step"] < errors["plain"]


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 9])
def test_krylov_is_a_step_from_the_smallest_residual_of_its_space_and_exact_once_that_is_full(steps: int) -> None:
    block = LinearBlock.random(31, size=5, radius=1.3)
    g = torch.randn(block.start.shape, dtype=DTYPE)
    z = fixed_point(block, block.solution().detach(), gradient=KrylovPhantom(steps=steps), solver=AT_SOLUTION)
    (grad,) = torch.autograd.grad((z.value * g).sum(), block.c)
    J = block.J.detach()
    adjoint = []
    for row in g:  # the dense least-squares answer, sample by sample
        space = torch.stack([torch.linalg.matrix_power(J.T, i) @ row for i in range(max(1, min(steps - 1, 5)))], dim=1)
        residual_map = space - J.T @ space
        weights = torch.linalg.lstsq(residual_map, row[:, None]).solution
        adjoint.append(row + J.T @ (space @ weights)[:, 0] if steps > 1 else row)
    torch.testing.assert_close(grad, torch.stack(adjoint).sum(dim=0), rtol=1e-8, atol=1e-8)
    if steps >= 6:
        torch.testing.assert_close(grad, block.adjoint(g).sum(dim=0), rtol=1e-8, atol=1e-8)


def test_krylov_survives_zero_and_invariant_cotangents() -> None:
    block = LinearBlock.random(32)
    with torch.no_grad():
        block.J.copy_(0.5 * torch.eye(5, dtype=DTYPE))  # every Krylov space has dimension 1
    for scale in (0.0, 1.0):
        z = fixed_point(block, block.start, gradient=KrylovPhantom(steps=6), solver=EXACT)
        (grad,) = torch.autograd.grad(scale * z.value.sum(), block.c)
        torch.testing.assert_close(grad, torch.full_like(grad, 2.0 * 4 * scale), rtol=1e-10, atol=0)


@pytest.mark.parametrize("gradient", [UnrolledPhantom(steps=3), NeumannPhantom(steps=3), OneStep()], ids=repr)
def test_second_derivatives_hold_the_solution_constant(gradient: Gradient) -> None:
    point = torch.randn(2, 3, dtype=DTYPE)
    weight = (0.4 * torch.randn(3, 3, dtype=DTYPE)).requires_grad_()

    def value(w: Tensor, x: Tensor) -> Tensor:
        return fixed_point(lambda z: torch.tanh(z @ w.T + x), point, gradient=gradient, solver=AT_SOLUTION).value

    x = torch.randn(2, 3, dtype=DTYPE, requires_grad=True)
    cotangent = torch.randn(2, 3, dtype=DTYPE)  # fixed: a cotangent that depends on the solution would move it
    (grad,) = torch.autograd.grad((value(weight, x) * cotangent).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)

    step = 1e-6
    direction = torch.randn_like(x)

    def first(at: Tensor) -> Tensor:
        return torch.autograd.grad((value(weight, at) * cotangent).sum(), weight)[0].square().sum()

    x = x.detach()
    numeric = (first(x + step * direction) - first(x - step * direction)) / (2 * step)
    assert (second * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_value_is_the_same_with_and_without_grad(problem: Any) -> None:
    weight = torch.tensor(1.0, dtype=DTYPE, requires_grad=True)

    def scaled(state: Any) -> Any:
        if isinstance(state, Tensor):
            return weight * state
        return {k: scaled(v) for k, v in state.items()} if isinstance(state, dict) else type(state)(map(scaled, state))

    for gradient in (NeumannPhantom(), OneStep(), Implicit()):
        options: dict[str, Any] = {
            "gradient": gradient,
            "batch_dim": problem.batch_dim,
            "solver": FixedPointIteration(max_steps=200),
        }
        with_grad = fixed_point(lambda z: scaled(problem.fn(z)), problem.start, **options)
        with torch.no_grad():
            without = fixed_point(lambda z: scaled(problem.fn(z)), problem.start, **options)
        torch.testing.assert_close(with_grad.value, without.value, rtol=0, atol=0)
        assert str(with_grad) == str(without)


@pytest.mark.parametrize(
    "gradient", [UnrolledPhantom(), NeumannPhantom(), KrylovPhantom(), OneStep(), Implicit()], ids=repr
)
def test_the_weights_of_a_small_float32_model_move_and_its_loss_falls(gradient: Gradient) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.Linear(16, 16)
            self.inputs = nn.Linear(4, 16)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.recurrent(z) + self.inputs(x))

    cell, readout = Cell(), nn.Linear(16, 1)
    attach(cell, gradient, on_failure="ignore")
    before = {name: p.detach().clone() for name, p in cell.named_parameters()}
    optimizer = torch.optim.Adam([*cell.parameters(), *readout.parameters()], lr=1e-2)
    x = torch.randn(64, 4)
    y = x.prod(dim=1, keepdim=True)
    losses = []
    for _ in range(150):
        loss = (readout(cell(torch.zeros(64, 16), x)) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    for name, parameter in cell.named_parameters():
        assert (parameter - before[name]).abs().max() > 1e-2, name


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: UnrolledPhantom(steps=0), "steps of UnrolledPhantom must be an integer of at least 1, got 0."),
        (
            lambda: NeumannPhantom(damping=0),
            "damping of NeumannPhantom must be a finite number above 0.0 and at most 2.0, got 0.",
        ),
        (lambda: NeumannPhantom(safeguard=1), "safeguard of NeumannPhantom must be True or False, got 1."),  # type: ignore[arg-type]
        (lambda: Implicit(rtol=-1.0), "rtol of Implicit must be a finite number at least 0.0, got -1.0."),
    ],
)
def test_values_out_of_range_are_refused_at_construction(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        make()
    assert str(caught.value) == text
