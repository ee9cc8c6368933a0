"""Watching attached modules in training: what is logged, when, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import DTYPE
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from phantomgrad import (
    AdaptivePhantom,
    Anderson,
    AttachError,
    FixedPointIteration,
    NeumannPhantom,
    OneStep,
    UnrolledPhantom,
    attach,
    attachments,
)
from phantomgrad.diagnostics import Monitor, gradient_alignment, spectral_radius

KEYS = {"solver_steps", "solver_steps_max", "residual", "residual_max", "unconverged"}


class Cell(nn.Module):
    def __init__(self, size: int = 6, gain: float = 0.5) -> None:
        super().__init__()
        self.recurrent, self.inputs = nn.Linear(size, size).double(), nn.Linear(3, size).double()
        self.gain = gain

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.gain * self.recurrent(z) + self.inputs(x))


class Model(nn.Module):
    """Calls its cell `calls` times a pass."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"cell": Cell()})
        self.readout = nn.Linear(6, 1).double()
        self.dropout = nn.Dropout(0.1)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros(x.shape[0], 6, dtype=DTYPE)
        for _ in range(self.calls):
            z = self.backbone["cell"](z.detach(), x)
        return self.readout(self.dropout(z))


def _x(seed: int = 0) -> Tensor:
    return torch.randn(5, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


class Log:
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []

    def __call__(self, values: dict[str, float], step: int) -> None:
        assert all(type(value) is float for value in values.values())
        self.entries.append((step, values))


def _train(model: nn.Module, steps: int, *, lr: float = 0.05) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses: list[float] = []
    for step in range(steps):
        loss = model(_x(step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- what is logged -----------------------------------------------------------------------------------------------------


def test_a_report_sums_up_the_solves_since_the_last_one() -> None:
    model, log = Model(), Log()
    attachment = attach(model.backbone["cell"], solver=FixedPointIteration(rtol=1e-6))
    monitor = Monitor(model, every=3, log=log)
    seen = []
    for step in range(7):
        model(_x(step))
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
    model(_x())
    model(_x(1))
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
    _train(model, 3)
    [(_, values)] = log.entries
    assert values["backbone.cell/adjoint_steps"] >= 2


def test_evaluation_and_single_steps_leave_no_trace() -> None:
    model, log = Model(), Log()
    attachment = attach(model.backbone["cell"])
    monitor = Monitor(model, every=1, log=log)
    with torch.no_grad():
        model(_x())
    assert monitor.step == 0
    with attachment.disabled():
        model(_x())
    assert monitor.step == 1
    assert log.entries == []  # a pass without a solve has nothing to report
    model(_x())
    assert [step for step, _ in log.entries] == [2]
    attachment.remove()
    model(_x())
    assert len(log.entries) == 1


def test_report_logs_at_once_and_step_can_be_set() -> None:
    model, log = Model(), Log()
    attach(model.backbone["cell"])
    monitor = Monitor(model, every=100, log=log)
    monitor.step = 5000
    model(_x())
    values = monitor.report()
    assert log.entries == [(5001, values)]
    assert set(values) == {f"backbone.cell/{key}" for key in KEYS}
    assert monitor.report() == {}
    assert len(log.entries) == 1


def test_remove_and_the_context_take_the_hooks_off() -> None:
    model, log = Model(), Log()
    attach(model.backbone["cell"])
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with Monitor(model, every=1, log=log) as monitor:
        model(_x())
    model(_x())
    assert len(log.entries) == 1
    monitor.remove()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


# -- measurements -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 2])
def test_measurements_are_those_of_the_loss_itself(calls: int) -> None:
    model, log = Model(calls), Log()
    model.dropout.eval()
    cell = model.backbone["cell"]
    attach(cell, OneStep(), solver=FixedPointIteration(max_steps=200))
    Monitor(model, every=2, measure_every=4, log=log)
    for step in range(6):
        model(_x(step)).square().mean().backward()  # the weights stay
    names = {"backbone.cell/gradient_cosine", "backbone.cell/spectral_radius"}
    assert [names <= set(values) for _, values in log.entries] == [False, True, False]
    values = log.entries[1][1]
    # Of two calls the second is measured: the first one's result is detached, so no cotangent reaches it.
    x, start = _x(2), torch.zeros(5, 6, dtype=DTYPE)
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
    x, mask = _x().clone(), torch.ones(5, 6, dtype=torch.int64)
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
        model(_x(step))
    assert all(set(values) == {f"backbone.cell/{key}" for key in KEYS} for _, values in log.entries)
    assert len(monitor._watched[0].probes) <= 1
    two = (model(_x()), model(_x(1)))  # two forwards before one backward: measured one report later
    sum(value.sum() for value in two).backward()
    model(_x())
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
    model, log = _attached(), Log()
    monitor = Monitor(model, every=2, measure_every=2, log=log)
    with pytest.warns(
        UserWarning,
        match=r"^Monitor could not measure Model\.backbone\.cell \(Cell\) and measures nothing from here on: out of memory$",
    ):
        _train(model, 3)
    _train(model, 5)  # says it once
    assert monitor.measure_every is None
    assert [step for step, _ in log.entries] == [2, 4, 6, 8]
    assert not monitor._measuring


class Stateful(Model):
    """A model whose forward changes more than its weights."""

    def __init__(self) -> None:
        super().__init__()
        cell = self.backbone["cell"]
        cell.recurrent = nn.utils.parametrizations.spectral_norm(cell.recurrent)
        cell.inputs = nn.Sequential(cell.inputs, nn.BatchNorm1d(6).double(), nn.Dropout(0.2))


def test_a_watched_run_equals_one_that_is_not_watched() -> None:
    runs: list[tuple[list[float], dict[str, Tensor]]] = []
    for watched in (False, True):
        torch.manual_seed(3)
        model, log = Stateful(), Log()
        attach(model.backbone["cell"], NeumannPhantom(steps=3), batch_dim=None)
        if watched:
            Monitor(model, every=2, measure_every=4, log=log)
        runs.append((_train(model, 10), model.state_dict()))
        if watched:
            assert sum("backbone.cell/gradient_cosine" in values for _, values in log.entries) == 2
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


# -- living with a model ------------------------------------------------------------------------------------------------


class _Transfers(TorchFunctionMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.count += name in {"tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy", "nonzero"}
        return func(*args, **(kwargs or {}))


def test_a_report_transfers_once_and_the_passes_between_never() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Cell(), Cell()

        def forward(self, x: Tensor) -> Tensor:
            zero = torch.zeros(x.shape[0], 6, dtype=DTYPE)
            return self.a(zero, x) + self.b(zero, x)

    model, log = Two(), Log()
    for cell in (model.a, model.b):
        attach(cell, solver=FixedPointIteration(max_steps=4, rtol=0.0, atol=0.0, keep="last"), on_failure="ignore")

    def transfers() -> int:
        with _Transfers() as mode:
            model(_x())
        return mode.count

    alone = transfers()
    Monitor(model, every=3, log=log)
    assert [transfers() - alone for _ in range(6)] == [0, 0, 1, 0, 0, 1]


def test_copies_and_pickles_are_not_watched() -> None:
    model, log = Model(), Log()
    attach(model.backbone["cell"])
    monitor = Monitor(model, every=1, measure_every=1, log=log)
    clone = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (clone, loaded):
        other(_x()).sum().backward()
        assert len(list(attachments(other))) == 1
    assert monitor.step == 0
    assert log.entries == []
    model(_x())
    assert monitor.step == 1


def test_the_monitor_keeps_neither_model_nor_graphs() -> None:
    model, log = Model(), Log()
    attach(model.backbone["cell"])
    monitor = Monitor(model, every=2, measure_every=2, log=log)
    _train(model, 5)
    output = model(_x())
    gone = [weakref.ref(model), weakref.ref(model.backbone["cell"].recurrent.weight), weakref.ref(output)]
    del model, output
    assert [ref() for ref in gone] == [None] * 3
    assert monitor.step == 6
    monitor.remove()


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
        model(torch.zeros(5, 6, dtype=DTYPE), _x(step)).sum().backward()
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
            model.backbone["cell"](start, _x())
    for _ in range(30):
        model.backbone["cell"](start, _x())  # warns once
    assert len(monitor._watched[0].calls) <= 10


def _attached(**options: Any) -> Model:
    model = Model()
    attach(model.backbone["cell"], **options)
    return model


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Monitor(Model(), log=print), AttachError, "Nothing in Model is attached: attach its cell first, then watch it."),
        (lambda: Monitor(_attached(), log="tensorboard"), TypeError, "log of Monitor must be callable as log(values, step), got 'tensorboard'."),  # type: ignore[arg-type]
        (lambda: Monitor([1], log=print), TypeError, "Monitor watches an nn.Module, got a list."),  # type: ignore[arg-type]
        (lambda: Monitor(_attached(), log=print, every=0), ValueError, "every of Monitor must be an integer of at least 1, got 0."),
        (lambda: Monitor(_attached(), log=print, every=10, measure_every=0), ValueError, "measure_every of Monitor must be an integer of at least 1, got 0."),
        (lambda: Monitor(_attached(), log=print, every=10, measure_every=25), ValueError, "measure_every of Monitor must be a multiple of every=10, got 25: what is measured appears in a report."),
        (lambda: Monitor(_attached(process_group=object()), log=print, measure_every=100), ValueError, "Model.backbone.cell (Cell) is attached with a process_group, whose processes must evaluate together, and measurements do not: leave measure_every out."),
    ],
)  # fmt: skip
def test_bad_input_is_answered_in_one_sentence(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value) == text


def test_diagnostics_of_a_cell_with_a_process_group_are_refused() -> None:
    model = _attached(process_group=object())
    with pytest.raises(
        ValueError,
        match=r"^Model\.backbone\.cell \(Cell\) is attached with a process_group, .* run it on the cell in a single process\.$",
    ):
        spectral_radius(model.backbone["cell"], torch.zeros(5, 6, dtype=DTYPE), _x())


# -- trackers -----------------------------------------------------------------------------------------------------------


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show for a folder of event files."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    files = sorted({path.parent for path in folder.rglob("events.out.tfevents*")})
    found: dict[str, list[tuple[int, float]]] = {}
    for each in files:
        events = accumulator.EventAccumulator(str(each)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_through_a_small_lambda(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    writer = tensorboard.SummaryWriter(tmp_path)
    model = _attached()

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    Monitor(model, every=2, measure_every=2, log=log)
    _train(model, 4)
    writer.close()
    scalars = _scalars(tmp_path)
    assert [step for step, _ in scalars["backbone.cell/solver_steps"]] == [2, 4]
    assert 0 < scalars["backbone.cell/gradient_cosine"][0][1] <= 1
    assert 0 < scalars["backbone.cell/spectral_radius"][0][1] < 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_accelerate_with_its_tensorboard_tracker(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    accelerator = accelerate.Accelerator(log_with="tensorboard", project_dir=tmp_path, cpu=True)
    accelerator.init_trackers("run")
    model = _attached()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    with Monitor(model, every=2, measure_every=4, log=accelerator.log):
        for step in range(6):
            loss = model(_x(step)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    scalars = _scalars(tmp_path)
    assert [step for step, _ in scalars["backbone.cell/residual_max"]] == [2, 4, 6]
    assert [step for step, _ in scalars["backbone.cell/gradient_cosine"]] == [4]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own
def test_a_compiled_model_is_watched() -> None:
    model, log = Model(), Log()
    model.dropout.eval()
    attach(model.backbone["cell"])
    Monitor(model, every=2, measure_every=2, log=log)
    compiled = torch.compile(model, backend="eager")
    for step in range(4):
        compiled(_x(step)).sum().backward()
    assert [step for step, _ in log.entries] == [2, 4]
    assert "backbone.cell/gradient_cosine" in log.entries[1][1]


def test_autocast_and_gradient_checkpointing() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.recurrent = nn.Linear(3, 8), nn.Linear(8, 8)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.recurrent(z) + self.inputs(x))

    cell, log = Mixed(), Log()
    attach(cell, UnrolledPhantom(recompute=True))
    Monitor(cell, every=2, measure_every=2, log=log)
    for step in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = cell(torch.zeros(5, 8), _x(step).float())
        z.square().mean().backward()
    assert 0.9 < log.entries[-1][1]["gradient_cosine"] <= 1.0001
