"""torchdeq with our cores, and what its tests compare."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from problems import DTYPE, LinearBlock
from torch import Tensor, nn

import phantomgrad.torchdeq

SOLVERS = ("fixed_point_iter", "anderson", "broyden", "simple_fixed_point_iter")
OURS = {"sliced": "phantom", "indexing": "phantom-indexing"}
EXACT = {"f_tol": 1e-12, "b_tol": 1e-12, "f_max_iter": 300, "b_max_iter": 300}


def import_torchdeq() -> Any:
    """torchdeq, or the test is skipped."""
    with warnings.catch_warnings():
        # Its docstrings hold "\|", of which Python complains when it compiles them for the first time.
        warnings.filterwarnings("ignore", "invalid escape sequence", Warning)
        return pytest.importorskip("torchdeq", reason="needs torchdeq: pip install 'phantomgrad[torchdeq]'")


def registered_torchdeq() -> Any:
    """torchdeq with our cores registered; without torchdeq the test is skipped."""
    module = import_torchdeq()
    phantomgrad.torchdeq.register()
    return module


def get_deq(*arguments: Any, **options: Any) -> Any:
    """torchdeq's function of that name, which knows our cores."""
    return registered_torchdeq().get_deq(*arguments, **options)


def block_gradients(states: list[Any], block: LinearBlock, power: int = 2) -> tuple[Tensor, ...]:
    """Gradients of a loss that weighs the returned states differently."""
    loss = sum(((1.7 + i) * (state**power).sum() for i, state in enumerate(states)), torch.zeros((), dtype=DTYPE))
    return torch.autograd.grad(loss, block.parameters)


def assert_equal(actual: Any, expected: Any, tolerance: float) -> None:
    """As many tensors, and equal ones."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class Model(nn.Module):
    """A model that solves `z = factor z + 1`."""

    def __init__(self, deq: nn.Module) -> None:
        super().__init__()
        self.deq = deq

    def forward(self, factor: float, z: Tensor) -> Any:
        return self.deq(lambda z: factor * z + 1.0, z)
