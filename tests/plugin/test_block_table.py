"""Which phantom gradient is how close to the exact one: a table of blocks, normal and not, settling and not."""

from __future__ import annotations

import pytest
import torch
from problems import DTYPE
from torch import Tensor
from torch.autograd import grad

from phantomgrad import (
    FixedPointIteration,
    Gradient,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    UnrolledPhantom,
    fixed_point,
)

SIZE = 8
AT_SOLUTION = FixedPointIteration(max_steps=0)


def _spectrum(*eigenvalues: float, shear: float = 0.0, seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues, in a random orthonormal basis; `shear` above the diagonal makes it non-normal."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=DTYPE, generator=generator))[0]
    upper = shear * torch.randn(SIZE, SIZE, dtype=DTYPE, generator=generator).triu(1)
    return basis @ (torch.diag(torch.tensor(eigenvalues, dtype=DTYPE)) + upper) @ basis.T


BLOCKS = {
    "normal, radius 0.5": _spectrum(0.5, -0.4, 0.3, -0.2, 0.2, 0.1, -0.1, 0.0),
    "normal, radius 0.95": _spectrum(0.95, 0.8, 0.5, -0.4, 0.3, -0.2, 0.1, 0.0),
    "non-normal, radius 0.4": _spectrum(0.4, -0.3, 0.3, -0.2, 0.2, 0.1, -0.1, 0.0, shear=0.8),
    "non-normal, radius 0.8": _spectrum(0.8, -0.5, 0.3, -0.2, 0.2, 0.1, -0.1, 0.0, shear=0.5),
    "radius 1.5, negative": _spectrum(-1.5, 0.5, 0.3, -0.2, 0.2, 0.1, -0.1, 0.0),
    "radius 3, negative": _spectrum(-3.0, 0.2, 0.1, 0.1, -0.1, 0.1, 0.0, 0.0),
    "radius 1.2, positive": _spectrum(1.2, 0.5, 0.3, -0.2, 0.2, 0.1, -0.1, 0.0),
}


def _radius(matrix: Tensor, damping: float) -> float:
    return torch.linalg.eigvals(damping * matrix + (1 - damping) * torch.eye(SIZE, dtype=DTYPE)).abs().max().item()


def _adjoints(matrix: Tensor, gradient: Gradient, cotangents: Tensor) -> Tensor:
    """What stands for `(I - J)^-T g`, one row a cotangent."""
    offset = torch.zeros_like(cotangents, requires_grad=True)
    point = torch.zeros_like(cotangents)
    z = fixed_point(
        lambda z: z @ matrix.T + offset, point, gradient=gradient, solver=AT_SOLUTION, on_failure="ignore"
    ).value
    return grad((z * cotangents).sum(), offset)[0]


def _cosine(adjoints: Tensor, exact: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(adjoints, exact, dim=1)


def _cotangents() -> Tensor:
    return torch.randn(64, SIZE, dtype=DTYPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("steps", [3, 5, 9])
@pytest.mark.parametrize("damping", [0.5, 1.0])
def test_the_guarded_series_is_the_plain_one_or_the_better_judged_partial_sum(
    name: str, steps: int, damping: float
) -> None:
    matrix, g = BLOCKS[name], _cotangents()
    identity = torch.eye(SIZE, dtype=DTYPE)
    B = damping * matrix + (1 - damping) * identity
    partial_sums, terms = [], []
    total, term = torch.zeros_like(g), damping * g
    for _ in range(steps):
        terms.append(term.norm(dim=1))  # the residual of the sum before it
        total, term = total + term, term @ B
        partial_sums.append(total)
    guarded = _adjoints(matrix, NeumannPhantom(steps=steps, damping=damping), g)
    judged = torch.stack(terms)  # the n-th judges the sum of the first n terms
    for row in range(len(g)):
        best = int(judged[:, row].flip(0).argmin())  # of equal ones the latest
        best = steps - 1 - best
        expected = partial_sums[-1] if best == steps - 1 else partial_sums[max(best, 1) - 1]
        torch.testing.assert_close(guarded[row], expected[row], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, matrix in BLOCKS.items() if _radius(matrix, 1.0) > 1])
@pytest.mark.parametrize("steps", [3, 5, 9])
def test_where_the_series_diverges_the_guarded_one_is_about_as_good_as_one_step_or_better(
    name: str, steps: int
) -> None:
    matrix, g = BLOCKS[name], _cotangents()
    exact = torch.linalg.solve((torch.eye(SIZE, dtype=DTYPE) - matrix).T, g.T).T
    errors = {
        gradient: (_adjoints(matrix, gradient, g) - exact).norm(dim=1).mean().item()
        for gradient in (
            NeumannPhantom(steps=steps, damping=1.0),
            NeumannPhantom(steps=steps, damping=1.0, safeguard=False),
            OneStep(),
        )
    }
    guarded, plain, one = errors.values()
    assert guarded <= 1.1 * one  # a positive eigenvalue above 1 turns the sign of the inverse, which no term can tell
    assert steps == 3 or guarded < plain


@pytest.mark.parametrize(
    "name", [name for name, matrix in BLOCKS.items() if "non" not in name and _radius(matrix, 1.0) < 1]
)
@pytest.mark.parametrize("steps", [3, 5, 9])
@pytest.mark.parametrize("damping", [0.5, 1.0])
def test_where_the_series_of_a_normal_block_converges_the_guard_changes_nothing(
    name: str, steps: int, damping: float
) -> None:
    matrix, g = BLOCKS[name], _cotangents()
    plain = _adjoints(matrix, NeumannPhantom(steps=steps, damping=damping, safeguard=False), g)
    assert torch.equal(_adjoints(matrix, NeumannPhantom(steps=steps, damping=damping), g), plain)
    torch.testing.assert_close(_adjoints(matrix, UnrolledPhantom(steps=steps, damping=damping), g), plain)


@pytest.mark.parametrize("steps", [2, 3, 5, 9])
@pytest.mark.parametrize("damping", [0.5, 1.0])
def test_krylov_is_closer_to_the_exact_gradient_than_the_series_of_as_many_products(steps: int, damping: float) -> None:
    table: dict[str, tuple[float, float]] = {}
    for name, matrix in BLOCKS.items():
        g = _cotangents()
        exact = torch.linalg.solve((torch.eye(SIZE, dtype=DTYPE) - matrix).T, g.T).T
        krylov = _cosine(_adjoints(matrix, KrylovPhantom(steps=steps), g), exact).mean().item()
        series = _cosine(_adjoints(matrix, NeumannPhantom(steps=steps, damping=damping), g), exact).mean().item()
        table[name] = krylov, series
        if steps == 9:
            assert krylov > 1 - 1e-9, name  # the space is the whole
        if steps > 2 and name.startswith("normal"):
            assert krylov >= series - 1e-9, name
    means = torch.tensor(list(table.values())).mean(dim=0)
    assert means[0] > means[1], table
