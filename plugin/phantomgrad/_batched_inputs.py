"""Which further inputs carry the batch, as the caller declares it: `batched_inputs`.

Only the caller knows: a tensor whose first dimension happens to be as long as the batch may be a weight. So nothing is guessed.
What is named is narrowed with the state, all else is passed whole.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from phantomgrad._arguments import Call, Place, listed
from phantomgrad._errors import AttachError, StateMismatchError
from phantomgrad._samples import select_rows
from phantomgrad._state import describe, tensors_mapped


class BatchedInputs:
    """The declared arguments of a map with these parameters; `name` says what to call it in messages."""

    def __init__(
        self,
        declared: Sequence[int | str],
        parameters: Sequence[inspect.Parameter],
        state: Place,
        name: Callable[[], str],
    ) -> None:
        self._places: list[Place] = []
        for key in declared:
            place = Place.find(parameters, key)
            if place is None:
                raise AttachError(
                    f"{name()} has no argument {key!r}, which batched_inputs names: it takes {listed(parameters)}. "
                    "Pass positions or keywords of the inputs that have a batch dimension."
                )
            if place == state:
                raise AttachError(
                    f"batched_inputs names the state of {name()}, {key!r}, which has a batch dimension anyway. Name further "
                    "inputs only; () says that there are none."
                )
            self._places.append(place)

    def of(self, call: Call, batch_dim: int, where: Callable[[], str]) -> BatchedCall:
        """One call's; an argument that it leaves out is left out."""
        keys = [place.among(call.args, call.kwargs) for place in self._places]
        return BatchedCall(call, tuple(key for key in keys if key is not None), batch_dim, where)


@dataclass(frozen=True)
class BatchedCall:
    """A call of which is known what its samples are."""

    call: Call
    keys: tuple[int | str, ...]
    """The arguments with a batch dimension."""
    batch_dim: int
    where: Callable[[], str]

    def check(self, count: int) -> None:
        """A `StateMismatchError` unless all tensors in the declared arguments have `count` samples."""
        for key in self.keys:
            value = self.call.kwargs[key] if isinstance(key, str) else self.call.args[key]
            for part in _parts(value):
                size = part.shape[self.batch_dim] if _has(part, self.batch_dim) else None
                if size != count:
                    raise StateMismatchError(
                        f"The input {key!r}, which batched_inputs names, does not have the {count} samples of the state along "
                        f"batch_dim={self.batch_dim}{self.where()}: {describe(value)}. Name the inputs whose tensors all have "
                        "that dimension; what is not named is passed whole."
                    )

    def narrowed(self, rows: Tensor) -> Call:
        """The call for the samples `rows` alone."""

        def select(tensor: Tensor) -> Tensor:
            return select_rows(tensor, rows, self.batch_dim % tensor.dim())

        def chosen(key: int | str, value: Any) -> Any:
            return tensors_mapped(select, value) if key in self.keys else value

        args = tuple(chosen(position, value) for position, value in enumerate(self.call.args))
        return replace(
            self.call, args=args, kwargs={key: chosen(key, value) for key, value in self.call.kwargs.items()}
        )


def _has(part: Any, dim: int) -> bool:
    return isinstance(part, Tensor) and -part.dim() <= dim < part.dim()


def _parts(value: Any) -> list[Any]:
    """What is in the containers of an argument; None, which stands for an input left out, is nothing."""
    if value is None:
        return []
    if type(value) in (dict, OrderedDict):
        return [part for each in value.values() for part in _parts(each)]
    if isinstance(value, tuple | list):
        return [part for each in value for part in _parts(each)]
    return [value]
