"""The alignment of a gradient with the exact one against dense adjoints in float64."""

from __future__ import annotations

import math

import pytest
import torch
from known_jacobians import AT_START, EXACT, Tanh, normal, solved
from problems import DTYPE, LinearBlock
from torch import Tensor, nn

from phantomgrad import (
    AdaptivePhantom,
    Backprop,
    Broyden,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    NotConvergedWarning,
    OneStep,
    Shine,
    UnrolledPhantom,
    attach,
)
from phantomgrad.diagnostics import gradient_alignment


def test_alignment_counts_imaginary_parts_of_complex_parameters() -> None:
    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5 + 0.4j, -0.3 + 0.6j], dtype=torch.complex128))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.view_as_real(torch.view_as_complex(z) * self.weight) + x

    cell, start, x = Filter(), torch.zeros(1, 2, 2, dtype=DTYPE), torch.randn(1, 2, 2, dtype=DTYPE)
    g = torch.randn(1, 2, 2, dtype=DTYPE)
    found = gradient_alignment(cell, start, x, gradient=OneStep(), cotangent=g, solver=EXACT)
    (parameter,) = cell.parameters()
    grads = []
    for gradient in (OneStep(), Implicit(rtol=1e-14)):
        with attach(cell, gradient, solver=EXACT):
            grads.append(torch.view_as_real(torch.autograd.grad(cell(start, x), parameter, g)[0]).flatten())
    expected = torch.nn.functional.cosine_similarity(*grads, dim=0).item()
    assert float(found.by_name["weight"].cosine) == pytest.approx(expected, rel=1e-9)
    assert expected < 0.999


def _dense_alignment(block: LinearBlock, adjoint: Tensor, exact: Tensor) -> tuple[float, float, list[float]]:
    """Overall cosine and norm ratio, and the cosine per parameter, of the gradients that two adjoints give."""
    z = block.solution().detach()
    a, b = (torch.autograd.grad((block(z) * v).sum(), block.parameters) for v in (adjoint, exact))
    flat_a, flat_b = (torch.cat([part.flatten() for part in parts]) for parts in (a, b))
    cosines = [
        torch.nn.functional.cosine_similarity(p.flatten(), q.flatten(), dim=0).item() for p, q in zip(a, b, strict=True)
    ]
    overall = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=0).item()
    return overall, (flat_a.norm() / flat_b.norm()).item(), cosines


@pytest.mark.parametrize("radius", [0.5, 0.9, 1.6])
@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (4, 0.6)])
def test_alignment_of_a_linear_block_is_the_dense_one(radius: float, steps: int, damping: float) -> None:
    block = LinearBlock.random(3, radius=radius)
    g = normal(4, 5, seed=9)
    parameters = dict(zip(("J", "U", "c", "x"), block.parameters, strict=True))
    found = gradient_alignment(
        block,
        block.solution().detach(),
        gradient=NeumannPhantom(steps=steps, damping=damping, safeguard=False),
        cotangent=g,
        parameters=parameters,
        solver=AT_START,
    )
    exact = block.adjoint(g)
    phantom = exact @ (torch.eye(5, dtype=DTYPE) - torch.linalg.matrix_power(block.damped_jacobian(damping), steps))
    cosine, ratio, cosines = _dense_alignment(block, phantom, exact)
    assert found.cosine == pytest.approx(cosine, rel=1e-9)
    assert float(found) == found.cosine
    assert found.norm_ratio == pytest.approx(ratio, rel=1e-9)
    assert list(found.by_name) == list(parameters)
    assert [each.cosine for each in found.by_name.values()] == pytest.approx(cosines, rel=1e-9)
    assert found.exact_residual < 1e-10


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_alignment_of_the_scalar_map_is_its_closed_form(steps: int) -> None:
    a = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    found = gradient_alignment(
        lambda x, b: a * x + b,
        torch.tensor(0.0, dtype=DTYPE),
        torch.tensor(1.0, dtype=DTYPE, requires_grad=True),
        gradient=UnrolledPhantom(steps=steps, damping=0.5),
        loss=lambda x: x**2,
        parameters={"a": a},
        solver=EXACT,
    )
    assert found.cosine == pytest.approx(1.0)
    assert list(found.by_name) == ["a", "input b"]
    for alignment in found.by_name.values():
        assert alignment.norm_ratio == pytest.approx(1 - 0.75**steps, rel=1e-10)


@pytest.mark.parametrize(
    "gradient",
    [Implicit(rtol=1e-12), KrylovPhantom(steps=6), AdaptivePhantom(target=1e-9), Backprop(steps=400), Shine(refine=40)],
    ids=lambda gradient: type(gradient).__name__,
)
def test_gradients_that_are_exact_are_seen_to_be(gradient: Gradient) -> None:
    cell, x = Tanh(), normal(4, 3).requires_grad_()
    solver = Broyden(max_steps=200, rtol=1e-13) if isinstance(gradient, Shine) else EXACT
    found = gradient_alignment(cell, torch.zeros(4, 5, dtype=DTYPE), x, gradient=gradient, solver=solver)
    assert found.cosine == pytest.approx(1.0, abs=1e-7)
    assert found.norm_ratio == pytest.approx(1.0, abs=1e-5)
    assert "input x" in found.by_name


def test_alignment_of_a_nonlinear_cell_with_a_loss() -> None:
    cell, x, readout = Tanh(gain=0.9), normal(4, 3), normal(5, seed=4)
    attach(cell, UnrolledPhantom(steps=2), solver=EXACT)
    start = torch.zeros(4, 5, dtype=DTYPE)

    def loss(z: Tensor) -> Tensor:
        return (z @ readout).square().mean()

    found = gradient_alignment(cell, start, x, loss=loss)
    names = [name for name, _ in cell.named_parameters()]
    z = solved(lambda z: torch.tanh(cell.recurrent(z) + cell.inputs(x)), start).requires_grad_()
    (g,) = torch.autograd.grad(loss(z), z)
    J = torch.autograd.functional.jacobian(lambda z: torch.tanh(cell.recurrent(z) + cell.inputs(x)), z).reshape(20, 20)
    v = torch.linalg.solve(torch.eye(20, dtype=DTYPE) - J.T, g.flatten()).reshape(4, 5)
    image = torch.tanh(cell.recurrent(z.detach()) + cell.inputs(x))
    exact = torch.autograd.grad((image * v).sum(), list(cell.parameters()))
    h = z.detach()
    for _ in range(2):
        h = 0.5 * h + 0.5 * torch.tanh(cell.recurrent(h) + cell.inputs(x))
    phantom = torch.autograd.grad((h * g).sum(), list(cell.parameters()))
    for name, a, b in zip(names, phantom, exact, strict=True):
        assert found.by_name[name].cosine == pytest.approx(
            (a * b).sum().item() / (a.norm() * b.norm()).item(), rel=1e-8
        )
        assert found.by_name[name].norm_ratio == pytest.approx((a.norm() / b.norm()).item(), rel=1e-8)
    assert str(found).startswith(
        f"UnrolledPhantom(steps=2, damping=0.5) against the exact gradient: cosine {found.cosine:.4f}"
    )
    assert len(str(found).splitlines()) == 1 + len(names)


def test_frozen_parameters_are_left_out_and_unused_ones_do_not_count() -> None:
    cell, x = Tanh(), normal(4, 3)
    cell.inputs.requires_grad_(False)
    cell.unused = nn.Parameter(torch.ones(2, dtype=DTYPE))
    found = gradient_alignment(cell, torch.zeros(4, 5, dtype=DTYPE), x, solver=EXACT)
    assert set(found.by_name) == {"recurrent.weight", "recurrent.bias"}
    zero = gradient_alignment(
        cell, torch.zeros(4, 5, dtype=DTYPE), x, solver=EXACT, cotangent=torch.zeros(4, 5, dtype=DTYPE)
    )
    assert math.isnan(zero.cosine)
    assert math.isnan(zero.norm_ratio)


def test_without_anything_that_requires_grad_the_inputs_count() -> None:
    found = gradient_alignment(lambda z, x: 0.5 * z + x, torch.zeros(2, 3, dtype=DTYPE), torch.ones(2, 3, dtype=DTYPE))
    assert list(found.by_name) == ["input x"]


def test_a_singular_adjoint_is_not_passed_off_as_exact() -> None:
    weight = torch.ones(1, dtype=DTYPE, requires_grad=True)
    with pytest.warns(
        NotConvergedWarning, match=r"^The exact adjoint was solved only to a relative residual of 1\.0e\+00"
    ):
        found = gradient_alignment(lambda z: weight * z, torch.zeros(2, 3, dtype=DTYPE), parameters={"w": weight})
    assert found.exact_residual > 0.5
