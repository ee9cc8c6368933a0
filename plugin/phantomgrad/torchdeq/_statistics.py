"""The `info` of torchdeq's solvers, from the residuals that a solve went through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NOTHING = 1e8
"""What torchdeq reports where nothing was measured, and as the first entry of every trace."""


def relative(gap: Tensor, scale: Tensor) -> Tensor:
    """`gap / scale`, as the solvers measure it: 0 where both are 0."""
    return gap / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def statistics(
    gaps: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    like: Tensor,
    stop_mode: str,
    max_steps: int,
    skipped: int = 0,
    last: bool = False,
) -> dict[str, Tensor]:
    """`abs_lowest`, `rel_lowest`, `nstep` of shape (samples,) and `abs_trace`, `rel_trace` of (samples, steps).

    `gaps` and `scales` hold `||f(z) - z||` and `||f(z)||` of every evaluation, each like `like`, (samples,). A trace
    begins with 1e8, leaves out the first `skipped` evaluations and is filled up with the lowest residual. `last` reports the last
    evaluation in place of the lowest.
    """
    start = torch.full_like(like, NOTHING)
    lowest: dict[str, Tensor] = {}
    steps: dict[str, Tensor] = {}
    traces: dict[str, Tensor] = {}
    for name, measured in (("abs", gaps), ("rel", list(map(relative, gaps, scales)))):
        rows = torch.stack([start, *measured])
        if last:
            lowest[name], steps[name] = rows[-1], torch.full_like(start, len(measured))
        else:
            lowest[name], steps[name] = torch.where(rows.isnan(), torch.inf, rows).min(dim=0)
        trace = torch.cat((rows[:1], rows[1 + skipped :]))
        missing = max(max_steps - skipped, 0) - (len(trace) - 1)
        traces[name] = torch.cat((trace, lowest[name].expand(max(missing, 0), -1))).T
    return {
        "abs_lowest": lowest["abs"],
        "rel_lowest": lowest["rel"],
        "abs_trace": traces["abs"],
        "rel_trace": traces["rel"],
        "nstep": steps[stop_mode].to(torch.float32),
        "sradius": torch.tensor([-1.0], device=like.device),
    }
