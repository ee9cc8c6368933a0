"""The decorator: a module class or a function that returns its equilibrium."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from phantomgrad._attach import attach, describe_type
from phantomgrad._errors import AttachError
from phantomgrad._fixed_point import OnFailure, OnStep, fixed_point
from phantomgrad._state import State
from phantomgrad.gradients import Gradient
from phantomgrad.solvers import Solver

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def equilibrium(
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
) -> Callable[[Decorated], Decorated]:
    """Decorate an `nn.Module` subclass, whose instances are then attached, or a function `f(z, *inputs)`.

    The options are those of `attach`; `state`, `eval_solver` and `compile` apply to classes only, since a decorated
    function takes its state first.
    """

    def decorate(target: Decorated) -> Decorated:
        if isinstance(target, type) and issubclass(target, nn.Module):
            _attach_instances(
                target,
                lambda module: attach(
                    module,
                    gradient,
                    solver=solver,
                    state=state,
                    output=output,
                    batch_dim=batch_dim,
                    eval_solver=eval_solver,
                    on_failure=on_failure,
                    on_step=on_step,
                    compile=compile,
                    process_group=process_group,
                ),
            )
            return target  # pyright: ignore[reportReturnType]  (the same class)
        if isinstance(target, (type, nn.Module)) or not callable(target):
            raise AttachError(
                f"@equilibrium decorates an nn.Module subclass or a function, got {describe_type(target)}. "
                "For a module that exists already use attach."
            )
        if state != 0 or eval_solver is not None or compile or output is not None:
            raise AttachError(
                "A decorated function takes its state first and returns it alone: state, output, eval_solver and compile "
                "are for classes."
            )

        @functools.wraps(target)
        def solve(z0: State, *inputs: Any) -> State:
            return fixed_point(
                target,
                z0,
                *inputs,
                gradient=gradient,
                solver=solver,
                batch_dim=batch_dim,
                on_failure=on_failure,
                on_step=on_step,
                process_group=process_group,
            ).value

        return solve  # pyright: ignore[reportReturnType]  (the same signature, by functools.wraps)

    return decorate


def _attach_instances(cls: type[nn.Module], attach_one: Callable[[nn.Module], object]) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        attach_one(self)

    cls.__init__ = init
