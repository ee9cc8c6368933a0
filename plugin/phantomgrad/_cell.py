"""The user's map as a function of leaves.

A `Cell` evaluates the map for one call: it rebuilds the state, checks what comes back, casts autocast's results to the
state's dtype, and holds what must stay the same between the evaluations of one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from phantomgrad._errors import PhantomGradError, StateMismatchError
from phantomgrad._once_per_solve import OncePerSolve
from phantomgrad._randomness import Replay
from phantomgrad._state import Leaves, State, Structure, describe
from phantomgrad._transforms import is_vmapped


class Cell:
    """The map `f` for the duration of one call.

    `step` takes a state and returns the next one, or with `output` (a position or key) something larger that contains
    it; the rest of the latest evaluation is kept in `returned`.
    """

    def __init__(
        self,
        step: Callable[[State], Any],
        state: State,
        *,
        output: int | str | None = None,
        where: Callable[[], str] = lambda: "",
        scope: OncePerSolve | None = None,
        compiled: bool = False,
    ) -> None:
        self.structure = Structure.of(state)
        leaves = self.structure.flatten(state)
        assert leaves is not None
        self.start: Leaves = tuple(leaf.detach() for leaf in leaves)
        self.compiled = compiled
        self._given: Leaves = leaves
        self.returned: Any = None
        self._step = step
        self._output = output
        self._where = where
        self._scope = scope if scope is not None and scope.needed else None
        self._randomness = Replay(leaves[0].device)
        self._signature = tuple((leaf.shape, leaf.device) for leaf in leaves)
        self._dtypes = tuple(leaf.dtype for leaf in leaves)
        for leaf in leaves:
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise StateMismatchError(
                    f"A fixed point needs floating-point states{where()}; got {describe(state)}. "
                    "Pass integer tensors as further inputs."
                )

    def __call__(self, leaves: Leaves) -> Leaves:
        """`f` of a state with these leaves."""
        versions = None if leaves[0].is_inference() else [leaf._version for leaf in leaves]
        state = self.structure.unflatten(leaves)
        self._randomness.begin()
        if self._scope is None:
            returned = self._step(state)
        else:
            with self._scope():
                returned = self._step(state)
        self._randomness.end()
        if versions is not None and versions != [leaf._version for leaf in leaves]:
            raise StateMismatchError(
                f"The map changed its state in place{self._where()}. The solver still needs it: write `z = z + ...` "
                "instead of `z += ...`, and use operations without a trailing underscore."
            )
        return self._checked(state, returned)

    def take_given(self) -> Leaves:
        """The start as it was given, with its history, which this no longer refers to."""
        given, self._given = self._given, self.start
        return given

    def finish(self) -> None:
        """After the solve: make the updates that one evaluation would have made."""
        if self._scope is not None:
            self._scope.commit()

    def _checked(self, state: State, returned: Any) -> Leaves:
        image = self._select(state, returned)
        leaves = self.structure.flatten(image)
        if leaves is None or tuple((leaf.shape, leaf.device) for leaf in leaves) != self._signature:
            raise self._mismatch(state, image)
        if any(map(is_vmapped, leaves)):
            raise PhantomGradError(
                f"torch.func.vmap cannot map over a solve{self._where()}: where it stops depends on the values. Add a batch "
                "dimension to the state instead: each sample along batch_dim is solved and stopped by itself."
            )
        if tuple(leaf.dtype for leaf in leaves) == self._dtypes:
            return leaves
        if not torch.is_autocast_enabled(leaves[0].device.type):
            raise self._mismatch(state, image)
        return tuple(leaf.to(dtype) for leaf, dtype in zip(leaves, self._dtypes, strict=True))

    def _select(self, state: State, returned: Any) -> State:
        if self._output is None:
            return returned
        self.returned = returned
        try:
            return returned[self._output]
        except (KeyError, IndexError, TypeError):
            raise StateMismatchError(
                f"The map returned {describe(returned)}{self._where()}, which has no part output={self._output!r}."
            ) from None

    def _mismatch(self, state: State, image: Any) -> StateMismatchError:
        hint = ""
        if self._output is None and isinstance(image, (tuple, dict)) and type(image) is not type(state):
            hint = " If the state is one part of what the map returns, pass output= with its position or key."
        return StateMismatchError(
            f"The map takes the state {describe(state)} to {describe(image)}{self._where()}. "
            f"A fixed point needs the same structure, shapes, dtypes and device.{hint}"
        )

    def replace_state(self, value: State) -> Any:
        """What the map returned last, with `value` in place of its state."""
        returned = self.returned
        if isinstance(returned, dict):
            return {**returned, self._output: value}
        parts = list(returned)
        assert isinstance(self._output, int)
        parts[self._output] = value
        if isinstance(returned, list):
            return parts
        return type(returned)(*parts) if hasattr(returned, "_fields") else type(returned)(parts)
