"""Jacobian regularisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from phantomgrad._cell import Cell
from phantomgrad._once_per_solve import OncePerSolve
from phantomgrad._options import check_integer
from phantomgrad._parametrizations import release
from phantomgrad.diagnostics._subject import Target, read_call


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions:
    """Options of the penalty, checked together."""

    probes: int

    def __post_init__(self) -> None:
        check_integer(self, "probes", minimum=1)


def jacobian_penalty(
    module: Target,
    *inputs: Any,
    probes: int = 1,
    generator: torch.Generator | None = None,
    state: int | str = 0,
    output: int | str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """A loss term, `||J||_F^2` over the number of state entries, that keeps the spectral radius of a cell down while it
    trains.

        z = cell(torch.zeros_like(x), x)
        loss = criterion(readout(z), y) + 0.1 * jacobian_penalty(cell, z, x)

    `J` is the cell's Jacobian at `z`, which is taken as constant; nothing is solved. Divided by the number of entries of
    the whole state it is the mean square of `J`'s singular values, whatever the batch and width, and no less than that
    of its eigenvalues' moduli (Bai et al., "Stabilizing Equilibrium Models by Jacobian Regularization", 2021).
    Estimated without bias from `probes` vectors `e` of random signs as the mean of `||J^T e||^2` (Hutchinson).

    Gradients reach the parameters, the inputs and what the cell has captured. Costs one evaluation, `probes`
    vector-Jacobian products, and differentiates twice: fused attention is replaced by plain operations here; a cell
    compiled by you cannot be used.

    inputs: the arguments of a call, in the state's place the solution that such a call has returned.
    probes: more of them mean less noise.
    generator: of the random signs; None takes the device's default one.
    state, output, kwargs: as in `spectral_radius`.
    """
    PenaltyOptions(probes=probes)
    call = read_call(module, inputs, kwargs, state=state, output=output, batch_dim=0)
    scope = None if call.module is None else OncePerSolve(call.module)
    cell = Cell(call.step, call.start, output=call.output, scope=scope)
    wants_grad = torch.is_grad_enabled()
    with torch.enable_grad():
        point = tuple(leaf.requires_grad_() for leaf in cell.start)
        torch.clear_autocast_cache()  # a cast cached without grad would cut the evaluation off from its parameter
        try:
            with sdpa_kernel(SDPBackend.MATH):
                image = cell(point)
        finally:
            if call.module is not None and call.attachment is None:
                release(call.module)
        connected = [leaf for leaf in image if leaf.requires_grad]
        dtype = torch.promote_types(point[0].dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=point[0].device)
        for _ in range(probes if connected else 0):
            signs = [_signs(leaf, generator) for leaf in connected]
            products = torch.autograd.grad(
                connected, point, signs, retain_graph=True, create_graph=wants_grad, allow_unused=True
            )
            for product in products:
                if product is not None:
                    total = total + product.to(dtype).square().sum()
    return total / (probes * sum(leaf.numel() for leaf in point))


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random signs, of variance 1."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like.dtype)
