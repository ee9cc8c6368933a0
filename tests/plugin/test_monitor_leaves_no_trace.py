"""A run that Monitor watches is the one it would have been: values, transfers, copies, memory."""

from __future__ import annotations

import copy
import io
import weakref
from typing import Any

import torch
from monitored import Cell, Log, Model, batch, train
from problems import DTYPE
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from phantomgrad import FixedPointIteration, NeumannPhantom, attach, attachments
from phantomgrad.diagnostics import Monitor


def test_remove_and_the_context_take_the_hooks_off() -> None:
    model, log = Model(), Log()
    attach(model.backbone["cell"])
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with Monitor(model, every=1, log=log) as monitor:
        model(batch())
    model(batch())
    assert len(log.entries) == 1
    monitor.remove()
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


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
        runs.append((train(model, 10), model.state_dict()))
        if watched:
            assert sum("backbone.cell/gradient_cosine" in values for _, values in log.entries) == 2
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


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
            model(batch())
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
        other(batch()).sum().backward()
        assert len(list(attachments(other))) == 1
    assert monitor.step == 0
    assert log.entries == []
    model(batch())
    assert monitor.step == 1


def test_the_monitor_keeps_neither_model_nor_graphs() -> None:
    model, log = Model(), Log()
    attach(model.backbone["cell"])
    monitor = Monitor(model, every=2, measure_every=2, log=log)
    train(model, 5)
    output = model(batch())
    gone = [weakref.ref(model), weakref.ref(model.backbone["cell"].recurrent.weight), weakref.ref(output)]
    del model, output
    assert [ref() for ref in gone] == [None] * 3
    assert monitor.step == 6
    monitor.remove()
