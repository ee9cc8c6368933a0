"""A module's own `forward`, and which of its arguments is the state."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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


class StateArgument:
    """Finds the state among a call's arguments: `state` is its position or its keyword."""

    def __init__(self, module: nn.Module, state: int | str) -> None:
        forward = original_forward(module, module.__dict__.get("forward"))
        parameters = list(inspect.signature(forward).parameters.values())
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
        self, args: tuple[Any, ...], kwargs: dict[str, Any], step: Forward, where: Callable[[], str] = lambda: ""
    ) -> tuple[State, tuple[Any, ...], Callable[[State], Any]]:
        """The state, the other arguments, and a function of the state alone."""
        position, name = self.position, self.name
        if position is not None and position < len(args):
            before, after = args[:position], args[position + 1 :]
            return args[position], (*before, *after, *kwargs.values()), lambda z: step(*before, z, *after, **kwargs)
        if name is not None and name in kwargs:
            rest = {key: value for key, value in kwargs.items() if key != name}
            return kwargs[name], (*args, *rest.values()), lambda z: step(*args, **rest, **{name: z})
        raise TypeError(
            f"The call lacks the state argument {position if name is None else name!r}{where()}: pass the start of the solve, "
            "such as zeros."
        )
