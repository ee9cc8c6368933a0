"""What Monitor logs of the solves in training, when, and what it refuses to watch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monitored import KEYS, Cell, Log, Model, attached, batch, train
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import AdaptivePhantom, Anderson, AttachError, FixedPointIteration, attach
from phantomgrad.diagnostics import Monitor, spectral_radius


def test_a_report_sums_up_the_solves_since_the_last_one() -> None:
    model, log = Model(), Log()
    attachment = attach(model.backbone["cell"], solver=FixedPointIteration(rtol=1e-6))
    monitor = Monitor(model, every=3, log=log)
    seen = []
    for step in range(7):
        model(batch(step))
        seen.append(attachment.solution)
    assert [step for step, _ in log.entries] == [3, 6]
    assert monitor.step == 7
    for first, (_, values) in zip((0, 3), log.entries, strict=True):
        steps = torch.cat([solution.steps for solution in seen[first : first + 3]]).double()
        residual = torch.cat([solution.residual for solution in seen[first : first + 3]])
        assert set(values) == {f"backbone.cell/{key}" for key in KEYS}
        assert values["backbone.cell/solver_steps"] == pytest.approx(steps.mean().item(), rel=1e-6)
        assert values["backbone.cell/solver_steps_max"] == steps.max().item()
        assert values["backbone.cell/residual"] == pytest.approx(residual.median().item(), rel=1e-6)
        assert values["backbone.cell/residual_max"] == pytest.approx(residual.max().item(), rel=1e-6)
        assert values["backbone.cell/unconverged"] == 0.0


def test_unconverged_samples_are_counted_as_a_fraction() -> None:
    class Half(nn.Module):
        def forward(self, z: Tensor, rate: Tensor) -> Tensor:
            return rate * z + 1.0

    cell, log = Half(), Log()
    attach(cell, on_failure="ignore", solver=FixedPointIteration(max_steps=20, rtol=1e-3))
    Monitor(cell, every=1, log=log)
    rate = torch.tensor([[0.1], [0.1], [0.1], [0.999]], requires_grad=True)
    cell(torch.zeros(4, 1), rate)
    [(step, values)] = log.entries
    assert step == 1
    assert values["unconverged"] == pytest.approx(0.25)
    assert values["solver_steps_max"] == 20.0
    assert set(values) == KEYS  # the model itself is attached: no prefix


def test_several_calls_in_a_pass_and_several_modules() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Cell(), Cell()

        def forward(self, x: Tensor) -> Tensor:
            zero = torch.zeros(x.shape[0], 6, dtype=DTYPE)
            return self.a(zero, x) + self.a(zero, 2 * x) + self.b(zero, x)

    model, log = Two(), Log()
    handles = [attach(model.a, solver=FixedPointIteration(damping=0.5)), attach(model.b, solver=Anderson())]
    Monitor(model, every=2, log=log)
    counts: list[Tensor] = []
    hook = model.a.register_forward_hook(lambda *_: counts.append(handles[0].solution.steps))
    model(batch())
    model(batch(1))
    hook.remove()
    [(_, values)] = log.entries
    assert len(counts) == 4
    assert values["a/solver_steps"] == pytest.approx(torch.cat(counts).double().mean().item())
    assert values["b/solver_steps"] < values["a/solver_steps"]
    assert set(values) == {f"{name}/{key}" for name in "ab" for key in KEYS}


def test_what_an_adaptive_gradient_took_is_logged() -> None:
    model, log = Model(), Log()
    attach(model.backbone["cell"], AdaptivePhantom(target=1e-3))
    Monitor(model, every=2, log=log)
    train(model, 3)
    [(_, values)] = log.entries
    assert values["backbone.cell/adjoint_steps"] >= 2


def test_evaluation_and_single_steps_leave_no_trace() -> None:
    model, log = Model(), Log()
    attachment = attach(model.backbone["cell"])
    monitor = Monitor(model, every=1, log=log)
    with torch.no_grad():
        model(batch())
    assert monitor.step == 0
    with attachment.disabled():
        model(batch())
    assert monitor.step == 1
    assert log.entries == []  # a pass without a solve has nothing to report
    model(batch())
    assert [step for step, _ in log.entries] == [2]
    attachment.remove()
    model(batch())
    assert len(log.entries) == 1


def test_report_logs_at_once_and_step_can_be_set() -> None:
    model, log = Model(), Log()
    attach(model.backbone["cell"])
    monitor = Monitor(model, every=100, log=log)
    monitor.step = 5000
    model(batch())
    values = monitor.report()
    assert log.entries == [(5001, values)]
    assert set(values) == {f"backbone.cell/{key}" for key in KEYS}
    assert monitor.report() == {}
    assert len(log.entries) == 1


def test_nested_attachments_are_watched_each() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Cell()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.3 * self.inner(torch.zeros_like(z), x) + 0.2 * z

    model, log = Outer(), Log()
    attach(model.inner)
    attach(model)
    Monitor(model, every=2, measure_every=2, log=log)
    for step in range(4):
        model(torch.zeros(5, 6, dtype=DTYPE), batch(step)).sum().backward()
    values = log.entries[-1][1]
    assert {"solver_steps", "inner/solver_steps", "spectral_radius", "inner/spectral_radius"} <= set(values)
    assert values["spectral_radius"] == pytest.approx(0.2)


def test_a_model_that_is_never_called_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phantomgrad.diagnostics._monitor._CALLS_WITHOUT_PASS", 10)
    model, log = Model(), Log()
    attach(model.backbone["cell"])
    monitor = Monitor(model, every=1, log=log)
    start = torch.zeros(5, 6, dtype=DTYPE)
    with pytest.warns(
        UserWarning,
        match=r"^Monitor counts the forward passes of Model, which has not been called yet, while backbone\.cell inside it has 11 times: pass Monitor the module that the training loop calls\.$",
    ):
        for _ in range(11):
            model.backbone["cell"](start, batch())
    for _ in range(30):
        model.backbone["cell"](start, batch())  # warns once
    assert len(monitor._watched[0].calls) <= 10


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Monitor(Model(), log=print), AttachError, "Nothing in Model is attached: attach its cell first, then watch it."),
        (lambda: Monitor(attached(), log="tensorboard"), TypeError, "log of Monitor must be callable as log(values, step), got 'tensorboard'."),  # type: ignore[arg-type]
        (lambda: Monitor([1], log=print), TypeError, "Monitor watches an nn.Module, got a list."),  # type: ignore[arg-type]
        (lambda: Monitor(attached(), log=print, every=0), ValueError, "every of Monitor must be an integer of at least 1, got 0."),
        (lambda: Monitor(attached(), log=print, every=10, measure_every=0), ValueError, "measure_every of Monitor must be an integer of at least 1, got 0."),
        (lambda: Monitor(attached(), log=print, every=10, measure_every=25), ValueError, "measure_every of Monitor must be a multiple of every=10, got 25: what is measured appears in a report."),
        (lambda: Monitor(attached(process_group=object()), log=print, measure_every=100), ValueError, "Model.backbone.cell (Cell) is attached with a process_group, whose processes must evaluate together, and measurements do not: leave measure_every out."),
    ],
)  # fmt: skip
def test_bad_input_is_answered_in_one_sentence(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value) == text


def test_diagnostics_of_a_cell_with_a_process_group_are_refused() -> None:
    model = attached(process_group=object())
    with pytest.raises(
        ValueError,
        match=r"^Model\.backbone\.cell \(Cell\) is attached with a process_group, .* run it on the cell in a single process\.$",
    ):
        spectral_radius(model.backbone["cell"], torch.zeros(5, 6, dtype=DTYPE), batch())
