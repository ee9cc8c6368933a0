"""The cells that libraries are compared on: a map, a start, and what gradients are taken for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from phantomgrad import attachments
from phantomgrad_hub import MDEQ, mdeq_cifar_large, mdeq_imagenet_small

State = tuple[Tensor, ...]


@dataclass
class Workload:
    """A cell with an input, the steps that are made, and the damping of solver and phantom gradients."""

    name: str
    cell: nn.Module
    """Maps `(state, x)` to the next state, a tuple of tensors."""
    x: Tensor
    start: State
    steps: int
    damping: float
    keep: list[Any] = field(default_factory=list[Any])
    """What must stay alive."""

    def __post_init__(self) -> None:
        self._weights = [torch.randn_like(leaf) for leaf in self.start]

    def to(self, device: str) -> Workload:
        """This, moved to a device."""
        self.cell.to(device)
        self.x = self.x.detach().to(device).requires_grad_()
        self.start = tuple(leaf.to(device) for leaf in self.start)
        self._weights = [weight.to(device) for weight in self._weights]
        return self

    def wait(self) -> None:
        """Until its device has done what it was asked."""
        wait(self.x.device)

    def share_loss(self, other: Workload) -> None:
        """Take the loss of another workload with the same shapes."""
        self._weights = other._weights

    def loss(self, state: State) -> Tensor:
        """A random linear form: the square of a state that a norm ends hardly depends on anything."""
        return torch.stack([(w * leaf).mean() for w, leaf in zip(self._weights, state, strict=True)]).sum()

    def step(self, state: State) -> State:
        """One evaluation."""
        return self.cell(state, self.x)

    @property
    def parameters(self) -> list[Tensor]:
        """What gradients are taken for: all weights of the cell, and its input."""
        return [*self.cell.parameters(), self.x]

    def weights_once(self) -> Any:
        """A context in which parametrized weights are computed once, with grad, for a library that does not see to it."""
        context = parametrize.cached()
        return _Prepared(context, self.cell)


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Prepared:
    """`parametrize.cached()`, filled with grad before a solve without grad could fill it."""

    def __init__(self, context: Any, cell: nn.Module) -> None:
        self._context, self._cell = context, cell

    def __enter__(self) -> None:
        self._context.__enter__()
        with torch.enable_grad():
            for module in self._cell.modules():
                if parametrize.is_parametrized(module):
                    for name in module.parametrizations:  # type: ignore[union-attr]
                        getattr(module, name)

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)


class Block(nn.Module):
    """The multiscale block of an MDEQ."""

    def __init__(self, model: MDEQ) -> None:
        super().__init__()
        self.block = model.block

    def forward(self, state: State, x: Tensor) -> State:
        return self.block(state, x)


class TransformerCell(nn.Module):
    """A weight-tied transformer layer that injects its input, with the norm last, so that it settles."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)

    def forward(self, state: State, x: Tensor) -> State:
        return (self.layer(0.5 * state[0] + x),)


class TinyCell(nn.Module):
    """`tanh(W z + x)`: all overhead."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, state: State, x: Tensor) -> State:
        return (torch.tanh(self.linear(state[0]) + x),)


def _mdeq(name: str, build: Callable[[], MDEQ], size: int, batch: int, steps: int, damping: float) -> Workload:
    model = build()
    [attachment] = attachments(model.block)
    attachment.remove()
    with torch.no_grad():
        injection = model.inject(torch.randn(batch, 3, size, size))
    start = model.block.initial_state(injection)
    return Workload(name, Block(model), injection.requires_grad_(), start, steps, damping, [model])


def _transformer(name: str) -> Workload:
    x = torch.randn(16, 64, 128, requires_grad=True)
    return Workload(name, TransformerCell(), x, (torch.zeros(16, 64, 128),), 26, 0.6)


def _tiny(name: str) -> Workload:
    return Workload(name, TinyCell(), torch.randn(32, 8, requires_grad=True), (torch.zeros(32, 8),), 50, 0.6)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "mdeq-small-64": lambda name, batch=16: _mdeq(name, mdeq_imagenet_small, 64, batch, 26, 0.6),
    "mdeq-small-224": lambda name, batch=2: _mdeq(name, mdeq_imagenet_small, 224, batch, 26, 0.6),
    "mdeq-cifar-large": lambda name, batch=16: _mdeq(name, mdeq_cifar_large, 32, batch, 18, 0.5),
    "transformer": _transformer,
    "tiny": _tiny,
}
"""How to make each, by its name; the blocks of MDEQ also take a `batch`."""
