"""The unrolled phantom gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from phantomgrad._errors import DivergedError, PhantomGradError
from phantomgrad._options import check_boolean, check_integer, check_number
from phantomgrad._state import Leaves, Map, damped, detach
from phantomgrad._transforms import in_forward_mode, in_function_transform
from phantomgrad.gradients._base import Gradient, Problem

_TOLERATED_GROWTH = 10.0
"""How far above its tolerance a residual may end: where the damped block is not normal it may grow before it shrinks."""


@dataclass(frozen=True, kw_only=True)
class UnrolledPhantom(Gradient):
    """Differentiate `steps` damped iterations taken from the solution (UPG).

    From the detached solution `h_0` it records `h_{t+1} = (1 - damping) h_t + damping F(h_t, z)` and returns `h_k`, which
    is also a refined solution (Geng et al., "On Training Implicit Models", 2021, Algorithm 1). Memory grows with `steps`.
    On a linear block at its solution the gradient is the exact one times `I - B^k`, `B = damping J + (1 - damping) I`.
    Higher derivatives are those of the unrolled steps, with the solution held constant. Steps that lead away from a converged
    solution, as they may where the damped block expands, are reported like a solve that did not converge.
    """

    steps: int = 5
    """How many steps are recorded: `k`."""
    damping: float = 0.5
    """The weight of the new image in each step: `lambda`."""
    refine_in_eval: bool = False
    """Take the steps where no gradient is recorded too, so that values agree with training's."""
    recompute: bool = False
    """Keep only the steps' states and evaluate again in backward: less memory, about a third more time."""

    def __post_init__(self) -> None:
        check_integer(self, "steps", minimum=1)
        check_number(self, "damping", above=0.0, maximum=2.0)
        check_boolean(self, "refine_in_eval")
        check_boolean(self, "recompute")

    @property
    def connects_last_evaluation(self) -> bool:
        return self.steps > 1  # the first step's input is held constant

    def connect(self, problem: Problem) -> Leaves:
        h = before = detach(problem.solved.image)
        for _ in range(self.steps):
            before = h
            h = self._checkpointed_step(problem.evaluate, h) if self.recompute else self._step(problem.evaluate, *h)
        if in_function_transform() or in_forward_mode():
            return h
        finite = self._check(problem, before, h)
        return h if finite is None else self._keeping(problem, finite)

    def _keeping(self, problem: Problem, finite: Tensor) -> Leaves:
        """The steps again, but for the samples that they have led to infinity: these keep the solution, and no gradient."""
        where, image = problem.samples.where, detach(problem.solved.image)
        h = image
        for _ in range(self.steps):
            h = where(finite, self._step(problem.evaluate, *where(finite, h, detach(problem.solved.point))), image)
        return h

    @torch.no_grad()
    def _check(self, problem: Problem, point: Leaves, refined: Leaves) -> Tensor | None:
        """Report a last step, which has cost its evaluation already, that is not as small as a solution's.

        Returns which samples are finite, where some are not although they were.
        """
        samples, agree, report = problem.samples, problem.agree, problem.report
        rtol, atol = problem.solver.tolerances(problem.tolerance_dtype)
        gap = samples.norm(tuple(map(torch.sub, refined, point))) / self.damping
        scale = samples.norm(refined)
        # What `on_step` let stop has not met the tolerance: such a sample is held to the residual that it had.
        size = torch.maximum(atol + rtol * scale, problem.solved.residual * scale)
        near = (gap <= _TOLERATED_GROWTH * size) | ~problem.solved.converged
        finite = torch.isfinite(gap + scale) | ~torch.isfinite(problem.solved.residual)
        flags = torch.stack((near.all(), finite.all()))
        all_near, all_finite = (flags if agree is None else agree(flags)).tolist()
        if not all_finite and report.on_failure != "ignore":
            report.fail(
                DivergedError(
                    f"The {self.steps} steps of UnrolledPhantom diverged{report.where()}: {int((~finite).sum())} of "
                    f"{samples.count} samples are not finite, where the solve's result is. Take KrylovPhantom() or "
                    "NeumannPhantom(), which return that, or a smaller damping."
                )
            )
        if all_near:
            return None if all_finite else finite
        problem.refinement.away = ~near
        report.failed(
            "refinement",
            lambda: (
                f"The {self.steps} steps of UnrolledPhantom led away from the solution{report.where()}: "
                f"{int((~near).sum())} of {samples.count} samples end with a relative residual of up to "
                f"{float((gap / scale).max()):.1e}, where the solve had met its tolerance. The block expands "
                "even when damped: take KrylovPhantom() or NeumannPhantom(), which return the solution itself, or a smaller "
                "damping."
            ),
        )
        return None if all_finite else finite

    def without_grad(self, problem: Problem) -> Leaves:
        h = problem.solved.image
        if self.refine_in_eval:
            for _ in range(self.steps):
                h = self._step(problem.evaluate, *h)
        return h

    def _step(self, evaluate: Map, *h: object) -> Leaves:
        leaves: Leaves = h  # pyright: ignore[reportAssignmentType]  (variadic for `checkpoint`)
        return damped(leaves, evaluate(leaves), self.damping)

    def _checkpointed_step(self, evaluate: Map, h: Leaves) -> Leaves:
        if in_function_transform():
            raise PhantomGradError(
                "torch.func transforms do not support recompute=True: take UnrolledPhantom() without it."
            )
        result: Leaves = checkpoint(self._step, evaluate, *h, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
        return result
