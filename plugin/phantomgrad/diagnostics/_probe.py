"""One call of an attached module, kept until its cotangent is known and it can be measured."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from phantomgrad._attach import Attachment
from phantomgrad._state import Leaves, State, Structure
from phantomgrad.diagnostics._alignment import ExactGradient, gradient_of
from phantomgrad.diagnostics._linearised import linearise
from phantomgrad.diagnostics._spectrum import RadiusOptions, radius
from phantomgrad.diagnostics._subject import examine

_RADIUS = RadiusOptions(damping=1.0, rtol=1e-2, max_products=100)


class Probe:
    """Copies of a call's arguments, and the cotangent that backward sends to its result."""

    def __init__(
        self, attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, step: int
    ) -> None:
        self.step = step
        """The forward pass of the call."""
        self._args, self._kwargs = _copied(args), _copied(kwargs)
        state: State = output if attachment._output is None else output[attachment._output]
        leaves = Structure.of(state).flatten(state) or ()
        self._shapes = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        self._grads: dict[int, Tensor] = {}
        for i, leaf in enumerate(leaves):
            if leaf.requires_grad:
                # One hook for all (register_multi_grad_hook) would keep the graph alive until the garbage collector runs.
                leaf.register_hook(partial(self._keep, i))

    def _keep(self, index: int, grad: Tensor) -> None:
        self._grads[index] = grad.detach().clone()

    @property
    def is_ready(self) -> bool:
        """Whether backward has been through the call."""
        return bool(self._grads)

    @property
    def cotangent(self) -> Leaves:
        """What backward has sent to the result; zero where nothing came."""
        return tuple(
            self._grads[i] if i in self._grads else torch.zeros(shape, dtype=dtype, device=device)
            for i, (shape, dtype, device) in enumerate(self._shapes)
        )

    def measure(self, module: nn.Module) -> dict[str, float]:
        """Spectral radius and gradient cosine of the call, with the module's weights as they are at the moment."""
        with examine(
            module, self._args, self._kwargs, solver=None, state=0, output=None, batch_dim=0, on_failure="ignore"
        ) as subject:
            at = linearise(subject, warn_of_coupling=False)
            measured = {"spectral_radius": float(radius(at, _RADIUS, seed=self.step))}
            if subject.variables and subject.gradient is not None:
                cotangent = self.cotangent
                exact = ExactGradient(at, cotangent)
                own = gradient_of(subject, subject.gradient, cotangent)
                cosine = exact.compare(subject.gradient, own).cosine
                measured["gradient_cosine"] = cosine if exact.is_exact else math.nan
        return measured


def _copied(value: Any) -> Any:
    """`value` with its tensors copied, since the caller may reuse their memory, and cut off from their history."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if type(value) is dict:
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_copied(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
