"""Gradients that do what torchdeq does beside differentiating."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from phantomgrad._samples import Samples
from phantomgrad._solve import Solved
from phantomgrad._state import Leaves, damped, detach
from phantomgrad.gradients import Gradient, Implicit, UnrolledPhantom
from phantomgrad.gradients._base import Problem
from phantomgrad.solvers import Anderson, Solver
from phantomgrad.torchdeq._statistics import statistics

Writer = Callable[[dict[str, Tensor]], object]


@dataclass(frozen=True, kw_only=True)
class SupervisedPhantom(UnrolledPhantom):
    """`UnrolledPhantom` that keeps the states after the steps `at`, with their graphs, in `kept`: torchdeq's `sup_*`."""

    at: tuple[int, ...]
    kept: list[Leaves] = field(default_factory=list[Leaves], compare=False)

    def connect(self, problem: Problem) -> Leaves:
        h = detach(problem.solved.image)
        for step in range(1, self.steps + 1):
            h = damped(h, problem.evaluate(h), self.damping)
            if step in self.at:
                self.kept.append(h)
        return h

    def refine(self, problem: Problem) -> Leaves:
        return self.connect(problem)


@dataclass(frozen=True, kw_only=True)
class WrittenImplicit(Gradient):
    """`Implicit` that tells `writer` how each adjoint solve went: torchdeq's `backward_writer`."""

    implicit: Implicit
    writer: Writer
    stop_mode: str

    def connect(self, problem: Problem) -> Leaves:
        inner = self.implicit.solver or problem.solver
        options = {each.name: getattr(inner, each.name) for each in fields(Solver)}
        traced = _Traced(inner=inner, **options)

        def report(solved: Solved, *what: Any) -> None:
            if solved.last:  # a solver is not asked to go on from its last evaluation
                traced.measure(solved.point, solved.image, problem.samples)
            info = statistics(
                traced.gaps,
                traced.scales,
                like=solved.residual,
                stop_mode=self.stop_mode,
                max_steps=inner.max_steps,
                skipped=2 if isinstance(inner, Anderson) else 0,
            )
            self.writer(info)
            problem.report(solved, *what)

        return replace(self.implicit, solver=traced).connect(replace(problem, report=report))


@dataclass(frozen=True, kw_only=True)
class _Traced(Solver):
    """`inner`, with the residuals of the solve it runs."""

    inner: Solver
    gaps: list[Tensor] = field(default_factory=list[Tensor], compare=False)
    scales: list[Tensor] = field(default_factory=list[Tensor], compare=False)

    def start(self, z: Leaves, samples: Samples) -> Any:
        del self.gaps[:], self.scales[:]
        return self.inner.start(z, samples)

    def advance(self, z: Leaves, fz: Leaves, memory: Any, samples: Samples) -> Leaves:
        self.measure(z, fz, samples)
        return self.inner.advance(z, fz, memory, samples)

    def measure(self, z: Leaves, fz: Leaves, samples: Samples) -> None:
        self.gaps.append(samples.norm(tuple(map(torch.sub, fz, z))))
        self.scales.append(samples.norm(fz))
