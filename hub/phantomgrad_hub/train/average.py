"""The weights that are validated and saved: a moving average of those being trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from phantomgrad_hub.models.mdeq import MDEQ

from .processes import own_part, sharded_like


class WeightAverage:
    """The exponential moving average of the weights of `trained`, and `model`, a whole copy of it as of the last `follow`.

    `decay` 0 makes it a plain copy. Early in training the average is shorter, `(1 + n) / (10 + n)` after `n` updates, so that
    it does not hold on to the random start. Buffers are copied, from the first process. Where `trained` is sharded so is the
    average; `follow` is called by all processes.
    """

    def __init__(self, model: MDEQ, trained: MDEQ, decay: float) -> None:
        self.model = model.requires_grad_(False).eval()
        self.decay = decay
        self._trained = trained
        self._spread()

    def _spread(self) -> None:
        """Take the weights of `model` as the average."""
        pairs = zip(self.model.parameters(), self._trained.parameters(), strict=True)
        self._average: list[Tensor] = [own_part(sharded_like(own, other)) for own, other in pairs]

    def load(self, stored: Mapping[str, Tensor]) -> None:
        """Go on from a state dict of `model`."""
        self.model.load_state_dict(stored)
        self._spread()

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the weights after `updates` optimizer steps."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for own, other in zip(self._average, self._trained.parameters(), strict=True):
            own.lerp_(own_part(other), 1 - decay)

    @torch.no_grad()
    def follow(self) -> None:
        """Bring `model` up to date."""
        for own, other in zip(self.model.buffers(), self._trained.buffers(), strict=True):
            own.copy_(other)
            if (
                distributed.is_available() and distributed.is_initialized()
            ):  # every process has its own, and the first one's are stored
                distributed.broadcast(own, 0)
        for own, average, other in zip(self.model.parameters(), self._average, self._trained.parameters(), strict=True):
            latest = average if self.decay else own_part(other)
            own.copy_(_gathered(latest, other) if isinstance(other, DTensor) else latest)


def _gathered(part: Tensor, other: DTensor) -> Tensor:
    """The whole of a tensor that is in parts like `other`."""
    layout = {"shape": other.shape, "stride": other.stride()}
    return DTensor.from_local(part, other.device_mesh, other.placements, **layout).full_tensor()  # type: ignore[arg-type]
