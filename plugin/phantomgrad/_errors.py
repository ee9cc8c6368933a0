"""The exceptions of phantomgrad.

PhantomGradError
├── AttachError(ValueError)           a module or an option that cannot be attached
├── StateMismatchError(ValueError)    the map does not return a state like the one it was given
├── DivergedError(RuntimeError)       a state became infinite or NaN
├── NotConvergedError(RuntimeError)   the solver ran out of steps and `on_failure="raise"`
└── NotConvergedWarning(UserWarning)  the solver ran out of steps and `on_failure="warn"`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phantomgrad._solution import Solution


class PhantomGradError(Exception):
    """Base class of everything phantomgrad raises on purpose."""


class AttachError(PhantomGradError, ValueError):
    """The module cannot be attached as asked."""


class StateMismatchError(PhantomGradError, ValueError):
    """The map returned a state whose structure, shape, dtype or device differs from its input's."""


class DivergedError(PhantomGradError, RuntimeError):
    """The iteration produced a state that is not finite."""

    solution: Solution | None = None
    """How far the solve came; None where it was one of backward."""


class NotConvergedError(PhantomGradError, RuntimeError):
    """The solver ran out of steps before every sample reached its tolerance."""

    solution: Solution | None = None
    """How far the solve came; None where it was one of backward."""


class NotConvergedWarning(PhantomGradError, UserWarning):
    """The solver ran out of steps before every sample reached its tolerance."""

    solution: Solution | None = None
    """How far the solve came, where the warning is raised as an error; None where it was one of backward."""
