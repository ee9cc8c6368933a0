"""Running statistics inside a map: one update per solve.

Note [Batch statistics]
In training mode BatchNorm updates its running statistics at every evaluation. During a solve each evaluation updates a
scratch copy instead, and one of them counts: the first after the solve, which is that at the solution, or the solver's last
where none follows. The module's own buffers change at the end of the call only, so no buffer that a graph has saved is
written to. A scratch copy knows the buffer it stands for, which another thread that finds the copy in the module takes
instead; a solve within an evaluation of this thread's takes the copy, as it would the module's own.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm

NormBase = batchnorm._NormBase
"""BatchNorm and InstanceNorm of any number of dimensions."""


def couples_samples(module: nn.Module) -> bool:
    """Whether it normalises with the statistics of a whole batch, or updates its own by them."""
    if not isinstance(module, NormBase):
        return False
    updates = module.training and module.track_running_stats
    return updates or (isinstance(module, batchnorm._BatchNorm) and (module.training or module.running_mean is None))


_NAMES = ("running_mean", "running_var", "num_batches_tracked")
_STANDS_FOR = "_phantomgrad_stands_for"
_Buffers = list[tuple[nn.Module, str, Tensor]]


def _seen_from_here(buffer: Tensor) -> Tensor:
    """The buffer itself, or what it stands for where another thread has put it into the module."""
    thread, stands_for = getattr(buffer, _STANDS_FOR, (threading.get_ident(), buffer))
    return buffer if thread == threading.get_ident() else _seen_from_here(stands_for)


class BatchStatistics:
    """The running statistics of the norms in training within one call."""

    def __init__(self, norms: list[NormBase]) -> None:
        self._own: _Buffers = [
            (norm, name, _seen_from_here(buffer))
            for norm in norms
            for name in _NAMES
            if (buffer := norm._buffers.get(name)) is not None
        ]
        self._counted: list[Tensor] | None = None
        self._solved = False
        self._decided = False

    @contextmanager
    def __call__(self) -> Generator[None, None, None]:
        """One evaluation, on scratch copies."""
        scratch = [buffer.clone() for _, _, buffer in self._own]
        for (norm, name, buffer), copy in zip(self._own, scratch, strict=True):
            setattr(copy, _STANDS_FOR, (threading.get_ident(), buffer))
            norm._buffers[name] = copy
        try:
            yield
        finally:
            for norm, name, buffer in self._own:
                norm._buffers[name] = buffer
        if not self._decided:
            self._counted = scratch
            self._decided = self._solved

    def solved(self) -> None:
        """The next evaluation is that of the solution."""
        self._solved = True

    @torch.no_grad()
    def commit(self) -> None:
        """Take over the statistics of the evaluation that counts."""
        for (_, _, buffer), counted in zip(self._own, self._counted or (), strict=False):
            buffer.copy_(counted)
        self._counted = None
        self._decided = True
