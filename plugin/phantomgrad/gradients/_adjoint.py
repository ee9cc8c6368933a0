"""One recorded evaluation whose cotangent is transformed on the way back.

Note [Recorded evaluation]
The map is evaluated once, with grad, at the solution behind a barrier: `out = f(barrier(z))`. What the caller gets is
`Adjoint(out)`: the same values, but in backward its cotangent `g` becomes `v = transform(vjp, g)`, where `vjp`
runs through the recorded evaluation from `out` to `z`. `v` then goes on through the recorded evaluation by the caller's
own backward, which takes it to parameters, inputs and captured tensors alike, as any other operation would: hooks,
DistributedDataParallel and gradient accumulation notice nothing. The barrier swallows what that last pass sends to `z`.

Of a compiled map the products have an evaluation of their own, see Note [Compiled cells].

The record keeps gradient edges (nodes of the graph), not tensors, so no reference cycle arises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from phantomgrad._cell import Cell
from phantomgrad._errors import PhantomGradError
from phantomgrad._state import Leaves, Map
from phantomgrad._transforms import in_function_transform, keeping_buffers
from phantomgrad.gradients._engine import vector_jacobian_products
from phantomgrad.gradients._saved import SavedOnce

VJP = Callable[[Leaves], Leaves]
"""Maps a cotangent of the image to the cotangent of the point: the Jacobian's product from the left."""

Transform = Callable[[VJP, Leaves], Leaves]
"""Maps the solution's cotangent to the one that the recorded evaluation is differentiated with."""


def record(evaluate: Map, point: Leaves, transform: Transform, *, products: int | None = None) -> Leaves:
    """Evaluate the map at `point` and return its image with `transform` applied to cotangents.

    `products` is how many the transform makes at most; None where that is not known.
    """
    tape, outputs = record_tape(evaluate, point, products=products)
    return cast(Leaves, _Adjoint.apply(tape, transform, *outputs))


def record_tape(evaluate: Map, point: Leaves, *, products: int | None = None) -> tuple[Tape, Leaves]:
    """Evaluate the map at `point`, behind a barrier: the recorded evaluation, and its image."""
    if in_function_transform():
        raise PhantomGradError(BACKWARD_ONLY)
    cell = evaluate if isinstance(evaluate, Cell) else None
    worthwhile = products is None or products > 1  # an evaluation more costs about as much as it spares one product
    held = cell.holding_constants() if cell is not None and worthwhile else None
    inputs, saved = _behind_a_barrier(point), SavedOnce.where_hooked()
    with saved.recording() if saved else nullcontext():
        outputs = evaluate(inputs) if held is None else held(inputs)
    tape = Tape(inputs, outputs, saved, compiled=cell is not None and cell.compiled)
    # Last, so that what the map returns beside the state is that of the evaluation with the whole graph.
    return tape, outputs if held is None else evaluate(_behind_a_barrier(point))


def _behind_a_barrier(point: Leaves) -> Leaves:
    return cast(Leaves, _Barrier.apply(*(leaf.detach().requires_grad_() for leaf in point)))


BACKWARD_ONLY = (
    "This gradient works in backward only: in torch.func.grad, vjp and jvp, and in forward mode, take UnrolledPhantom() or "
    "OneStep(), or differentiate with torch.autograd.grad."
)


class Tape:
    """The edges of one recorded evaluation."""

    def __init__(self, inputs: Leaves, outputs: Leaves, saved: SavedOnce | None, *, compiled: bool) -> None:
        self._saved = saved
        self._compiled = compiled
        self._inputs = tuple(get_gradient_edge(leaf) for leaf in inputs)
        self._connected = [index for index, leaf in enumerate(outputs) if leaf.requires_grad]
        self._outputs = tuple(get_gradient_edge(outputs[index]) for index in self._connected)
        self._all_connected = len(self._connected) == len(outputs)
        self.device_type = inputs[0].device.type

    def vjp(self, cotangent: Leaves) -> Leaves:
        """`J^T cotangent`, by the recorded evaluation."""
        if not self._connected:
            return tuple(map(torch.zeros_like, cotangent))
        try:
            connected = cotangent if self._all_connected else tuple(cotangent[index] for index in self._connected)
            products = vector_jacobian_products(self._outputs, self._inputs, connected)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise PhantomGradError(
                "Activation checkpointing inside the cell needs use_reentrant=False: the reentrant kind cannot be "
                "differentiated several times."
            ) from error
        return tuple(
            torch.zeros_like(g) if product is None else product for product, g in zip(products, cotangent, strict=True)
        )

    def products(self) -> AbstractContextManager[Any]:
        """Around all products of one backward pass; see Note [Saved tensors]."""
        if self._saved is None and not self._compiled:
            return nullcontext()
        context = ExitStack()
        if self._saved is not None:
            context.enter_context(self._saved.unpacked())
        if self._compiled:
            context.enter_context(keeping_buffers())
        return context


class _Barrier(torch.autograd.Function):
    """Identity whose output requires grad and whose backward sends nothing on."""

    @staticmethod
    def forward(ctx: Any, *leaves: Tensor) -> Leaves:
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[None, ...]:
        return (None,) * len(cotangent)


class _Adjoint(torch.autograd.Function):
    """Identity whose backward applies the transform; see Note [Recorded evaluation]."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, transform: Transform, *outputs: Tensor) -> Leaves:
        ctx.tape, ctx.transform = tape, transform
        # Copies, since autograd forbids changing a Function's views in place and callers may do that.
        return tuple(leaf.clone() for leaf in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.tape.products():
            return (None, None, *ctx.transform(ctx.tape.vjp, cotangent))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Leaves:
        raise PhantomGradError(BACKWARD_ONLY)
