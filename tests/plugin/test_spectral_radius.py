"""The spectral radius against dense Jacobians in float64, and what its report says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known_jacobians import AT_START, EXACT, Tanh, dense_jacobians, linear_map, non_normal, normal, rotation, solved
from problems import DTYPE
from torch import Tensor

from phantomgrad import Broyden
from phantomgrad.diagnostics import spectral_radius


@pytest.mark.parametrize("damping", [1.0, 0.5, 1.3])
def test_spectral_radius_of_a_nonlinear_cell_is_that_of_its_dense_jacobians(damping: float) -> None:
    cell, x = Tanh(), normal(4, 3)
    start = torch.zeros(4, 5, dtype=DTYPE)
    found = spectral_radius(cell, start, x, damping=damping, solver=EXACT)
    J = dense_jacobians(cell, solved(cell, start, x), x)
    truth = torch.linalg.eigvals(damping * J + (1 - damping) * torch.eye(5, dtype=DTYPE)).abs().amax(dim=1)
    torch.testing.assert_close(found.value, truth, rtol=1e-9, atol=0)
    assert found.converged.all()
    assert float(found) == pytest.approx(truth.max().item(), rel=1e-9)
    torch.testing.assert_close(found.eigenvalue.abs(), found.value)
    assert abs(found.worst) == pytest.approx(float(found))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 9), batch=st.integers(1, 3), damping=st.floats(0.1, 1.5))
def test_spectral_radius_of_a_random_linear_map(seed: int, size: int, batch: int, damping: float) -> None:
    J = normal(size, size, seed=seed)
    start = torch.zeros(batch, size, dtype=DTYPE)
    found = spectral_radius(linear_map(J), start, damping=damping, rtol=1e-9, solver=AT_START)
    B = damping * J + (1 - damping) * torch.eye(size, dtype=DTYPE)
    truth = torch.linalg.eigvals(B).abs().max()
    torch.testing.assert_close(found.value, truth.expand(batch), rtol=1e-6, atol=1e-9)
    assert found.products <= size


@pytest.mark.parametrize(
    ("J", "eigenvalue"),
    [
        (0.6 * rotation(1.0), 0.6 * complex(math.cos(1.0), math.sin(1.0))),
        (
            torch.block_diag(0.9 * rotation(2.0), 0.2 * torch.eye(3, dtype=DTYPE)),
            0.9 * complex(math.cos(2), math.sin(2)),
        ),
        (torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DTYPE), 1j),
        (torch.diag(torch.tensor([-1.5, 0.5, 1.2], dtype=DTYPE)), -1.5),
        (0.5 * torch.eye(4, dtype=DTYPE), 0.5),
        (non_normal(), None),
    ],
    ids=["rotation", "pair among others", "quarter turn", "negative", "multiple of I", "non-normal"],
)
def test_spectral_radius_of_known_matrices(J: Tensor, eigenvalue: complex | None) -> None:
    found = spectral_radius(linear_map(J), torch.zeros(2, J.shape[0], dtype=DTYPE), solver=AT_START)
    truth = torch.linalg.eigvals(J).abs().max().item()
    assert float(found) == pytest.approx(truth, rel=1e-9)
    assert found.converged.all()
    if eigenvalue is not None:
        assert abs(found.worst - eigenvalue) < 1e-9


@pytest.mark.parametrize("pairs", [True, False], ids=["complex", "real"])
def test_spectral_radius_of_a_large_map_needs_restarts_and_is_as_accurate_as_it_says(pairs: bool) -> None:
    size = 120
    moduli = torch.linspace(0.95, 0.05, size // 2, dtype=DTYPE)
    blocks = [m * (rotation(0.1 + i) if pairs else torch.diag(torch.tensor([1.0, -0.5]))) for i, m in enumerate(moduli)]
    basis = torch.linalg.qr(normal(size, size))[0]
    J = basis @ torch.block_diag(*blocks).to(DTYPE) @ basis.T
    evaluations = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return z @ J.T

    found = spectral_radius(counted, torch.zeros(1, size, dtype=DTYPE), rtol=1e-6, max_products=2000, solver=AT_START)
    assert found.converged.all()
    assert 24 < found.products < 1000  # more than one basis
    assert evaluations <= 3  # one recorded evaluation serves all products
    assert abs(float(found) - 0.95) <= 1e-6 * 0.95  # the matrix is normal
    assert found.residual.max() <= 1e-6 * float(found)


def test_an_unfinished_search_says_so() -> None:
    J = torch.linalg.qr(normal(80, 80))[0]  # all eigenvalues on the unit circle: nothing stands out
    found = spectral_radius(linear_map(J), torch.zeros(1, 80, dtype=DTYPE), max_products=5, solver=AT_START)
    assert not found.converged.any()
    assert found.products == 5
    assert 0 < float(found) <= 1 + 1e-12  # a Ritz value of a normal matrix lies inside
    assert str(found).endswith("not settled after 5 products: take it as a lower bound)")
    assert found.residual.max() > 1e-3 * float(found)


def test_the_radius_of_a_constant_map_is_zero() -> None:
    found = spectral_radius(lambda z: torch.ones_like(z), torch.zeros(2, 3, dtype=DTYPE))
    assert found.value.tolist() == [0.0, 0.0]
    assert found.converged.all()


def test_a_map_that_is_not_finite_is_reported_as_nan_and_not_converged() -> None:
    found = spectral_radius(lambda z: z / 0, torch.zeros(2, 3, dtype=DTYPE), solver=AT_START)
    assert found.value.isnan().all()
    assert not found.converged.any()


def test_spectral_radius_in_float32_and_its_text() -> None:
    J = torch.block_diag(0.9 * rotation(2.0), 0.2 * torch.eye(40, dtype=DTYPE)).float()
    found = spectral_radius(lambda z: z @ J.T, torch.zeros(3, 42), solver=AT_START)
    assert float(found) == pytest.approx(0.9, rel=1e-5)
    text = str(spectral_radius(lambda z: -0.5 * z, torch.zeros(3, 2), damping=0.25))
    assert text.startswith(
        "spectral radius of 0.25 J + 0.75 I: 0.625, the largest of 3 samples (eigenvalue 0.625, residual "
    )


def test_samples_may_lie_along_another_dimension_or_be_coupled() -> None:
    J = normal(3, 3)
    found = spectral_radius(lambda z: J @ z, torch.zeros(3, 4, dtype=DTYPE), batch_dim=1, solver=AT_START)
    truth = torch.linalg.eigvals(J).abs().max()
    torch.testing.assert_close(found.value, truth.expand(4), rtol=1e-9, atol=0)

    graph = normal(6, 6, seed=1)
    joint = torch.linalg.eigvals(torch.kron(graph, J)).abs().max()  # of z -> graph z J^T
    start = torch.zeros(6, 3, dtype=DTYPE)
    found = spectral_radius(lambda z: graph @ z @ J.T, start, batch_dim=None, rtol=1e-9, solver=AT_START)
    torch.testing.assert_close(found.value, joint[None], rtol=1e-6, atol=0)
    with pytest.warns(
        UserWarning, match=r"^The map couples the samples along batch_dim=0, so all of them are measured as one"
    ):
        found = spectral_radius(lambda z: graph @ z @ J.T, start, rtol=1e-9, solver=AT_START)
    torch.testing.assert_close(found.value, joint[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_coupling_in_one_direction_is_noticed(count: int) -> None:
    causal = torch.tril(torch.full((count, count), 0.1, dtype=DTYPE))
    with pytest.warns(UserWarning, match="couples the samples"):
        spectral_radius(lambda z: causal @ z, torch.zeros(count, 2, dtype=DTYPE), solver=AT_START)


def test_the_start_and_the_solver_decide_where_the_jacobian_is_taken() -> None:
    cell = lambda z: 2 - 3 / (z + 2)  # noqa: E731  (solutions 1 and -1, with slopes 1/3 and 3)
    near, far = torch.full((1, 2), 0.9, dtype=DTYPE), torch.full((1, 2), -1.0, dtype=DTYPE)
    assert float(spectral_radius(cell, near)) == pytest.approx(1 / 3)
    assert float(spectral_radius(cell, far)) == pytest.approx(3.0)
    assert float(spectral_radius(cell, far + 0.01, solver=Broyden(rtol=1e-12))) == pytest.approx(3.0)
    assert float(spectral_radius(cell, torch.zeros(1, 2, dtype=DTYPE), solver=AT_START)) == pytest.approx(0.75)
