"""The decorator: a module class or a function that returns its equilibrium."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from phantomgrad._attach import attach, describe_type, is_attached
from phantomgrad._errors import AttachError
from phantomgrad._fixed_point import OnStep
from phantomgrad._report import OnFailure
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
    compile: bool | str = False,
    process_group: Any = None,
    batched_inputs: Sequence[int | str] | None = None,
) -> Callable[[Decorated], Decorated]:
    """Decorate an `nn.Module` subclass, whose instances are then attached, or a function `f(z, *inputs)`.

    The options are those of `attach`. Subclasses of a decorated class are attached too; where one is decorated itself, its own
    options hold. A function is called as before and returns its equilibrium, with gradients to its inputs and
    to everything it has captured; for a method, `state=1` skips `self`.
    """

    if gradient is not None and not isinstance(gradient, Gradient) and callable(gradient):
        raise AttachError("Write @equilibrium() with parentheses: its first argument is the gradient.")

    def attach_one(module: nn.Module) -> None:
        attach(
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
            batched_inputs=batched_inputs,
        )

    def decorate(target: Decorated) -> Decorated:
        if isinstance(target, type) and issubclass(target, nn.Module):
            _attach_instances(target, attach_one)
            return target  # pyright: ignore[reportReturnType]  (the same class)
        if isinstance(target, (type, nn.Module)) or not callable(target):
            raise AttachError(
                f"@equilibrium decorates an nn.Module subclass or a function, got {describe_type(target)}. "
                "For a module that exists already use attach."
            )
        module = _module_of(target)
        attach_one(module)

        @functools.wraps(target)
        def solve(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        return solve  # pyright: ignore[reportReturnType]  (the same signature, by functools.wraps)

    return decorate


def _module_of(function: Callable[..., Any]) -> nn.Module:
    """A module without parameters whose forward is `function` and whose name in messages is the function's."""
    module = type(getattr(function, "__name__", type(function).__name__), (nn.Module,), {})()
    module.__dict__["forward"] = function
    return module


_ATTACH = "_phantomgrad_attach"


def _attach_instances(cls: type[nn.Module], attach_one: Callable[[nn.Module], None]) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not is_attached(self):  # a decorated base class has been here before
            getattr(type(self), _ATTACH)(self)

    cls.__init__ = init
    setattr(cls, _ATTACH, staticmethod(attach_one))
