"""The interface of a solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from phantomgrad._options import check_choice, check_integer, check_number
from phantomgrad._samples import Samples
from phantomgrad._state import Leaves

_DEFAULT_RTOL = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A method that finds `z = f(z)` with one evaluation of `f` per step.

    The driver evaluates `f`, measures residuals, keeps the best iterate and decides when to stop; a solver only says
    where to evaluate next. To write one, subclass as a frozen keyword-only dataclass and implement `advance`, and
    `start` if it remembers anything between steps.

    A sample has converged when `||f(z) - z|| <= atol + rtol * ||f(z)||`.
    """

    max_steps: int = 50
    """The most evaluations of one solve; 0 takes the start itself as the solution."""
    rtol: float | None = None
    """Relative tolerance; None means 1e-8 in float64, 1e-4 in float32, 1e-2 in float16, 2e-2 in bfloat16 (under
    autocast: that of its dtype)."""
    atol: float | None = None
    """Absolute tolerance, on the norm of a whole sample; None means a hundredth of `rtol`."""
    check_every: int = 1
    """Measure residuals at every n-th step (and the last); steps between are not candidates for the solution."""
    trace: Literal["residual", "state"] | None = None
    """What `Solution.trace` records at each check."""
    keep: Literal["best", "last"] = "best"
    """Which iterate is the solution's: the one with the smallest residual, or the last."""

    def __post_init__(self) -> None:
        check_integer(self, "max_steps", minimum=0)
        check_integer(self, "check_every", minimum=1)
        for name in ("rtol", "atol"):
            if getattr(self, name) is not None:
                check_number(self, name, minimum=0.0)
        check_choice(self, "trace", (None, "residual", "state"))
        check_choice(self, "keep", ("best", "last"))

    def tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        """`(rtol, atol)` for states of `dtype`."""
        rtol = _DEFAULT_RTOL.get(dtype.to_real(), 1e-4) if self.rtol is None else self.rtol
        return rtol, 0.01 * rtol if self.atol is None else self.atol

    def start(self, z: Leaves, samples: Samples) -> Any:
        """The memory of a solve that starts at `z`; it is passed to every `advance`, which may change it."""
        return None

    def select(self, memory: Any, rows: Tensor) -> Any:
        """The memory of the samples `rows`, integers of shape (samples,), alone.

        A solver that implements it beside `advance` lets a solve drop converged samples from its batch; with any other no
        sample is dropped.
        """
        raise NotImplementedError

    @property
    def can_select(self) -> bool:
        """Whether `select` was written for this very `advance` and `start`, and not for those of a base class."""
        for kind in type(self).__mro__:
            if "select" in vars(kind):
                return kind is not Solver
            if "advance" in vars(kind) or "start" in vars(kind):
                return False
        return False

    @abstractmethod
    def advance(self, z: Leaves, fz: Leaves, memory: Any, samples: Samples) -> Leaves:
        """The next iterate, given the current one and its image; neither may be changed in place."""
