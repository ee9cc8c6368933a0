"""The one-step gradient."""

from __future__ import annotations

from dataclasses import dataclass

from phantomgrad._state import Leaves, detach
from phantomgrad.gradients._base import Gradient, Problem


@dataclass(frozen=True, kw_only=True)
class OneStep(Gradient):
    """Differentiate a single evaluation at the solution, its input held constant (Jacobian-free backpropagation).

    The exact gradient with `(I - J)^-1` replaced by `I` (Fung et al., "JFB", 2022): the cheapest of all, and the
    least accurate. Equal to a phantom gradient of one step with damping 1.
    """

    def connect(self, problem: Problem) -> Leaves:
        return problem.evaluate(detach(problem.solved.point))
