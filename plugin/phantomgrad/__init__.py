"""phantomgrad: phantom gradients for any fixed-point module.

    from phantomgrad import attach, Anderson, UnrolledPhantom
    attach(model.cell, UnrolledPhantom(steps=5, damping=0.5), solver=Anderson())

`model.cell(z0, x)` then returns its equilibrium, and `backward` uses the phantom gradient.
"""

from phantomgrad._attach import Attachment as Attachment
from phantomgrad._attach import attach as attach
from phantomgrad._attach import attachments as attachments
from phantomgrad._attach import is_attached as is_attached
from phantomgrad._equilibrium import equilibrium as equilibrium
from phantomgrad._errors import AttachError as AttachError
from phantomgrad._errors import DivergedError as DivergedError
from phantomgrad._errors import NotConvergedError as NotConvergedError
from phantomgrad._errors import NotConvergedWarning as NotConvergedWarning
from phantomgrad._errors import PhantomGradError as PhantomGradError
from phantomgrad._errors import StateMismatchError as StateMismatchError
from phantomgrad._fixed_point import fixed_point as fixed_point
from phantomgrad._solution import AdjointSolve as AdjointSolve
from phantomgrad._solution import Solution as Solution
from phantomgrad._solution import Trace as Trace
from phantomgrad.gradients import AdaptivePhantom as AdaptivePhantom
from phantomgrad.gradients import Backprop as Backprop
from phantomgrad.gradients import Gradient as Gradient
from phantomgrad.gradients import Implicit as Implicit
from phantomgrad.gradients import KrylovPhantom as KrylovPhantom
from phantomgrad.gradients import NeumannPhantom as NeumannPhantom
from phantomgrad.gradients import OneStep as OneStep
from phantomgrad.gradients import Shine as Shine
from phantomgrad.gradients import UnrolledPhantom as UnrolledPhantom
from phantomgrad.solvers import Anderson as Anderson
from phantomgrad.solvers import Broyden as Broyden
from phantomgrad.solvers import FixedPointIteration as FixedPointIteration
from phantomgrad.solvers import Solver as Solver

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name != "diagnostics":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("phantomgrad.diagnostics")  # at its first use, so that the plugin's import stays short


__all__ = [
    "AdaptivePhantom",
    "AdjointSolve",
    "Anderson",
    "AttachError",
    "Attachment",
    "Backprop",
    "Broyden",
    "DivergedError",
    "FixedPointIteration",
    "Gradient",
    "Implicit",
    "KrylovPhantom",
    "NeumannPhantom",
    "NotConvergedError",
    "NotConvergedWarning",
    "OneStep",
    "PhantomGradError",
    "Shine",
    "Solution",
    "Solver",
    "StateMismatchError",
    "Trace",
    "UnrolledPhantom",
    "attach",
    "attachments",
    "equilibrium",
    "fixed_point",
    "is_attached",
]
