"""Classifying with as many solver steps as each photo's answer needs, and no more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phantomgrad import attachments

SIZES = 16
"""How many sizes the batch of the head may take: back ends prepare their operations anew for every size they have not met."""

if TYPE_CHECKING:
    from collections.abc import Callable

    from phantomgrad import Solver

    from .models.mdeq import MDEQ


@dataclass(frozen=True)
class EarlyAnswer:
    """What `classify_early` found."""

    logits: Tensor
    """Of shape (B, num_classes)."""
    steps: Tensor
    """The evaluations of the block that each image took, integers of shape (B,)."""


@torch.no_grad()
def classify_early(
    model: MDEQ, images: Tensor, *, lead: float = 0.18, first: int = 3, solver: Solver | None = None
) -> EarlyAnswer:
    """Logits of images `(B, 3, H, W)`, each solved until its answer has settled.

    After step `t` the block's output gives class probabilities `p_t`. An image stops at the first step from `first` on at which
    its likeliest class leads the next by at least `lead` times the last change of all probabilities,

        p_t[1st] - p_t[2nd] >= lead * sum |p_t - p_(t - 1)|,

    or at the tolerance or limit of `solver` (the model's own by default). Where a step makes the change `r` times as large as
    the one before, all further steps together change the probabilities by `r / (1 - r)` times the last change, so that a `lead`
    of this size leaves the answer as it is. The head runs once a step from `first - 1` on, for the images that are left, and once
    more for those that the solver stops; where the solver checks every few steps only, a change is that between two checks.
    The model is used in eval mode and left in the mode it was in.
    """
    if isinstance(lead, bool) or not (isinstance(lead, int | float) and 0 <= lead < math.inf):
        raise ValueError(f"lead must be a finite number of at least 0, got {lead!r}")
    if isinstance(first, bool) or not isinstance(first, int) or first < 2:
        raise ValueError(f"first must be an integer of at least 2, as a change needs a step before it, got {first!r}")
    [attachment] = attachments(model.block)
    watch = AnswerWatch(model.head, lead, first)
    was_training = model.training
    try:
        model.train(False)
        with attachment.using(solver=solver, on_step=watch):
            state = model.equilibrium(model.inject(images))
        solution = attachment.solution
        assert solution is not None
        return EarlyAnswer(watch.answers(state), solution.steps)
    finally:
        model.train(was_training)


class AnswerWatch:
    """An `on_step` that stops every image whose answer has settled, and keeps its logits."""

    def __init__(self, head: Callable[[tuple[Tensor, ...]], Tensor], lead: float, first: int) -> None:
        self._head, self._lead, self._first = head, lead, first
        self._settled: Tensor | None = None
        self._logits = self._probabilities = torch.empty(0)

    def __call__(self, step: int, state: tuple[Tensor, ...], residual: Tensor) -> Tensor | None:
        """Which images are to stop at this image of the block, bool of shape (B,); None before any can."""
        if step < self._first - 1:
            return None
        if self._settled is None:
            self._logits = self._head(state)
            self._probabilities = self._logits.float().softmax(1)
            self._settled = torch.zeros_like(residual, dtype=torch.bool)
            return None
        # Some settled images may go along, so that the size is one of a few.
        unit = -(-len(self._settled) // SIZES)
        left = len(self._settled) - int(self._settled.sum())
        rows = torch.argsort(self._settled.byte(), stable=True)[: -(-left // unit) * unit]
        logits = self._head(tuple(leaf[rows] for leaf in state))
        probabilities = logits.float().softmax(1)
        change = (probabilities - self._probabilities[rows]).abs().sum(1)
        settled = lead_of(probabilities) >= self._lead * change
        new = rows[:left]
        self._logits[new], self._probabilities[new] = logits[:left], probabilities[:left]
        self._settled[new] = settled[:left]
        return self._settled

    def answers(self, state: tuple[Tensor, ...]) -> Tensor:
        """Logits (B, num_classes) of all images, where `state` is what the solve returned."""
        if self._settled is None:
            return self._head(state)
        rows = (~self._settled).nonzero().squeeze(1)
        if len(rows):
            self._logits[rows] = self._head(tuple(leaf[rows] for leaf in state))
        return self._logits


def lead_of(probabilities: Tensor) -> Tensor:
    """By how much the likeliest class leads the next, of probabilities (..., classes); 1 where there is no other."""
    if probabilities.shape[-1] == 1:
        return torch.ones_like(probabilities[..., 0])
    two = probabilities.topk(2, dim=-1).values
    return two[..., 0] - two[..., 1]
