"""What a diagnostic looks at: a cell, attached or not, and the arguments of one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phantomgrad._arguments import StateArgument, original_forward
from phantomgrad._attach import describe_type
from phantomgrad._attachment import Attachment, attachment_of
from phantomgrad._bound import module_path
from phantomgrad._fixed_point import fixed_point
from phantomgrad._report import OnFailure
from phantomgrad._solution import Solution
from phantomgrad._state import Leaves, State, Structure, describe, detach
from phantomgrad.diagnostics._undisturbed import undisturbed
from phantomgrad.gradients import Gradient
from phantomgrad.solvers import FixedPointIteration, Solver

Target = nn.Module | Attachment | Callable[..., Any]
"""An attached module (or its handle), a bare module, or a function whose first argument is the state."""


class Map(nn.Module):
    """A cell as a map of its state alone, in which `fixed_point` finds the parameters and norms of the user's module.

    The module is no child of this one, so that its path in messages stays the user's.
    """

    def __init__(self, module: nn.Module | None, step: Callable[[State], Any]) -> None:
        super().__init__()
        self._step = step
        self._inside = () if module is None else (module,)

    def named_modules(self, *args: Any, **kwargs: Any) -> Generator[tuple[str, nn.Module], None, None]:
        for module in self._inside:
            yield from module.named_modules(*args, **kwargs)

    def forward(self, z: State, *variables: Tensor) -> Any:
        return self._step(z)


@dataclass(frozen=True)
class Call:
    """One call of a cell: its start, what else it is given, and how its owner has attached it."""

    module: nn.Module | None
    attachment: Attachment | None
    start: State
    step: Callable[[State], Any]
    """One evaluation, with the call's further arguments."""
    inputs: dict[str, Tensor]
    """The floating-point tensors among the further arguments, by name."""
    output: int | str | None
    batch_dim: int | None

    @property
    def leaves(self) -> Leaves:
        """The tensors of the start."""
        leaves = Structure.of(self.start).flatten(self.start)
        assert leaves is not None
        return leaves


def read_call(
    target: Target,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    state: int | str,
    output: int | str | None,
    batch_dim: int | None,
    prepare: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Call:
    """Find state and inputs in a call; `prepare` makes of every floating-point input what the evaluations get."""
    module, attachment, evaluate = _resolve(target)
    keywords = dict(kwargs or {})
    if not args and not keywords:
        raise ValueError("Pass the cell's arguments after it: the start of the solve, then its further inputs.")
    if attachment is not None:
        _refuse_conflict(attachment, state=state, output=output, batch_dim=batch_dim)
        argument, output, batch_dim = attachment._state, attachment._output, attachment._settings.batch_dim
    elif module is not None:
        argument = StateArgument(module, state)
    elif state != 0:
        raise ValueError(f"A function takes its state first, so state={state!r} is for modules only.")
    else:
        argument = None
    position, name = (0, None) if argument is None else (argument.position, argument.name)
    names = _argument_names(evaluate, len(args))
    inputs: dict[str, Tensor] = {}
    args = tuple(arg if i == position else _map_tensors(arg, names[i], prepare, inputs) for i, arg in enumerate(args))
    keywords = {
        key: value if key == name else _map_tensors(value, key, prepare, inputs) for key, value in keywords.items()
    }
    if argument is not None:
        start, _, step = argument.split(args, keywords, evaluate)
    elif args:
        start, rest = args[0], args[1:]
        step: Callable[[State], Any] = lambda z: evaluate(z, *rest, **keywords)  # noqa: E731
    else:
        raise ValueError("A function takes its state first: pass it by position, before kwargs.")
    call = Call(
        module=module,
        attachment=attachment,
        start=start,
        step=step,
        inputs=inputs,
        output=output,
        batch_dim=batch_dim,
    )
    leaves = call.leaves
    if any(leaf.is_complex() for leaf in leaves):
        raise ValueError(
            f"Diagnostics work on real states, got {describe(start)}. Let the cell take torch.view_as_real of its "
            "state."
        )
    if any(leaf.numel() == 0 for leaf in leaves):
        raise ValueError(f"The state is empty: {describe(start)}. Pass a batch with at least one sample.")
    return call


def _resolve(target: Target) -> tuple[nn.Module | None, Attachment | None, Callable[..., Any]]:
    if isinstance(target, Attachment):
        target = target.module
    if isinstance(target, nn.Module):
        attachment = attachment_of(target)
        previous = target.__dict__.get("forward") if attachment is None else attachment._previous
        # Not the compiled step of an attachment: torch.compile cannot differentiate twice.
        return target, attachment, original_forward(target, previous)
    if isinstance(target, type) or not callable(target):
        raise TypeError(
            f"Diagnostics take an nn.Module, its attachment or a function f(z, *inputs), got {describe_type(target)}."
        )
    return None, None, target


def _refuse_conflict(attachment: Attachment, **given: Any) -> None:
    """An option that contradicts the attachment's would be ignored: say so."""
    own = {
        "state": attachment._state.position if attachment._state.name is None else attachment._state.name,
        "output": attachment._output,
        "batch_dim": attachment._settings.batch_dim,
    }
    defaults = {"state": 0, "output": None, "batch_dim": 0}
    for name, value in given.items():
        allowed = (defaults[name], own[name], attachment._state.position if name == "state" else own[name])
        if value not in allowed:
            raise ValueError(
                f"{module_path(attachment.module)} is attached with {name}={own[name]!r}, so {name}={value!r} cannot "
                f"hold. Leave {name} out, or attach it again."
            )


def _argument_names(evaluate: Callable[..., Any], count: int) -> list[str]:
    """A name for each positional argument: its parameter's, or its position."""
    try:
        parameters = inspect.signature(evaluate).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        parameters = ()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [names[i] if i < len(names) else f"argument {i}" for i in range(count)]


def _map_tensors(value: Any, name: str, prepare: Callable[[Tensor], Tensor], found: dict[str, Tensor]) -> Any:
    """`value` with every floating-point tensor in it prepared and entered in `found`."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value
        found[name] = prepared = prepare(value)
        return prepared
    if type(value) is dict:
        return {key: _map_tensors(part, f"{name}.{key}", prepare, found) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_map_tensors(part, f"{name}.{i}", prepare, found) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


@dataclass(frozen=True)
class Subject:
    """A call that can be solved again and again without a trace in the user's objects."""

    call: Call
    map: Map
    variables: dict[str, Tensor]
    """What gradients are taken for: parameters under their names, inputs as `input x`."""
    solver: Solver
    on_failure: OnFailure
    restart: Callable[[], None]
    """Brings buffers and random generators back to where they were at first."""

    @property
    def gradient(self) -> Gradient | None:
        """The gradient the module is attached with, if it is."""
        return None if self.call.attachment is None else self.call.attachment.gradient

    def solve(
        self,
        gradient: Gradient,
        *,
        solver: Solver | None = None,
        start: State | None = None,
        on_failure: OnFailure | None = None,
    ) -> Solution:
        """The solution, carrying `gradient`; every solve meets the same buffers and random numbers."""
        self.restart()
        structure = Structure.of(self.call.start)
        return fixed_point(
            self.map,
            structure.unflatten(detach(self.call.leaves)) if start is None else start,
            *self.variables.values(),
            gradient=gradient,
            solver=self.solver if solver is None else solver,
            output=self.call.output,
            batch_dim=self.call.batch_dim,
            on_failure=self.on_failure if on_failure is None else on_failure,
        )


@contextmanager
def examine(
    target: Target,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    solver: Solver | None,
    state: int | str,
    output: int | str | None,
    batch_dim: int | None,
    parameters: Mapping[str, Tensor] | None = None,
    on_failure: OnFailure | None = None,
) -> Generator[Subject, None, None]:
    """A `Subject` for a while: grad mode is on, and buffers, generators and `.grad` stay as they are outside.

    Gradients are taken for the parameters (or `parameters`) and inputs that require grad; where none does, for all
    floating-point inputs.
    """
    required: set[int] = set()

    def prepare(tensor: Tensor) -> Tensor:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be recorded
            leaf = tensor.clone() if tensor.is_inference() else tensor.detach()
            if tensor.requires_grad:
                required.add(id(leaf))
            return leaf.requires_grad_()

    call = read_call(target, args, kwargs, state=state, output=output, batch_dim=batch_dim, prepare=prepare)
    if call.attachment is not None and call.attachment._settings.process_group is not None:
        raise ValueError(
            f"{module_path(call.attachment.module)} is attached with a process_group, whose processes must evaluate "
            "together, and a diagnostic evaluates in its own process alone: run it on the cell in a single process."
        )
    if parameters is None:
        parameters = {} if call.module is None else dict(call.module.named_parameters())
    variables = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    inputs = {f"input {name}": leaf for name, leaf in call.inputs.items()}
    wanted = {name: leaf for name, leaf in inputs.items() if id(leaf) in required}
    for name, leaf in inputs.items():
        if (variables or wanted) and name not in wanted:
            leaf.requires_grad_(False)
    attachment = call.attachment
    with undisturbed(call.module, call.leaves[0].device) as restart:
        yield Subject(
            call=call,
            map=Map(call.module, call.step),
            variables={**variables, **wanted} or inputs,
            solver=solver or _own_solver(attachment),
            on_failure=on_failure or ("warn" if attachment is None else attachment._settings.on_failure),
            restart=restart,
        )


def _own_solver(attachment: Attachment | None) -> Solver:
    """What a training call of the module runs."""
    return FixedPointIteration() if attachment is None else attachment.gradient.solver_for(attachment.solver)
