"""The figures of an evaluation, as they are printed, stored with a run and shown on a card."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from phantomgrad_hub.errors import ConfigError
from phantomgrad_hub.text import summarise


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracies as fractions, residuals relative, steps in evaluations of the block, over `count` images."""

    count: int
    top1: float
    top5: float
    steps_mean: float
    residual_median: float
    residual_p90: float
    unconverged: int
    """Images on which the solver ran out of steps before its tolerance."""
    unreadable: int = 0
    """Further images, which could not be read."""
    accuracy_by_steps: dict[int, float] = field(default_factory=dict[int, float])
    """Top-1 accuracy where the solver is stopped after so many steps."""

    @classmethod
    def from_dict(cls, values: Any) -> Evaluation:
        """The evaluation that `to_dict` wrote; raises `ConfigError` where a figure is missing, unknown or impossible."""
        if not isinstance(values, dict):
            raise ConfigError(f"an evaluation is a JSON object, not {type(values).__name__}")
        names = [option.name for option in fields(cls)]
        if unknown := sorted(set(map(str, values)) - set(names)):
            raise ConfigError(f"unknown keys in the evaluation: {summarise(unknown)}")
        if missing := [name for name in names if name not in (*values, "unreadable", "accuracy_by_steps")]:
            raise ConfigError(f"missing keys in the evaluation: {', '.join(missing)}")
        by_steps = values.get("accuracy_by_steps", {})
        if not isinstance(by_steps, dict) or not all(
            str(steps).isdecimal() and len(str(steps)) < 8 for steps in by_steps
        ):
            raise ConfigError("accuracy_by_steps of the evaluation must map numbers of steps to accuracies")
        return cls(
            count=_count("count", values["count"]),
            top1=_fraction("top1", values["top1"]),
            top5=_fraction("top5", values["top5"]),
            steps_mean=_number("steps_mean", values["steps_mean"]),
            residual_median=_number("residual_median", values["residual_median"]),
            residual_p90=_number("residual_p90", values["residual_p90"]),
            unconverged=_count("unconverged", values["unconverged"]),
            unreadable=_count("unreadable", values.get("unreadable", 0)),
            accuracy_by_steps={int(steps): _fraction("accuracy_by_steps", share) for steps, share in by_steps.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, None for a figure that is not finite."""
        values = {name: None if _is_infinite(value) else value for name, value in asdict(self).items()}
        values["accuracy_by_steps"] = {str(steps): accuracy for steps, accuracy in self.accuracy_by_steps.items()}
        return values


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 10**12:
        raise ConfigError(f"{name} of the evaluation must be a number of images, got {value!r:.60}")
    return value


def _fraction(name: str, value: Any) -> float:
    # JSON has null for a figure that is not finite.
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ConfigError(f"{name} of the evaluation must be between 0 and 1, got {value!r:.60}")
    return float(value)


def _number(name: str, value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not 0 <= value < 1e12:
        raise ConfigError(f"{name} of the evaluation must be a number of at least 0, got {value!r:.60}")
    return float(value)
