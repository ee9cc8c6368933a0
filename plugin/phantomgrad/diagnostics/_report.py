"""The page that `check` prints."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from phantomgrad.diagnostics._error import PhantomError
from phantomgrad.diagnostics._spectrum import SpectralRadius
from phantomgrad.diagnostics._text import eigenvalue, milliseconds, short, table
from phantomgrad.diagnostics._trials import GradientTrial, SolverTrial
from phantomgrad.gradients import Gradient

_WIDTH = 110


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckReport:
    """What `check` found; `str()` is the printed page."""

    where: str
    """The module's path in its model."""
    gradient: Gradient | None
    """What the module is attached with; None if it is not attached."""
    state: str
    """Shapes, dtypes and device of the state."""
    samples: int
    entries: int
    """Of the state, per sample."""
    variables: dict[str, int]
    """How many entries each parameter and input has that gradients are taken for."""
    solvers: tuple[SolverTrial, ...]
    """First the module's own or the given solver, then others."""
    chosen: SolverTrial
    """The solve at whose end everything else was measured."""
    radius: SpectralRadius
    """Of `J` at the solution."""
    damped_radius: SpectralRadius
    """Of `B` with the damping, in tenths up to 1, that makes it smallest; 1 where nothing is gained."""
    norm: PhantomError | None
    """`||J||_2`; None if the map's backward cannot be differentiated."""
    coupled: bool
    """Whether the map couples samples that it was said to keep apart."""
    repeatable: bool
    """Whether the map, given the same state twice, returned the same image."""
    gradients: tuple[GradientTrial, ...]
    """Empty where there is no solution to differentiate at."""
    exact_residual: float | None
    """The relative residual to which the exact adjoint was solved; None where it was not tried."""
    random_cotangent: bool
    advice: tuple[str, ...] = ()

    @property
    def damping(self) -> float | None:
        """The damping of plain iteration that contracts most; None if none does."""
        return self.damped_radius.damping if float(self.damped_radius) < 1 else None

    @property
    def settles(self) -> bool:
        """Whether one of the solvers brings every sample to its tolerance."""
        return any(trial.settles for trial in self.solvers)

    def __repr__(self) -> str:
        verdict = f"settles in {self.chosen.steps} steps" if self.settles else "does not settle"
        return f"CheckReport({self.where} {verdict}, spectral radius {float(self.radius):.3g})"

    def __str__(self) -> str:
        blocks = [self._header(), self._settling(), self._jacobian(), self._gradients(), self._advice()]
        return "\n\n".join("\n".join(block) for block in blocks if block)

    def _header(self) -> list[str]:
        own = "not attached" if self.gradient is None else f"attached with {short(self.gradient)}"
        parts = "gradients for nothing"
        if self.variables:
            numbers = _count(sum(self.variables.values()), "number")
            parts = f"gradients for {numbers} in {_count(len(self.variables), 'tensor')}"
        samples = f"{_count(self.samples, 'sample')} of {self.entries:,} entries"
        return [
            f"phantomgrad check of {self.where}, {own}",
            *textwrap.wrap(f"state {self.state}: {samples}; {parts}", _WIDTH),
        ]

    def _settling(self) -> list[str]:
        longest = max(len(trial.residual) for trial in self.solvers)
        marks = [mark for mark in (1, 5, 10, 20, 50) if mark <= longest]
        rows = [
            [
                short(trial.solver),
                *(_residual(trial.after(mark)) for mark in marks),
                _residual(trial.best),
                f"{trial.converged}/{trial.samples}",
                "diverges" if trial.diverges else str(trial.steps) if trial.settles else f">{trial.steps}",
                milliseconds(trial.seconds),
            ]
            for trial in self.solvers
        ]
        header = ["solver", *(f"after {mark}" for mark in marks), "best", "settled", "steps", "time"]
        return ["DOES IT SETTLE? Relative residual of the worst sample", *table(header, rows)]

    def _jacobian(self) -> list[str]:
        radius = self.radius
        where = "at the solution" if self.chosen.settles else f"at the best iterate (residual {self.chosen.best:.1e})"
        doubt = "" if radius.converged.all() else "; a lower bound, the search has not settled"
        leading = f"leading eigenvalue {eigenvalue(radius.worst)}{doubt}"
        rows = [["spectral radius of J", f"{float(radius):.3g}", leading]]
        damped = self.damped_radius
        if damped.damping != 1.0:
            rows.append(
                [f"the same with damping {damped.damping:g}", f"{float(damped):.3g}", "the smallest in steps of 0.1"]
            )
        if self.norm is not None:
            rows.append(["2-norm of J", f"{float(self.norm):.3g}", "what one step can do to an error at most"])
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"  {name:<{widths[0]}}  {value:>{widths[1]}}   {note}" for name, value, note in rows]
        return [f"THE JACOBIAN {where}, worst sample", *lines]

    def _gradients(self) -> list[str]:
        if not self.gradients:
            return []
        rows = [
            [
                short(trial.gradient) + (" (yours)" if trial.gradient == self.gradient else ""),
                f"{trial.alignment.cosine:.4f}",
                f"{trial.alignment.norm_ratio:.3f}",
                milliseconds(trial.seconds),
            ]
            for trial in self.gradients
        ]
        what = "a random cotangent" if self.random_cotangent else "the loss"
        return [
            f"GRADIENTS of {what} against the exact one; time of one gradient without the solve",
            *table(["gradient", "cosine", "norm ratio", "time"], rows),
        ]

    def _advice(self) -> list[str]:
        lines: list[str] = []
        for number, sentence in enumerate(self.advice, start=1):
            lines += textwrap.wrap(sentence, _WIDTH, initial_indent=f"  {number}. ", subsequent_indent="     ")
        return ["ADVICE", *lines]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _residual(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"
