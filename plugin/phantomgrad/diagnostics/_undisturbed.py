"""Evaluating a module without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList


@contextmanager
def undisturbed(module: nn.Module | None, device: torch.device) -> Generator[Callable[[], None], None, None]:
    """Grad mode within; afterwards buffers, instance `forward`s and random generators are what they were before.

    Evaluations work on copies of the buffers, so not even the version of the user's own changes. Yields a function that
    brings copies and generators back to where they were at first, so that one solve after another meets the same
    dropout masks and weights.
    """
    modules = [] if module is None else list(module.modules())
    buffers = [(each, name, b) for each in modules for name, b in each._buffers.items() if b is not None]
    plain = [each for each in modules if isinstance(each, ParametrizationList) and "forward" not in each.__dict__]
    cpu = torch.get_rng_state()
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    other = None if accelerator is None else accelerator.get_rng_state(device)

    def restore_generators() -> None:
        torch.set_rng_state(cpu)
        if accelerator is not None:
            accelerator.set_rng_state(other, device)

    def restart() -> None:
        copies: dict[int, Tensor] = {}
        for each, name, buffer in buffers:
            each._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        restore_generators()

    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield restart
    finally:
        for each, name, buffer in buffers:
            each._buffers[name] = buffer
        for each in plain:
            each.__dict__.pop("forward", None)
        restore_generators()
