"""What becomes of a solve that failed: counted, and warned about once, raised or ignored."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from phantomgrad._errors import DivergedError, NotConvergedError, NotConvergedWarning, PhantomGradError
from phantomgrad._solve import Solved
from phantomgrad.solvers import Anderson, FixedPointIteration, Solver

OnFailure = Literal["warn", "raise", "ignore"]


class Report:
    """Tells the caller of one attachment, or of one call of `fixed_point`, how solves went."""

    def __init__(self, on_failure: OnFailure, where: Callable[[], str] = lambda: "") -> None:
        self.on_failure: OnFailure = on_failure
        self.unconverged = 0
        self.where = where
        self._warned: set[str] = set()
        self._raised: weakref.ref[BaseException] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has solved nothing and warned of nothing.
        return {**self.__dict__, "where": None, "unconverged": 0, "_warned": set(), "_raised": None}

    def warn_once(self, topic: str, message: Callable[[], str], category: type[Warning] = UserWarning) -> None:
        """Warn, but only the first time about each topic; only then is the message made."""
        if topic in self._warned:
            return
        stacklevel = _outside_stacklevel()
        try:
            warnings.warn(message(), category, stacklevel=stacklevel)
        except PhantomGradError as warning:  # a filter has made it an error, of which every call is one
            self._raised = weakref.ref(warning)
            raise
        self._warned.add(topic)

    def has_raised(self, error: BaseException) -> bool:
        """Whether `error` is of this report's making."""
        return self._raised is not None and self._raised() is error

    def __call__(
        self, solved: Solved, what: str, solver: Solver | None = None, on_failure: OnFailure | None = None
    ) -> None:
        """Act on a finished solve of `what` by `solver`."""
        on_failure = on_failure or self.on_failure
        if solved.any_diverged and on_failure != "ignore":
            self.fail(
                DivergedError(
                    f"{_sentence(what)} diverged{self.where()}: {_count(solved.diverged)} not finite after "
                    f"{_steps(solved)}. {_cure_of_divergence(solved)}"
                )
            )
        if solved.all_converged or torch.compiler.is_exporting():
            return
        self.failed(
            "unconverged",
            lambda: (
                f"{_sentence(what)} did not converge{self.where()}: {_count(~solved.converged)} above their tolerance after "
                f"{_steps(solved)}, with a relative residual of up to {_worst(solved):.1e}. "
                f"{_cure_of_slowness(solver)}"
            ),
            on_failure,
        )

    def fail(self, error: Exception) -> NoReturn:
        """Raise `error`."""
        self._raised = weakref.ref(error)
        raise error

    def failed(self, topic: str, message: Callable[[], str], on_failure: OnFailure | None = None) -> None:
        """Count a result that is not what was asked for, and raise or warn, by `on_failure`."""
        on_failure = on_failure or self.on_failure
        self.unconverged += 1
        if on_failure == "raise":
            self.fail(NotConvergedError(message()))
        if on_failure == "warn":  # the message reads from the device and looks for the module's path
            self.warn_once(topic, message, NotConvergedWarning)


def _worst(solved: Solved) -> float:
    """The largest residual of the samples that have not converged."""
    return float(torch.where(solved.converged, 0.0, solved.residual).max())


def _sentence(what: str) -> str:
    return what[0].upper() + what[1:]


def _steps(solved: Solved) -> str:
    steps = int(solved.steps.max())
    return "1 step" if steps == 1 else f"{steps} steps"


def _cure_of_divergence(solved: Solved) -> str:
    if int(solved.steps.max()) <= 1:
        return (
            "The first evaluation is not finite already: look for infinite or NaN inputs, parameters or starts, an overflow, or "
            "a division by zero in the map."
        )
    return "Damp the solver (FixedPointIteration(damping=0.5)), use Anderson(), or normalise the block."


def _cure_of_slowness(solver: Solver | None) -> str:
    if solver is None or isinstance(solver, FixedPointIteration):
        cure = "Raise max_steps, use Anderson() or damping below 1"
    else:
        cure = "Raise max_steps or rtol" if isinstance(solver, Anderson) else "Raise max_steps, use Anderson()"
    return f'{cure}, or pass on_failure="ignore"; phantomgrad.diagnostics.check says what the block needs.'


def _count(failed: Tensor) -> str:
    """Which samples have failed; none of this process's where another of its process_group has failed."""
    count = int(failed.sum())
    return f"{count} of {failed.numel()} samples are" if count else "samples of another process of process_group are"


def _outside_stacklevel() -> int:
    """The `stacklevel` that shows a warning at the first caller outside phantomgrad and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("phantomgrad.", "phantomgrad_hub.", "torch.")):
            break
        level, frame = level + 1, frame.f_back
    return level
