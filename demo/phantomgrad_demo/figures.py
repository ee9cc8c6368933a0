"""The page's curves: what is drawn of a trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .plot import Line, Plot
from .trajectory import Trajectory
from .wording import chosen, percent, scientific, step_count

LEADING = 4
"""How many classes are followed from step to step."""
_AXIS_STEPS = 10


def leading(trajectory: Trajectory) -> list[int]:
    """The classes to follow: the most probable ones of the last step."""
    scores = trajectory.probabilities
    return scores.topk(min(LEADING, len(scores))).indices.tolist()


def residual_curves(trajectory: Trajectory) -> str:
    """The relative residual after each solver step, of each resolution and of the whole, with the tolerance."""
    steps = trajectory.steps
    numbers = tuple(step.number for step in steps)
    whole = Line(label="whole state", steps=numbers, values=tuple(step.residual for step in steps))
    parts = [
        Line(
            label=f"{shown.shape[0]} x {shown.shape[1]}",
            steps=numbers,
            values=tuple(step.residuals[index] for step in steps),
        )
        for index, shown in enumerate(steps[0].maps)
    ]
    tolerance = trajectory.settings.tolerance
    settled = {"settled": "settled", None: "still running"}.get(
        trajectory.reason, f"stopped before its tolerance of {chosen(tolerance)}"
    )
    return Plot(
        name="residual",
        title="Relative residual after each solver step",
        description=(
            f"From {scientific(steps[0].residual)} after step {numbers[0]} to {scientific(trajectory.residual)} after "
            f"{step_count(numbers[-1])}: {settled}. Logarithmic axis, one line for each resolution of the state."
        ),
        lines=[whole, *parts],
        scale="log",
        last=_last_step(trajectory),
        level=(tolerance, f"tolerance {chosen(tolerance)}"),
    ).render()


def probability_curves(trajectory: Trajectory, labels: Sequence[str]) -> str:
    """The leading classes' probability had the solver been stopped after each step."""
    steps = trajectory.steps
    lines = [
        Line(
            label=labels[index],
            steps=tuple(step.number for step in steps),
            values=tuple(float(step.probabilities[index]) for step in steps),
        )
        for index in leading(trajectory)
    ]
    return Plot(
        name="probability",
        title="Probability of the leading classes after each step",
        description=" ".join(
            f"{line.label}: {percent(line.values[0])} after step {line.steps[0]}, {percent(line.values[-1])} after "
            f"{step_count(line.steps[-1])}."
            for line in lines
        ),
        lines=lines,
        scale="share",
        last=_last_step(trajectory),
    ).render()


def residuals_together(name: str, title: str, trajectories: Mapping[str, Trajectory]) -> str:
    """The residuals of several solves in one plot, each by its name."""
    lines = [
        Line(
            label=label,
            steps=tuple(step.number for step in trajectory.steps),
            values=tuple(step.residual for step in trajectory.steps),
        )
        for label, trajectory in trajectories.items()
    ]
    tolerance = min(trajectory.settings.tolerance for trajectory in trajectories.values())
    return Plot(
        name=name,
        title=title,
        description=" ".join(
            f"{line.label}: from {scientific(line.values[0])} to {scientific(min(line.values))} in "
            f"{step_count(line.steps[-1])}."
            for line in lines
        ),
        lines=lines,
        scale="log",
        last=max(line.steps[-1] for line in lines),
        level=(tolerance, f"tolerance {chosen(tolerance)}"),
    ).render()


def accuracy_curve(accuracy: Mapping[int, float], marks: Sequence[tuple[int, str]]) -> str:
    """The checkpoint's accuracy where its solver is stopped after so many steps, with some of them marked."""
    steps, values = tuple(accuracy), tuple(accuracy.values())
    return Plot(
        name="accuracy",
        title="Validation accuracy by steps of the checkpoint's own solver",
        description=" ".join(
            f"{percent(value)} after {step_count(step)}." for step, value in zip(steps, values, strict=True)
        ),
        lines=[Line(label="accuracy", steps=steps, values=values)],
        scale="share",
        last=max([steps[-1], *(step for step, _ in marks)]),
        marks=marks,
    ).render()


def _last_step(trajectory: Trajectory) -> int:
    """The end of the step axis; while the solver runs it moves in leaps, so that the lines stand still."""
    last = trajectory.steps[-1].number
    if trajectory.reason is not None:
        return last
    return min(-(-last // _AXIS_STEPS) * _AXIS_STEPS, max(trajectory.settings.max_steps, 2))
