"""Solving a fixed-point problem and giving its solution a gradient: the core, which knows no modules."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from phantomgrad._cell import Cell
from phantomgrad._errors import DivergedError, NotConvergedError, NotConvergedWarning
from phantomgrad._once_per_solve import OncePerSolve
from phantomgrad._progress import Agree
from phantomgrad._samples import Samples
from phantomgrad._solution import AdjointSolve, Solution, Trace
from phantomgrad._solve import Solved, solve
from phantomgrad._state import Leaves, State, detach
from phantomgrad._transforms import in_forward_mode, outside_the_compiler, without_tangents
from phantomgrad.gradients import Gradient, UnrolledPhantom
from phantomgrad.gradients._base import Problem
from phantomgrad.solvers import FixedPointIteration, Solver

OnFailure = Literal["warn", "raise", "ignore"]
OnStep = Callable[[int, State, Tensor], None]
"""Called after each check with the step, the state's image `f(z)` and the relative residual of every sample."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything about a call but the map and its inputs."""

    gradient: Gradient
    solver: Solver
    eval_solver: Solver | None = None
    """The solver where grad mode is off; None takes `solver`."""
    batch_dim: int | None = 0
    on_failure: OnFailure = "warn"
    on_step: OnStep | None = None
    process_group: Any = None

    def __post_init__(self) -> None:
        for name, kind in (("gradient", Gradient), ("solver", Solver)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"{name} must be a phantomgrad {kind.__name__} object such as {_EXAMPLES[name]}, "
                    f"got {getattr(self, name)!r}."
                )
        if self.eval_solver is not None and not isinstance(self.eval_solver, Solver):
            raise TypeError(f"eval_solver must be a phantomgrad Solver object or None, got {self.eval_solver!r}.")
        self.gradient.solver_for(self.solver)  # refuses a combination that cannot work
        if self.batch_dim is not None and (isinstance(self.batch_dim, bool) or not isinstance(self.batch_dim, int)):
            raise TypeError(f"batch_dim must be an integer or None, got {self.batch_dim!r}.")
        if self.on_failure not in get_args(OnFailure):
            raise ValueError(f"on_failure must be one of 'warn', 'raise', 'ignore', got {self.on_failure!r}.")
        if self.on_step is not None and not callable(self.on_step):
            raise TypeError(f"on_step must be callable or None, got {self.on_step!r}.")

    @property
    def running_solver(self) -> Solver:
        """The solver of a call made in the present grad mode."""
        chosen = self.solver if torch.is_grad_enabled() or self.eval_solver is None else self.eval_solver
        return self.gradient.solver_for(chosen) if self.gradient.records_solve else chosen


_EXAMPLES = {"gradient": "UnrolledPhantom(steps=5)", "solver": "Anderson()"}


@outside_the_compiler
def fixed_point(
    fn: Callable[..., Any],
    z0: State,
    *inputs: Any,
    gradient: Gradient | None = None,
    solver: Solver | None = None,
    output: int | str | None = None,
    batch_dim: int | None = 0,
    on_failure: OnFailure = "warn",
    on_step: OnStep | None = None,
    process_group: Any = None,
) -> Solution:
    """Solve `z = fn(z, *inputs)` from `z0`, with gradients to the inputs, captured tensors and parameters of `fn`.

    The state is a tensor, or a tuple, list or dict of them; `fn` returns one of the same structure, shapes and dtypes. The
    options are those of `attach`. `Solution.value` carries the gradient, an `UnrolledPhantom` by default.
    """
    settings = Settings(
        gradient=UnrolledPhantom() if gradient is None else gradient,
        solver=FixedPointIteration() if solver is None else solver,
        batch_dim=batch_dim,
        on_failure=on_failure,
        on_step=on_step,
        process_group=process_group,
    )
    visible = [*inputs, *(fn.parameters() if isinstance(fn, nn.Module) else ())]
    scope = OncePerSolve(fn) if isinstance(fn, nn.Module) else None
    cell = Cell(lambda z: fn(z, *inputs), z0, output=output, scope=scope)
    leaves, solution = run(cell, settings, visible=visible, report=Report(settings.on_failure))
    return replace(solution, value=cell.structure.unflatten(leaves))


class Report:
    """What becomes of failed solves: counted, and warned about once, raised or ignored."""

    def __init__(self, on_failure: OnFailure, where: Callable[[], str] = lambda: "") -> None:
        self.on_failure: OnFailure = on_failure
        self.unconverged = 0
        self.where = where
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "where": None}

    def warn_once(self, topic: str, message: Callable[[], str], category: type[Warning] = UserWarning) -> None:
        """Warn, but only the first time about each topic; only then is the message made."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message(), category, stacklevel=_outside_stacklevel())

    def __call__(self, solved: Solved, what: str, on_failure: OnFailure | None = None) -> None:
        """Act on a finished solve of `what`."""
        on_failure = on_failure or self.on_failure
        if solved.any_diverged and on_failure != "ignore":
            raise DivergedError(
                f"{what[0].upper()}{what[1:]} diverged{self.where()}: {_count(solved.diverged)} not finite after "
                f"{int(solved.steps.max())} steps. Damp the solver (FixedPointIteration(damping=0.5)), use Anderson(), "
                "or normalise the block."
            )
        if solved.all_converged or torch.compiler.is_exporting():
            return
        self.unconverged += 1
        if on_failure == "ignore" or (on_failure == "warn" and "unconverged" in self._warned):
            return  # the message reads from the device and looks for the module's path
        message = (
            f"{what[0].upper()}{what[1:]} did not converge{self.where()}: {_count(~solved.converged)} above their tolerance "
            f"after {int(solved.steps.max())} steps, with a relative residual of up to {float(solved.residual.max()):.1e}. "
            'Raise max_steps, use Anderson() or damping below 1, or pass on_failure="ignore"; '
            "phantomgrad.diagnostics.check says which."
        )
        if on_failure == "raise":
            raise NotConvergedError(message)
        self.warn_once("unconverged", lambda: message, NotConvergedWarning)


def run(cell: Cell, settings: Settings, *, visible: Iterable[Any], report: Report) -> tuple[Leaves, Solution]:
    """Solve, and return the solution's leaves with their gradient, and detached how it went.

    `visible` are the inputs and parameters known to the caller: where none requires grad, the first evaluation finds
    out whether the map has captured something that does.
    """
    samples = Samples(cell.start, settings.batch_dim)
    gradient, solver = settings.gradient, settings.running_solver
    recorded = gradient.records_solve and torch.is_grad_enabled()
    given = cell.take_given()
    start = given if recorded else cell.start
    wants_grad = torch.is_grad_enabled() and any(map(_requires_grad, chain((start,), visible)))
    wants_grad = (wants_grad or in_forward_mode()) and not torch.compiler.is_exporting()
    probing = torch.is_grad_enabled() and not (wants_grad or recorded or torch.compiler.is_exporting())
    probe = _Probe(cell) if probing else None
    on_step, agree = settings.on_step, _agreement(settings.process_group)
    tolerance_dtype = _tolerance_dtype(samples)
    with nullcontext() if recorded else without_tangents():
        solved = solve(
            cell if probe is None else probe,
            start,
            solver,
            samples,
            tolerance_dtype=tolerance_dtype,
            stop_on_divergence=settings.on_failure != "ignore",
            on_step=None
            if on_step is None
            else lambda step, z, residual: on_step(step, cell.structure.unflatten(z), residual),
            agree=agree,
            recorded=recorded,
            stop_early=not gradient.records_solve,
        )
    if solver.max_steps > 0:
        report(solved, "the fixed point", settings.on_failure)
    if probe is not None:
        wants_grad = probe.found or solver.max_steps == 0
    if torch.is_autocast_enabled(samples.device.type):
        # Casts of parameters that autocast cached without grad would cut the recorded evaluation off from them.
        torch.clear_autocast_cache()
    problem = Problem(
        evaluate=cell,
        solved=solved,
        samples=samples,
        solver=solver,
        tolerance_dtype=tolerance_dtype,
        report=report,
        adjoint=AdjointSolve(),
        agree=agree,
        compiled=cell.compiled,
    )
    if wants_grad:
        leaves = gradient.connect(problem)
        if solver.max_steps == 0 and not isinstance(gradient, UnrolledPhantom):
            leaves = _with_values(solved.image, leaves)
    else:
        leaves = solved.image if recorded else gradient.without_grad(problem)
        if cell.returned is not None and not solved.last:
            with torch.no_grad():
                cell(solved.point)
    cell.finish()
    return leaves, _solution(cell, leaves, problem)


def _solution(cell: Cell, leaves: Leaves, problem: Problem) -> Solution:
    solved = problem.solved
    trace = solved.trace
    if trace is not None and trace.states is not None:
        trace = Trace(trace.steps, trace.residuals, [cell.structure.unflatten(state) for state in trace.states])
    return Solution(
        value=cell.structure.unflatten(detach(leaves)),
        converged=solved.converged,
        steps=solved.steps,
        residual=solved.residual,
        trace=trace,
        adjoint=problem.adjoint,
    )


class _Probe:
    """The cell, whose first evaluation is recorded to see whether its result requires grad."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._asked = False
        self.found = False

    def __call__(self, leaves: Leaves) -> Leaves:
        if self._asked:
            return self._cell(leaves)
        self._asked = True
        with torch.enable_grad():
            image = self._cell(leaves)
        self.found = any(leaf.requires_grad for leaf in image)
        return detach(image)


class _Values(torch.autograd.Function):
    """The given values with the gradient of others."""

    @staticmethod
    def forward(ctx: Any, values: Leaves, *leaves: Tensor) -> Leaves:
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *cotangent)


def _with_values(values: Leaves, leaves: Leaves) -> Leaves:
    result: Leaves = _Values.apply(values, *leaves)  # pyright: ignore[reportAssignmentType]
    return result


def _requires_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        return any(_requires_grad(part) for part in value.values())
    return isinstance(value, (tuple, list)) and any(_requires_grad(part) for part in value)


def _tolerance_dtype(samples: Samples) -> torch.dtype:
    """The coarsest dtype that takes part: no residual falls below the rounding of autocast's."""
    device = samples.device.type
    candidates = [dtype.to_real() for dtype in samples.dtypes]
    if torch.is_autocast_enabled(device):
        candidates.append(torch.get_autocast_dtype(device))
    return max(candidates, key=lambda dtype: torch.finfo(dtype).eps)


def _agreement(process_group: Any) -> Agree | None:
    if process_group is None:
        return None

    def agree(flags: Tensor) -> Tensor:
        votes = flags.to(torch.int32)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=process_group)
        return votes.bool()

    return agree


def _count(failed: Tensor) -> str:
    """Which samples have failed; none of this process's where another of its process_group has failed."""
    count = int(failed.sum())
    return f"{count} of {failed.numel()} samples are" if count else "samples of another process of process_group are"


def _outside_stacklevel() -> int:
    """The `stacklevel` that shows a warning at the first caller outside phantomgrad and torch's module machinery."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("phantomgrad.", "torch.nn.modules.module", "torch.autograd")):
            break
        level, frame = level + 1, frame.f_back
    return level
