"""The sentences of the page."""

from __future__ import annotations

from .answer import Answer


def percent(probability: float) -> str:
    """A probability as readers see it: `63 %`, `0.4 %`, `< 0.1 %`."""
    value = 100 * probability
    if value < 0.1:
        return "< 0.1 %"
    return f"{value:.1f} %" if value < 0.95 or value > 99.5 else f"{value:.0f} %"


def scientific(value: float) -> str:
    """A number as `8.1e-3`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def step_count(steps: int) -> str:
    """`1 step`, `14 steps`."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"


def standing(answer: Answer) -> str:
    """Where the solver stopped: `settled`, or that it stopped before its tolerance."""
    return "settled" if answer.settled else f"stopped before its tolerance of {scientific(answer.tolerance)}"


def sentence(answer: Answer) -> str:
    """`After 14 steps: goldfish 63 %, relative residual 8.1e-3 (settled)`."""
    label, probability = answer.probabilities[0]
    return (
        f"After {step_count(answer.steps)}: {label} {percent(probability)}, "
        f"relative residual {scientific(answer.residual)} ({standing(answer)})"
    )
