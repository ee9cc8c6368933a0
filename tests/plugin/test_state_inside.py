"""Dropout, batch statistics and spectral norm inside the map."""

from __future__ import annotations

import pytest
import torch
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import (
    Backprop,
    FixedPointIteration,
    Gradient,
    Implicit,
    NeumannPhantom,
    OneStep,
    UnrolledPhantom,
    attach,
    fixed_point,
)

GRADIENTS: list[Gradient] = [
    UnrolledPhantom(),
    UnrolledPhantom(recompute=True),
    NeumannPhantom(),
    OneStep(),
    Implicit(),
]
SOLVER = FixedPointIteration(max_steps=300, rtol=1e-12)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).double()
        self.masks: list[Tensor] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        kept = torch.nn.functional.dropout(torch.ones_like(z), 0.5, self.training)
        self.masks.append(kept)
        return torch.tanh(0.3 * self.linear(z) * kept + x)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_dropout_draws_one_mask_per_solve_and_the_generator_advances_as_by_one_evaluation(gradient: Gradient) -> None:
    cell, x = Dropping(), torch.randn(3, 8, dtype=torch.float64)
    attachment = attach(cell, gradient, solver=SOLVER)
    torch.manual_seed(5)
    attachment.step(torch.zeros_like(x), x)
    expected = torch.get_rng_state()
    cell.masks.clear()
    torch.manual_seed(5)
    z = cell(torch.zeros_like(x), x)
    assert torch.equal(torch.get_rng_state(), expected)
    z.sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)
    assert attachment.solution is not None
    assert attachment.solution.converged.all()
    assert len(cell.masks) > 3
    assert all(torch.equal(mask, cell.masks[0]) for mask in cell.masks)
    first = cell.masks[0]
    cell.masks.clear()
    cell(torch.zeros_like(x), x)
    assert not torch.equal(cell.masks[0], first)


def test_a_function_that_draws_is_a_fixed_map_too() -> None:
    solution = fixed_point(lambda z: 0.5 * z + torch.rand(3, 1), torch.zeros(3, 1))
    assert solution.converged.all()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.norm = nn.BatchNorm1d(4).double()
        self.evaluations = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        return 0.3 * torch.tanh(self.norm(self.linear(z) + x)) + x


@pytest.mark.parametrize("gradient", [*GRADIENTS, None], ids=repr)
def test_batch_statistics_are_updated_once_per_solve_from_the_equilibrium(gradient: Gradient | None) -> None:
    cell, x = Normed(), torch.randn(16, 4, dtype=torch.float64)
    attach(cell, gradient, solver=SOLVER, batch_dim=None)
    with torch.set_grad_enabled(gradient is not None):
        z = cell(torch.zeros_like(x), x)
    if gradient is not None:
        z.sum().backward()
    assert cell.evaluations > 5
    assert cell.norm.num_batches_tracked is not None
    assert cell.norm.num_batches_tracked.item() == 1
    with torch.no_grad():
        mean = (cell.linear(z) + x).mean(dim=0)
    torch.testing.assert_close(cell.norm.running_mean, 0.1 * mean, rtol=1e-6, atol=1e-9)
    cell.eval()
    before = cell.norm.running_mean.clone()  # type: ignore[union-attr]
    cell(torch.zeros_like(x), x)
    assert torch.equal(cell.norm.running_mean, before)  # type: ignore[arg-type]


def test_batch_statistics_of_one_evaluation_are_the_bare_modules() -> None:
    bare, attached = Normed(), Normed()
    attached.load_state_dict(bare.state_dict())
    x = torch.randn(16, 4, dtype=torch.float64)
    attach(attached, OneStep(), solver=FixedPointIteration(max_steps=0), batch_dim=None)
    bare(x, x)
    attached(x, x)
    for name, buffer in bare.named_buffers():
        assert torch.equal(dict(attached.named_buffers())[name], buffer), name


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_spectral_norm_iterates_once_per_solve_and_gets_gradients(gradient: Gradient) -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6).double())

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.linear(z) + x)

    torch.manual_seed(0)
    cell, bare = Spectral(), Spectral()
    bare.load_state_dict(cell.state_dict())
    x = torch.randn(3, 6, dtype=torch.float64)
    attach(cell, gradient, solver=SOLVER)
    z = cell(torch.zeros_like(x), x)
    _ = bare.linear.weight  # one power iteration
    for name, buffer in bare.named_buffers():
        torch.testing.assert_close(dict(cell.named_buffers())[name], buffer)
    z.sum().backward()
    grad = cell.linear.parametrizations.weight.original.grad
    assert grad is not None
    assert grad.abs().max() > 0


@pytest.mark.parametrize("gradient", [Implicit(), OneStep(), NeumannPhantom(), Backprop(steps=60)], ids=repr)
@pytest.mark.parametrize("frozen", [True, False])
def test_running_statistics_are_those_of_the_solution(gradient: Gradient, frozen: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, momentum=1.0).double()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            self.norm(z)
            return 0.5 * z + x

    cell, x = Normed(), torch.randn(8, 4, dtype=DTYPE)
    cell.requires_grad_(not frozen)
    x.requires_grad_(not frozen)
    attach(cell, gradient, batch_dim=None, solver=FixedPointIteration(max_steps=100, rtol=1e-10))
    cell(torch.full((8, 4), 7.0, dtype=DTYPE), x)
    torch.testing.assert_close(cell.norm.running_mean, 2 * x.detach().mean(0), rtol=1e-6, atol=1e-6)
    assert cell.norm.num_batches_tracked == 1


def test_a_thread_never_takes_another_ones_scratch_buffers_for_the_modules_own() -> None:
    from phantomgrad._batch_statistics import BatchStatistics

    norm = nn.BatchNorm1d(4)
    own = [id(buffer) for buffer in norm.buffers()]
    one = BatchStatistics([norm])
    with one():
        other = BatchStatistics([norm])  # as another thread would, in the middle of an evaluation
        with other():
            norm(torch.randn(3, 4))
    one.commit()
    other.commit()
    assert [id(buffer) for buffer in norm.buffers()] == own


def test_batch_norm_inside_two_solves_is_updated_once() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.3 * torch.tanh(self.norm(z + x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * self.inner(torch.zeros_like(z), z + x)

    cell, x = Outer(), torch.randn(6, 4, dtype=DTYPE)
    attach(cell.inner, batch_dim=None)
    attach(cell, batch_dim=None)
    own = [id(buffer) for buffer in cell.buffers()]
    for calls in (1, 2):
        cell(torch.zeros_like(x), x)
        assert cell.inner.norm.num_batches_tracked == calls
    assert [id(buffer) for buffer in cell.buffers()] == own
