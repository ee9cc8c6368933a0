"""The weights that are validated and saved: a moving average of those being trained."""

from __future__ import annotations

import torch

from phantomgrad_hub.models.mdeq import MDEQ


class WeightAverage:
    """Keeps `model` at the exponential moving average of another model of the same kind.

    `decay` 0 makes it a plain copy, taken when `follow` is called. Early in training the average is shorter,
    `(1 + n) / (10 + n)` after `n` updates, so that it does not hold on to the random start. Buffers are copied.
    """

    def __init__(self, model: MDEQ, decay: float) -> None:
        self.model = model.requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, trained: MDEQ, updates: int) -> None:
        """Take in the weights after `updates` optimizer steps."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for own, other in zip(self.model.parameters(), trained.parameters(), strict=True):
            own.lerp_(other, 1 - decay)

    @torch.no_grad()
    def follow(self, trained: MDEQ) -> None:
        """Bring buffers up to date, and the weights as well where there is no averaging."""
        for own, other in zip(self.model.buffers(), trained.buffers(), strict=True):
            own.copy_(other)
        if not self.decay:
            for own, other in zip(self.model.parameters(), trained.parameters(), strict=True):
                own.copy_(other)
