"""Solving a fixed-point problem and giving its solution a gradient: the core, which knows no modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor, nn

from phantomgrad._arguments import Call, Place
from phantomgrad._batched_inputs import BatchedInputs
from phantomgrad._cell import Cell
from phantomgrad._errors import DivergedError, NotConvergedError, NotConvergedWarning, StateMismatchError
from phantomgrad._once_per_solve import OncePerSolve
from phantomgrad._progress import Agree
from phantomgrad._report import OnFailure, Report
from phantomgrad._samples import Samples
from phantomgrad._solution import AdjointSolve, Solution, Trace
from phantomgrad._solve import solve
from phantomgrad._state import Leaves, State, describe, detach, requires_grad
from phantomgrad._transforms import in_forward_mode, outside_the_compiler, without_tangents
from phantomgrad.gradients import Gradient, UnrolledPhantom
from phantomgrad.gradients._base import Problem, Refinement
from phantomgrad.solvers import FixedPointIteration, Solver

OnStep = Callable[[int, State, Tensor], Tensor | None]
"""Called after each check with the step, the state's image `f(z)` and the relative residual of every sample.

It may return the samples that are to stop at this image, a bool tensor of shape (samples,); they then count as converged.
With a `process_group` all processes return one, or none does.
"""


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
    batched_inputs: Sequence[int | str] | None = None
    """Which further inputs have a batch dimension; None where the caller has not said."""

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
        self._check_batched_inputs()

    def _check_batched_inputs(self) -> None:
        named = self.batched_inputs
        if named is None:
            return
        if not isinstance(named, tuple | list) or any(
            isinstance(each, bool) or not isinstance(each, int | str) for each in named
        ):
            raise TypeError(f"batched_inputs must be a tuple of positions and keywords, or None, got {named!r}.")
        for name, given in (
            ("batch_dim=None", self.batch_dim is None),
            ("process_group", self.process_group is not None),
        ):
            if given:
                raise ValueError(
                    f"batched_inputs lets converged samples be dropped from the batch, which {name} rules out. Leave out one "
                    "of the two."
                )

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
    batched_inputs: Sequence[int | str] | None = None,
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
        batched_inputs=batched_inputs,
    )
    call = Call(fn, (None, *inputs), {}, state=0)
    batched = None
    if settings.batched_inputs is not None and settings.batch_dim is not None:
        parameters = _parameters(fn)
        state = Place.find(parameters, 0) or Place(0, None)
        declared = BatchedInputs(
            settings.batched_inputs, parameters, state, lambda: getattr(fn, "__name__", type(fn).__name__)
        )
        batched = declared.of(call, settings.batch_dim, lambda: "")
    visible = [*inputs, *(fn.parameters() if isinstance(fn, nn.Module) else ())]
    scope = OncePerSolve(fn) if isinstance(fn, nn.Module) else None
    cell = Cell(call, z0, output=output, scope=scope, batched=batched)
    leaves, solution = run(cell, settings, visible=visible, report=Report(settings.on_failure))
    return replace(solution, value=cell.structure.unflatten(leaves))


def _parameters(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    """What `fn` takes; anything by position where that cannot be read, as of a builtin."""
    try:
        return list(inspect.signature(fn).parameters.values())
    except ValueError:
        return [inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)]


def run(cell: Cell, settings: Settings, *, visible: Iterable[Any], report: Report) -> tuple[Leaves, Solution]:
    """Solve, and return the solution's leaves with their gradient, and detached how it went.

    `visible` are the inputs and parameters known to the caller: where none requires grad, the first evaluation finds
    out whether the map has captured something that does.
    """
    samples = Samples(cell.start, settings.batch_dim, where=cell.where)
    if cell.is_empty:
        return _run_empty(cell, settings, samples)
    if cell.batched is not None and not torch.compiler.is_exporting():
        cell.batched.check(samples.count)
    gradient, solver = settings.gradient, settings.running_solver
    recorded = gradient.records_solve and torch.is_grad_enabled()
    given = cell.take_given()
    start = given if recorded else cell.start
    wants_grad = torch.is_grad_enabled() and any(map(requires_grad, chain((start,), visible)))
    wants_grad = (wants_grad or in_forward_mode()) and not torch.compiler.is_exporting()
    probing = torch.is_grad_enabled() and not (wants_grad or recorded or torch.compiler.is_exporting())
    probe = _Probe(cell) if probing else None
    narrows = cell.batched is not None and not (recorded or torch.compiler.is_exporting())
    narrows = narrows and not (gradient.reads_memory and torch.is_grad_enabled())
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
            on_step=None if on_step is None else _for_leaves(on_step, cell),
            agree=agree,
            recorded=recorded,
            stop_early=not gradient.records_solve,
            narrow=cell.narrowed if narrows else None,
        )
    cell.solved()
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
        refinement=Refinement(),
        agree=agree,
        compiled=cell.compiled,
    )
    try:
        if solver.max_steps > 0:
            report(solved, "the fixed point", solver, settings.on_failure)
        leaves = _connected(cell, gradient, problem) if wants_grad else _constant(cell, gradient, problem, recorded)
    except (DivergedError, NotConvergedError, NotConvergedWarning) as error:
        if report.has_raised(error):  # and not that of an attached module inside the map
            error.solution = _solution(cell, solved.image, problem)
        raise
    cell.finish()
    return leaves, _solution(cell, leaves, problem)


def _for_leaves(on_step: OnStep, cell: Cell) -> Callable[[int, Leaves, Tensor], Tensor | None]:
    """`on_step` for images as leaves, with what it returns checked."""

    def on_leaves(step: int, image: Leaves, residual: Tensor) -> Tensor | None:
        chosen = on_step(step, cell.structure.unflatten(image), residual)
        if chosen is None:
            return None
        if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != residual.shape:
            got = f"{chosen.dtype} of shape {tuple(chosen.shape)}" if isinstance(chosen, Tensor) else repr(chosen)
            raise TypeError(
                "on_step must return None, or which samples are to stop as a bool tensor of shape "
                f"{tuple(residual.shape)}, got {got}."
            )
        return chosen.to(residual.device)

    return on_leaves


def _connected(cell: Cell, gradient: Gradient, problem: Problem) -> Leaves:
    """The solution with its gradient."""
    solved, solver = problem.solved, problem.solver
    if solver.max_steps == 0:
        cell.prepare()  # a gradient's evaluations share what the solve would have computed
    leaves = gradient.connect(problem)
    if solver.max_steps == 0 and not isinstance(gradient, UnrolledPhantom):
        leaves = _with_values(solved.image, leaves)
    elif solved.any_diverged:  # a sample that was never finite keeps its start, as it does without grad
        leaves = problem.samples.where(torch.isfinite(solved.residual), leaves, solved.image)
    if cell.rest_requires_grad and not gradient.connects_last_evaluation:
        # What the map returns beside the state depends on the solution, and so on everything through it.
        cell(_with_values(solved.point, leaves))
    return leaves


def _constant(cell: Cell, gradient: Gradient, problem: Problem, recorded: bool) -> Leaves:
    """The solution where no gradient is recorded, or where the solve's own graph is it."""
    solved = problem.solved
    if recorded:
        return solved.image
    leaves = gradient.without_grad(problem)
    if cell.returns_more and (cell.returned is None or (leaves is solved.image and not solved.last)):
        with torch.no_grad():
            cell(solved.point)
    # The caller may change the result in place, but not thereby the start.
    return tuple(map(torch.clone, leaves)) if problem.solver.max_steps == 0 else leaves


def _run_empty(cell: Cell, settings: Settings, samples: Samples) -> tuple[Leaves, Solution]:
    """A state without entries is its own fixed point: one evaluation, for the graph and the rest of what the map returns."""
    if settings.process_group is not None:
        raise StateMismatchError(
            f"The state {describe(cell.start)} is empty{cell.where()}, and the other processes of process_group would wait for "
            "its solve. Give every process at least one sample."
        )
    leaves = cell(cell.start)
    cell.finish()
    zeros = torch.zeros(samples.count, dtype=samples.dtype.to_real(), device=samples.device)
    return leaves, Solution(
        value=cell.structure.unflatten(detach(leaves)),
        converged=torch.ones_like(zeros, dtype=torch.bool),
        steps=torch.zeros_like(zeros, dtype=torch.int64),
        residual=zeros,
    )


def _solution(cell: Cell, leaves: Leaves, problem: Problem) -> Solution:
    solved, away = problem.solved, problem.refinement.away
    trace = solved.trace
    if trace is not None and trace.states is not None:
        trace = Trace(trace.steps, trace.residuals, [cell.structure.unflatten(state) for state in trace.states])
    return Solution(
        value=cell.structure.unflatten(detach(leaves)),
        converged=solved.converged if away is None else solved.converged & ~away,
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
        self.found = any(leaf.requires_grad for leaf in image) or self._cell.rest_requires_grad
        return detach(image)


def _with_values(values: Leaves, leaves: Leaves) -> Leaves:
    """The given values with the gradient of others."""
    return tuple(value + (leaf - leaf.detach()) for value, leaf in zip(values, leaves, strict=True))


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
