"""Checking and measuring leave modules, gradients and random numbers as they were."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checked_cells import diagonal, examine
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import Anderson, Implicit, NeumannPhantom, UnrolledPhantom, attach
from phantomgrad.diagnostics import check, spectral_radius


class Stateful(nn.Module):
    """Everything that a forward may change: running statistics, dropout, parametrizations, an own counter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4).double())
        self.inputs = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4).double())
        self.norm = nn.BatchNorm1d(4).double()
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("alias", self.norm.running_mean, persistent=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(0.3 * self.linear(self.dropout(z)) + self.norm(self.inputs(x)))


def _everything(cell: nn.Module) -> dict[str, Any]:
    return {
        "parameters": [(id(p), p._version, p.detach().clone(), p.grad) for p in cell.parameters()],
        "buffers": [
            (id(b), b._version, b.clone()) for m in cell.modules() for b in m._buffers.values() if b is not None
        ],
        "training": [m.training for m in cell.modules()],
        "dictionaries": [list(m.__dict__) for m in cell.modules()],
        "forwards": [m.__dict__.get("forward") for m in cell.modules()],
        "hooks": [len(m._forward_hooks) for m in cell.modules()],
        "generator": torch.get_rng_state(),
        "python": random.getstate(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b


MEASURES: dict[str, Callable[..., Any]] = {
    "check": lambda cell, *inputs: check(cell, *inputs, show=False, max_steps=10),
    "spectral_radius": lambda cell, *inputs: spectral_radius(cell, *inputs),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("attached", [False, True], ids=["bare", "attached"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.filterwarnings("ignore:The map couples the samples:UserWarning")
def test_nothing_changes(measure: str, attached: bool, training: bool) -> None:
    cell = Stateful().train(training)
    x = torch.randn(5, 3, dtype=DTYPE, requires_grad=True)
    start = torch.zeros(5, 4, dtype=DTYPE)
    gradient, solver = NeumannPhantom(steps=2), Anderson(max_steps=9)
    attachment = attach(cell, gradient, solver=solver, on_failure="ignore") if attached else None
    z = cell(start, x)
    z.sum().backward()  # .grad exists, and the graph has saved buffers
    pending = cell(start, x)
    grads = [None if p.grad is None else p.grad.clone() for p in cell.parameters()]
    solution = attachment.solution if attachment else None
    unconverged = attachment.unconverged if attachment else 0
    x_grad = x.grad.clone()
    before = _everything(cell)

    MEASURES[measure](cell, start, x)

    after = _everything(cell)
    for name, value in before.items():
        assert _same(value, after[name]), name
    for parameter, grad in zip(cell.parameters(), grads, strict=True):
        assert _same(parameter.grad, grad)
    assert torch.equal(x.grad, x_grad)
    assert x.requires_grad
    assert not start.requires_grad
    if attachment is not None:
        assert (attachment.gradient, attachment.solver) == (gradient, solver)
        assert attachment.solution is solution
        assert attachment.unconverged == unconverged
    pending.sum().backward()  # what the graph has saved is as it was


@pytest.mark.filterwarnings("ignore:The map couples the samples:UserWarning")
def test_nothing_changes_when_it_fails() -> None:
    class Failing(Stateful):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            super().forward(z, x)
            raise RuntimeError("broken")

    cell = Failing().train()
    before = _everything(cell)
    with pytest.raises(RuntimeError, match="broken"):
        check(cell, torch.zeros(5, 4, dtype=DTYPE), torch.ones(5, 3, dtype=DTYPE))
    assert _same(before, _everything(cell))


def test_bare_and_attached_modules_get_the_same_answers() -> None:
    bare = diagonal(-0.9, 0.4, 0.1)
    attached = copy.deepcopy(bare)
    attach(attached)
    reports = [examine(cell) for cell in (bare, attached)]
    assert float(reports[0].radius) == float(reports[1].radius)
    assert reports[0].damping == reports[1].damping
    assert [t.steps for t in reports[0].solvers] == [t.steps for t in reports[1].solvers]
    cosines = [{t.gradient: t.alignment.cosine for t in report.gradients} for report in reports]
    assert cosines[0] == cosines[1]
    assert reports[0].gradient is None
    assert reports[1].gradient == UnrolledPhantom()


def test_the_report_keeps_neither_module_nor_graph() -> None:
    cell = diagonal(0.5, 0.1)
    report = examine(cell)
    gone = weakref.ref(cell)
    del cell
    assert gone() is None
    assert "Linear" in str(report)


# torch 2.11 warns about its own use of torch.jit when the compiler is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_dropout_and_compiled_attachments_can_be_checked() -> None:
    cell = Stateful().train()
    cell.norm.eval()
    x, start = torch.randn(5, 3, dtype=DTYPE), torch.zeros(5, 4, dtype=DTYPE)
    report = check(cell, start, x, show=False)
    assert report.repeatable
    assert not report.coupled
    assert next(t.alignment.cosine for t in report.gradients if isinstance(t.gradient, Implicit)) > 0.999

    compiled = diagonal(0.5, 0.1)
    attach(compiled, compile=True)
    assert examine(compiled).settles
