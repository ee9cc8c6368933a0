"""The ascent condition against the dense terms of its inequality in float64, and where it does not apply."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_jacobians import AT_START, EXACT, Tanh, normal
from problems import DTYPE, LinearBlock
from torch import Tensor

from phantomgrad import Implicit, KrylovPhantom, NeumannPhantom, OneStep, UnrolledPhantom
from phantomgrad.diagnostics import ascent_condition


def _dense_terms(block: LinearBlock, power: Tensor) -> tuple[float, float, float]:
    """`||dF/dz B^k||`, `s_max` and `s_min` for the whole batch, from dense matrices."""
    z = block.solution().detach()
    names = block.parameters
    jacobians = torch.autograd.functional.jacobian(lambda *p: LinearBlock(*p)(z), tuple(p.detach() for p in names))
    n = z.numel()
    dF = torch.cat([j.reshape(n, -1) for j in jacobians], dim=1).T  # the paper's layout: z times state
    B = torch.block_diag(*[power.T] * z.shape[0])
    singular = torch.linalg.svdvals(dF)
    return torch.linalg.matrix_norm(dF @ B, 2).item(), singular[0].item(), singular[-1].item()


@pytest.mark.parametrize(
    "gradient", [UnrolledPhantom(steps=3, damping=0.6), NeumannPhantom(steps=3, damping=0.6, safeguard=False)], ids=repr
)
@pytest.mark.parametrize("dense", [True, False])
def test_ascent_condition_has_the_dense_terms(gradient: Any, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not dense:
        monkeypatch.setattr("phantomgrad.diagnostics._ascent._DENSE_ROWS", 0)
    block = LinearBlock.random(6, size=4, batch=2)
    g = normal(2, 4, seed=3)
    parameters = dict(zip(("J", "U", "c", "x"), block.parameters, strict=True))
    found = ascent_condition(
        block, block.solution().detach(), gradient=gradient, cotangent=g, parameters=parameters, solver=AT_START
    )
    left, s_max, s_min = _dense_terms(block, torch.linalg.matrix_power(block.damped_jacobian(0.6), 3))
    rel = 1e-9 if dense else 1e-4
    assert found.dense is dense
    assert found.applicable
    assert found.left == pytest.approx(left, rel=rel)
    assert found.s_max == pytest.approx(s_max, rel=rel)
    assert found.s_min == pytest.approx(s_min, rel=rel)
    assert found.bound == pytest.approx(s_min**2 / s_max, rel=2 * rel)
    assert found.kappa == pytest.approx(s_max / s_min, rel=2 * rel)
    assert (found.state_entries, found.variable_entries) == (8, 16 + 12 + 4 + 6)
    exact = block.adjoint(g)
    phantom = exact @ (torch.eye(4, dtype=DTYPE) - torch.linalg.matrix_power(block.damped_jacobian(0.6), 3))
    z = block.solution().detach()
    a, b = (torch.autograd.grad((block(z) * v).sum(), block.parameters) for v in (phantom, exact))
    assert found.inner_product == pytest.approx(sum((p * q).sum().item() for p, q in zip(a, b, strict=True)), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 8), damping=st.floats(0.3, 1.0), radius=st.floats(0.1, 0.8))
def test_where_the_condition_holds_the_inner_product_is_not_negative(
    seed: int, steps: int, damping: float, radius: float
) -> None:
    block = LinearBlock.random(seed, size=3, batch=1, radius=radius)
    parameters = dict(zip(("J", "U", "c", "x"), block.parameters, strict=True))
    found = ascent_condition(
        block,
        block.solution().detach(),
        gradient=UnrolledPhantom(steps=steps, damping=damping),
        parameters=parameters,
        seed=seed,
        solver=AT_START,
    )
    assert found.applicable
    assert found.holds is (found.left <= found.bound)
    if found.holds:
        assert found.inner_product >= 0
        assert "holds" in str(found)


def test_enough_steps_fulfil_the_condition() -> None:
    block = LinearBlock.random(2, size=3, batch=1)
    parameters = dict(zip(("J", "U", "c", "x"), block.parameters, strict=True))
    for steps, holds in ((1, False), (100, True)):
        gradient = NeumannPhantom(steps=steps, safeguard=False)
        found = ascent_condition(
            block, block.solution().detach(), gradient=gradient, parameters=parameters, solver=AT_START
        )
        assert found.holds is holds
        assert found.inner_product > 0


def test_the_exact_gradient_fulfils_the_condition_with_nothing_left() -> None:
    cell, x = Tanh(), normal(1, 3)
    found = ascent_condition(cell, torch.zeros(1, 5, dtype=DTYPE), x, gradient=Implicit(rtol=1e-13), solver=EXACT)
    assert found.holds
    assert found.left < 1e-9 < found.bound
    assert found.cosine == pytest.approx(1.0)


def test_fewer_inputs_and_parameters_than_states_are_not_applicable() -> None:
    bias = torch.ones(2, dtype=DTYPE, requires_grad=True)
    found = ascent_condition(
        lambda z: 0.5 * z + bias.sum(), torch.zeros(1, 5, dtype=DTYPE), parameters={"bias": bias}, solver=EXACT
    )
    assert not found.applicable
    assert found.holds is None
    assert (found.s_min, found.bound, found.kappa) == (0.0, 0.0, math.inf)
    assert found.s_max == pytest.approx(math.sqrt(10))
    assert found.inner_product > 0
    assert found.cosine == pytest.approx(1.0)
    text = str(found)
    assert text.startswith(
        "Ascent condition of UnrolledPhantom(steps=5, damping=0.5): not applicable: the inputs and parameters have fewer entries (2) than the state (5), so s_min = 0"
    )
    assert "measured: <phantom, exact> = " in text


def test_a_rank_that_is_too_small_and_a_gradient_that_is_not_linear_are_not_applicable() -> None:
    weight = torch.ones(8, dtype=DTYPE, requires_grad=True)
    flat = ascent_condition(
        lambda z: 0.5 * z + weight.sum(), torch.zeros(1, 3, dtype=DTYPE), parameters={"w": weight}, solver=EXACT
    )
    assert flat.reason == "dF/dz has not the full rank of the state, so s_min = 0"
    cell, x = Tanh(), normal(1, 3)
    krylov = ascent_condition(cell, torch.zeros(1, 5, dtype=DTYPE), x, gradient=KrylovPhantom(steps=3), solver=EXACT)
    assert krylov.reason == "KrylovPhantom(steps=3) is not a linear function of its cotangent here"
    assert math.isnan(krylov.left)
    assert krylov.s_min > 0
    assert krylov.cosine > 0.5


def test_estimates_do_not_claim_what_they_cannot_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phantomgrad.diagnostics._ascent._DENSE_ENTRIES", 0)
    cell, x = Tanh(), normal(1, 3)
    start = torch.zeros(1, 5, dtype=DTYPE)
    good = ascent_condition(cell, start, x, gradient=UnrolledPhantom(steps=100), solver=EXACT)
    assert good.applicable
    assert good.holds is None  # the bound is an upper bound only
    assert "undecided: left is below the bound, but the bound is an estimate from above" in str(good)
    bad = ascent_condition(cell, start, x, gradient=OneStep(), solver=EXACT)
    assert bad.holds is False
    assert "(estimates)" in str(bad)
    other = ascent_condition(cell, start, x, gradient=Implicit(), solver=EXACT)
    assert other.reason.startswith("with 5 state entries the dense matrices that Implicit() needs are too large")
