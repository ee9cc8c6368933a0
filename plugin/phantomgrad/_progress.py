"""What has become of each sample during a solve: still running, converged or diverged, and its best residual.

Everything is kept on the device; one transfer to the host a check says which of the rare cases to look at. While every
sample is still running, that is two comparisons and one reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Agree = Callable[[Tensor], Tensor]
"""Combines host decisions over processes: a bool tensor becomes the logical and of everybody's."""


@dataclass(frozen=True)
class Check:
    """What one check found."""

    residual: Tensor
    """The relative residual of every sample."""
    improved: Tensor | None
    """The samples whose iterate is the best so far; None where all are."""
    stopped: Tensor | None
    """The samples that go no further; None where there are none."""


class Progress:
    """The samples of one solve.

    A sample has converged when `gap <= atol + rtol * scale`, and diverged when `gap` or `scale` is not finite.
    """

    def __init__(
        self,
        like: Tensor,
        *,
        rtol: float,
        atol: float,
        keep: Literal["best", "last"],
        stop_early: bool,
        agree: Agree | None,
    ) -> None:
        self.best = torch.full_like(like, torch.inf)
        """The relative residual of each sample's best iterate."""
        self.all_converged = self.any_diverged = self.all_stopped = False
        self._rtol, self._atol = rtol, torch.full_like(like, atol)
        self._tiny = torch.finfo(like.dtype).tiny
        self._keep, self._stop_early, self._agree = keep, stop_early, agree
        self._steps = 0
        # Made when a sample first stops; until then all are running.
        self._outcome: Outcome | None = None

    @property
    def outcome(self) -> Outcome:
        """What has become of every sample so far."""
        if self._outcome is not None:
            return self._outcome
        none = torch.zeros_like(self.best, dtype=torch.bool)
        return Outcome(none, none, torch.full_like(self.best, self._steps, dtype=torch.int64))

    def select(self, rows: Tensor) -> None:
        """Go on with the samples `rows` alone."""
        self.best, self._atol = self.best[rows], self._atol[rows]
        if self._outcome is not None:
            self._outcome = self._outcome.select(rows)

    def check(self, step: int, gap: Tensor, scale: Tensor) -> Check:
        """Take in `||f(z) - z||` and `||f(z)||` of every sample at a step."""
        residual = gap / scale.clamp_min(self._tiny)
        unmet = gap > torch.add(self._atol, scale, alpha=self._rtol)
        finite = (gap + scale) < torch.inf  # the norm of an image may overflow before its entries do
        improved = finite if self._keep == "last" else residual <= self.best
        if self._outcome is None:
            all_unmet, all_finite, all_improved = self._ask(unmet, finite, improved)
            if all_unmet and all_finite:
                self._steps = step
                return self._found(residual, None if all_improved else improved, None)
        before = self.outcome
        stopped = before.stopped(self._stop_early)
        diverged = before.diverged | ~finite
        converged = (before.converged & stopped) | ~(unmet | diverged)
        self._steps = step
        self._outcome = after = Outcome(converged, diverged, torch.where(stopped, before.steps, step))
        # A sample that has stopped is evaluated again at its best iterate, which is as good as it was. One that has just
        # converged is taken here: an absolute tolerance may let it with a larger relative residual than an earlier one.
        improved = finite & ((improved & (~stopped | (residual == self.best))) | (converged & ~stopped))
        stopped = after.stopped(self._stop_early)
        flags = self._ask(converged, ~diverged, stopped, improved, ~stopped)
        self.all_converged, none_diverged, self.all_stopped, all_improved, all_running = flags
        self.any_diverged = not none_diverged and not torch.compiler.is_exporting()
        return self._found(residual, None if all_improved else improved, None if all_running else stopped)

    def accept(self, chosen: Tensor, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """Let the running samples among `chosen` stop at this check, as if they had converged.

        Returns those, and all that have stopped by now (None where there are none).
        """
        before = self.outcome
        accepted = chosen & ~before.stopped(early=True)
        self._outcome = after = Outcome(before.converged | accepted, before.diverged, before.steps)
        self.best = torch.where(accepted, residual, self.best)
        stopped = after.stopped(early=True)
        self.all_converged, self.all_stopped, all_running = self._ask(after.converged, stopped, ~stopped)
        return accepted, None if all_running else stopped

    def _ask(self, *conditions: Tensor) -> list[bool]:
        """Whether each condition holds for all samples, of all processes: the only transfer to the host."""
        if torch.compiler.is_exporting():
            return [False] * len(conditions)  # what is traced has no values: every sample by itself, to the last step
        flags = torch.stack(conditions).all(dim=1)
        return (flags if self._agree is None else self._agree(flags)).tolist()

    def _found(self, residual: Tensor, improved: Tensor | None, stopped: Tensor | None) -> Check:
        self.best = residual if improved is None else torch.where(improved, residual, self.best)
        return Check(residual, improved, stopped)


@dataclass(frozen=True)
class Outcome:
    """Per sample: whether it has converged or diverged, and after how many steps."""

    converged: Tensor
    diverged: Tensor
    steps: Tensor

    def select(self, rows: Tensor) -> Outcome:
        """That of the samples `rows` alone."""
        return Outcome(self.converged[rows], self.diverged[rows], self.steps[rows])

    def replaced(self, rows: Tensor, chosen: Outcome) -> Outcome:
        """A copy with the samples `rows` replaced by `chosen`."""
        return Outcome(
            self.converged.index_copy(0, rows, chosen.converged),
            self.diverged.index_copy(0, rows, chosen.diverged),
            self.steps.index_copy(0, rows, chosen.steps),
        )

    def stopped(self, early: bool) -> Tensor:
        return self.converged | self.diverged if early else self.diverged
