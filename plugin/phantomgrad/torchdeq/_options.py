"""torchdeq's options, and the solvers and gradients that they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from phantomgrad._options import check_boolean, check_choice, check_integer, check_number
from phantomgrad._report import OnFailure
from phantomgrad.gradients import Gradient, Implicit, NeumannPhantom, UnrolledPhantom
from phantomgrad.solvers import Anderson, Broyden, FixedPointIteration, Solver

SOLVERS = ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden")
ONLY_AT_THE_END = 1 << 31
"""A `check_every` that no solve reaches: the last step alone is checked."""

_SOLVER_SETS = ("f_solver", "f_max_iter", "f_tol", "f_stop_mode")
_GRADIENT_SETS = (
    "grad",
    "tau",
    "ift",
    "hook_ift",
    "sup_gap",
    "sup_loc",
    "b_solver",
    "b_max_iter",
    "b_tol",
    "b_stop_mode",
)


@dataclass(frozen=True, kw_only=True)
class DEQOptions:
    """The options of `torchdeq.get_deq` with its defaults, and four of our own at the end.

    A wrong value is a `ValueError` that names the option.
    """

    core: str = "phantom"
    f_solver: str = "fixed_point_iter"
    b_solver: str = "fixed_point_iter"
    no_stat: bool | None = None
    f_max_iter: int = 40
    b_max_iter: int = 40
    f_tol: float = 1e-3
    b_tol: float = 1e-6
    f_stop_mode: str = "abs"
    b_stop_mode: str = "abs"
    eval_factor: float = 1.0
    eval_f_max_iter: int = 0
    ift: bool = False
    hook_ift: bool = False
    grad: int | Iterable[int] = 1
    tau: float = 1.0
    sup_gap: int = -1
    sup_loc: Iterable[int] | None = None
    n_states: int = 1
    indexing: Iterable[int] | None = None
    gradient: Gradient | None = None
    """A gradient of ours in place of `grad`, `tau`, `ift`, `hook_ift`, `sup_*` and `b_*`."""
    solver: Solver | None = None
    """A solver of ours in place of `f_solver`, `f_max_iter`, `f_tol` and `f_stop_mode`."""
    batch_dim: int | None = 0
    """The dimension along which the map treats samples independently; None if it couples them."""
    on_failure: OnFailure = "warn"
    """What becomes of a solve that does not converge: "warn" (once), "raise" or "ignore"."""

    def __post_init__(self) -> None:
        check_choice(self, "core", ("phantom", "phantom-indexing"))
        for name, instead in (("f_solver", "solver=Broyden()"), ("b_solver", "gradient=Implicit(solver=Broyden())")):
            if getattr(self, name) not in SOLVERS:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, SOLVERS))}, got {getattr(self, name)!r}. "
                    f"For any other pass a phantomgrad solver, as in {instead}."
                )
        check_integer(self, "f_max_iter", minimum=0)
        check_integer(self, "b_max_iter", minimum=1)
        check_integer(self, "eval_f_max_iter", minimum=0)
        check_integer(self, "n_states", minimum=1)
        for name in ("f_tol", "b_tol", "eval_factor"):
            check_number(self, name, minimum=0.0)
        check_number(self, "tau", above=0.0, maximum=2.0)
        for name in ("f_stop_mode", "b_stop_mode"):
            check_choice(self, name, ("abs", "rel"))
        for name in ("ift", "hook_ift"):
            check_boolean(self, name)
        check_choice(self, "no_stat", (None, True, False))
        self._settle("grad", [self.grad] if isinstance(self.grad, int) else self.grad)
        for name in ("sup_loc", "indexing"):
            self._settle(name, () if getattr(self, name) is None else getattr(self, name))
        if not self.steps:
            raise ValueError("grad of DEQOptions must name at least one number of steps.")
        self._check_supervision()
        self._check_replaced("solver", Solver, _SOLVER_SETS)
        self._check_replaced("gradient", Gradient, _GRADIENT_SETS)
        if self.solver is not None:
            object.__setattr__(self, "f_max_iter", self.solver.max_steps)
        self.gradients()
        self.budgets(self.f_max_iter)

    def _settle(self, name: str, values: Any) -> None:
        """Store a list of positive integers as a tuple."""
        good = isinstance(values, (tuple, list))
        if not good or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
            raise ValueError(f"{name} of DEQOptions must hold integers of at least 1, got {values!r}.")
        object.__setattr__(self, name, tuple(values))

    def _check_supervision(self) -> None:
        check_integer(self, "sup_gap", minimum=-1)
        last = min(self.steps)
        if self.sup_gap > 0 and self.sup_loc:
            raise ValueError("sup_gap and sup_loc of DEQOptions exclude each other: give one of them.")
        if self.sup_gap > last or any(step > last for step in self.sup_locations):
            raise ValueError(
                f"sup_gap and sup_loc of DEQOptions choose among the grad={last} steps of the phantom gradient, got "
                f"sup_gap={self.sup_gap}, sup_loc={list(self.sup_locations)}."
            )

    def _check_replaced(self, ours: str, kind: type, theirs: tuple[str, ...]) -> None:
        """`gradient` and `solver` replace some of torchdeq's options, which must then be left at their defaults."""
        if getattr(self, ours) is None:
            return
        if not isinstance(getattr(self, ours), kind):
            raise TypeError(f"{ours} must be a phantomgrad {kind.__name__} object, got {getattr(self, ours)!r}.")
        given = [name for name in theirs if getattr(self, name) not in (_DEFAULTS[name], (_DEFAULTS[name],), ())]
        if given:
            raise ValueError(
                f"{ours}={getattr(self, ours)!r} replaces {', '.join(f'{n}={getattr(self, n)!r}' for n in given)}: "
                "give the one or the other."
            )

    # -- what they stand for -----------------------------------------------------------------------------------------

    @property
    def steps(self) -> tuple[int, ...]:
        """`grad` as a tuple."""
        return self.grad  # pyright: ignore[reportReturnType]  (settled at construction)

    @property
    def sup_locations(self) -> tuple[int, ...]:
        """`sup_loc` as a tuple."""
        return self.sup_loc  # pyright: ignore[reportReturnType]  (settled at construction)

    @property
    def count(self) -> int:
        """How many solver states are returned in training."""
        return self.n_states if self.n_states > 1 else 1 + len(tuple(self.indexing or ()))

    @property
    def monitored(self) -> bool:
        """Whether `info` has the residuals of every step."""
        return not self.no_stat and (self.solver is not None or self.f_solver != "simple_fixed_point_iter")

    def forward_solver(self) -> Solver:
        """The solver of training."""
        if self.solver is not None:
            return self.solver
        return _solver(self.f_solver, self.f_max_iter, self.f_tol, self.f_stop_mode)

    def eval_solver(self) -> Solver:
        """The solver of evaluation: training's with the budget of `eval_f_max_iter` or `eval_factor`."""
        solver = self.forward_solver()
        budget = self.eval_f_max_iter or int(self.f_max_iter * self.eval_factor)
        if isinstance(solver, Broyden) and self.solver is None:
            return replace(solver, max_steps=budget, memory=max(budget, 1))
        return replace(solver, max_steps=budget)

    def gradients(self) -> list[Gradient]:
        """The gradient of every returned state."""
        if self.gradient is not None:
            return [self.gradient] * self.count
        steps = self.steps * self.count if len(self.steps) == 1 else self.steps
        if len(steps) != self.count:
            raise ValueError(
                f"grad of DEQOptions must name one number of steps, or one for each of the {self.count} returned states, "
                f"got {list(steps)}."
            )
        gradients: list[Gradient] = [UnrolledPhantom(steps=k, damping=self.tau) for k in steps]
        if self.ift or self.hook_ift:
            gradients[-1] = self._exact()
        return gradients

    def _exact(self) -> Gradient:
        if self.b_solver == "simple_fixed_point_iter":
            # That many undamped terms of the Neumann series, whatever their size: torchdeq starts from zero.
            return NeumannPhantom(steps=self.b_max_iter, damping=1.0, safeguard=False)
        return Implicit(solver=_solver(self.b_solver, self.b_max_iter, self.b_tol, self.b_stop_mode))

    def budgets(self, total: int) -> list[int]:
        """How `total` steps are divided among the returned states: the length of each slice, or where each is taken."""
        n, indexing = self.n_states, tuple(self.indexing or ())
        if n > 1:
            if n > max(total, 1):
                raise ValueError(f"n_states={n} of DEQOptions needs an f_max_iter of at least as many, got {total}.")
            gap = total // n
            if self.core == "phantom":
                return [gap] * n
            return [total - (n - 1 - k) * gap for k in range(n)]
        ends = [*indexing, total]
        if indexing and (sorted(set(ends)) != ends):
            raise ValueError(
                f"indexing of DEQOptions must increase and end below f_max_iter={total}, got {list(indexing)}."
            )
        if self.core == "phantom":
            return [end - begin for begin, end in itertools.pairwise([0, *ends])]
        return ends


_DEFAULTS = {field.name: field.default for field in fields(DEQOptions)}
OPTIONS = tuple(_DEFAULTS)
"""Every name that `get_deq(core="phantom")` knows."""


def _solver(name: str, max_steps: int, tol: float, stop_mode: str) -> Solver:
    """torchdeq's solver of this name: its evaluations, criterion and memory."""
    if name == "simple_fixed_point_iter":
        # Any finite residual will do, so that only divergence is reported.
        return FixedPointIteration(max_steps=max_steps, rtol=0.0, atol=1e30, keep="last", check_every=ONLY_AT_THE_END)
    rtol, atol = (0.0, tol) if stop_mode == "abs" else (tol, 0.0)
    if name == "anderson":
        return Anderson(max_steps=max_steps, rtol=rtol, atol=atol, memory=6)
    if name == "broyden":
        return Broyden(max_steps=max_steps, rtol=rtol, atol=atol, memory=max(max_steps, 1))
    return FixedPointIteration(max_steps=max_steps, rtol=rtol, atol=atol)
