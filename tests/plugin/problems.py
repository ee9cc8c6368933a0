"""Fixed-point problems with known answers, and independent ways to compute gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPE = torch.float64


@dataclass(frozen=True)
class Problem:
    """A map, a start, and its fixed point."""

    name: str
    fn: Callable[[Any], Any]
    start: Any
    answer: Any
    batch_dim: int | None = 0


def _tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=DTYPE)


_COUPLING = _tensor([[0.0, 0.25], [0.25, 0.0]])
_MATRIX = 0.6 * torch.linalg.qr(torch.randn(6, 6, dtype=DTYPE, generator=torch.Generator().manual_seed(3)))[0]
_BIAS = torch.randn(4, 6, dtype=DTYPE, generator=torch.Generator().manual_seed(4))

PROBLEMS = [
    Problem("scalar affine", lambda x: 0.5 * x + 1.0, _tensor(0.0), _tensor(2.0)),
    Problem(
        "coupled affine", lambda x: _COUPLING @ x + _tensor([1.0, 2.0]), _tensor([0.0, 0.0]), _tensor([1.6, 2.4]), None
    ),
    Problem(
        "dict",
        lambda z: {"a": 0.5 * z["a"] + 1.0, "b": 0.25 * z["b"] + 3.0},
        {"a": _tensor([0.0]), "b": _tensor([0.0])},
        {"a": _tensor([2.0]), "b": _tensor([4.0])},
    ),
    Problem(
        "tuple that exchanges",
        lambda z: (0.5 * z[1] + 1.0, [0.5 * z[0]][0]),
        (_tensor([[0.0, 0.0]]), _tensor([[0.0, 0.0]])),
        (_tensor([[4 / 3, 4 / 3]]), _tensor([[2 / 3, 2 / 3]])),
    ),
    Problem(
        "list",
        lambda z: [0.5 * z[0] + 1.0, 0.5 * z[1] + 0.25 * z[0]],
        [_tensor([[0.0]]), _tensor([[0.0]])],
        [_tensor([[2.0]]), _tensor([[1.0]])],
    ),
    Problem("cosine", torch.cos, _tensor([[0.0]]), _tensor([[0.7390851332151607]])),
    Problem(
        "rotation",
        lambda z: z @ _MATRIX.T + _BIAS,
        torch.zeros(4, 6, dtype=DTYPE),
        torch.linalg.solve(torch.eye(6, dtype=DTYPE) - _MATRIX, _BIAS.T).T,
    ),
]

PLAIN_ITERATION_FAILS = Problem(
    "cosine with J = -1",
    lambda x: torch.cos(x) + _tensor([0.0, math.pi / 2]),
    _tensor([0.0, 0.0]),
    _tensor([0.7390851332151607, math.pi / 2]),
)


@dataclass(frozen=True)
class LinearBlock:
    """`f(z, x) = z J^T + x U^T + c` per row, with dense answers to everything."""

    J: Tensor
    U: Tensor
    c: Tensor
    x: Tensor

    @staticmethod
    def random(seed: int, *, size: int = 5, inputs: int = 3, batch: int = 4, radius: float = 0.7) -> LinearBlock:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=DTYPE, generator=generator)

        J = normal(size, size)
        J *= radius / torch.linalg.eigvals(J).abs().max()
        return LinearBlock(
            *(t.requires_grad_() for t in (J, normal(size, inputs), normal(size), normal(batch, inputs)))
        )

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.J, self.U, self.c, self.x

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.J.T + self.x @ self.U.T + self.c

    @property
    def start(self) -> Tensor:
        return torch.zeros(self.x.shape[0], self.J.shape[0], dtype=DTYPE)

    def solution(self) -> Tensor:
        """The fixed point, by a dense solve; differentiable."""
        identity = torch.eye(self.J.shape[0], dtype=DTYPE)
        return torch.linalg.solve(identity - self.J, (self.x @ self.U.T + self.c).T).T

    def adjoint(self, cotangent: Tensor) -> Tensor:
        """The exact adjoint `(I - J)^-T g` of each row."""
        identity = torch.eye(self.J.shape[0], dtype=DTYPE)
        return torch.linalg.solve((identity - self.J).T, cotangent.T).T.detach()

    def damped_jacobian(self, damping: float) -> Tensor:
        return (damping * self.J + (1 - damping) * torch.eye(self.J.shape[0], dtype=DTYPE)).detach()
