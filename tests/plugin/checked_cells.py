"""Linear cells with known eigenvalues, and their pages, for the tests of check."""

from __future__ import annotations

from typing import Any

import torch
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad.diagnostics import CheckReport, check


class Linear(nn.Module):
    """`f(z, x) = z J^T + x` with a trainable `J`."""

    def __init__(self, J: Tensor) -> None:
        super().__init__()
        self.J = nn.Parameter(J.to(DTYPE))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.J.T + x


def diagonal(*eigenvalues: float) -> Linear:
    """A cell with these eigenvalues."""
    return Linear(torch.diag(torch.tensor(eigenvalues)))


def examine(cell: Any, **options: Any) -> CheckReport:
    """The report on a cell that starts from zero and whose inputs are ones."""
    x = torch.ones(2, cell.J.shape[0], dtype=DTYPE)
    return check(cell, torch.zeros_like(x), x, show=False, **options)


def says(report: CheckReport, text: str) -> bool:
    """Whether the text is part of the advice."""
    return any(text in sentence for sentence in report.advice)
