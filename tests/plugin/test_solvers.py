"""Every solver on every problem, and what the driver promises about convergence."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import PLAIN_ITERATION_FAILS, PROBLEMS, LinearBlock, Problem

from phantomgrad import (
    Anderson,
    Broyden,
    DivergedError,
    FixedPointIteration,
    NotConvergedError,
    NotConvergedWarning,
    Solver,
    StateMismatchError,
    fixed_point,
)
from phantomgrad._samples import Samples
from phantomgrad.solvers._broyden import InverseEstimate

SOLVERS: list[Solver] = [
    FixedPointIteration(max_steps=200, rtol=1e-12),
    FixedPointIteration(max_steps=300, rtol=1e-12, damping=0.7),
    FixedPointIteration(max_steps=200, rtol=1e-12, check_every=7),
    Anderson(max_steps=200, rtol=1e-12),
    Anderson(max_steps=200, rtol=1e-12, memory=1),
    Anderson(max_steps=200, rtol=1e-12, memory=3, mixing=0.8),
    Broyden(max_steps=200, rtol=1e-12),
    Broyden(max_steps=200, rtol=1e-12, memory=3),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_finds_the_known_fixed_point(problem: Problem, solver: Solver) -> None:
    solution = fixed_point(problem.fn, problem.start, solver=solver, batch_dim=problem.batch_dim)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, problem.answer, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", [FixedPointIteration(damping=0.5, max_steps=200), Anderson(max_steps=200)], ids=repr)
def test_damping_and_anderson_settle_a_map_that_plain_iteration_does_not(solver: Solver) -> None:
    problem = PLAIN_ITERATION_FAILS
    with pytest.warns(NotConvergedWarning):
        plain = fixed_point(problem.fn, problem.start, solver=FixedPointIteration(max_steps=200))
    assert not plain.converged[1]
    solution = fixed_point(problem.fn, problem.start, solver=solver)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, problem.answer, rtol=1e-7, atol=1e-7)


def test_anderson_needs_fewer_steps_than_plain_iteration() -> None:
    block = LinearBlock.random(1, radius=0.95, size=8)
    plain = fixed_point(block, block.start, solver=FixedPointIteration(max_steps=2000))
    accelerated = fixed_point(block, block.start, solver=Anderson(max_steps=2000, memory=8))
    assert accelerated.converged.all()
    assert int(accelerated.steps.max()) * 4 < int(plain.steps.max())


def test_broyden_solves_a_linear_map_that_expands() -> None:
    block = LinearBlock.random(9, radius=1.5, size=4)
    solution = fixed_point(block, block.start, solver=Broyden(max_steps=100, rtol=1e-10))
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, block.solution(), rtol=1e-6, atol=1e-6)


def test_each_sample_has_its_own_steps_and_is_frozen_when_it_converges() -> None:
    rate = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def fn(z: torch.Tensor) -> torch.Tensor:
        seen.append(z.clone())
        return rate * z + 1.0

    solution = fixed_point(fn, torch.zeros(3, 1, dtype=torch.float64), solver=FixedPointIteration(max_steps=500))
    steps = solution.steps.tolist()
    assert steps == sorted(steps)
    assert len(set(steps)) == 3
    # Row by row, the batch does what each sample does alone.
    for row in range(3):
        alone = fixed_point(
            lambda z, row=row: rate[row : row + 1] * z + 1.0,
            torch.zeros(1, 1, dtype=torch.float64),
            solver=FixedPointIteration(max_steps=500),
        )
        assert alone.steps.item() == steps[row]
        assert alone.residual.item() == solution.residual[row].item()
        assert alone.value.item() == solution.value[row].item()
        frozen = torch.stack([z[row] for z in seen[steps[row] : int(max(steps))]]) if row < 2 else seen[-1][row]
        assert (frozen == frozen.reshape(-1)[0]).all()


def test_residual_and_converged_are_what_their_definitions_say() -> None:
    block = LinearBlock.random(2)
    solver = FixedPointIteration(max_steps=7, rtol=1e-2, atol=0.0)
    points: list[torch.Tensor] = []

    def fn(z: torch.Tensor) -> torch.Tensor:
        points.append(z)
        return block(z)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        with torch.no_grad():
            solution = fixed_point(fn, block.start, solver=solver)
    for row in range(4):
        z = points[int(solution.steps[row]) - 1][row : row + 1]
        image = z @ block.J.T + block.x[row] @ block.U.T + block.c
        residual = ((image - z).norm() / image.norm()).item()
        assert residual == pytest.approx(solution.residual[row].item(), rel=1e-12)
        assert bool(solution.converged[row]) == (residual <= 1e-2)
        torch.testing.assert_close(solution.value[row : row + 1], image.detach())


def test_the_best_iterate_is_returned_and_never_a_later_worse_one() -> None:
    # Contracts until |z| is small, then pushes away: the residual has a minimum on the way.
    def fn(z: torch.Tensor) -> torch.Tensor:
        fn.calls += 1  # type: ignore[attr-defined]
        return 0.5 * z if fn.calls <= 5 else z + 10.0 * fn.calls  # type: ignore[attr-defined]

    fn.calls = 0  # type: ignore[attr-defined]
    with pytest.warns(NotConvergedWarning):
        best = fixed_point(fn, torch.full((1, 2), 8.0), solver=FixedPointIteration(max_steps=9, trace="residual"))
    assert best.trace is not None
    assert best.residual.item() == best.trace.residual.min().item()
    fn.calls = 0  # type: ignore[attr-defined]
    with pytest.warns(NotConvergedWarning):
        last = fixed_point(fn, torch.full((1, 2), 8.0), solver=FixedPointIteration(max_steps=9, keep="last"))
    assert last.residual.item() == pytest.approx(best.trace.residual[-1].item())


def test_a_sample_that_converges_is_taken_where_it_did_though_an_earlier_relative_residual_was_smaller() -> None:
    # Shrinking makes the absolute residual small, not the relative one; only the former is asked for.
    start = torch.ones(1, 1, dtype=torch.float64)
    solution = fixed_point(lambda z: 0.5 * z + 0.4 * z**3, start, solver=FixedPointIteration(rtol=0.0, atol=1e-3))
    assert solution.converged.all()
    assert solution.value.abs().item() < 1e-3
    gap = solution.residual * solution.value.norm()
    assert gap.item() <= 1e-3


def test_zero_steps_take_the_start_as_the_solution() -> None:
    start = torch.tensor([[3.0]], dtype=torch.float64)
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    solution = fixed_point(lambda z: weight * z + 1.0, start, solver=FixedPointIteration(max_steps=0))
    assert solution.steps.item() == 0
    assert torch.isnan(solution.residual).all()
    with torch.no_grad():
        assert fixed_point(lambda z: weight * z, start, solver=FixedPointIteration(max_steps=0)).value.item() == 3.0


@pytest.mark.parametrize("trace", ["residual", "state"])
def test_trace_records_every_check(trace: Any) -> None:
    solver = FixedPointIteration(max_steps=40, trace=trace, check_every=3)
    solution = fixed_point(lambda z: [0.5 * z[0] + 1.0], [torch.zeros(2, 3)], solver=solver)
    assert solution.trace is not None
    assert solution.trace.steps == list(range(3, int(solution.steps.max()) + 1, 3))
    assert solution.trace.residual.shape == (len(solution.trace), 2)
    if trace == "state":
        assert isinstance(solution.trace[0], list)
        assert solution.trace[0][0].shape == (2, 3)
        torch.testing.assert_close(solution.trace[-1], solution.value)
    else:
        assert solution.trace[-1].shape == (2,)


def test_on_step_sees_steps_states_and_residuals() -> None:
    seen: list[tuple[int, Any, torch.Tensor]] = []
    solution = fixed_point(
        lambda z: {"a": 0.5 * z["a"] + 1.0},
        {"a": torch.zeros(2, 3)},
        on_step=lambda step, z, residual: seen.append((step, z, residual)),
    )
    assert [step for step, _, _ in seen] == list(range(1, int(solution.steps.max()) + 1))
    torch.testing.assert_close(seen[-1][1], solution.value)
    assert seen[-1][2].shape == (2,)


def test_a_map_that_diverges_raises_and_can_be_ignored() -> None:
    start = torch.ones(3, 1)
    factor = torch.tensor([[0.5], [1e30], [0.25]])

    def fn(z: torch.Tensor) -> torch.Tensor:
        return factor * z

    for on_failure in ("warn", "raise"):
        with pytest.raises(
            DivergedError, match=r"^The fixed point diverged: 1 of 3 samples are not finite after \d+ steps\."
        ):
            fixed_point(fn, start, on_failure=on_failure)
    solution = fixed_point(fn, start, on_failure="ignore")
    assert solution.converged.tolist() == [True, False, True]
    assert torch.isfinite(solution.value).all()


def test_a_state_whose_norm_overflows_has_diverged_though_its_entries_are_finite() -> None:
    with pytest.raises(DivergedError, match="3 of 3 samples are not finite"):
        fixed_point(lambda z: 2 * z, torch.ones(3, 16), solver=FixedPointIteration(max_steps=200))


def test_running_out_of_steps_warns_raises_or_is_ignored() -> None:
    def call(on_failure: Any) -> Any:
        return fixed_point(lambda z: -z + 1.0, torch.zeros(2, 1), on_failure=on_failure)

    text = r"^The fixed point did not converge: 2 of 2 samples are above their tolerance after 50 steps, with a relative residual"
    with pytest.warns(NotConvergedWarning, match=text):
        call("warn")
    with pytest.raises(NotConvergedError, match=text):
        call("raise")
    assert not call("ignore").converged.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [FixedPointIteration(), Anderson(), Anderson(memory=1), Broyden()], ids=repr)
def test_every_dtype_is_kept_and_converges_to_its_default_tolerance(dtype: torch.dtype, solver: Solver) -> None:
    solution = fixed_point(lambda z: 0.5 * z + 1.0, torch.zeros(2, 3, dtype=dtype), solver=solver)
    assert solution.value.dtype is dtype
    assert solution.converged.all()
    torch.testing.assert_close(solution.value.double(), torch.full((2, 3), 2.0).double(), rtol=4e-2, atol=0)


def test_solvers_survive_singular_systems() -> None:
    constant = fixed_point(
        lambda z: torch.ones_like(z), torch.zeros(2, 3), solver=Anderson(rtol=0.0, atol=0.0, max_steps=8)
    )
    torch.testing.assert_close(constant.value, torch.ones(2, 3))
    # One dimension and five residuals: the Gram matrix has rank one.
    broyden = fixed_point(
        lambda z: torch.ones_like(z), torch.zeros(2, 3), solver=Broyden(rtol=0.0, atol=0.0, max_steps=8)
    )
    torch.testing.assert_close(broyden.value, torch.ones(2, 3))
    parallel = fixed_point(lambda z: 0.9 * z + 1.0, torch.zeros(3, 1, dtype=torch.float64), solver=Anderson(ridge=0.0))
    torch.testing.assert_close(parallel.value, torch.full((3, 1), 10.0, dtype=torch.float64))


def test_samples_along_other_dimensions_and_coupled_ones() -> None:
    rate = torch.tensor([0.1, 0.9])
    solution = fixed_point(
        lambda z: rate * z + 1.0, torch.zeros(5, 2), batch_dim=1, solver=FixedPointIteration(max_steps=200)
    )
    assert solution.steps.shape == (2,)
    assert solution.steps[0] < solution.steps[1]
    coupled = fixed_point(
        lambda z: rate * z + 1.0, torch.zeros(5, 2), batch_dim=None, solver=FixedPointIteration(max_steps=200)
    )
    assert coupled.steps.shape == (1,)


def test_wrong_batch_dim_says_so() -> None:
    with pytest.raises(
        StateMismatchError, match=r"different sizes along batch_dim=0: \(\(2, 3\) float32 on cpu, \(3, 3\) float32"
    ):
        fixed_point(lambda z: z, (torch.zeros(2, 3), torch.zeros(3, 3)))
    with pytest.raises(StateMismatchError, match=r"no dimension batch_dim=2"):
        fixed_point(lambda z: z, torch.zeros(2, 3), batch_dim=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_steps": -1}, "max_steps of FixedPointIteration must be an integer of at least 0, got -1."),
        ({"max_steps": 2.5}, "max_steps of FixedPointIteration must be an integer of at least 0, got 2.5."),
        ({"check_every": 0}, "check_every of FixedPointIteration must be an integer of at least 1, got 0."),
        ({"rtol": -1e-3}, "rtol of FixedPointIteration must be a finite number at least 0.0, got -0.001."),
        (
            {"damping": 0.0},
            "damping of FixedPointIteration must be a finite number above 0.0 and at most 2.0, got 0.0.",
        ),
        (
            {"damping": float("nan")},
            "damping of FixedPointIteration must be a finite number above 0.0 and at most 2.0, got nan.",
        ),
        ({"trace": "all"}, "trace of FixedPointIteration must be one of None, 'residual', 'state', got 'all'."),
        ({"keep": "first"}, "keep of FixedPointIteration must be one of 'best', 'last', got 'first'."),
    ],
)
def test_values_out_of_range_are_refused_at_construction(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        FixedPointIteration(**options)
    assert str(caught.value) == text


def test_unknown_options_are_type_errors() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'tol'"):
        FixedPointIteration(tol=1e-3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'f_max_iter'"):
        fixed_point(lambda z: z, torch.zeros(1), f_max_iter=3)  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"solver must be a phantomgrad Solver object such as Anderson\(\), got 'anderson'"
    ):
        fixed_point(lambda z: z, torch.zeros(1), solver="anderson")  # type: ignore[arg-type]


def test_broyden_takes_a_plain_step_where_its_next_iterate_would_not_be_finite() -> None:
    start = torch.zeros(2, 3, dtype=torch.float64)
    samples, solver = Samples((start,), 0), Broyden()
    memory = solver.start((start,), samples)
    for scale in (1.0, 0.9):
        memory.learn(start + scale, start + 0.5 * scale)
    image = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    # A correction so large that applying it overflows.
    memory._left = torch.full((2, 30, 3), 1e200, dtype=torch.float64)
    memory._right = torch.full((2, 30, 3), 1e200, dtype=torch.float64)
    (following,) = solver.advance((start,), (image,), memory, samples)
    assert torch.equal(following, image)
    assert torch.equal(memory.apply(image), -image)


@pytest.mark.parametrize("J", [-5.0, -10.5, -12.0, -100.0, 12.0, 20.0])
def test_broyden_solves_an_affine_map_of_one_eigenvalue_in_three_steps(J: float) -> None:
    solution = fixed_point(lambda z: J * z + 1, torch.zeros(2, 3, dtype=torch.float64), solver=Broyden())
    assert solution.steps.tolist() == [3, 3]
    torch.testing.assert_close(solution.value, torch.full((2, 3), 1 / (1 - J), dtype=torch.float64))


@pytest.mark.parametrize("scale", [1.5, 3.0, 6.0, 12.0])
def test_broyden_ends_on_expanding_affine_maps(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        J = torch.randn(8, 8, dtype=torch.float64, generator=generator)
        J = J * scale / torch.linalg.eigvals(J).abs().max()
        x = torch.randn(1, 8, dtype=torch.float64, generator=generator)
        solver = Broyden(max_steps=60, memory=60)  # without returns at most 2 n steps (Gay, 1979)
        solution = fixed_point(lambda z, J=J, x=x: z @ J + x, torch.zeros_like(x), solver=solver)
        torch.testing.assert_close(
            solution.value,
            torch.linalg.solve(torch.eye(8, dtype=torch.float64) - J, x, left=False),
            rtol=1e-5,
            atol=1e-5,
        )


def test_broyden_learns_from_a_step_that_led_astray_and_goes_on_from_the_best_point() -> None:
    memory = InverseEstimate(5)
    point, residual = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    for scale in (1.0, 0.5, 0.25):
        memory.learn(point + scale, scale * residual)
    jumped = torch.tensor([[0.2], [100.0]], dtype=torch.float64) * residual
    at, r = memory.learn(point, jumped)
    assert torch.equal(r, torch.tensor([[0.2], [0.25]], dtype=torch.float64).expand(2, 3))
    assert torch.equal(at, torch.tensor([[0.0], [0.25]], dtype=torch.float64).expand(2, 3))
    change, step = jumped - 0.25, point - 0.25
    torch.testing.assert_close(memory.apply(change), step.expand(2, 3))


@pytest.mark.parametrize(
    "solver", [Anderson(max_steps=60), Anderson(max_steps=60, memory=2), Broyden(max_steps=60)], ids=repr
)
def test_a_complex_affine_map_is_solved_as_fast_as_its_size_allows(solver: Solver) -> None:
    generator = torch.Generator().manual_seed(3)
    W = 0.3 * torch.randn(3, 3, dtype=torch.complex128, generator=generator)
    b = torch.randn(2, 3, dtype=torch.complex128, generator=generator)
    solution = fixed_point(lambda z: z @ W + b, torch.zeros_like(b), solver=replace(solver, rtol=1e-10))
    expected = torch.linalg.solve(torch.eye(3, dtype=W.dtype) - W, b, left=False)
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-8)
    assert solution.steps.max() <= (30 if solver == Anderson(max_steps=60, memory=2) else 10)
