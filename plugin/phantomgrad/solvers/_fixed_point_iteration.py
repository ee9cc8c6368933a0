"""Fixed-point iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phantomgrad._options import check_number
from phantomgrad._samples import Samples
from phantomgrad._state import Leaves, damped
from phantomgrad.solvers._base import Solver


@dataclass(frozen=True, kw_only=True)
class FixedPointIteration(Solver):
    """Iterate `z <- (1 - damping) * z + damping * f(z)`.

    Converges linearly at the spectral radius of `(1 - damping) I + damping J`. Below 1, damping settles maps whose
    Jacobian has eigenvalues near or beyond -1; it cannot help against real eigenvalues above 1.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "damping", above=0.0, maximum=2.0)

    def advance(self, z: Leaves, fz: Leaves, memory: Any, samples: Samples) -> Leaves:
        return damped(z, fz, self.damping)

    def select(self, memory: Any, rows: Tensor) -> Any:
        return memory
