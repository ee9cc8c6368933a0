"""Trajectories made by hand, whose numbers the tests know."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phantomgrad_demo.settings import Settings
from phantomgrad_demo.trajectory import Reason, Step, Trajectory

LABELS = ["goldfish", "Bits & <b>pieces</b>", "lemon", "bus", "cat", "teapot"]
SETTINGS = Settings(solver="Anderson", max_steps=12, tolerance=1e-2)


def step(number: int, residual: float, shares: Sequence[float]) -> Step:
    """A step of a state with two resolutions, the second of which moves half as far."""
    probabilities = torch.tensor([*shares, *[0.0] * (len(LABELS) - len(shares))])
    return Step(
        number=number,
        seconds=0.01 * number,
        residual=residual,
        residuals=(residual, residual / 2),
        probabilities=probabilities,
        maps=(torch.full((4, 4), 1.0 + number), torch.full((2, 2), 2.0)),
        changes=(torch.full((4, 4), residual), torch.full((2, 2), residual / 2)),
    )


def trajectory(
    residuals: Sequence[float], reason: Reason | None = "settled", settings: Settings = SETTINGS
) -> Trajectory:
    """A solve whose answer is `Bits & <b>pieces</b>` at its first step and `goldfish` from its second on."""
    steps = [step(1, residuals[0], (0.1, 0.3, 0.2))]
    steps += [
        step(number, residual, (0.4 + 0.01 * number, 0.2, 0.1))
        for number, residual in enumerate(residuals[1:], start=2)
    ]
    return Trajectory(settings=settings, steps=tuple(steps), reason=reason, seconds=0.25)


SETTLED = trajectory([1.0, 0.2, 0.05, 8.1e-3])
SINGLE = trajectory([1.0], "steps")
EXACT = trajectory([1.0, 0.2, 1e-3, 0.0])
LONG = trajectory([0.8**number for number in range(48)], "steps")
RUNNING = trajectory([1.0, 0.2, 0.05], None)
