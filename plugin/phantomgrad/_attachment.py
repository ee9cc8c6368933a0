"""The handle of an attached module."""

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

from phantomgrad._arguments import Call, StateArgument, call_forward, original_forward, parameters_of
from phantomgrad._batched_inputs import BatchedCall, BatchedInputs
from phantomgrad._bound import Bound, located, module_path
from phantomgrad._cell import Cell
from phantomgrad._communication import refuse_communication
from phantomgrad._compiled import CompiledCall, CompiledForward
from phantomgrad._errors import AttachError, DivergedError, NotConvergedError, NotConvergedWarning
from phantomgrad._fixed_point import OnStep, Settings, run
from phantomgrad._once_per_solve import OncePerSolve
from phantomgrad._parametrizations import release
from phantomgrad._report import Report
from phantomgrad._solution import Solution
from phantomgrad._state import State, requires_grad
from phantomgrad._transforms import outside_the_compiler
from phantomgrad.gradients import Gradient
from phantomgrad.solvers import Solver


def attachment_of(module: nn.Module) -> Attachment | None:
    """The attachment of `module` itself, also where a framework has wrapped its `forward` since."""
    replicate = module.__dict__.get(_REPLICATE)
    if not isinstance(replicate, _Replicate) or "forward" not in module.__dict__:
        return None
    attachment = replicate.attachment
    return attachment if attachment._module_ref() is module else None  # a shallow copy shares what is another module's


_REPLICATE = "_replicate_for_data_parallel"


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
        compile: bool | str,
    ) -> None:
        super().__init__(module)
        self._settings = settings
        self._previous: Callable[..., Any] | None = module.__dict__.get("forward")
        self._state = StateArgument(module, state)
        self._batched: BatchedInputs | None = None
        if settings.batched_inputs is not None:
            parameters, place = parameters_of(module), self._state.place
            self._batched = BatchedInputs(settings.batched_inputs, parameters, place, lambda: module_path(module))
        self._output = output
        self._compile = compile
        self._report = Report(settings.on_failure)
        self._prepare()
        module.__dict__["forward"] = self
        module.__dict__[_REPLICATE] = _Replicate(module, self)

    def _prepare(self) -> None:
        """Create what neither copies nor pickles carry."""
        self._thread = _ThreadState()
        self._where = located(self._module_ref)
        self._report.where = self._where
        self._compiled: CompiledForward | None = None
        if self._compile:
            mode = self._compile if isinstance(self._compile, str) else None
            self._compiled = CompiledForward(self.module, self._previous, mode)

    def _copied_state(self) -> dict[str, Any]:
        fresh = ("_thread", "_where", "_compiled")
        return {name: value for name, value in super()._copied_state().items() if name not in fresh}

    def __getstate__(self) -> dict[str, Any]:
        # A process group lives in its process: copies within it share the group, pickles go without.
        return {**super().__getstate__(), "_settings": replace(self._settings, process_group=None)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self._settings.process_group)] = self._settings.process_group
        return super().__deepcopy__(memo)

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
        """How many solves so far, forward and in backward, did not reach what they were asked for."""
        return self._report.unconverged

    @contextmanager
    def using(
        self, *, gradient: Gradient | None = None, solver: Solver | None = None, on_step: OnStep | None = None
    ) -> Generator[Self, None, None]:
        """Other settings for this thread within a `with`; `solver` then holds with and without grad."""
        changes: dict[str, Any] = {} if gradient is None else {"gradient": gradient}
        if solver is not None:
            changes |= {"solver": solver, "eval_solver": None}
        if on_step is not None:
            changes |= {"on_step": on_step}
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
            return self._compiled([], self.module, *args, **kwargs)
        return call_forward(self.module, self._previous, *args, **kwargs)

    def remove(self) -> None:
        """Give the module its own `forward` back; doing so twice is harmless."""
        module = self.module
        if attachment_of(module) is not self:
            return
        forward = module.__dict__.get("forward")
        if forward is not self and getattr(forward, "__func__", None) is not _forward:
            raise AttachError(
                f"The forward of {module_path(module)} was wrapped after attaching, so it cannot be given back. Unwrap it "
                "first (Accelerate: accelerator.unwrap_model(model, keep_fp32_wrapper=False))."
            )
        del module.__dict__["forward"], module.__dict__[_REPLICATE]
        if self._previous is not None:
            module.__dict__["forward"] = self._previous
        release(module)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        module = self._module_ref()
        path = "a module that no longer exists" if module is None else module_path(module)
        return f"Attachment({path}, {self.gradient}, solver={self.solver})"

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(
                f"An attachment has no {name!r} to assign: gradient, solver and eval_solver can be. Other options are given to "
                "attach: remove() it and attach anew."
            )
        super().__setattr__(name, value)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(functools.partial(original_forward(self.module, self._previous)))

    # -- a call ------------------------------------------------------------------------------------------------------

    @property
    def __self__(self) -> nn.Module:
        """With `__func__`, what a bound method has: frameworks that wrap `forward` then rebind it to copies of the module."""
        return self.module

    @property
    def __code__(self) -> Any:
        """What `torch.export` reads the names of a root module's arguments from."""
        return getattr(original_forward(self.module, self._previous), "__code__", type(self.module).forward.__code__)

    @property
    def __func__(self) -> Callable[..., Any]:
        return _forward

    @outside_the_compiler
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        thread = self._thread
        if thread.disabled:
            return self.step(*args, **kwargs)
        settings = self._current_settings()
        module = self.module
        compiled = None if self._compiled is None else CompiledCall(self._compiled, module)
        step = self.step if compiled is None else compiled.step
        z0, others, call = self._state.split(args, kwargs, step, self._where)
        if settings.process_group is None:
            refuse_communication(module)
        scope = OncePerSolve(module, ahead=compiled is not None)
        cell = Cell(
            call,
            z0,
            output=self._output,
            where=self._where,
            scope=scope,
            constant=None if compiled is None else functools.partial(compiled.constant, call),
            returns_more=True,
            batched=self._batched_call(call),
        )
        if torch.is_grad_enabled() and not settings.gradient.records_solve:
            self._check_start(z0, cell, others, module)
        try:
            leaves, solution = run(cell, settings, visible=_chain(others, module), report=self._report)
        except (DivergedError, NotConvergedError, NotConvergedWarning) as error:
            if self._report.has_raised(error):
                thread.solution = error.solution
            raise
        thread.solution = solution
        thread.last_output = [weakref.ref(leaf) for leaf in leaves]
        value = cell.structure.unflatten(leaves)
        return value if self._output is None else cell.replace_state(value)

    def _batched_call(self, call: Call) -> BatchedCall | None:
        batch_dim = self._settings.batch_dim
        return None if self._batched is None or batch_dim is None else self._batched.of(call, batch_dim, self._where)

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
                lambda: (
                    f"The start of the solve{self._where()} is the previous call's result: a loop around the module is no longer "
                    "needed, one call returns the equilibrium. To warm start, pass z0.detach()."
                ),
            )
        elif not any(map(requires_grad, others)):
            self._report.warn_once(
                "start",
                lambda: (
                    f"The start of the solve{self._where()} requires grad and no other input does: a start gets no gradient, so "
                    "what computed it stays untrained. Pass it as a further input of the cell, or detach it if that is intended."
                ),
            )


class _Replicate(Bound):
    """Takes the place of the module's hook for `nn.DataParallel`, whose replicas must not call the original's forward."""

    def __init__(self, module: nn.Module, attachment: Attachment) -> None:
        super().__init__(module)
        self.attachment = attachment

    def __call__(self) -> nn.Module:
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        replica.__dict__["forward"] = _refuse_replica
        return replica


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The `forward` of whatever module is attached."""
    attachment = attachment_of(module)
    if attachment is None:
        raise AttachError(f"{module_path(module)} is not attached any more, but its wrapped forward is still in use.")
    return attachment(*args, **kwargs)


def _refuse_replica(*args: Any, **kwargs: Any) -> Any:
    raise AttachError(
        "nn.DataParallel cannot run an attached module. Use DistributedDataParallel, one process a device."
    )


def _chain(others: tuple[Any, ...], module: nn.Module) -> Iterator[Any]:
    yield from others
    yield from module.parameters()
