"""How much a solve does beside evaluating its map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from phantomgrad import FixedPointIteration, NeumannPhantom, UnrolledPhantom, fixed_point


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def _operations(steps: int, structure: str, **options: Any) -> int:
    x, y = torch.randn(4, 3), torch.full((4, 2), 0.5)
    w = torch.eye(3).mul(0.9).requires_grad_()

    def single(z: Tensor) -> Tensor:
        return torch.addmm(x, z, w)  # one operation beside the transposes of autograd

    def double(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.addmm(x, state[0], w), torch.mul(state[1], y)

    fn, start = (single, x) if structure == "tensor" else (double, (x, y))
    with _Count() as count, torch.no_grad():
        fixed_point(
            fn,
            start,
            solver=FixedPointIteration(max_steps=steps, rtol=0.0, atol=0.0, **options),
            on_failure="ignore",
        )
    return count.operations


@pytest.mark.parametrize(("structure", "evaluation", "most"), [("tensor", 1, 15), ("tuple", 2, 22)])
def test_a_checked_step_makes_few_operations_beside_its_evaluation(structure: str, evaluation: int, most: int) -> None:
    extra = (_operations(30, structure) - _operations(10, structure)) / 20 - evaluation
    assert extra <= most


def test_a_step_that_is_not_checked_makes_none() -> None:
    options = {"check_every": 1000}
    assert _operations(30, "tensor", **options) - _operations(10, "tensor", **options) == 20


def test_the_neumann_series_makes_two_operations_a_term_beside_its_product() -> None:
    counts = []
    for steps in (2, 12):
        w = torch.eye(3).mul(0.5).requires_grad_()
        z = fixed_point(
            lambda z, w=w: z @ w + 1.0, torch.zeros(4, 3), gradient=NeumannPhantom(steps=steps, safeguard=False)
        )
        with _Count() as count:
            z.value.sum().backward()
        counts.append(count.operations)
    product = 2  # a transpose and a product of matrices
    assert (counts[1] - counts[0]) / 10 <= product + 3


def test_unrolled_steps_make_one_operation_beside_their_evaluation() -> None:
    counts = []
    for steps in (2, 12):
        w = torch.eye(3).mul(0.5).requires_grad_()
        with _Count() as count:
            fixed_point(lambda z, w=w: z @ w, torch.ones(4, 3), gradient=UnrolledPhantom(steps=steps))
        counts.append(count.operations)
    assert (counts[1] - counts[0]) / 10 <= 2
