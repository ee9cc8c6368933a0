"""The Neumann phantom gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from phantomgrad._options import check_boolean, check_integer, check_number
from phantomgrad._samples import Samples
from phantomgrad._state import Leaves, damped
from phantomgrad.gradients._adjoint import VJP, record
from phantomgrad.gradients._base import Gradient, Problem


@dataclass(frozen=True, kw_only=True)
class NeumannPhantom(Gradient):
    """Replace the inverse `(I - J)^-1` by the first `steps` terms of a damped Neumann series (NPG).

    Records one evaluation at the solution; backward forms `v = damping * (I + B + ... + B^{k-1}) g` with
    `B = damping J + (1 - damping) I` by `k - 1` vector-Jacobian products (Geng et al., "On Training Implicit Models",
    2021, Algorithm 2). Memory does not grow with `steps`. On a linear block it equals `UnrolledPhantom`. Where the spectral
    radius of `B` exceeds 1 the series diverges: the safeguard then keeps an earlier partial sum.
    Higher derivatives hold the solution constant.
    """

    steps: int = 5
    """How many terms are summed: `k`."""
    damping: float = 0.5
    """The weight of the Jacobian in each term: `lambda`."""
    safeguard: bool = True
    """Per sample, keep the partial sum with the smallest adjoint residual `||B^i g||`; costs no further product."""

    def __post_init__(self) -> None:
        check_integer(self, "steps", minimum=1)
        check_number(self, "damping", above=0.0, maximum=2.0)
        check_boolean(self, "safeguard")

    def connect(self, problem: Problem) -> Leaves:
        series = guarded_neumann_series if self.safeguard and self.steps > 1 else neumann_series
        sum_terms = partial(series, steps=self.steps, damping=self.damping, samples=problem.samples)
        return record(problem.evaluate, problem.solved.point, sum_terms, products=self.steps - 1)


def neumann_series(vjp: VJP, cotangent: Leaves, *, steps: int, damping: float, samples: Samples) -> Leaves:
    """`damping * sum_{i < steps} B^i g` with `B = damping J + (1 - damping) I`, in `steps - 1` products."""
    term = total = tuple(damping * g for g in cotangent)
    for _ in range(steps - 1):
        term = damped(term, vjp(term), damping)
        total = tuple(map(torch.add, total, term))
    return total


def guarded_neumann_series(vjp: VJP, cotangent: Leaves, *, steps: int, damping: float, samples: Samples) -> Leaves:
    """The series, cut per sample where its terms stop shrinking, in `steps - 1` products.

    The sum of the first `n` terms, `s_n`, leaves the adjoint residual `g - (I - J) s_n = B^n g`: the next term itself, so
    the terms judge the sums for free. If the last term is the smallest the whole sum is taken, else the sum that
    the smallest one judges, and never less than one term.
    """
    term = total = best = tuple(damping * g for g in cotangent)
    smallest = samples.norm(term).detach()
    shrinking = torch.ones_like(smallest, dtype=torch.bool)
    for _ in range(steps - 1):
        term = damped(term, vjp(term), damping)
        size = samples.norm(term).detach()
        shrinking = size <= smallest
        smallest = torch.where(shrinking, size, smallest)
        best = samples.where(shrinking, total, best)
        total = tuple(map(torch.add, total, term))
    return samples.where(shrinking, total, best)
