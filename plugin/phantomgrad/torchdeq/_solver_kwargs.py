"""torchdeq's `solver_kwargs`: options of the solver for one call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from phantomgrad.solvers import Anderson, Broyden, FixedPointIteration, Solver
from phantomgrad.torchdeq._options import ONLY_AT_THE_END

_RENAMED: dict[type[Solver], dict[str, str]] = {
    FixedPointIteration: {"tau": "damping"},
    Anderson: {"tau": "mixing", "m": "memory"},
    Broyden: {"LBFGS_thres": "memory"},
}
_REFUSED = {
    "lam": "our ridge is relative to the system: pass solver=Anderson(ridge=...) to get_deq",
    "ls": "there is no line search; pass solver=Anderson(...) to get_deq where Broyden wanders",
    "tol": "pass f_tol to get_deq",
    "stop_mode": "pass f_stop_mode to get_deq",
    "max_iter": "it is called f_max_iter here",
    "indexing": "pass indexing to get_deq",
}


def for_this_call(solver: Solver, kwargs: dict[str, Any]) -> Solver:
    """`solver` with the options of one call; one that it does not have is a `TypeError`, a wrong value a `ValueError`."""
    renamed = _RENAMED.get(type(solver), {})
    changes: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "f_max_iter":
            changes["max_steps"] = solver.max_steps if value is None else value
        elif name == "return_final":
            if value:
                changes |= {"keep": "last", "check_every": ONLY_AT_THE_END}
        elif name in renamed:
            changes[renamed[name]] = value
        elif name == "ls" and not value and isinstance(solver, Broyden):
            continue
        else:
            reason = _REFUSED.get(
                name, f"{type(solver).__name__} takes {', '.join(['f_max_iter', 'return_final', *renamed])}"
            )
            raise TypeError(f"solver_kwargs cannot hold {name}={value!r}: {reason}.")
    return replace(solver, **changes) if changes else solver
