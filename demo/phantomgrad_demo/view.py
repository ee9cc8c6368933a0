"""A trajectory as the plain values that the page's script shows; what grows with the steps is appended to lists."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .figures import probability_curves, residual_curves
from .settings import Settings
from .snippet import python_code
from .trajectory import Step, Trajectory
from .wording import end_sentence, percent, step_sentence, takeaway, weak_notice

TOP = 5
_DYNAMIC_RANGE = 1e-4
"""The part of the largest change below which the change maps are black."""


def view(
    trajectory: Trajectory, labels: Sequence[str], *, example: str = "", checkpoint: str = "", run: str = ""
) -> dict[str, Any]:
    """What the page shows of a solve that runs or has ended; a message alone where it made no step.

    `run` is the name by which the page can end it.
    """
    if not trajectory.steps:
        return message("The network gave no finite state for this photo.")
    steps = trajectory.steps
    rows = [_row(step, labels) for step in steps]
    running = trajectory.reason is None
    if not running:
        rows[-1]["sentence"] = end_sentence(trajectory, labels)
    return {
        "running": running,
        "run": run,
        "rows": rows,
        "grids": [list(shown.shape) for shown in steps[0].maps],
        # The same colours at every step: else settling could not be seen.
        "limits": {
            "maps": [_limits([step.maps[index] for step in steps]) for index in range(len(steps[0].maps))],
            "changes": [_decades([step.changes[index] for step in steps]) for index in range(len(steps[0].maps))],
        },
        "figures": {"residual": residual_curves(trajectory), "probability": probability_curves(trajectory, labels)},
        "takeaway": takeaway(trajectory, labels),
        "link": link(trajectory.settings, example),
        "python": python_code(trajectory.settings, checkpoint),
    }


def message(text: str) -> dict[str, Any]:
    """A sentence in the place of an answer."""
    return {"running": False, "message": text, "rows": []}


def link(settings: Settings, example: str) -> dict[str, str]:
    """What an address carries to restore an example and settings; empty without an example."""
    if not example:
        return {}
    return {
        "example": example,
        "solver": settings.solver,
        "steps": str(settings.max_steps),
        "tolerance": f"{settings.tolerance:g}",
        "damping": f"{settings.damping:g}",
    }


def _row(step: Step, labels: Sequence[str]) -> dict[str, Any]:
    values, indices = step.probabilities.topk(min(TOP, len(labels)))
    return {
        "step": step.number,
        "sentence": step_sentence(step, labels),
        "weak": weak_notice(step, len(labels)),
        "classes": [
            [labels[index], percent(value), round(100 * value, 1)]
            for index, value in zip(indices.tolist(), values.tolist(), strict=True)
        ],
        "maps": [_encoded(shown) for shown in step.maps],
        "changes": [_encoded(shown) for shown in step.changes],
    }


def _encoded(shown: Tensor) -> str:
    """Little-endian float32, in base64."""
    return base64.b64encode(shown.contiguous().numpy().astype("<f4").tobytes()).decode("ascii")


def _limits(maps: Sequence[Tensor]) -> list[float]:
    return [min(float(each.min()) for each in maps), max(float(each.max()) for each in maps)]


def _decades(maps: Sequence[Tensor]) -> list[float]:
    """The limits of a logarithmic colour scale."""
    largest = max(max(float(each.max()) for each in maps), 1e-30)
    return [_DYNAMIC_RANGE * largest, largest]
