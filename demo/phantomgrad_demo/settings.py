"""What a visitor may set for one solve, and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from phantomgrad import Anderson, Broyden, FixedPointIteration, Solver, attachments
from phantomgrad_hub import MDEQ

SolverName = Literal["fixed point", "Anderson", "Broyden"]
SOLVERS: dict[SolverName, type[Solver]] = {
    "fixed point": FixedPointIteration,
    "Anderson": Anderson,
    "Broyden": Broyden,
}
MOST_STEPS = 60
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
SMALLEST_TOLERANCE = 1e-5
"""float32 does not settle much further."""


class SettingsError(ValueError):
    """A value that no solve takes, in one line."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Solver, most steps, relative tolerance, and damping (of the fixed-point iteration alone).

    Raises `SettingsError` for values out of range.
    """

    solver: SolverName
    max_steps: int
    tolerance: float
    damping: float = 1.0

    def __post_init__(self) -> None:
        if self.solver not in get_args(SolverName):
            raise SettingsError(f"the solver is one of {', '.join(SOLVERS)}, not {self.solver!r:.40}")
        if type(self.max_steps) is not int or not 1 <= self.max_steps <= MOST_STEPS:
            raise SettingsError(f"the most steps are a whole number from 1 to {MOST_STEPS}, not {self.max_steps!r:.40}")
        if not _is_number(self.tolerance) or not SMALLEST_TOLERANCE <= self.tolerance <= 1.0:
            raise SettingsError(f"the tolerance is from {SMALLEST_TOLERANCE:g} to 1, not {self.tolerance!r:.40}")
        if not _is_number(self.damping) or not 0.05 <= self.damping <= 1.0:
            raise SettingsError(f"the damping is from 0.05 to 1, not {self.damping!r:.40}")

    @classmethod
    def of_model(cls, model: MDEQ) -> Settings:
        """What the checkpoint's own evaluation solver does, within the limits here."""
        own = solver_of(model)
        names: list[SolverName] = [name for name, kind in SOLVERS.items() if isinstance(own, kind)]
        training = model.config.solver
        damped = next((each for each in (own, training) if isinstance(each, FixedPointIteration)), None)
        tolerance = own.tolerances(_dtype_of(model))[0]
        return cls(
            solver=names[0] if names else "Anderson",
            max_steps=min(max(own.max_steps, 1), MOST_STEPS),
            tolerance=min(max(tolerance, SMALLEST_TOLERANCE), 1.0),
            damping=1.0 if damped is None else min(max(damped.damping, 0.05), 1.0),
        )

    def build(self, like: Solver) -> Solver:
        """The solver; what cannot be set here is as in `like` where that is of the same kind."""
        kind = SOLVERS[self.solver]
        base = like if isinstance(like, kind) else kind()
        solver = replace(
            base, max_steps=self.max_steps, rtol=self.tolerance, atol=None, check_every=1, trace=None, keep="best"
        )
        return replace(solver, damping=self.damping) if isinstance(solver, FixedPointIteration) else solver


def solver_of(model: MDEQ) -> Solver:
    """The solver that the checkpoint uses where no gradient is recorded."""
    [attachment] = attachments(model.block)
    return attachment.eval_solver or attachment.solver


def tolerances_for(settings: Settings) -> tuple[float, ...]:
    """The tolerances to choose from, the settings' own among them, coarsest first."""
    return tuple(sorted({*TOLERANCES, settings.tolerance}, reverse=True))


def _dtype_of(model: MDEQ) -> torch.dtype:
    return next(model.parameters()).dtype


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False
