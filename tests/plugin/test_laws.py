"""Laws that hold for every cell, shape, dtype, structure, solver and gradient, checked on random ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import grad

from phantomgrad import (
    AdaptivePhantom,
    Anderson,
    Backprop,
    Broyden,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    Solver,
    UnrolledPhantom,
    attach,
    fixed_point,
)

SOLVERS: tuple[Solver, ...] = (
    FixedPointIteration(max_steps=400),
    FixedPointIteration(max_steps=400, damping=0.7),
    Anderson(max_steps=400),
    Broyden(max_steps=400),
)
GRADIENTS: tuple[Gradient, ...] = (
    UnrolledPhantom(steps=3),
    UnrolledPhantom(steps=2, recompute=True),
    NeumannPhantom(steps=3),
    KrylovPhantom(steps=3),
    AdaptivePhantom(),
    OneStep(),
    Implicit(),
)
NONLINEAR: dict[str, Callable[[Tensor], Tensor]] = {"linear": lambda z: z, "tanh": torch.tanh, "sin": torch.sin}
STRUCTURES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda z: z,
    "tuple": lambda z: (z[..., :1], z[..., 1:]),
    "list": lambda z: [z[..., :1], z[..., 1:]],
    "dict": lambda z: {"a": z[..., :1], "b": (z[..., 1:],)},
}


class Cell(nn.Module):
    """A contraction with factor below `norm` on a state of shape `(batch, *middle, size)`, packed in some structure."""

    def __init__(self, size: int, norm: float, activation: str, structure: str, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.randn(size, size, dtype=torch.float64)
        weight *= norm / torch.linalg.matrix_norm(weight, 2).clamp_min(1e-9)
        self.weight = nn.Parameter(weight.to(dtype))
        self.bias = nn.Parameter(torch.randn(size, dtype=dtype))
        self.activation, self.structure = activation, structure

    def forward(self, state: Any, x: Tensor) -> Any:
        z = unpack(state)
        return STRUCTURES[self.structure](NONLINEAR[self.activation](z @ self.weight.T + self.bias) + x)


def unpack(state: Any) -> Tensor:
    if isinstance(state, Tensor):
        return state
    parts = state.values() if isinstance(state, dict) else state
    return torch.cat([unpack(part) for part in parts], dim=-1)


@dataclass(frozen=True)
class Case:
    cell: Cell
    x: Tensor

    @property
    def start(self) -> Any:
        return STRUCTURES[self.cell.structure](torch.zeros_like(self.x))


@st.composite
def cases(draw: Any, dtypes: Any = (torch.float64,)) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    size, batch = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    middle = draw(st.lists(st.integers(1, 3), max_size=2))
    cell = Cell(
        size,
        draw(st.floats(0.05, 0.85)),
        draw(st.sampled_from(sorted(NONLINEAR))),
        draw(st.sampled_from(sorted(STRUCTURES))),
        dtype,
    )
    return Case(cell, torch.randn(batch, *middle, size, dtype=dtype))


@settings(max_examples=120, deadline=None)
@given(case=cases(dtypes=(torch.float64, torch.float32)), solver=st.sampled_from(SOLVERS))
def test_a_converged_solution_is_a_fixed_point_within_its_tolerance(case: Case, solver: Solver) -> None:
    with torch.no_grad():
        solution = fixed_point(case.cell, case.start, case.x, solver=solver)
        assert solution.converged.all()
        z = unpack(solution.value)
        image = unpack(case.cell(solution.value, case.x))
    rtol, atol = solver.tolerances(case.x.dtype)
    # The returned image lies closer than the point it is the image of: the cell contracts.
    gap, scale = (image - z).flatten(1).norm(dim=1), image.flatten(1).norm(dim=1)
    assert (gap <= 1.5 * (atol + rtol * scale)).all()
    assert (solution.steps >= 1).all()
    assert (solution.steps <= solver.max_steps).all()


@settings(max_examples=80, deadline=None)
@given(case=cases(), solver=st.sampled_from(SOLVERS), gradient=st.sampled_from(GRADIENTS))
def test_every_sample_is_solved_and_differentiated_as_if_it_were_alone(
    case: Case, solver: Solver, gradient: Gradient
) -> None:
    x = case.x.clone().requires_grad_()
    whole = fixed_point(case.cell, case.start, x, solver=solver, gradient=gradient)
    (together,) = grad(unpack(whole.value).square().sum(), x)
    for i in range(len(x)):
        row = case.x[i : i + 1].clone().requires_grad_()
        alone = Case(case.cell, row.detach())
        solution = fixed_point(case.cell, alone.start, row, solver=solver, gradient=gradient)
        assert solution.steps.item() == whole.steps[i].item()
        torch.testing.assert_close(unpack(solution.value)[0], unpack(whole.value)[i], rtol=1e-7, atol=1e-7)
        if not isinstance(gradient, AdaptivePhantom):  # whose samples share their number of products
            (own,) = grad(unpack(solution.value).square().sum(), row)
            torch.testing.assert_close(own[0], together[i], rtol=1e-5, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(case=cases(), gradient=st.sampled_from(GRADIENTS))
def test_an_attached_module_and_the_function_agree_and_removing_undoes_attaching(
    case: Case, gradient: Gradient
) -> None:
    before = unpack(case.cell(case.start, case.x))
    expected = unpack(fixed_point(case.cell, case.start, case.x, gradient=gradient, solver=SOLVERS[0]).value)
    truth = grad(expected.square().sum(), tuple(case.cell.parameters()))
    handle = attach(case.cell, gradient, solver=SOLVERS[0])
    z = unpack(case.cell(case.start, case.x))
    assert torch.equal(z, expected)
    for ours, other in zip(grad(z.square().sum(), tuple(case.cell.parameters())), truth, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)
    handle.remove()
    assert "forward" not in case.cell.__dict__
    assert torch.equal(unpack(case.cell(case.start, case.x)), before)


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_the_exact_gradient_is_that_of_many_backpropagated_steps(case: Case) -> None:
    x = case.x.clone().requires_grad_()
    variables = (x, *case.cell.parameters())
    results = []
    for gradient in (Implicit(rtol=1e-12), Backprop(steps=150)):
        solver = FixedPointIteration(max_steps=500, rtol=1e-13, atol=1e-13)
        z = unpack(fixed_point(case.cell, case.start, x, gradient=gradient, solver=solver, on_failure="ignore").value)
        results.append(grad((z * torch.cos(z.detach())).sum(), variables))
    for exact, truth in zip(*results, strict=True):
        torch.testing.assert_close(exact, truth, rtol=1e-7, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(case=cases(), kind=st.sampled_from((UnrolledPhantom, NeumannPhantom, KrylovPhantom)))
def test_more_products_never_end_far_from_the_exact_gradient(case: Case, kind: type[Any]) -> None:
    x = case.x.clone().requires_grad_()
    solver = FixedPointIteration(max_steps=500, rtol=1e-13, atol=1e-13)

    def gradient_of(gradient: Gradient) -> Tensor:
        solution = fixed_point(case.cell, case.start, x, gradient=gradient, solver=solver, on_failure="ignore")
        return grad(unpack(solution.value).sum(), x)[0]

    exact = gradient_of(Implicit(rtol=1e-12))
    errors = [(gradient_of(kind(steps=steps)) - exact).norm().item() for steps in (1, 60)]
    assert errors[1] <= 1e-2 * exact.norm().item() + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    case=cases(dtypes=(torch.float32, torch.bfloat16, torch.float16)),
    solver=st.sampled_from(SOLVERS),
    gradient=st.sampled_from(GRADIENTS),
)
def test_dtypes_are_kept_and_nothing_is_ever_nan(case: Case, solver: Solver, gradient: Gradient) -> None:
    x = case.x.clone().requires_grad_()
    solution = fixed_point(case.cell, case.start, x, solver=solver, gradient=gradient, on_failure="ignore")
    z = unpack(solution.value)
    assert z.dtype is x.dtype
    assert torch.isfinite(z).all()
    for found in grad(z.float().square().mean(), (x, *case.cell.parameters())):
        assert torch.isfinite(found).all()
        assert found.dtype is x.dtype
