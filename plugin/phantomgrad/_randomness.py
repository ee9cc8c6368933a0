"""Random numbers inside a map: one draw per solve.

Note [Randomness]
A map that draws a fresh dropout mask at every evaluation has no fixed point. If the first evaluation of a call moves the random
number generator, every further one of that call starts where the first did, so that all draw the same numbers; afterwards
the generator stands where a single evaluation would have left it. Evaluations made later, in backward, leave it where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Replay:
    """Gives all evaluations of one call the same random numbers, from the CPU's generator and the state's device's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: tuple[Tensor, ...] | None = None
        self._replayed: bool | None = None
        self._finished = False
        self._outside: tuple[Tensor, ...] | None = None

    @property
    def draws(self) -> bool:
        """Whether the evaluations draw random numbers, as far as the first has shown."""
        return self._replayed is not False

    def begin(self) -> None:
        """Called before each evaluation."""
        if self._first is None:
            self._first = self._states()
        elif self._replayed:
            self._outside = self._states() if self._finished else None
            self._restore(self._first)

    def end(self) -> None:
        """Called after each evaluation."""
        if self._replayed is None and self._first is not None:
            self._replayed = not all(map(torch.equal, self._first, self._states()))
        if self._outside is not None:
            self._restore(self._outside)
            self._outside = None

    def finish(self) -> None:
        """Called after the last evaluation of the forward pass."""
        self._finished = True

    def _states(self) -> tuple[Tensor, ...]:
        cpu = torch.get_rng_state()
        if self._device.type == "cpu":
            return (cpu,)
        return (cpu, torch.get_device_module(self._device).get_rng_state(self._device))

    def _restore(self, states: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.get_device_module(self._device).set_rng_state(states[1], self._device)
