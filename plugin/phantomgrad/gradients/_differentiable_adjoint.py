"""The recorded evaluation of an exact gradient, which can itself be differentiated, to any order.

Note [Higher derivatives]
A first backward works as in Note [Recorded evaluation]. A backward that builds a graph must give a result that depends
on the solution as well as on what the map takes from outside. The map is then evaluated again, at the
solution that the caller holds (which is connected: its own gradient is this one) and on aliases of the outside tensors;
the adjoint equation `v = J^T v + g` is another fixed-point problem, solved with the same kind of gradient, hence
differentiable in turn; and `(df/dtheta)^T v` is returned for the outside tensors themselves. Without aliases, that last
product would also run back through the solution and into this function again, without end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

from phantomgrad._errors import PhantomGradError
from phantomgrad._state import Leaves, Map
from phantomgrad.gradients._adjoint import BACKWARD_ONLY, VJP, Tape, record_tape
from phantomgrad.gradients._outside import Aliasing, Discovery, aliases, reaches_a_leaf

SolveAdjoint = Callable[[VJP, Leaves], tuple[Leaves, Leaves]]
"""Solves `v = vjp(v) + g` for a cotangent `g`: a point and its image, which differ by the residual."""


def record_exact(
    evaluate: Map, point: Leaves, solve_adjoint: SolveAdjoint, *, outside: Leaves | None = None, twice: bool = True
) -> Leaves:
    """Evaluate the map at `point` and return its image with the exact gradient, differentiable to any order.

    `outside` are the tensors that the map depends on, where the caller knows them all; otherwise they are found. With
    `twice=False` they are not looked for, and a backward that builds a graph is refused.
    """
    if outside is None and twice:
        with Discovery() as discovery:
            tape, outputs = record_tape(evaluate, point)
        outside = discovery.tensors
    else:
        tape, outputs = record_tape(evaluate, point)
    known = tuple(tensor for tensor in outside or () if tensor.requires_grad)
    exact = _Exact(evaluate, tape, solve_adjoint, twice=twice)
    return cast(Leaves, _ExactAdjoint.apply(exact, len(outputs), *outputs, *known))


class _Exact:
    """What the backward pass of an exact gradient needs."""

    def __init__(self, evaluate: Map, tape: Tape, solve_adjoint: SolveAdjoint, *, twice: bool) -> None:
        self._evaluate = evaluate
        self._tape = tape
        self._solve_adjoint = solve_adjoint
        self._twice = twice
        self._autocast = _running_autocast(tape.device_type)

    def adjoint(self, cotangent: Leaves) -> Leaves:
        """The exact adjoint `v = (I - J)^-T g`."""
        with self._tape.products():
            return self._solve_adjoint(self._tape.vjp, cotangent)[1]

    def differentiable(self, solution: Leaves, outside: Leaves, cotangent: Leaves) -> tuple[Tensor | None, ...]:
        """`(df/dtheta)^T v` for each outside tensor, with a graph."""
        if not self._twice:
            raise PhantomGradError(
                "Second derivatives through a compiled cell are not available: torch refuses them. Attach with compile=False."
            )
        with self._autocast():
            v = self._connected_adjoint(solution, outside, cotangent)
            point = aliases(solution)
            with Aliasing(outside) as mode:
                image = self._evaluate(point)
        if reaches_a_leaf(image, (*point, *mode.aliases)):
            raise PhantomGradError(
                "The map uses a tensor that requires grad in a way that its second derivative cannot follow, such as a "
                "custom autograd Function applied to a captured tensor, or an attached module inside the cell. Pass the tensor "
                "as an input, take Backprop(), or use create_graph=False."
            )
        return _vjp(image, mode.aliases, v)

    def _connected_adjoint(self, solution: Leaves, outside: Leaves, cotangent: Leaves) -> Leaves:
        def adjoint_map(v: Leaves) -> Leaves:
            point = aliases(solution)
            products = _vjp(self._evaluate(point), point, v)
            return tuple(
                g.clone() if product is None else product + g for product, g in zip(products, cotangent, strict=True)
            )

        with torch.no_grad(), self._tape.products():
            point, _ = self._solve_adjoint(self._tape.vjp, cotangent)
        return record_exact(adjoint_map, point, self._solve_adjoint, outside=(*solution, *outside, *cotangent))


def _vjp(outputs: Leaves, inputs: Leaves, cotangent: Leaves) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian product of an evaluation, with a graph; None for inputs that play no part."""
    connected = [(leaf, g) for leaf, g in zip(outputs, cotangent, strict=True) if leaf.requires_grad]
    if not connected or not inputs:
        return (None,) * len(inputs)
    leaves, cotangents = zip(*connected, strict=True)
    return torch.autograd.grad(leaves, inputs, cotangents, create_graph=True, allow_unused=True)


class _ExactAdjoint(torch.autograd.Function):
    """Identity on the outputs of an evaluation; the outside tensors take part in derivatives of the gradient only."""

    @staticmethod
    def forward(ctx: Any, exact: _Exact, count: int, *tensors: Tensor) -> Leaves:
        ctx.exact, ctx.count = exact, count
        # Copies, since autograd forbids changing a Function's views in place and callers may do that.
        solution = tuple(leaf.clone() for leaf in tensors[:count])
        ctx.save_for_backward(*solution, *tensors[count:])
        return solution

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            outside = len(ctx.needs_input_grad) - 2 - ctx.count
            return (None, None, *ctx.exact.adjoint(cotangent), *(None,) * outside)
        saved: Leaves = ctx.saved_tensors
        solution, tensors = saved[: ctx.count], saved[ctx.count :]
        return (None, None, *(None,) * ctx.count, *ctx.exact.differentiable(solution, tensors, cotangent))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Leaves:
        raise PhantomGradError(BACKWARD_ONLY)


def _running_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which autocast is as it is now."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=False)
