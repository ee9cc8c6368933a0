"""The phantom error against dense powers of the damped Jacobian in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_jacobians import AT_START, EXACT, Tanh, dense_jacobians, linear_map, non_normal, normal, rotation, solved
from problems import DTYPE, LinearBlock
from torch import Tensor

from phantomgrad import KrylovPhantom, NeumannPhantom, OneStep, PhantomGradError, attach
from phantomgrad.diagnostics import phantom_error, spectral_radius

MATRICES = {
    "random": 0.3 * normal(6, 6, seed=2),
    "rotation": torch.block_diag(0.9 * rotation(2.0), 0.5 * rotation(0.3)),
    "non-normal": non_normal(),
    "expanding": 1.2 * torch.eye(4, dtype=DTYPE),
}


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (5, 0.5), (9, 0.8)])
def test_phantom_error_is_the_norm_of_the_dense_power(name: str, steps: int, damping: float) -> None:
    J = MATRICES[name]
    B = damping * J + (1 - damping) * torch.eye(J.shape[0], dtype=DTYPE)
    power = torch.linalg.matrix_power(B, steps)
    start = torch.zeros(3, J.shape[0], dtype=DTYPE)
    found = phantom_error(linear_map(J), start, steps=steps, damping=damping, rtol=1e-8, solver=AT_START)
    torch.testing.assert_close(found.value, torch.linalg.matrix_norm(power, 2).expand(3), rtol=1e-6, atol=0)
    assert found.converged.all()
    assert found.products % (2 * steps) == 0
    upper = phantom_error(
        linear_map(J), start, steps=steps, damping=damping, norm="frobenius", probes=200, solver=AT_START
    )
    torch.testing.assert_close(upper.value, torch.linalg.matrix_norm(power).expand(3), rtol=0.2, atol=0)
    assert upper.products == 200 * steps


def test_phantom_error_of_a_nonlinear_cell_is_per_sample() -> None:
    cell, x, start = Tanh(gain=0.9), normal(4, 3), torch.zeros(4, 5, dtype=DTYPE)
    J = dense_jacobians(cell, solved(cell, start, x), x)
    power = torch.linalg.matrix_power(0.5 * J + 0.5 * torch.eye(5, dtype=DTYPE), 5)
    found = phantom_error(cell, start, x, solver=EXACT)
    torch.testing.assert_close(found.value, torch.linalg.matrix_norm(power, 2), rtol=1e-6, atol=0)
    assert len(set(found.value.tolist())) == 4


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 6), damping=st.floats(0.2, 1.0))
def test_phantom_error_bounds_the_relative_error_of_the_adjoint(seed: int, steps: int, damping: float) -> None:
    block = LinearBlock.random(seed, batch=1)
    bound = float(phantom_error(block, block.solution().detach(), steps=steps, damping=damping, solver=AT_START))
    g = normal(1, 5, seed=seed)
    exact = block.adjoint(g)
    phantom = exact @ (torch.eye(5, dtype=DTYPE) - torch.linalg.matrix_power(block.damped_jacobian(damping), steps))
    assert (phantom - exact).norm() <= bound * exact.norm() * (1 + 1e-6)


def test_phantom_error_takes_the_attached_gradients_options() -> None:
    cell, x, start = Tanh(), normal(2, 3), torch.zeros(2, 5, dtype=DTYPE)
    attachment = attach(cell, NeumannPhantom(steps=3, damping=0.7), solver=EXACT)
    found = phantom_error(cell, start, x)
    assert (found.steps, found.damping) == (3, 0.7)
    assert phantom_error(cell, start, x, steps=4).steps == 4
    attachment.gradient = OneStep()
    assert (phantom_error(cell, start, x).steps, phantom_error(cell, start, x).damping) == (1, 1.0)
    attachment.gradient = KrylovPhantom()
    with pytest.raises(
        ValueError,
        match=r"^The module is attached with KrylovPhantom\(steps=5\), which has no B\^k to measure\. Pass steps= and damping=",
    ):
        phantom_error(cell, start, x)
    assert phantom_error(cell, start, x, steps=2, damping=0.5).steps == 2


def test_phantom_error_says_what_it_cannot_tell() -> None:
    start = torch.zeros(1, 60, dtype=DTYPE)
    unfinished = phantom_error(linear_map(normal(60, 60)), start, max_products=20, solver=AT_START)
    assert not unfinished.converged.any()
    assert str(unfinished).endswith("at 1 or above it bounds nothing useful; not settled after 20 products")
    small = phantom_error(lambda z: 0.5 * z, start, steps=2, damping=1.0)
    assert str(small) == (
        "2-norm of B^2, B = 1 J + 0 I: 0.25, the largest of 1 samples; bounds the relative error of the adjoint"
    )
    one_entry = torch.zeros(1, 50, dtype=DTYPE)
    J = torch.zeros(50, 50, dtype=DTYPE)
    J[:, 0] = 1.0  # J^T e is far larger where the signs agree
    assert not phantom_error(
        linear_map(J), one_entry, steps=1, damping=1.0, norm="frobenius", probes=4, solver=AT_START
    ).converged.all()


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 0.5 * z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 0.5 * g


def test_a_backward_that_cannot_be_differentiated_leaves_what_needs_one_sided_products() -> None:
    start = torch.zeros(2, 3, dtype=DTYPE)
    assert float(spectral_radius(_FirstOnly.apply, start)) == pytest.approx(0.5)
    assert float(phantom_error(_FirstOnly.apply, start, norm="frobenius", steps=1, damping=1.0)) == pytest.approx(
        math.sqrt(3) / 2
    )
    with pytest.raises(
        PhantomGradError,
        match=r"^Products with the Jacobian from the right need a map whose backward can be differentiated again; this one's cannot: its second derivatives are not those of its first\.$",
    ):
        phantom_error(_FirstOnly.apply, start)
