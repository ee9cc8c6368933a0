"""Where to attach: the only file that knows how a module is called."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from phantomgrad._bound import Bound, located, module_path
from phantomgrad._cell import Cell
from phantomgrad._errors import AttachError
from phantomgrad._fixed_point import OnFailure, OnStep, Report, Settings, run
from phantomgrad._once_per_solve import OncePerSolve
from phantomgrad._parametrizations import release
from phantomgrad._solution import Solution
from phantomgrad._state import State
from phantomgrad.gradients import Gradient, UnrolledPhantom
from phantomgrad.solvers import FixedPointIteration, Solver


def attach(
    module: nn.Module,
    gradient: Gradient | None = None,
    *,
    solver: Solver | None = None,
    state: int | str = 0,
    output: int | str | None = None,
    batch_dim: int | None = 0,
    eval_solver: Solver | None = None,
    on_failure: OnFailure = "warn",
    on_step: OnStep | None = None,
    compile: bool = False,
    process_group: Any = None,
) -> Attachment:
    """Make `module` return its equilibrium: `module(z0, x)` now solves `z = forward(z, x)` from `z0`.

    The call convention, `state_dict`, parameters, `type` and `repr` stay as they are; `remove()` undoes it.

    gradient: which gradient the solution carries; `UnrolledPhantom()` by default.
    solver: how the equilibrium is found; `FixedPointIteration()` by default.
    state: which argument is the state, a position or a keyword.
    output: which part of a larger return value is the new state, a position or key; the rest comes back from the
        recorded evaluation.
    batch_dim: the dimension along which `forward` treats samples independently; each then stops by itself. None if it couples
        them (graphs, sequences first, batch statistics).
    eval_solver: the solver where grad mode is off; `solver` by default.
    on_failure: "warn" (once; a non-finite state raises), "raise", or "ignore" (the best finite iterate).
    on_step: called as `on_step(step, image, residual)` after each check of the solver.
    compile: compile the cell with `torch.compile`, for solver and gradient alike.
    process_group: processes that must stop and fail together (FSDP units or SyncBatchNorm inside the cell).

    Raises AttachError if the module is attached already, is no module, or has no such argument.
    """
    if not isinstance(module, nn.Module):
        raise AttachError(
            f"attach takes an nn.Module, got {describe_type(module)}. For a function use fixed_point or @equilibrium."
        )
    if is_attached(module):
        raise AttachError(
            f"{module_path(module)} is attached already. Change it by assignment (attachment.gradient = ..., "
            "attachment.solver = ...; attachments(model) yields every attachment), or remove() it first."
        )
    settings = Settings(
        gradient=UnrolledPhantom() if gradient is None else gradient,
        solver=FixedPointIteration() if solver is None else solver,
        eval_solver=eval_solver,
        batch_dim=batch_dim,
        on_failure=on_failure,
        on_step=on_step,
        process_group=process_group,
    )
    return Attachment(module, settings, state=state, output=output, compile=compile)


def is_attached(module: nn.Module) -> bool:
    """Whether `module` itself returns its equilibrium."""
    return isinstance(module.__dict__.get("forward"), Attachment)


def attachments(model: nn.Module) -> Iterator[Attachment]:
    """Every attachment in `model`, in the order of its modules."""
    for module in model.modules():
        if is_attached(module):
            yield module.__dict__["forward"]


class _ThreadState(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.overrides: list[dict[str, Any]] = []
        self.disabled = 0
        self.solution: Solution | None = None
        self.last_output: list[weakref.ref[Tensor]] = []


class Attachment(Bound):
    """The handle of an attached module, and the callable that took its `forward`'s place (Note [Instance forward]).

    A context manager: `with attach(cell): ...` removes itself at the end.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: Settings,
        *,
        state: int | str,
        output: int | str | None,
        compile: bool,
    ) -> None:
        super().__init__(module)
        self._settings = settings
        self._previous: Callable[..., Any] | None = module.__dict__.get("forward")
        self._state = _StateArgument(module, state)
        self._output = output
        self._compile = compile
        self._report = Report(settings.on_failure)
        self._prepare()
        module.__dict__["forward"] = self
        module.__dict__["_replicate_for_data_parallel"] = _Replicate(module)

    def _prepare(self) -> None:
        """Create what neither copies nor pickles carry."""
        self._thread = _ThreadState()
        self._where = located(lambda: self.module)
        self._report.where = self._where
        self._compiled = torch.compile(_call_forward) if self._compile else None

    def _copied_state(self) -> dict[str, Any]:
        fresh = ("_thread", "_where", "_compiled")
        return {name: value for name, value in super()._copied_state().items() if name not in fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    # -- what the user sees ------------------------------------------------------------------------------------------

    @property
    def gradient(self) -> Gradient:
        """The gradient that solutions carry; assignable."""
        return self._settings.gradient

    @gradient.setter
    def gradient(self, gradient: Gradient) -> None:
        self._settings = replace(self._settings, gradient=gradient)

    @property
    def solver(self) -> Solver:
        """The solver where grad mode is on, and where it is off unless there is an `eval_solver`; assignable."""
        return self._settings.solver

    @solver.setter
    def solver(self, solver: Solver) -> None:
        self._settings = replace(self._settings, solver=solver)

    @property
    def eval_solver(self) -> Solver | None:
        """The solver where grad mode is off; None takes `solver`; assignable."""
        return self._settings.eval_solver

    @eval_solver.setter
    def eval_solver(self, solver: Solver | None) -> None:
        self._settings = replace(self._settings, eval_solver=solver)

    @property
    def solution(self) -> Solution | None:
        """How the last call in this thread went, detached; None before the first."""
        return self._thread.solution

    @property
    def unconverged(self) -> int:
        """How many solves so far left a sample above its tolerance."""
        return self._report.unconverged

    @contextmanager
    def using(self, *, gradient: Gradient | None = None, solver: Solver | None = None) -> Generator[Self, None, None]:
        """Other settings for this thread within a `with`; `solver` then holds with and without grad."""
        changes: dict[str, Any] = {} if gradient is None else {"gradient": gradient}
        if solver is not None:
            changes |= {"solver": solver, "eval_solver": None}
        replace(self._current_settings(), **changes)  # a wrong value is refused before anything changes
        self._thread.overrides.append(changes)
        try:
            yield self
        finally:
            self._thread.overrides.pop()

    @contextmanager
    def disabled(self) -> Generator[Self, None, None]:
        """Within a `with`, the module in this thread does what it did before: one evaluation per call."""
        self._thread.disabled += 1
        try:
            yield self
        finally:
            self._thread.disabled -= 1

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One original evaluation of the module."""
        if self._compiled is not None:
            return self._compiled(self.module, self._previous, *args, **kwargs)
        return _call_forward(self.module, self._previous, *args, **kwargs)

    def remove(self) -> None:
        """Give the module its own `forward` back; doing so twice is harmless."""
        module = self.module
        if module.__dict__.get("forward") is not self:
            return
        del module.__dict__["forward"], module.__dict__["_replicate_for_data_parallel"]
        if self._previous is not None:
            module.__dict__["forward"] = self._previous
        release(module)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Attachment({module_path(self.module)}, {self.gradient}, solver={self.solver})"

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(_original(self.module, self._previous)))

    # -- a call ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        thread = self._thread
        if thread.disabled:
            return self.step(*args, **kwargs)
        settings = self._current_settings()
        z0, others, call = self._state.split(args, kwargs, self.step)
        module = self.module
        cell = Cell(
            call, z0, output=self._output, where=self._where, scope=OncePerSolve(module), compiled=self._compile
        )
        if torch.is_grad_enabled() and not settings.gradient.records_solve:
            self._check_start(z0, cell, others, module)
        leaves, solution = run(cell, settings, visible=_chain(others, module), report=self._report)
        thread.solution = solution
        thread.last_output = [weakref.ref(leaf) for leaf in leaves]
        value = cell.structure.unflatten(leaves)
        return value if self._output is None else cell.replace_state(value)

    def _current_settings(self) -> Settings:
        """The settings of a call in this thread."""
        settings = self._settings
        for changes in self._thread.overrides:
            settings = replace(settings, **changes)
        return settings

    def _check_start(self, z0: State, cell: Cell, others: tuple[Any, ...], module: nn.Module) -> None:
        """Warn about the two silent mistakes that users make with the start."""
        leaves = cell.structure.flatten(z0) or ()
        if not any(leaf.requires_grad for leaf in leaves):
            return
        if any(last() is leaf for last in self._thread.last_output for leaf in leaves):
            self._report.warn_once(
                "loop",
                f"The start of the solve{self._where()} is the previous call's result: a loop around the module is no longer "
                "needed, one call returns the equilibrium. To warm start, pass z0.detach().",
            )
        elif not any(isinstance(value, Tensor) and value.requires_grad for value in others):
            self._report.warn_once(
                "start",
                f"The start of the solve{self._where()} requires grad and no other input does: a start gets no gradient, so what "
                "computed it stays untrained. Pass it as a further input of the cell, or detach it if that is intended.",
            )


class _StateArgument:
    """Finds the state among a call's arguments."""

    def __init__(self, module: nn.Module, state: int | str) -> None:
        parameters = list(inspect.signature(_original(module, module.__dict__.get("forward"))).parameters.values())
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        takes_any = {p.kind for p in parameters}
        self.position: int | None = None
        self.name: str | None = None
        if isinstance(state, str):
            self.name = state
            self.position = positional.index(state) if state in positional else None
            known = state in [p.name for p in parameters] or inspect.Parameter.VAR_KEYWORD in takes_any
        elif isinstance(state, int) and not isinstance(state, bool):
            self.position = state
            self.name = positional[state] if 0 <= state < len(positional) else None
            known = state >= 0 and (self.name is not None or inspect.Parameter.VAR_POSITIONAL in takes_any)
        else:
            raise AttachError(f"state must be the position or the keyword of an argument, got {state!r}.")
        if not known:
            raise AttachError(
                f"{module_path(module)} has no argument state={state!r}: its forward takes "
                f"({', '.join(str(p) for p in parameters)}). Pass state= with the position or keyword of the state."
            )

    def split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], step: Callable[..., Any]
    ) -> tuple[State, tuple[Any, ...], Callable[[State], Any]]:
        """The state, the other arguments, and a function of the state alone."""
        position, name = self.position, self.name
        if position is not None and position < len(args):
            before, after = args[:position], args[position + 1 :]
            return args[position], (*before, *after, *kwargs.values()), lambda z: step(*before, z, *after, **kwargs)
        if name is not None and name in kwargs:
            rest = {key: value for key, value in kwargs.items() if key != name}
            return kwargs[name], (*args, *rest.values()), lambda z: step(*args, **rest, **{name: z})
        raise TypeError(f"The call lacks the state argument {position if name is None else name!r}.")


class _Replicate(Bound):
    """Takes the place of the module's hook for `nn.DataParallel`, whose replicas must not call the original's forward."""

    def __call__(self) -> nn.Module:
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        replica.__dict__["forward"] = _refuse_replica
        return replica


def _refuse_replica(*args: Any, **kwargs: Any) -> Any:
    raise AttachError(
        "nn.DataParallel cannot run an attached module. Use DistributedDataParallel, one process a device."
    )


def _original(module: nn.Module, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    return functools.partial(type(module).forward, module) if previous is None else previous


def _call_forward(module: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs) if previous is None else previous(*args, **kwargs)


def _chain(others: tuple[Any, ...], module: nn.Module) -> Iterator[Any]:
    yield from others
    yield from module.parameters()


def describe_type(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
