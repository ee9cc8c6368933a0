"""A solve's batch, from which converged samples are dropped.

Note [Compaction]
A converged sample is frozen, so what the map makes of it is known: evaluations may go on with the others alone, where the caller
has declared which inputs are to be narrowed with the state. All that leaves the solve (callbacks, traces, the outcome) has the
whole batch, the dropped samples as they were frozen. Every narrowing copies the state, those inputs and the solver's memory, so
one is made only when a good part of the present batch has converged; then there are few of them, whatever the batch. Some
converged samples stay, so that the size is one of a few.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from phantomgrad._progress import Outcome, Progress
from phantomgrad._samples import Samples
from phantomgrad._state import Leaves, Map

Narrow = Callable[[Tensor, Samples], Map | None]
"""The map for the samples at these positions of the whole batch alone; None where that would be another map."""

WORTHWHILE = 0.125
"""The part of the present batch that is dropped at least."""
SIZES = 16
"""How many sizes a batch may take: back ends prepare their operations anew for every size that they have not met lately."""


class Batch:
    """The samples that are evaluated, and all that the solve began with."""

    def __init__(self, evaluate: Map, samples: Samples, narrow: Narrow | None) -> None:
        self.evaluate = evaluate
        self.samples = samples
        """Those that are evaluated."""
        self.narrowed = False
        self._narrow = narrow
        self._whole = samples
        self._rows = torch.empty(0)
        self._point = self._image = ()
        self._best = torch.empty(0)
        self._outcome: Outcome | None = None

    def drop_converged(self, progress: Progress, point: Leaves, image: Leaves) -> Tensor | None:
        """Drop converged samples, where that pays, and return which of the present ones stay.

        `point` and `image` are every present sample's best iterate, at which it is frozen, and what the map makes of it.
        """
        if self._narrow is None:
            return None
        converged = progress.outcome.converged
        left = len(converged) - int(converged.sum())
        unit = -(-self._whole.count // SIZES)
        size = min(-(-left // unit) * unit, len(converged))
        if len(converged) - size < max(1.0, WORTHWHILE * len(converged)):
            return None
        kept = torch.argsort(converged.byte(), stable=True)[:size].sort().values
        rows = self._rows[kept] if self.narrowed else kept
        samples = self._whole.narrowed(len(rows))
        evaluate = self._narrow(rows, samples)
        if evaluate is None:
            self._narrow = None
            return None
        self._point, self._image, self._best, self._outcome = self.whole_result(progress, point, image)
        self._rows, self.narrowed, self.samples, self.evaluate = rows, True, samples, evaluate
        progress.select(kept)
        return kept

    def whole(self, image: Leaves) -> Leaves:
        """The present samples' `image` among those of the dropped ones."""
        return self._whole.replaced(self._image, self._rows, image) if self.narrowed else image

    def whole_residual(self, residual: Tensor) -> Tensor:
        """The present samples' `residual` among those of the dropped ones, shape (samples,)."""
        return self._best.index_copy(0, self._rows, residual) if self.narrowed else residual

    def present(self, chosen: Tensor) -> Tensor:
        """Of a flag for every sample, shape (samples,), those of the present ones."""
        return chosen[self._rows] if self.narrowed else chosen

    def whole_result(self, progress: Progress, point: Leaves, image: Leaves) -> tuple[Leaves, Leaves, Tensor, Outcome]:
        """Best points, their images and residuals, and what has become of every sample."""
        outcome = progress.outcome
        if self._outcome is None:
            return point, image, progress.best, outcome
        points = self._whole.replaced(self._point, self._rows, point)
        outcome = self._outcome.replaced(self._rows, outcome)
        return points, self.whole(image), self.whole_residual(progress.best), outcome
