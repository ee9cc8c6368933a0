"""Weights that a parametrization computes: cast and laid out once per solve."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from phantomgrad import FixedPointIteration, Gradient, Implicit, NeumannPhantom, OneStep, UnrolledPhantom, attach

SOLVER = FixedPointIteration(max_steps=7, rtol=0.0, atol=0.0)
PLAIN: dict[str, Any] = {"solver": SOLVER, "on_failure": "ignore"}
RECORDED = [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()]


class Half(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


class Casts(TorchDispatchMode):
    """The shapes that were cast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def _convolving(*, channels_last: bool = False) -> nn.Module:
    """`tanh(conv(z) + x)` with a weight norm that keeps it a contraction."""

    class Convolving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1))
            self.seen: list[Tensor] = []
            with torch.no_grad():
                self.conv.parametrizations.weight.original0.mul_(0.3)  # type: ignore[union-attr, operator]

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            self.seen.append(self.conv.weight)
            return torch.tanh(self.conv(z) + x)

    cell = Convolving()
    return cell.to(memory_format=torch.channels_last) if channels_last else cell


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 6, 5, 5), torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("gradient", RECORDED, ids=repr)
def test_autocast_casts_a_computed_weight_once_per_solve(gradient: Gradient) -> None:
    cell = _convolving()
    attach(cell, gradient, **PLAIN)
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
        cell(*_inputs()).square().sum().backward()
    assert casts.shapes.count((6, 6, 3, 3)) == 1
    assert casts.shapes.count((2, 6, 5, 5)) >= SOLVER.max_steps


@pytest.mark.parametrize("gradient", RECORDED, ids=repr)
def test_the_gradient_through_the_cast_is_that_of_float32_to_its_rounding(gradient: Gradient) -> None:
    found: list[dict[str, Tensor]] = []
    for enabled in (False, True):
        cell = _convolving()
        attach(cell, gradient, solver=FixedPointIteration(max_steps=100))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z = cell(*_inputs())
        (z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum().backward()
        found.append({name: p.grad for name, p in cell.named_parameters() if p.grad is not None})
    assert len(found[0]) == 3
    for name, expected in found[0].items():
        assert found[1][name].dtype is torch.float32
        assert ((found[1][name] - expected).norm() / expected.norm()).item() < 0.05, name


def test_where_the_cell_leaves_autocast_the_weight_is_as_it_was_computed() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            parametrize.register_parametrization(self.linear, "weight", Half())

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                careful = self.linear(z)
            return torch.tanh(0.3 * (careful + self.linear(z)) + x)

    cell, x = Careful(), torch.randn(3, 4)
    attach(cell, NeumannPhantom(), **PLAIN)
    with torch.autocast("cpu", torch.bfloat16):
        z = cell(torch.zeros(3, 4), x)
    z.sum().backward()
    assert cell.linear.parametrizations.weight.original.grad.abs().max() > 0  # type: ignore[union-attr, operator]


def test_a_module_that_may_use_its_weight_otherwise_gets_it_in_float32() -> None:
    class Penalised(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert self.weight.dtype is torch.float32
            return super().forward(input) / self.weight.norm()

    cell = nn.Sequential(Penalised(4, 4), nn.Tanh())
    parametrize.register_parametrization(cell[0], "weight", Half())
    attach(cell, NeumannPhantom(), **PLAIN)
    with torch.autocast("cpu", torch.bfloat16):
        cell(torch.zeros(3, 4)).sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("parametrized", [True, False])
def test_what_is_no_layer_gets_the_weight_in_float32(
    parametrized: bool, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 4)
            if parametrized:
                parametrize.register_parametrization(self.linear, "weight", Half())

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            weight = self.linear.weight
            return torch.tanh(0.3 * self.linear(z) / torch.linalg.matrix_norm(weight, 2) + torch.mv(weight, x[0]) + x)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    cell, x = Bounded(), torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    with attach(cell, NeumannPhantom(), compile=compile, **PLAIN), torch.autocast("cpu", torch.bfloat16):
        found = cell(torch.zeros(3, 4), x)
    expected = torch.zeros(3, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(SOLVER.max_steps):
            expected = cell(expected, x)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)
    found.sum().backward()
    for parameter in cell.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype is torch.float32
    torch.compiler.reset()


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_computed_weight_is_laid_out_as_its_parameter_is(channels_last: bool) -> None:
    cell = _convolving(channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with attach(cell, NeumannPhantom(), **PLAIN):
        found = cell(*_inputs())
        weights: Any = cell.seen
        assert len(weights) == SOLVER.max_steps + 1
        assert len(set(map(id, weights))) == 1
        assert weights[0].is_contiguous(memory_format=layout)
    expected = _convolving()
    attach(expected, NeumannPhantom(), **PLAIN)
    torch.testing.assert_close(found, expected(*_inputs()))
