"""What the page knows about a classified photo: plain values, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One class's probability had the solver been stopped after each step."""

    label: str
    probabilities: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says about a photo, and how its block settled."""

    probabilities: tuple[tuple[str, float], ...]
    """Every class with its probability, best first."""
    steps: int
    """Evaluations of the block that the solver made."""
    residual: float
    """The relative residual `||f(z) - z|| / ||f(z)||` of the answer's state."""
    settled: bool
    """Whether the residual met the tolerance."""
    tolerance: float
    """The solver's relative tolerance."""
    checked: tuple[int, ...]
    """The steps at which the next two were taken."""
    residuals: tuple[float, ...]
    """The relative residual after each of them."""
    leading: tuple[Curve, ...]
    """The best classes of the answer, best first."""
