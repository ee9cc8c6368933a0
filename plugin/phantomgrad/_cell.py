"""The user's map as a function of leaves.

A `Cell` evaluates the map for one call: it rebuilds the state, checks what comes back, casts autocast's results to the
state's dtype, and holds what must stay the same between the evaluations of one call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from phantomgrad._batched_inputs import BatchedCall
from phantomgrad._errors import PhantomGradError, StateMismatchError
from phantomgrad._once_per_solve import OncePerSolve
from phantomgrad._randomness import Replay
from phantomgrad._samples import Samples
from phantomgrad._state import Leaves, State, Structure, describe, requires_grad
from phantomgrad._transforms import is_vmapped

Step = Callable[[State], Any]
Signature = tuple[tuple[torch.Size, torch.device], ...]
"""Shape and device of every leaf."""


class Cell:
    """The map `f` for the duration of one call.

    `step` takes a state and returns the next one, or with `output` (a position or key) something larger that contains
    it; with `returns_more` the latest evaluation's is kept in `returned` until `replace_state` takes it. `batched` is the same
    call where the caller has declared which of its arguments carry the batch; `constant` makes, for a compiled map, the step that
    holds all but the state constant, or None.
    """

    def __init__(
        self,
        step: Step,
        state: State,
        *,
        output: int | str | None = None,
        where: Callable[[], str] = lambda: "",
        scope: OncePerSolve | None = None,
        constant: Callable[[], Step | None] | None = None,
        returns_more: bool = False,
        batched: BatchedCall | None = None,
    ) -> None:
        self.structure = Structure.of(state, where)
        leaves = self.structure.flatten(state)
        assert leaves is not None
        if not torch.is_inference_mode_enabled():
            # Tensors made in inference mode can neither be recorded nor watched for changes in place.
            leaves = tuple(leaf.clone() if leaf.is_inference() else leaf for leaf in leaves)
        self.start: Leaves = tuple(leaf.detach() for leaf in leaves)
        self.where = where
        self.compiled = constant is not None
        self._constant = constant
        self.returned: Any = None
        """What the map returned last, where the state is only one part of it."""
        self.returns_more = returns_more and output is not None
        self._given: Leaves = leaves
        self._step = step
        self._output = output
        self.batched = batched
        self._evaluated = False
        self._finished = False
        self._couples_samples = scope is not None and scope.couples_samples
        self._scope = scope if scope is not None and scope.needed else None
        self._randomness = Replay(leaves[0].device)
        self._signature = tuple((leaf.shape, leaf.device) for leaf in leaves)
        self._dtypes = tuple(leaf.dtype for leaf in leaves)
        for leaf in leaves:
            if leaf.is_meta:
                raise StateMismatchError(
                    f"A solve needs values{where()}; got {describe(state)}. Use attachment.disabled() to trace shapes."
                )
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise StateMismatchError(
                    f"A fixed point needs floating-point states{where()}; got {describe(state)}. "
                    "Pass integer tensors as further inputs."
                )

    def __call__(self, leaves: Leaves) -> Leaves:
        """`f` of a state with these leaves."""
        return self._evaluated_by(self._step, leaves, self._signature)

    def narrowed(self, rows: Tensor, samples: Samples) -> Callable[[Leaves], Leaves] | None:
        """`f` for the samples `rows` of the batch alone; None where that would be another map.

        It would be where the first evaluation has drawn random numbers, or where a norm sees the whole batch. `samples` are those
        of the narrowed state.
        """
        if self.batched is None or self._couples_samples or self._randomness.draws:
            return None
        step = self.batched.narrowed(rows)
        signature = tuple((shape, device) for shape, (_, device) in zip(samples.shapes, self._signature, strict=True))
        return lambda leaves: self._evaluated_by(step, leaves, signature)

    def holding_constants(self) -> Callable[[Leaves], Leaves] | None:
        """`f` as a function of the state alone, where its products then cost less; None where that makes no difference."""
        step = None if self._constant is None else self._constant()
        if step is None:
            return None
        return lambda leaves: self._evaluated_by(step, leaves, self._signature, constant=True)

    def _evaluated_by(self, step: Step, leaves: Leaves, signature: Signature, *, constant: bool = False) -> Leaves:
        unchanged = self._watch(leaves)
        state = self.structure.unflatten(leaves)
        self._randomness.begin()
        try:
            if self._scope is None:
                returned = step(state)
            else:
                with self._scope(constant=constant):
                    returned = step(state)
        finally:
            self._randomness.end()
        self._evaluated = True
        if not unchanged():
            raise StateMismatchError(
                f"The map changed its state in place{self.where()}. The solver still needs it: write `z = z + ...` "
                "instead of `z += ...`, and use operations without a trailing underscore."
            )
        return self._checked(state, returned, signature)

    def take_given(self) -> Leaves:
        """The start as it was given, with its history, which this no longer refers to."""
        given, self._given = self._given, self.start
        return given

    @property
    def is_empty(self) -> bool:
        """Whether the state has no entries."""
        return not torch.compiler.is_exporting() and all(leaf.numel() == 0 for leaf in self.start)

    def prepare(self) -> None:
        """Compute what all evaluations share, where none has done so."""
        if self._scope is not None:
            self._scope.prepare()

    def solved(self) -> None:
        """After the solver's last evaluation: the next one is that of the solution."""
        if self._scope is not None:
            self._scope.solved()

    def finish(self) -> None:
        """After the last evaluation of the forward pass: make the updates that one evaluation would have made."""
        self._finished = True
        self._randomness.finish()
        if self._scope is not None:
            self._scope.commit()

    def _watch(self, leaves: Leaves) -> Callable[[], bool]:
        """A function that tells whether these have not been changed in place since."""
        if not any(leaf.is_inference() for leaf in leaves):
            versions = [leaf._version for leaf in leaves]
            return lambda: versions == [leaf._version for leaf in leaves]
        if self._evaluated:  # a map that changes its state does so in its first evaluation
            return lambda: True
        copies = [leaf.clone() for leaf in leaves]
        return lambda: all(map(_same, leaves, copies))

    def _checked(self, state: State, returned: Any, signature: Signature) -> Leaves:
        image = self._select(state, returned)
        leaves = self.structure.flatten(image)
        if leaves is None or tuple((leaf.shape, leaf.device) for leaf in leaves) != signature:
            raise self._mismatch(state, image)
        if any(map(is_vmapped, leaves)):
            raise PhantomGradError(
                f"torch.func.vmap cannot map over a solve{self.where()}: where it stops depends on the values. Add a batch "
                "dimension to the state instead: each sample along batch_dim is solved and stopped by itself."
            )
        dtypes = tuple(leaf.dtype for leaf in leaves)
        if dtypes == self._dtypes:
            return leaves
        device = leaves[0].device.type
        autocasts = (torch.get_autocast_dtype(device), torch.float32) if torch.is_autocast_enabled(device) else ()
        if any(dtype not in (*autocasts, own) for dtype, own in zip(dtypes, self._dtypes, strict=True)):
            raise self._mismatch(state, image)
        return tuple(leaf.to(dtype) for leaf, dtype in zip(leaves, self._dtypes, strict=True))

    def _select(self, state: State, returned: Any) -> State:
        if self._output is None:
            return returned
        if self.returns_more and not self._finished:  # later evaluations, in backward, belong to the graph
            self.returned = returned
        if isinstance(returned, Tensor):
            raise StateMismatchError(
                f"The map returned a tensor{self.where()}, {describe(returned)}, which has no parts: leave out "
                f"output={self._output!r}."
            )
        if isinstance(returned, (tuple, list, dict)):
            with suppress(KeyError, IndexError, TypeError):
                return returned[self._output]  # pyright: ignore[reportArgumentType, reportCallIssue]
        raise StateMismatchError(
            f"The map returned {describe(returned)}{self.where()}, which has no part output={self._output!r}."
        )

    def _mismatch(self, state: State, image: Any) -> StateMismatchError:
        hint = ""
        if self._output is None and isinstance(image, (tuple, dict)) and type(image) is not type(state):
            hint = " If the state is one part of what the map returns, pass output= with its position or key."
        return StateMismatchError(
            f"The map takes the state {describe(state)} to {describe(image)}{self.where()}. "
            f"A fixed point needs the same structure, shapes, dtypes and device.{hint}"
        )

    @property
    def rest_requires_grad(self) -> bool:
        """Whether anything requires grad that the latest evaluation returned beside the state."""
        if not self.returns_more:
            return False
        state = self.returned[self._output]
        return any(map(requires_grad, _rest(self.returned, state)))

    def replace_state(self, value: State) -> Any:
        """What the map returned last, which this no longer refers to, with `value` in place of its state."""
        returned, self.returned = self.returned, None
        if isinstance(returned, dict):
            replaced = copy.copy(returned)
            replaced[self._output if self._output in returned else list(returned)[int(self._output or 0)]] = value
            return replaced
        parts = list(returned)
        assert isinstance(self._output, int)
        parts[self._output] = value
        if isinstance(returned, list):
            return parts
        return type(returned)(*parts) if hasattr(returned, "_fields") else type(returned)(parts)


def _rest(returned: Any, state: State) -> Iterator[Any]:
    """The parts of what the map returned that are not its state."""
    for part in returned.values() if isinstance(returned, dict) else returned:
        if part is not state:
            yield part


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())
