"""Attaching and removing: what of the module stays as it is, and what its handle changes."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import pytest
import torch
from attached_model import SOLVER, Cell, Model, batch, equilibrium_of
from torch import Tensor, nn

import phantomgrad
from phantomgrad import (
    Anderson,
    AttachError,
    FixedPointIteration,
    Implicit,
    NeumannPhantom,
    OneStep,
    attach,
    attachments,
    equilibrium,
    is_attached,
)


def test_the_call_returns_the_equilibrium() -> None:
    model, x = Model(), batch()
    attach(model.cell, solver=SOLVER)
    torch.testing.assert_close(model(x), equilibrium_of(model.cell, x))


def test_state_dict_parameters_type_and_repr_stay_as_they_are() -> None:
    bare, attached = Model(), Model()
    attached.load_state_dict(bare.state_dict())
    parameters = [id(p) for p in attached.parameters()]
    attach(attached.cell)
    assert list(attached.state_dict()) == list(bare.state_dict())
    for key, value in bare.state_dict().items():
        assert torch.equal(attached.state_dict()[key], value)
    assert [id(p) for p in attached.parameters()] == parameters
    assert type(attached.cell) is Cell
    assert repr(attached) == repr(bare)
    bare.load_state_dict(attached.state_dict())
    attached.load_state_dict(bare.state_dict())
    assert inspect.signature(attached.cell.forward) == inspect.signature(bare.cell.forward)


def test_remove_restores_the_module_exactly() -> None:
    model, x = Model(), batch()
    before = dict(model.cell.__dict__)
    once = model.cell(x, x)
    attachment = attach(model.cell)
    assert is_attached(model.cell)
    attachment.remove()
    attachment.remove()
    assert not is_attached(model.cell)
    assert list(model.cell.__dict__) == list(before)
    assert all(model.cell.__dict__[name] is value for name, value in before.items())
    assert torch.equal(model.cell(x, x), once)


def test_remove_gives_back_an_instance_forward_and_parametrizations() -> None:
    cell, x = Cell(), batch()
    cell.recurrent = nn.utils.parametrizations.weight_norm(cell.recurrent)
    own = lambda z, x: 0.5 * z + x  # noqa: E731
    cell.forward = own  # type: ignore[method-assign]
    with attach(cell, solver=SOLVER) as attachment:
        torch.testing.assert_close(cell(torch.zeros_like(x), x), 2 * x)
        assert torch.equal(attachment.step(x, x), 1.5 * x)
    assert cell.__dict__["forward"] is own
    del cell.forward
    with attach(cell):
        cell(torch.zeros_like(x), x)
    for module in cell.modules():
        assert "forward" not in module.__dict__


def test_disabled_and_step_are_the_original_evaluation() -> None:
    cell, x = Cell(), batch()
    once = cell(x, x)
    attachment = attach(cell)
    assert torch.equal(attachment.step(x, x), once)
    with attachment.disabled():
        assert torch.equal(cell(x, x), once)
    assert not torch.equal(cell(x, x), once)


def test_attachments_yields_every_one_and_settings_are_assignable() -> None:
    model = nn.ModuleList([Model(), Cell(), nn.Linear(2, 2)])
    first, second = attach(model[0].cell), attach(model[1], OneStep())  # type: ignore[arg-type]
    assert list(attachments(model)) == [first, second]
    for attachment in attachments(model):
        attachment.gradient = NeumannPhantom(steps=3)
        attachment.solver = Anderson()
    assert first.gradient == second.gradient == NeumannPhantom(steps=3)
    assert first.solver == Anderson()
    assert first.eval_solver is None
    first.eval_solver = FixedPointIteration(max_steps=3)
    first.solver = FixedPointIteration(max_steps=4)
    assert first.eval_solver == FixedPointIteration(max_steps=3)
    with pytest.raises(TypeError, match="gradient must be a phantomgrad Gradient object"):
        first.gradient = "upg"  # type: ignore[assignment]


def test_eval_solver_holds_where_grad_mode_is_off_whatever_training_says() -> None:
    cell, x = Cell(), batch()
    options: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, "keep": "last"}
    attachment = attach(
        cell,
        solver=FixedPointIteration(max_steps=3, **options),
        eval_solver=FixedPointIteration(max_steps=7, **options),
        on_failure="ignore",
    )
    for training in (True, False):
        cell.train(training)
        cell(torch.zeros_like(x), x)
        assert attachment.solution is not None
        assert attachment.solution.steps.tolist() == [3, 3, 3]
        with torch.no_grad():
            cell(torch.zeros_like(x), x)
        assert attachment.solution.steps.tolist() == [7, 7, 7]


def test_using_holds_for_its_thread_only_and_solutions_are_per_thread() -> None:
    model, x = Model(), batch()
    attachment = attach(model.cell, solver=SOLVER)
    inside, seen = threading.Event(), threading.Event()
    other_steps: list[int] = []

    def other() -> None:
        inside.wait()
        assert attachment.solution is None
        model(x)
        assert attachment.solution is not None
        other_steps.append(int(attachment.solution.steps.max()))
        seen.set()

    thread = threading.Thread(target=other)
    thread.start()
    fixed = FixedPointIteration(max_steps=2, rtol=0.0, atol=0.0, keep="last")
    with pytest.warns(phantomgrad.NotConvergedWarning), attachment.using(solver=fixed, gradient=OneStep()):
        inside.set()
        seen.wait()
        model(x)
        assert attachment.solution is not None
        assert attachment.solution.steps.tolist() == [2, 2, 2]
        with torch.no_grad():
            model(x)
        assert attachment.solution.steps.tolist() == [2, 2, 2]
    thread.join()
    assert other_steps[0] > 2
    assert attachment.solver == SOLVER


def test_equilibrium_decorates_classes_and_functions() -> None:
    @equilibrium(OneStep(), solver=SOLVER)
    class Decorated(Cell):
        pass

    cell, x = Decorated(), batch()
    assert is_attached(cell)
    torch.testing.assert_close(cell(torch.zeros_like(x), x), equilibrium_of(cell, x))

    @equilibrium(Implicit(), solver=SOLVER)
    def settle(z: Tensor, x: Tensor) -> Tensor:
        """Halve and add."""
        return 0.5 * z + x

    assert settle.__doc__ == "Halve and add."
    inputs = batch(True)
    z = settle(torch.zeros_like(inputs), inputs)
    torch.testing.assert_close(z, 2 * inputs)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), inputs)[0], torch.full_like(x, 2.0))
    with pytest.raises(AttachError, match=r"^@equilibrium decorates an nn\.Module subclass or a function, got a Cell"):
        equilibrium()(Cell())
    with pytest.raises(AttachError, match=r"has no argument state=1: its forward takes \(z\)"):
        equilibrium(state=1)(lambda z: z)


def test_the_handle_of_a_module_that_is_gone_can_be_printed() -> None:
    attachment = attach(Cell())
    assert repr(attachment).startswith("Attachment(a module that no longer exists, UnrolledPhantom(")
