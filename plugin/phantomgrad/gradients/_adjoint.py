"""One recorded evaluation whose cotangent is transformed on the way back.

Note [Recorded evaluation]
The map is evaluated once, with grad, at the solution behind a barrier: `out = f(barrier(z))`. What the caller gets is
`Adjoint(out)`: the same values, but in backward its cotangent `g` becomes `v = transform(vjp, g)`, where `vjp`
runs through the recorded evaluation from `out` to `z`. `v` then goes on through the recorded evaluation by the caller's
own backward, which takes it to parameters, inputs and captured tensors alike, as any other operation would: hooks,
DistributedDataParallel and gradient accumulation notice nothing. The barrier swallows what that last pass sends to `z`.

The record keeps gradient edges (nodes of the graph), not tensors, so no reference cycle arises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from phantomgrad._solve import Map
from phantomgrad._state import Leaves

VJP = Callable[[Leaves], Leaves]
"""Maps a cotangent of the image to the cotangent of the point: the Jacobian's product from the left."""

Transform = Callable[[VJP, Leaves], Leaves]
"""Maps the solution's cotangent to the one that the recorded evaluation is differentiated with."""


def record(evaluate: Map, point: Leaves, transform: Transform) -> Leaves:
    """Evaluate the map at `point` and return its image with `transform` applied to cotangents."""
    tape, outputs = record_tape(evaluate, point)
    return cast(Leaves, _Adjoint.apply(tape.vjp, transform, *outputs))


def record_tape(evaluate: Map, point: Leaves) -> tuple[Tape, Leaves]:
    """Evaluate the map at `point`, behind a barrier: the recorded evaluation, and its image."""
    inputs = cast(Leaves, _Barrier.apply(*(leaf.detach().requires_grad_() for leaf in point)))
    outputs = evaluate(inputs)
    return Tape(inputs, outputs), outputs


class Tape:
    """The edges of one recorded evaluation."""

    def __init__(self, inputs: Leaves, outputs: Leaves) -> None:
        self._inputs = tuple(get_gradient_edge(leaf) for leaf in inputs)
        self._outputs: tuple[GradientEdge | None, ...] = tuple(
            get_gradient_edge(leaf) if leaf.requires_grad else None for leaf in outputs
        )
        self.device_type = inputs[0].device.type

    def vjp(self, cotangent: Leaves) -> Leaves:
        """`J^T cotangent`, by the recorded evaluation."""
        connected = [(edge, g) for edge, g in zip(self._outputs, cotangent, strict=True) if edge is not None]
        if not connected:
            return tuple(map(torch.zeros_like, cotangent))
        products = torch.autograd.grad(
            [edge for edge, _ in connected],
            self._inputs,
            [g for _, g in connected],
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        return tuple(
            torch.zeros_like(g) if product is None else product for product, g in zip(products, cotangent, strict=True)
        )


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
    def forward(ctx: Any, vjp: VJP, transform: Transform, *outputs: Tensor) -> Leaves:
        ctx.vjp, ctx.transform = vjp, transform
        # Copies, since autograd forbids changing a Function's views in place and callers may do that.
        return tuple(leaf.clone() for leaf in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.transform(ctx.vjp, cotangent))
