"""The mistakes that check notices in what it is given: coupled samples, noise, values that are not finite, bad options."""

from __future__ import annotations

import random

import pytest
import torch
from checked_cells import diagonal, says
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import StateMismatchError, attach
from phantomgrad.diagnostics import check


def test_coupled_samples_are_noticed() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.4))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.w * (z + z.roll(1, dims=0)) + x

    report = check(Chain(), torch.zeros(6, 2), torch.ones(6, 2), show=False)
    assert report.coupled
    assert says(report, "The map couples the samples, so they cannot stop one by one: attach it with batch_dim=None")
    assert float(report.radius) == pytest.approx(0.8, rel=1e-3)
    assert not check(Chain(), torch.zeros(6, 2), torch.ones(6, 2), batch_dim=None, show=False).coupled


def test_a_forward_that_is_no_map_is_noticed() -> None:
    class Noisy(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * z + x + 0.1 * random.random()

    report = check(Noisy(), torch.zeros(2, 3), torch.ones(2, 3), show=False)
    assert not report.repeatable
    assert says(report, "Two evaluations at the same state differ, so there is no fixed point to find")


def test_a_first_evaluation_that_is_not_finite_is_said_first() -> None:
    class Broken(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 1 / z

    report = check(Broken(), torch.zeros(2, 3), show=False)
    assert report.advice == (
        "The first evaluation is not finite already: look for an overflow or a division by zero in the forward, or take "
        "another start.",
    )
    assert "diverges" in str(report)


def test_nothing_to_train_is_said() -> None:
    report = check(lambda z: 0.5 * z + 1, torch.zeros(2, 3), show=False)
    assert report.where == "<lambda>"
    assert report.variables == {}
    assert says(
        report, "No gradients were compared: no parameter requires grad and no input is a floating-point tensor."
    )


def test_a_whole_model_in_place_of_its_cell_gets_a_hint() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = diagonal(0.5, 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(torch.zeros_like(x), x).sum(dim=1)

    model = Model()
    attach(model.cell)
    with pytest.raises(StateMismatchError, match="A fixed point needs the same structure") as caught:
        check(model, torch.ones(2, 2, dtype=DTYPE))
    assert caught.value.__notes__ == [
        "Model is not attached, but Model.cell (Linear) inside it is: check that one, with the arguments that it is called with."
    ]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^max_steps of CheckOptions must be an integer of at least 1, got 0\.$"):
        check(diagonal(0.5), torch.zeros(1, 1, dtype=DTYPE), torch.zeros(1, 1, dtype=DTYPE), max_steps=0)
    with pytest.raises(TypeError, match=r"^Diagnostics take an "):
        check(3, torch.zeros(1))  # type: ignore[arg-type]
