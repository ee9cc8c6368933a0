"""The sentences of the page."""

from __future__ import annotations

from collections.abc import Sequence

from .trajectory import Step, Trajectory

WEAK = 0.15
"""A best class below this is probably no class at all; `docs/demo.md` says what it was measured on."""


def percent(probability: float) -> str:
    """A probability as readers see it: `63 %`, `0.4 %`, `< 0.1 %`."""
    value = 100 * probability
    if value < 0.1:
        return "< 0.1 %"
    return f"{value:.1f} %" if value < 0.95 or value > 99.5 else f"{value:.0f} %"


def scientific(value: float) -> str:
    """A measured number as `8.1e-3` or `1.0`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}" if int(exponent) else mantissa


def chosen(value: float) -> str:
    """A number that somebody chose, such as a tolerance, as `1e-3`."""
    return scientific(value).replace(".0e", "e").removesuffix(".0")


def step_count(steps: int) -> str:
    """`1 step`, `14 steps`."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def milliseconds(seconds: float) -> str:
    """`84 ms`, `2.1 s`."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def best(step: Step, labels: Sequence[str]) -> tuple[str, float]:
    """The most probable class at a step."""
    probability, index = step.probabilities.max(dim=0)
    return labels[int(index)], float(probability)


def step_sentence(step: Step, labels: Sequence[str]) -> str:
    """`Step 4: lakeside 33 %, residual 1.9e-1`."""
    label, probability = best(step, labels)
    return f"Step {step.number}: {label} {percent(probability)}, residual {scientific(step.residual)}"


def end_sentence(trajectory: Trajectory, labels: Sequence[str]) -> str:
    """`Settled after 11 steps: espresso 96 %, residual 8.2e-4`, or why and where it stopped before its tolerance."""
    label, probability = best(trajectory.steps[-1], labels)
    answer = f"{label} {percent(probability)}, residual {scientific(trajectory.residual)}"
    steps = step_count(len(trajectory.steps))
    if trajectory.reason == "settled":
        return f"Settled after {steps}: {answer}"
    why = {
        "steps": "",
        "time": " at the time limit",
        "stopped": " at your wish",
        "diverged": ", as the state was no longer finite",
    }[trajectory.reason or "stopped"]
    return f"Stopped after {steps}{why}, before its tolerance of {chosen(trajectory.settings.tolerance)}: {answer}"


def weak_notice(step: Step, classes: int) -> str:
    """What is said of an answer that is hardly one; empty where it is."""
    return f"Probably none of the {classes} I know." if float(step.probabilities.max()) < WEAK else ""


def takeaway(trajectory: Trajectory, labels: Sequence[str]) -> str:
    """What the solve shows, in a sentence or two."""
    steps = trajectory.steps
    answers = [best(step, labels)[0] for step in steps]
    since = next(index for index in range(len(answers)) if set(answers[index:]) == {answers[-1]})
    first, last = scientific(steps[0].residual), scientific(trajectory.residual)
    if len(steps) == 1:
        return f"One step moves the state by {first} of its size; more steps show whether it settles."
    fell = f"The state moves less and less: the residual falls from {first} to {last} in {step_count(len(steps))}."
    if trajectory.reason != "settled" and steps[-1].residual > 0.3 * steps[len(steps) // 2].residual:
        fell = f"The state keeps moving: after {step_count(len(steps))} the residual is still {last}."
    return f"{fell} The answer has been {answers[-1]} since step {steps[since].number}."
