"""Copies and pickles of attached modules, and that nothing keeps a module that is gone."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from attached_model import SOLVER, Cell, Model, batch, equilibrium_of
from torch import nn

from phantomgrad import (
    AttachError,
    Implicit,
    NeumannPhantom,
    OneStep,
    UnrolledPhantom,
    attach,
    attachments,
    is_attached,
)


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
def test_deepcopy_and_pickle_follow_the_copy(gradient: Any) -> None:
    model, x = Model(), batch()
    attach(model.cell, gradient, solver=SOLVER)
    model(x)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        [attachment] = attachments(other)
        assert attachment.module is other.cell
        assert attachment.gradient == gradient
        assert attachment.solution is None
        with torch.no_grad():
            other.cell.recurrent.weight.zero_()
            other.cell.recurrent.bias.zero_()
        torch.testing.assert_close(other(x), torch.tanh(x))
        torch.testing.assert_close(model(x), equilibrium_of(model.cell, x))
        other(x).sum().backward()
        assert other.cell.recurrent.weight.grad is not None
        assert model.cell.recurrent.weight.grad is None


def test_deepcopy_of_weight_norm_inside() -> None:
    model, x = Model(), batch()
    model.cell.recurrent = nn.utils.parametrizations.weight_norm(model.cell.recurrent)
    attach(model.cell, solver=SOLVER)
    model(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.cell.recurrent.parametrizations.weight.original0.zero_()
    other(x).sum().backward()
    assert other.cell.recurrent.parametrizations.weight.original0.grad is not None
    torch.testing.assert_close(model(x), equilibrium_of(model.cell, x))


def test_everything_is_freed_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        for gradient in (UnrolledPhantom(), NeumannPhantom(), Implicit()):
            model, x = Model(), batch(True)
            handle = attach(model.cell, gradient, solver=SOLVER)
            weight = weakref.ref(model.cell.recurrent.weight)
            z = model(x)
            z.sum().backward()
            model(x)
            del z, model
            assert weight() is None, gradient
            with pytest.raises(AttachError, match="no longer exists"):
                _ = handle.module
    finally:
        gc.enable()


def test_a_shallow_copy_is_not_attached_and_says_what_to_do() -> None:
    cell = Cell()
    attach(cell)
    shallow = copy.copy(cell)
    assert not is_attached(shallow)
    with pytest.raises(AttachError, match=r"Cell is a shallow copy of an attached module .* Use copy\.deepcopy"):
        attach(shallow)
