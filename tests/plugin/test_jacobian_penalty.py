"""The Jacobian penalty: its value, its gradients, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from known_jacobians import Tanh, dense_jacobians, normal
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import attach
from phantomgrad.diagnostics import jacobian_penalty, spectral_radius


def test_penalty_of_a_diagonal_map_is_exact_and_so_is_its_gradient() -> None:
    scale = torch.tensor([0.5, -2.0, 3.0], dtype=DTYPE, requires_grad=True)
    z = normal(4, 3)
    penalty = jacobian_penalty(lambda z: scale * z, z)  # signs leave no noise where J is diagonal
    assert penalty.item() == pytest.approx(scale.square().mean().item())
    (grad,) = torch.autograd.grad(penalty, scale)
    torch.testing.assert_close(grad, 2 * scale.detach() / 3)


def test_penalty_is_an_unbiased_estimate_of_the_squared_norm() -> None:
    cell, x, z = Tanh(), normal(4, 3), normal(4, 5, seed=1)
    J = dense_jacobians(cell, z, x)
    truth = J.square().sum(dim=(1, 2)).mean() / 5
    estimate = jacobian_penalty(cell, z, x, probes=1000)
    assert estimate.item() == pytest.approx(truth.item(), rel=0.05)


def test_penalty_gradients_reach_parameters_inputs_and_what_computed_them() -> None:
    cell, z = Tanh(), normal(4, 5)
    encoder = nn.Linear(2, 3).double()
    generator = torch.Generator().manual_seed(7)
    penalty = jacobian_penalty(cell, z, encoder(normal(4, 2)), generator=generator)
    penalty.backward()
    for parameter in (*cell.parameters(), *encoder.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0

    weight = cell.recurrent.weight
    direction = torch.randn_like(weight)
    x = encoder(normal(4, 2)).detach()

    def value() -> Tensor:
        return jacobian_penalty(cell, z, x, generator=torch.Generator().manual_seed(7))

    (grad,) = torch.autograd.grad(value(), weight)
    with torch.no_grad():
        weight += 1e-6 * direction
        above = value()
        weight -= 2e-6 * direction
        below = value()
    assert not above.requires_grad
    assert (grad * direction).sum().item() == pytest.approx((above - below).item() / 2e-6, rel=1e-6)


def test_training_with_the_penalty_lowers_the_spectral_radius() -> None:
    cell, x = Tanh(gain=1.4), normal(8, 3)
    attach(cell, on_failure="ignore")
    start = torch.zeros(8, 5, dtype=DTYPE)
    before = float(spectral_radius(cell, start, x))
    optimizer = torch.optim.Adam(cell.parameters(), lr=1e-2)
    for _ in range(40):
        z = cell(start, x)
        loss = 0.0 * z.sum() + jacobian_penalty(cell, z, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(spectral_radius(cell, start, x)) < 0.7 * before


def test_penalty_makes_one_evaluation_and_leaves_state_inside_alone() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5).double()
            self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5).double())
            self.calls = 0

        def forward(self, z: Tensor) -> Tensor:
            self.calls += 1
            return torch.tanh(self.norm(self.linear(z)))

    bare, attached = Normed(), Normed()
    attached.load_state_dict(bare.state_dict())
    attach(attached)
    z = normal(6, 5)
    values = []
    for module in (bare, attached):
        mean = module.norm.running_mean.clone()
        values.append(jacobian_penalty(module, z, generator=torch.Generator().manual_seed(0)))
        assert module.calls == 1
        assert torch.equal(module.norm.running_mean, mean)
        assert all("forward" not in each.__dict__ for each in bare.modules())
        values[-1].backward()
        assert all(p.grad is not None for p in module.linear.parameters() if p.dim() == 2)
    assert values[0].item() == pytest.approx(values[1].item())


def test_penalty_of_a_map_without_a_state_is_zero() -> None:
    assert jacobian_penalty(lambda z: torch.ones_like(z), torch.zeros(2, 3)).item() == 0.0
