"""The map of one solve, measured at every evaluation as torchdeq's solvers measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from phantomgrad._errors import AttachError
from phantomgrad._samples import Samples
from phantomgrad._solution import Solution
from phantomgrad._state import Leaves, State, Structure, detach
from phantomgrad.solvers import Anderson, Solver
from phantomgrad.torchdeq._statistics import NOTHING, relative, statistics


class Watch:
    """`step`, whose evaluations by the solver are measured; those that gradients make are not.

    `recorded` says that the solver evaluates with grad. `monitored=False` reports the end of the solve only. `sampled` lists
    the steps at which the best image so far (the latest, where the solver keeps the last) is put into `states`.
    """

    def __init__(
        self,
        step: Callable[[State], Any],
        start: State,
        batch_dim: int | None,
        *,
        solver: Solver,
        stop_mode: str,
        monitored: bool,
        recorded: bool = False,
        sampled: Sequence[int] = (),
    ) -> None:
        self.structure = Structure.of(start)
        leaves = self.structure.flatten(start)
        assert leaves is not None
        self.samples = Samples(leaves, batch_dim)
        self.states: list[State] = []
        self._step = step
        self._batch_dim = batch_dim
        self._solver = solver
        self._stop_mode = stop_mode
        self._monitored = monitored
        # A solver that checks the end alone is there to be fast: nothing else is measured then.
        fast = not monitored and not sampled and solver.check_every >= solver.max_steps
        self._first = solver.max_steps if fast else 1
        self._last = solver.max_steps
        self._recorded = recorded
        self._sampled = sampled
        self._evaluations = 0
        self._gaps: list[Tensor] = []
        self._scales: list[Tensor] = []
        self._best: Leaves = leaves
        self._lowest: Tensor | None = None

    def __call__(self, state: State) -> Any:
        image = self._step(state)
        # The solver evaluates without grad, but for its first evaluation where a gradient may be wanted.
        if self._recorded or self._evaluations == 0 or not torch.is_grad_enabled():
            self._evaluations += 1
            if self._first <= self._evaluations <= self._last:
                self._measure(state, image)
        return image

    @torch.no_grad()
    def _measure(self, state: State, image: Any) -> None:
        z, fz = self.structure.flatten(state), self.structure.flatten(image)
        if z is None or fz is None or [leaf.shape for leaf in z] != [leaf.shape for leaf in fz]:
            return  # the solver's own check says what is wrong
        gap, scale = self.samples.norm(tuple(map(torch.sub, fz, z))), self.samples.norm(fz)
        self._gaps.append(gap)
        self._scales.append(scale)
        if self._sampled:
            self._keep_best(detach(fz), gap if self._stop_mode == "abs" else relative(gap, scale))

    def _keep_best(self, image: Leaves, residual: Tensor) -> None:
        lowest = torch.full_like(residual, NOTHING) if self._lowest is None else self._lowest
        better = residual < lowest if self._solver.keep == "best" else residual.isfinite()
        self._best = self.samples.where(better, image, self._best)
        self._lowest = torch.where(better, residual, lowest)
        if self._evaluations in self._sampled:
            self.states.append(self.structure.unflatten(self._best))

    def finish(self, solution: Solution) -> dict[str, Tensor]:
        """The statistics of the solve, whose `solution` says how many evaluations were its own."""
        steps = int(solution.steps.max()) if solution.steps.numel() else 0
        measured = max(steps - self._first + 1, 0)
        del self._gaps[measured:], self._scales[measured:]
        while len(self.states) < len(self._sampled):
            self.states.append(self.structure.unflatten(self._best))
        if self._monitored and self._solver.check_every == 1:
            self._check_independent(solution)
        info = statistics(
            self._gaps,
            self._scales,
            like=self._gaps[0] if self._gaps else torch.empty(self.samples.count, device=self.samples.device),
            stop_mode=self._stop_mode,
            max_steps=self._solver.max_steps,
            skipped=2 if isinstance(self._solver, Anderson) else 0,
            last=self._solver.keep == "last",
        )
        if not self._monitored:
            info |= {f"{name}_trace": info[f"{name}_lowest"].unsqueeze(1) for name in ("abs", "rel")}
            info["nstep"] = torch.full_like(info["nstep"], steps)
        # Gradients keep this map, which has nothing left to measure.
        self._last, self._gaps, self._scales = 0, [], []
        return info

    def _check_independent(self, solution: Solution) -> None:
        """Refuse a map that couples its samples.

        A sample that has converged stands still, so its residual changes afterwards only if it depends on other samples. By
        more than a tolerance, and it has not converged at all.
        """
        if self._batch_dim is None or self.samples.count < 2 or len(self._gaps) < 2:
            return
        rtol, atol = self._solver.tolerances(max(self.samples.dtypes, key=lambda dtype: torch.finfo(dtype).eps))
        if rtol == 0.0 and atol == 0.0:
            return
        gaps, scales = torch.stack(self._gaps), torch.stack(self._scales)
        merit = relative(gaps, atol + rtol * scales)
        later = torch.arange(1, len(gaps) + 1, device=gaps.device).unsqueeze(1) > solution.steps
        frozen = torch.where(later, torch.inf, relative(gaps, scales)).argmin(dim=0, keepdim=True)
        moved = solution.converged & later & (merit > merit.gather(0, frozen) + 1.0)
        if bool(moved.any()):
            raise AttachError(
                f"The map couples the samples along batch_dim={self._batch_dim}: {int(moved.any(dim=0).sum())} of "
                f"{self.samples.count} had converged and no longer did when others changed. Pass batch_dim=None to get_deq, "
                "or the dimension along which the map treats samples independently."
            )
