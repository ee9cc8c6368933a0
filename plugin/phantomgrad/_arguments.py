"""A module's own `forward`, and which of its arguments is the state."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from phantomgrad._bound import module_path
from phantomgrad._errors import AttachError
from phantomgrad._state import State

Forward = Callable[..., Any]


def original_forward(module: nn.Module, previous: Forward | None) -> Forward:
    """What the module ran before: `previous` if it had a `forward` of its own, else its class's."""
    return functools.partial(type(module).forward, module) if previous is None else previous


def call_forward(module: nn.Module, previous: Forward | None, *args: Any, **kwargs: Any) -> Any:
    """One evaluation of it."""
    return type(module).forward(module, *args, **kwargs) if previous is None else previous(*args, **kwargs)


@dataclass(frozen=True)
class Call:
    """A call's arguments without the state: as a function of it, `step` with all of them."""

    step: Forward
    args: tuple[Any, ...]
    """Those by position, with a gap where the state goes if it goes there."""
    kwargs: dict[str, Any]
    state: int | str
    """Where the state goes: a position in `args` or a further keyword."""

    def __call__(self, z: State) -> Any:
        if isinstance(self.state, str):
            return self.step(*self.args, **self.kwargs, **{self.state: z})
        return self.step(*self.args[: self.state], z, *self.args[self.state + 1 :], **self.kwargs)

    @property
    def others(self) -> tuple[Any, ...]:
        """All arguments but the state."""
        return (*self.args, *self.kwargs.values())


@dataclass(frozen=True)
class Place:
    """An argument of a forward: its position, its name, or both."""

    position: int | None
    name: str | None

    @staticmethod
    def find(parameters: Sequence[inspect.Parameter], key: int | str) -> Place | None:
        """The argument at the position or with the keyword `key`; None where no call could have it."""
        positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        kinds = {p.kind for p in parameters}
        if isinstance(key, str):
            known = key in [p.name for p in parameters] or inspect.Parameter.VAR_KEYWORD in kinds
            return Place(positional.index(key) if key in positional else None, key) if known else None
        name = positional[key] if 0 <= key < len(positional) else None
        known = key >= 0 and (name is not None or inspect.Parameter.VAR_POSITIONAL in kinds)
        return Place(key, name) if known else None

    def among(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
        """The position or keyword at which a call has it; None where it has not."""
        if self.position is not None and self.position < len(args):
            return self.position
        return self.name if self.name in kwargs else None


def parameters_of(module: nn.Module) -> list[inspect.Parameter]:
    """What the forward of `module` takes."""
    return list(inspect.signature(original_forward(module, module.__dict__.get("forward"))).parameters.values())


def listed(parameters: Sequence[inspect.Parameter]) -> str:
    """The parameters for an error message."""
    return f"({', '.join(map(str, parameters))})"


class StateArgument:
    """Finds the state among a call's arguments: `state` is its position or its keyword."""

    def __init__(self, module: nn.Module, state: int | str) -> None:
        if isinstance(state, bool) or not isinstance(state, int | str):
            raise AttachError(f"state must be the position or the keyword of an argument, got {state!r}.")
        parameters = parameters_of(module)
        place = Place.find(parameters, state)
        if place is None:
            raise AttachError(
                f"{module_path(module)} has no argument state={state!r}: its forward takes "
                f"{listed(parameters)}. Pass state= with the position or keyword of the state."
            )
        self.place = place
        self.position, self.name = place.position, place.name

    def split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], step: Forward, where: Callable[[], str] = lambda: ""
    ) -> tuple[State, tuple[Any, ...], Call]:
        """The state, the other arguments, and a function of the state alone."""
        key = self.place.among(args, kwargs)
        if isinstance(key, int):
            call = Call(step, (*args[:key], None, *args[key + 1 :]), kwargs, key)
            return args[key], call.others, call
        if key is not None:
            call = Call(step, args, {other: value for other, value in kwargs.items() if other != key}, key)
            return kwargs[key], call.others, call
        raise TypeError(
            f"The call lacks the state argument {self.position if self.name is None else self.name!r}{where()}: "
            "pass the start of the solve, such as zeros."
        )
