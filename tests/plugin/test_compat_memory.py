"""Nothing stays behind: no graph after a step, no growth over many, no model after `del`, all without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from compat import GRADIENTS, Cell, attached, batch, loss
from torch import Tensor

from phantomgrad import FixedPointIteration, Gradient, Implicit, UnrolledPhantom


class _Token:
    """Lives as long as a node of a graph."""


class _Node(torch.autograd.Function):
    """Identity that leaves a token in the graph."""

    alive: ClassVar[weakref.WeakSet[_Token]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.token = _Token()
        _Node.alive.add(ctx.token)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Watched(Cell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return _Node.apply(super().forward(z, x))  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _without_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_no_graph_and_no_object_is_left_by_500_steps(gradient: Gradient) -> None:
    model, attachment = attached(gradient, cell=Watched)
    if isinstance(attachment.solver, FixedPointIteration):
        attachment.solver = FixedPointIteration(rtol=1e-2)
    if isinstance(gradient, Implicit):
        attachment.gradient = Implicit(rtol=1e-2)
    x = batch()
    loss(
        model, x
    ).backward()  # the first use of activation checkpointing imports, and leaves garbage of the import once
    gc.collect()
    objects: list[int] = []
    for step in range(500):
        value = loss(model, x)
        assert _Node.alive
        if step % 2:  # a loss that nobody differentiates leaves as little
            value.backward()
        del value
        model.zero_grad()
        assert not _Node.alive
        if step in (99, 499):
            if gradient == UnrolledPhantom(recompute=True):
                gc.collect()  # each torch.utils.checkpoint leaves seven small objects of its own in a cycle
            objects.append(len(gc.get_objects()))
    assert objects[1] - objects[0] < 20


@pytest.mark.parametrize("backward", ["none", "once", "twice", "create_graph"])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_deleting_the_model_frees_it_and_every_graph(gradient: Gradient, backward: str) -> None:
    model, attachment = attached(gradient, cell=Watched)
    weights = [weakref.ref(p) for p in model.parameters()]
    value = loss(model, batch())
    if backward == "create_graph":
        grads = torch.autograd.grad(value, list(model.cell.parameters()), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        del grads
    elif backward != "none":
        value.backward(retain_graph=backward == "twice")
    if backward == "twice":
        value.backward()
    with torch.no_grad():
        model(batch())
    handle = weakref.ref(attachment)
    del model, attachment, value
    assert [weight() for weight in weights] == [None] * len(weights)
    assert handle() is None
    assert not _Node.alive


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_a_failed_step_leaves_nothing_either(gradient: Gradient) -> None:
    class Failing(Watched):
        fail = False

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            if self.fail and torch.is_grad_enabled():
                raise RuntimeError("out of memory, say")
            return super().forward(z, x)

    model, _ = attached(gradient, cell=Failing)
    model.cell.fail = True
    with pytest.raises(RuntimeError, match="out of memory, say"):
        loss(model, batch())
    model.cell.fail = False
    loss(model, batch()).backward()
    weight = weakref.ref(model.cell.recurrent.weight)
    del model
    assert weight() is None
    assert not _Node.alive
