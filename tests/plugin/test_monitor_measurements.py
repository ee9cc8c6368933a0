"""The gradient alignment and spectral radius that Monitor measures in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monitored import KEYS, Cell, Log, Model, attached, batch, train
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import FixedPointIteration, OneStep, attach
from phantomgrad.diagnostics import Monitor, gradient_alignment, spectral_radius


@pytest.mark.parametrize("calls", [1, 2])
def test_measurements_are_those_of_the_loss_itself(calls: int) -> None:
    model, log = Model(calls), Log()
    model.dropout.eval()
    cell = model.backbone["cell"]
    attach(cell, OneStep(), solver=FixedPointIteration(max_steps=200))
    Monitor(model, every=2, measure_every=4, log=log)
    for step in range(6):
        model(batch(step)).square().mean().backward()  # the weights stay
    names = {"backbone.cell/gradient_cosine", "backbone.cell/spectral_radius"}
    assert [names <= set(values) for _, values in log.entries] == [False, True, False]
    values = log.entries[1][1]
    # Of two calls the second is measured: the first one's result is detached, so no cotangent reaches it.
    x, start = batch(2), torch.zeros(5, 6, dtype=DTYPE)
    truth = spectral_radius(cell, start, x, rtol=1e-9)
    assert values["backbone.cell/spectral_radius"] == pytest.approx(float(truth), rel=1e-2)
    expected = gradient_alignment(cell, start, x, loss=lambda z: model.readout(z).square().mean())
    assert values["backbone.cell/gradient_cosine"] == pytest.approx(expected.cosine, rel=1e-6)
    assert expected.cosine < 0.999


def test_inputs_that_are_reused_and_states_in_parts() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()

        def forward(self, state: dict[str, Tensor], x: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], int]:
            z = self.cell(torch.cat((state["a"], state["b"]), dim=1), x) * mask
            return {"a": z[:, :2], "b": z[:, 2:]}, 7

    cell, log = Parts(), Log()
    attach(cell, OneStep(), output=0)
    Monitor(cell, every=2, measure_every=2, log=log)
    start = {"a": torch.zeros(5, 2, dtype=DTYPE), "b": torch.zeros(5, 4, dtype=DTYPE)}
    x, mask = batch().clone(), torch.ones(5, 6, dtype=torch.int64)
    first = x.clone()
    for _ in range(2):
        state, seven = cell(start, x=x, mask=mask)
        assert seven == 7
        state["a"].sum().backward()  # nothing reaches "b"
        x.mul_(-3)  # the caller reuses its memory
    [(_, values)] = log.entries
    expected = gradient_alignment(cell, start, first, mask, loss=lambda state: state["a"].sum())
    assert values["gradient_cosine"] == pytest.approx(expected.cosine, rel=1e-6)


def test_forwards_without_a_backward_are_not_measured_and_kept_for_nothing() -> None:
    model, log = Model(), Log()
    attach(model.backbone["cell"])
    monitor = Monitor(model, every=2, measure_every=2, log=log)
    for step in range(6):
        model(batch(step))
    assert all(set(values) == {f"backbone.cell/{key}" for key in KEYS} for _, values in log.entries)
    assert len(monitor._watched[0].probes) <= 1
    two = (model(batch()), model(batch(1)))  # two forwards before one backward: measured one report later
    sum(value.sum() for value in two).backward()
    model(batch())
    assert "backbone.cell/gradient_cosine" in monitor.report()


def test_an_exact_gradient_that_cannot_be_had_is_logged_as_nan() -> None:
    class Identity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, z: Tensor) -> Tensor:
            return self.w * z

    cell, log = Identity(), Log()
    attach(cell)
    Monitor(cell, every=2, measure_every=2, log=log)
    for _ in range(2):
        cell(torch.ones(2, 3)).sum().backward()
    [(_, values)] = log.entries
    assert values["spectral_radius"] == pytest.approx(1.0)
    assert values["gradient_cosine"] != values["gradient_cosine"]


def test_a_measurement_that_fails_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, module: nn.Module) -> None:
        raise torch.OutOfMemoryError("out of memory\nTried to allocate much")

    monkeypatch.setattr("phantomgrad.diagnostics._probe.Probe.measure", fail)
    model, log = attached(), Log()
    monitor = Monitor(model, every=2, measure_every=2, log=log)
    with pytest.warns(
        UserWarning,
        match=r"^Monitor could not measure Model\.backbone\.cell \(Cell\) and measures nothing from here on: out of memory$",
    ):
        train(model, 3)
    train(model, 5)  # says it once
    assert monitor.measure_every is None
    assert [step for step, _ in log.entries] == [2, 4, 6, 8]
    assert not monitor._measuring
