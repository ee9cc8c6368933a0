"""Autocast and loss scaling."""

from __future__ import annotations

import warnings

import pytest
import torch
from compat import GRADIENTS as EXACT_GRADIENTS
from compat import Cell, Model, gradients, settings
from torch import Tensor, nn

from phantomgrad import Gradient, Implicit, NeumannPhantom, UnrolledPhantom, attach

HALF = [torch.bfloat16, torch.float16]

# Half precision bounds the residual of an exact gradient too.
GRADIENTS = [Implicit() if isinstance(gradient, Implicit) else gradient for gradient in EXACT_GRADIENTS]


def _model(gradient: Gradient) -> Model:
    """A float32 model whose cell is attached with the default tolerances."""
    torch.manual_seed(7)
    model = Model()
    options = settings(gradient)
    attach(model.cell, gradient, solver=type(options["solver"])(max_steps=100))
    return model


def _batch(size: int = 16) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(8))
    return x, (x.sum(dim=1) > 0).long()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_autocast_gives_the_gradients_of_float32_to_its_rounding(gradient: Gradient, dtype: torch.dtype) -> None:
    x, labels = _batch()
    found: list[dict[str, Tensor]] = []
    for enabled in (False, True):
        model = _model(gradient)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        found.append(gradients(model))
    for name, expected in found[0].items():
        error = (found[1][name] - expected).norm() / expected.norm()
        assert error < 0.06, (name, error)


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), Implicit()], ids=repr)
def test_a_state_in_half_precision_keeps_its_dtype(gradient: Gradient) -> None:
    cell = Cell().bfloat16()
    attach(cell, gradient)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    z = cell(torch.zeros_like(x), x)
    assert z.dtype is torch.bfloat16
    z.sum().backward()
    assert cell.recurrent.weight.grad is not None
    assert cell.recurrent.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_backward_outside_autocast_and_create_graph_agree_with_inside(dtype: torch.dtype) -> None:
    x, labels = _batch()
    found: list[tuple[Tensor, ...]] = []
    for inside in (True, False):
        model = _model(Implicit())
        weights = list(model.cell.parameters())
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(x), labels)
            if inside:
                first = torch.autograd.grad(loss, weights, create_graph=True)
        if not inside:
            first = torch.autograd.grad(loss, weights, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), weights))
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0
        assert ((a - b).norm() / a.norm()).item() < 0.1


def _scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_training_in_fp16_with_a_scaler_learns_in_every_weight(gradient: Gradient) -> None:
    x, labels = _batch(64)
    model = _model(gradient)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.5), _scaler(1024.0)
    losses: list[float] = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert scaler.get_scale() == 1024.0
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    "gradient",
    GRADIENTS,
    ids=repr,
)
def test_an_overflow_reaches_the_scaler_which_skips_the_step(gradient: Gradient) -> None:
    x, labels = _batch()
    model = _model(gradient)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.5), _scaler(3e38)
    with torch.autocast("cpu", torch.float16):
        loss = 100 * nn.functional.cross_entropy(model(x), labels)
    scaler.scale(loss).backward()
    assert any(not bool(torch.isfinite(g).all()) for name, g in gradients(model).items() if name.startswith("cell."))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 3e38
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
