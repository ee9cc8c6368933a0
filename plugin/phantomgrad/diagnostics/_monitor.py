"""Watching the attached modules of a model while it trains."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.hooks import RemovableHandle

from phantomgrad._attach import attachment_of
from phantomgrad._bound import module_path
from phantomgrad._errors import AttachError, PhantomGradError
from phantomgrad._options import check_integer
from phantomgrad._solution import AdjointSolve, Solution
from phantomgrad.diagnostics._probe import Probe

Log = Callable[[dict[str, float], int], Any]
"""Takes named numbers and the step they belong to, as `accelerator.log` does."""

_CALLS_WITHOUT_PASS = 1000


class Monitor:
    """Log how the solves of every attached module in `model` go, every `every` forward passes.

        monitor = Monitor(model, every=100, log=accelerator.log)

    Each report is one call `log({"cell/solver_steps": 8.3, ...}, step)` about all solves since the last one, `step`
    being the number of forward passes so far. Keys start with the module's name in the model (nothing if it is the
    model itself):

    - `solver_steps`, `solver_steps_max`: mean and largest number of evaluations of a sample;
    - `residual`, `residual_max`: median and largest relative residual of a sample;
    - `unconverged`: the fraction of samples that missed their tolerance;
    - `adjoint_steps`, for gradients that decide while they run: the mean number of products in backward;
    - with `measure_every`: `gradient_cosine`, of the attached gradient with the exact one for the loss's own cotangent,
      and `spectral_radius`, of `J` at the solution, for the first call of a pass that backward reaches.

    Only calls with grad mode on count, so evaluation between epochs leaves no trace. A report moves numbers off the
    device once; a measurement (one solve, and up to a few hundred products) waits for it often, but changes nothing in
    the run: random generators, buffers and `.grad` stay. The hooks do not hold the model, copies and pickles of it are
    not watched, and `remove()`, or leaving `with Monitor(...)`, takes the hooks off.

    model: what the training loop calls, or a module inside it that is called once a pass.
    every: forward passes between reports.
    log: called as `log(values, step)`.
    measure_every: forward passes between measurements, a multiple of `every`; None makes none.

    Raises AttachError if nothing in `model` is attached.
    """

    every: int
    measure_every: int | None
    step: int
    """How many forward passes were counted; assignable, for a run that is resumed."""

    def __init__(self, model: nn.Module, *, every: int = 100, log: Log, measure_every: int | None = None) -> None:
        self.every, self.measure_every, self.step = every, measure_every, 0
        check_integer(self, "every", minimum=1)
        if measure_every is not None:
            check_integer(self, "measure_every", minimum=1)
            if measure_every % every != 0:
                raise ValueError(
                    f"measure_every of Monitor must be a multiple of every={every}, got {measure_every}: what is "
                    "measured appears in a report."
                )
        if not callable(log):
            raise TypeError(f"log of Monitor must be callable as log(values, step), got {log!r}.")
        if not isinstance(model, nn.Module):
            raise TypeError(f"Monitor watches an nn.Module, got a {type(model).__name__}.")
        modules = {name: each for name, each in model.named_modules() if attachment_of(each) is not None}
        if not modules:
            raise AttachError(f"Nothing in {module_path(model)} is attached: attach its cell first, then watch it.")
        for each in modules.values() if measure_every is not None else ():
            attachment = attachment_of(each)
            if attachment is not None and attachment._settings.process_group is not None:
                raise ValueError(
                    f"{module_path(each)} is attached with a process_group, whose processes must evaluate together, "
                    "and measurements do not: leave measure_every out."
                )
        self._log = log
        self._model = weakref.ref(model)
        self._calls = 0
        self._warned = False
        self._measuring = False
        self._watched = [_Watched(name) for name in modules]
        self._handles: list[RemovableHandle] = [
            each.register_forward_hook(_Listener(partial(self._called, watched)), with_kwargs=True)
            for watched, each in zip(self._watched, modules.values(), strict=True)
        ]
        self._handles.append(model.register_forward_hook(_Listener(self._passed), with_kwargs=True))

    def remove(self) -> None:
        """Stop watching; doing so twice is harmless."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for watched in self._watched:
            watched.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def report(self) -> dict[str, float]:
        """Log what has come together since the last report at once (at the end of a run, say), and return it."""
        values = _summary(self._watched)
        for watched in self._watched:
            values.update({watched.key(name): value for name, value in watched.measured.items()})
            watched.calls.clear()
            watched.measured = {}
        if values:
            self._log(values, self.step)
        return values

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _called(
        self, watched: _Watched, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        attachment = attachment_of(module)
        solution = None if attachment is None else attachment.solution
        if self._measuring or attachment is None or solution is None or watched.is_known(solution):
            return  # no solve has taken place: the attachment is disabled, or removed
        if not torch.is_grad_enabled():
            return
        watched.calls.append(_Solve(solution.steps, solution.residual, solution.converged, solution.adjoint))
        self._calls += 1
        if self.step == 0 and self._calls > _CALLS_WITHOUT_PASS:
            self._never_passed(watched)
        self._measure(watched, module)
        if self._is_due():
            watched.probes = [probe for probe in watched.probes if probe.step == self.step]
            watched.probes.append(Probe(attachment, args, kwargs, output, step=self.step))

    def _passed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._measuring or not torch.is_grad_enabled():
            return
        self.step += 1
        if self.step % self.every == 0:
            self.report()

    def _is_due(self) -> bool:
        """Whether the pass under way is the last before one whose report should hold a measurement.

        The loss's cotangent is known only after that pass's backward, so measuring waits for the next pass.
        """
        return self.measure_every is not None and (self.step + 2) % self.measure_every == 0

    def _measure(self, watched: _Watched, module: nn.Module) -> None:
        ready = next((probe for probe in watched.probes if probe.is_ready), None)
        if ready is None:
            return
        watched.probes.clear()
        self._measuring = True
        try:
            watched.measured = ready.measure(module)
        except (PhantomGradError, torch.OutOfMemoryError) as error:  # no reason to end a run that trains
            self.measure_every = None
            warnings.warn(
                f"Monitor could not measure {module_path(module)} and measures nothing from here on: "
                f"{str(error).splitlines()[0]}",
                stacklevel=2,
            )
        finally:
            self._measuring = False

    def _never_passed(self, watched: _Watched) -> None:
        for each in self._watched:
            each.calls.clear()
        model = self._model()
        if not self._warned and model is not None:
            self._warned = True
            warnings.warn(
                f"Monitor counts the forward passes of {module_path(model)}, which has not been called yet, while "
                f"{watched.name or 'a cell'} inside it has {self._calls} times: pass Monitor the module that the "
                "training loop calls.",
                stacklevel=2,
            )


class _Solve(NamedTuple):
    """What is kept of a solution: not its value."""

    steps: Tensor
    residual: Tensor
    converged: Tensor
    adjoint: AdjointSolve


@dataclass
class _Watched:
    """An attached module's name, and what is known about its calls since the last report."""

    name: str
    calls: list[_Solve] = field(default_factory=list["_Solve"])
    measured: dict[str, float] = field(default_factory=dict[str, float])
    probes: list[Probe] = field(default_factory=list[Probe])
    """The calls of one pass, of which the first that backward reaches is measured."""
    last: weakref.ref[Solution] | None = None

    def key(self, name: str) -> str:
        return f"{self.name}/{name}" if self.name else name

    def is_known(self, solution: Solution) -> bool:
        known = self.last is not None and self.last() is solution
        self.last = weakref.ref(solution)
        return known

    def clear(self) -> None:
        self.calls.clear()
        self.probes.clear()
        self.measured = {}


class _Listener:
    """A forward hook that copies and pickles of the model leave behind."""

    def __init__(self, callback: Callable[..., None] | None = None) -> None:
        self._callback = callback

    @_disable_dynamo  # a compiled model leaves the compiler for the solve anyway
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._callback is not None:
            self._callback(module, args, kwargs, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Listener:
        return _Listener()

    def __reduce__(self) -> tuple[type[_Listener], tuple[()]]:
        return _Listener, ()


_STATISTICS = ("solver_steps", "solver_steps_max", "residual", "residual_max", "unconverged")


def _summary(watched: list[_Watched]) -> dict[str, float]:
    """The statistics of all calls of all modules, with one transfer from the device."""
    called = [each for each in watched if each.calls]
    if not called:
        return {}
    device = called[0].calls[0].steps.device
    table: list[list[float]] = torch.stack([_statistics(each.calls).to(device) for each in called]).tolist()
    summary: dict[str, float] = {}
    for each, row in zip(called, table, strict=True):
        summary |= {each.key(name): value for name, value in zip(_STATISTICS, row, strict=True)}
        adjoint = [call.adjoint.steps for call in each.calls if call.adjoint.steps is not None]
        if adjoint:
            summary[each.key("adjoint_steps")] = sum(adjoint) / len(adjoint)
    return summary


def _statistics(calls: list[_Solve]) -> Tensor:
    steps = torch.cat([call.steps for call in calls]).float()
    residual = torch.cat([call.residual for call in calls]).float()
    unconverged = ~torch.cat([call.converged for call in calls])
    return torch.stack((steps.mean(), steps.max(), residual.nanmedian(), residual.max(), unconverged.float().mean()))
