"""What check finds and advises for cells whose eigenvalues are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checked_cells import Linear, diagonal, examine, says
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import (
    AdaptivePhantom,
    Anderson,
    Backprop,
    Broyden,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    OneStep,
    Shine,
    UnrolledPhantom,
    attach,
)
from phantomgrad.diagnostics import check


def test_a_block_that_settles() -> None:
    report = examine(diagonal(0.5, -0.3, 0.1))
    assert report.settles
    assert report.chosen.solver == FixedPointIteration()
    assert float(report.radius) == pytest.approx(0.5)
    assert report.norm is not None
    assert float(report.norm) == pytest.approx(0.5)
    assert not report.coupled
    assert report.repeatable
    assert (report.samples, report.entries, report.variables) == (2, 3, {"J": 9})
    plain = report.solvers[0]
    assert plain.settles
    assert not plain.diverges
    # The error shrinks by the spectral radius, so 1e-8 takes about 27 steps.
    assert 24 <= plain.steps <= 30
    assert plain.residual[9] / plain.residual[8] == pytest.approx(0.5, rel=0.02)
    assert plain.after(9) == plain.residual[8]
    assert plain.after(1000) == plain.residual[-1]
    assert plain.best == pytest.approx(plain.residual.min().item())
    assert says(report, f"FixedPointIteration(damping=1.0) settles every sample within {plain.steps} steps.")
    names = [type(trial.gradient) for trial in report.gradients]
    assert {OneStep, UnrolledPhantom, NeumannPhantom, KrylovPhantom, Implicit} <= set(names)
    exact = report.gradients[names.index(Implicit)]
    assert exact.alignment.cosine == pytest.approx(1.0, abs=1e-6)
    assert all(trial.seconds is not None and trial.seconds > 0 for trial in report.gradients)
    assert repr(report) == f"CheckReport(Linear settles in {plain.steps} steps, spectral radius 0.5)"


def test_a_block_that_wants_damping() -> None:
    report = examine(diagonal(-1.3, 0.2, 0.1))
    assert not report.solvers[0].settles
    # max(|1 - d - 1.3 d|, |1 - d + 0.2 d|) is smallest at d = 2 / 3.1, of the tenths at 0.6.
    assert report.damping == 0.6
    assert float(report.damped_radius) == pytest.approx(0.52)
    damped = next(trial for trial in report.solvers if trial.solver == FixedPointIteration(damping=0.6))
    assert damped.settles
    assert says(report, "Plain iteration wants damping=0.6: a step then multiplies the error by 0.52 instead of 1.3.")
    assert says(report, "FixedPointIteration(damping=1.0) does not settle within 50 steps, but ")
    assert any(trial.gradient == UnrolledPhantom(damping=0.6) for trial in report.gradients)


def test_a_complex_pair_near_the_imaginary_axis() -> None:
    J = torch.tensor([[0.0, -1.2], [1.2, 0.0]])
    report = examine(Linear(J))
    assert float(report.radius) == pytest.approx(1.2)
    # |1 - d + 1.2 d i|^2 is smallest at d = 1 / 2.44.
    assert report.damping == 0.4
    assert float(report.damped_radius) == pytest.approx((0.6**2 + 0.48**2) ** 0.5)
    assert "leading eigenvalue" in str(report)
    assert "+- 1.2i" in str(report)


def test_a_block_that_no_damping_settles() -> None:
    report = examine(diagonal(1.4, 0.2))
    assert report.damping is None
    assert float(report.damped_radius) >= 1
    assert report.solvers[0].diverges or not report.solvers[0].settles
    assert report.chosen.settles  # a linear map of two entries is easy for Anderson
    assert isinstance(report.chosen.solver, (Anderson, Broyden))
    assert says(report, "No damping up to 1 makes plain iteration contract: at best, 0.1, the spectral radius is 1.04 ")
    assert report.gradients  # at the solution that Anderson found
    assert report.chosen.best < 1e-6


class NoSolution(nn.Module):
    """`f(z) = z + 1 + w`, which has no fixed point."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        return z + 1 + self.w


def test_a_block_without_a_solution() -> None:
    report = check(NoSolution(), torch.zeros(2, 3), show=False, max_steps=5)
    assert not report.settles
    assert report.gradients == ()
    assert says(report, "Nothing that was tried settles; the closest is ")
    assert says(
        report, "No gradients were compared: far from a solution they mean nothing; make the block settle first."
    )
    assert repr(report) == "CheckReport(NoSolution does not settle, spectral radius 1)"
    assert all(trial.solver.max_steps == 5 for trial in report.solvers)


def test_a_slow_block_says_how_slow() -> None:
    report = examine(diagonal(*([0.97] * 3)), max_steps=1)
    assert not report.settles
    # log(10) / -log(0.97) = 75.6
    assert says(report, "every further digit takes plain iteration about 76 steps: raise max_steps")


def test_a_singular_adjoint_leaves_the_gradients_out() -> None:
    cell = diagonal(1.0, 0.5)
    start = torch.zeros(2, 2, dtype=DTYPE)
    report = check(cell, start, torch.tensor([[0.0, 1.0]] * 2, dtype=DTYPE), show=False)
    assert report.settles
    assert report.gradients == ()
    assert says(report, "No gradients were compared: the exact adjoint could be solved only to a relative residual of ")


def test_a_block_that_is_far_from_normal() -> None:
    J = torch.diag(torch.linspace(-0.3, 0.3, 6)) + torch.diag(torch.full((5,), 2.0), 1)
    report = examine(Linear(J), max_steps=200)
    assert report.norm is not None
    assert float(report.norm) == pytest.approx(torch.linalg.matrix_norm(J, 2).item(), rel=0.01)
    assert says(report, "The block is far from normal (2-norm 2.")


def test_a_norm_little_above_one_is_not_far_from_normal() -> None:
    J = torch.tensor([[0.5, 0.8], [0.0, 0.5]])
    report = examine(Linear(J), max_steps=200)
    assert report.norm is not None
    assert 1 < float(report.norm) < 1.1
    assert not says(report, "far from normal")


def test_your_poor_gradient_is_named() -> None:
    cell = Linear(torch.tensor([[0.0, 0.95], [-0.95, 0.0]]))
    attach(cell, OneStep(), solver=FixedPointIteration(damping=0.5, max_steps=300))
    report = examine(cell)
    yours = next(trial for trial in report.gradients if trial.gradient == OneStep())
    assert yours.alignment.cosine < 0.9
    assert says(report, f"Your OneStep() has a cosine of {yours.alignment.cosine:.2f} with the exact gradient")
    assert "OneStep() (yours)" in str(report)
    assert report.solvers[0].solver == FixedPointIteration(damping=0.5, max_steps=300)
    assert says(report, "Your FixedPointIteration(max_steps=300, damping=0.5) settles every sample within ")


def test_every_solver_gets_the_tolerance_of_your_own() -> None:
    cell = diagonal(0.5, -0.3)
    attach(cell, solver=FixedPointIteration(max_steps=7, rtol=1e-2, atol=1e-3))
    report = examine(cell)
    assert {(trial.solver.rtol, trial.solver.atol) for trial in report.solvers} == {(1e-2, 1e-3)}
    assert [trial.solver.max_steps for trial in report.solvers] == [7, 50, 50, 50, 50]
    assert {t.solver.max_steps for t in examine(cell, max_steps=30).solvers} == {30}
    taking_the_start = examine(diagonal(0.5), solver=FixedPointIteration(max_steps=0))
    assert taking_the_start.solvers[0].solver == FixedPointIteration()
    assert taking_the_start.settles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    cell = diagonal(0.5, -0.3, 0.1).to(dtype)
    x = torch.ones(2, 3, dtype=dtype)
    report = check(cell, torch.zeros_like(x), x, show=False)
    assert report.settles
    assert float(report.radius) == pytest.approx(0.5, rel=0.02)
    assert min(trial.alignment.cosine for trial in report.gradients) > 0.8


@pytest.mark.parametrize(
    ("gradient", "solver"),
    [
        (Implicit(), FixedPointIteration(max_steps=100)),
        (AdaptivePhantom(), FixedPointIteration(max_steps=100)),
        (Backprop(steps=60), FixedPointIteration()),
        (Shine(), Broyden()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_attached_gradient_has_its_row(gradient: Gradient, solver: Any) -> None:
    cell = diagonal(0.5, -0.3, 0.1)
    attach(cell, gradient, solver=solver)
    report = examine(cell)
    yours = next(trial for trial in report.gradients if trial.gradient == gradient)
    assert yours.alignment.cosine > 0.97
    assert " (yours)" in str(report)


def test_the_loss_decides_what_is_compared() -> None:
    cell = diagonal(0.5, -0.5)
    first = examine(cell, loss=lambda z: z[:, 0].sum())
    second = examine(cell, loss=lambda z: z[:, 1].sum())
    # For one eigenvector the one-step gradient is the exact one times 1 - eigenvalue.
    ratios = [
        next(trial.alignment.norm_ratio for trial in report.gradients if trial.gradient == OneStep())
        for report in (first, second)
    ]
    assert ratios == pytest.approx([0.5, 1.5])
    assert "GRADIENTS of the loss" in str(first)
    assert "GRADIENTS of a random cotangent" in str(examine(cell))
