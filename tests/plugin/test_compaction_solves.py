"""Converged samples leave the batch of a solve, and nothing else of its result changes, for every solver."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phantomgrad import (
    Anderson,
    Broyden,
    DivergedError,
    FixedPointIteration,
    NotConvergedWarning,
    Solution,
    Solver,
    fixed_point,
)

pytestmark = pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")

DTYPE = torch.float64
SIZE = 6
SOLVERS: list[Solver] = [
    FixedPointIteration(max_steps=300),
    FixedPointIteration(max_steps=300, damping=0.7, check_every=3),
    FixedPointIteration(max_steps=300, keep="last"),
    Anderson(),
    Anderson(memory=3, mixing=0.8),
    Broyden(),
    Broyden(memory=3),
]
MIXING = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=DTYPE, generator=torch.Generator().manual_seed(5)))[0]


class Parts(NamedTuple):
    first: Tensor
    second: Tensor


PACK: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda z: z,
    "dict of tuples": lambda z: {"a": (z[..., :2], [z[..., 2:3]]), "b": z[..., 3:]},
    "namedtuple": lambda z: Parts(z[..., :1], z[..., 1:]),
}
UNPACK: dict[str, Callable[[Any], Tensor]] = {
    "tensor": lambda z: z,
    "dict of tuples": lambda z: torch.cat((z["a"][0], z["a"][1][0], z["b"]), dim=-1),
    "namedtuple": lambda z: torch.cat((z.first, z.second), dim=-1),
}


class Map:
    """`tanh(rate * W z + x)` for samples along `batch_dim`, each with a rate of its own; counts the samples it is given.

    The weight, as long as the batch may be, is no sample's.
    """

    def __init__(self, structure: str = "tensor", batch_dim: int = 0) -> None:
        self.rows: list[int] = []
        self.structure, self.batch_dim = structure, batch_dim

    def __call__(self, state: Any, inputs: dict[str, Any], weight: Tensor) -> Any:
        z = UNPACK[self.structure](state)
        self.rows.append(z.shape[self.batch_dim])
        rate, [x] = inputs["rate"], inputs["x"]
        return PACK[self.structure](torch.tanh(rate * (z @ weight.T) + x))

    def arguments(self, rates: list[float]) -> tuple[Any, dict[str, Any], Tensor]:
        shape = [len(rates), SIZE] if self.batch_dim == 0 else [2, len(rates), SIZE]
        x = torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(6))
        rate = torch.tensor(rates, dtype=DTYPE).unsqueeze(-1).expand(*shape[:-1], 1)
        return PACK[self.structure](torch.zeros_like(x)), {"rate": rate, "x": [x]}, MIXING


def both(f: Map, rates: list[float], solver: Solver, **options: Any) -> tuple[Solution, Solution, list[int]]:
    """The whole batch solved to the end, the same with converged samples dropped, and the samples of each evaluation then."""
    steps: tuple[list[Any], list[Any]] = [], []
    arguments = f.arguments(rates)
    options = {"solver": solver, "batch_dim": f.batch_dim, **options}
    whole = fixed_point(f, *arguments, on_step=lambda *seen: steps[0].append(seen), **options)
    f.rows.clear()
    dropped = fixed_point(
        f, *arguments, on_step=lambda *seen: steps[1].append(seen), batched_inputs=("inputs",), **options
    )
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-10, atol=1e-10, equal_nan=True)
    return whole, dropped, list(f.rows)


def assert_equal(found: Solution, expected: Solution) -> None:
    close = {"rtol": 1e-10, "atol": 1e-10, "equal_nan": True}
    torch.testing.assert_close(found.value, expected.value, **close)
    assert found.converged.tolist() == expected.converged.tolist()
    assert found.steps.tolist() == expected.steps.tolist()
    torch.testing.assert_close(found.residual, expected.residual, **close)
    assert (found.trace is None) == (expected.trace is None)
    if found.trace is not None and expected.trace is not None:
        assert found.trace.steps == expected.trace.steps
        torch.testing.assert_close(found.trace.residuals, expected.trace.residuals, **close)
        torch.testing.assert_close(found.trace.states, expected.trace.states, **close)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize(
    ("structure", "batch_dim"), [("tensor", 0), ("dict of tuples", 0), ("namedtuple", 1), ("tensor", -2)]
)
def test_nothing_but_the_number_of_samples_evaluated_changes(structure: str, batch_dim: int, solver: Solver) -> None:
    f = Map(structure, batch_dim)
    rates = [0.0, 0.9, 0.1, 0.5, 0.8, 0.3, 0.05, 0.7]
    whole, dropped, rows = both(f, rates, replace(solver, trace="state"))
    assert_equal(dropped, whole)
    assert dropped.converged.all()
    evaluations = rows[: int(dropped.steps.max())]
    assert evaluations == sorted(evaluations, reverse=True)
    # No sample is evaluated after the check that finds it converged: with so few, each that has pays.
    assert sum(evaluations) == int(dropped.steps.sum())


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.sampled_from((0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)), min_size=1, max_size=40),
    solver=st.sampled_from(SOLVERS),
    max_steps=st.integers(1, 30),
    trace=st.sampled_from((None, "residual", "state")),
    rtol=st.sampled_from((1e-1, 1e-4, 1e-9)),
)
def test_whatever_order_samples_converge_in(
    rates: list[float], solver: Solver, max_steps: int, trace: Any, rtol: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        solver = replace(solver, max_steps=max_steps, trace=trace, rtol=rtol)
        with torch.no_grad():
            whole, dropped, rows = both(Map(), rates, solver)
    assert_equal(dropped, whole)
    assert sum(rows) <= len(rates) * len(rows)


def test_samples_that_converge_together_or_not_at_all_are_evaluated_as_ever() -> None:
    with torch.no_grad():
        together, dropped, rows = both(Map(), [0.0] * 4, FixedPointIteration())
        assert_equal(dropped, together)
        assert rows == [4] * int(together.steps.max())
        never, dropped, rows = both(Map(), [0.9] * 4, FixedPointIteration(max_steps=5))
        assert_equal(dropped, never)
        assert rows == [4] * 5


def test_a_few_of_many_do_not_pay() -> None:
    with torch.no_grad():
        _, dropped, rows = both(Map(), [0.0] + [0.9] * 19, FixedPointIteration(max_steps=8))
    assert dropped.converged.sum() == 1
    assert rows == [20] * 8


@pytest.mark.parametrize("solver", SOLVERS[:4] + SOLVERS[5:6], ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, 1e308])
def test_a_sample_that_diverges_is_reported_as_ever(solver: Solver, bad: float) -> None:
    rates = torch.tensor([0.1, 0.6, 0.3, 0.8], dtype=DTYPE)[:, None]
    x = torch.randn(4, SIZE, dtype=DTYPE)
    blows_up = torch.tensor([0, 1, 0, 0], dtype=DTYPE)[:, None]

    def f(z: Tensor, rate: Tensor, x: Tensor, blows_up: Tensor) -> Tensor:
        image = torch.tanh(rate * (z @ MIXING.T) + x)
        return torch.where((blows_up > 0) & (z.norm(dim=1, keepdim=True) > 0), bad * image, image)

    def call(**options: Any) -> Solution:
        return fixed_point(
            f, torch.zeros_like(x), rates, x, blows_up, solver=replace(solver, trace="residual"), **options
        )

    whole = call(on_failure="ignore")
    assert whole.converged.tolist() == [True, False, True, True]
    assert_equal(call(on_failure="ignore", batched_inputs=(1, 2, 3)), whole)
    errors = []
    for options in ({}, {"batched_inputs": (1, 2, 3)}):
        with pytest.raises(DivergedError) as error:
            call(**options)
        errors.append(error.value)
    assert str(errors[0]) == str(errors[1])
    assert errors[0].solution is not None
    assert errors[1].solution is not None
    assert_equal(errors[1].solution, errors[0].solution)


def test_a_frozen_sample_stays_where_it_converged_between_checks_too() -> None:
    seen: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        seen.append(z)
        return torch.tensor([[0.1], [0.9]], dtype=DTYPE) * z + 1.0

    with torch.no_grad():
        solution = fixed_point(
            f, torch.zeros(2, 1, dtype=DTYPE), solver=FixedPointIteration(check_every=10, max_steps=100)
        )
    [stopped, _] = solution.steps.tolist()
    assert {z[0].item() for z in seen[stopped:]} == {seen[stopped][0].item()}


@dataclass(frozen=True, kw_only=True)
class PerSampleDamping(Solver):
    """A solver of a user's own that knows how long the batch is."""

    damping: Tensor

    def advance(self, z: Any, fz: Any, memory: Any, samples: Any) -> Any:
        return tuple(torch.lerp(a, b, self.damping) for a, b in zip(z, fz, strict=True))


@dataclass(frozen=True, kw_only=True)
class Remembering(Anderson):
    """A subclass whose memory is another than that of its base."""

    def start(self, z: Any, samples: Any) -> Any:
        return {"inner": super().start(z, samples), "damping": torch.full((samples.count, 1), 0.9, dtype=DTYPE)}

    def advance(self, z: Any, fz: Any, memory: Any, samples: Any) -> Any:
        following = super().advance(z, fz, memory["inner"], samples)
        return tuple(torch.lerp(a, b, memory["damping"]) for a, b in zip(z, following, strict=True))


@dataclass(frozen=True, kw_only=True)
class Selecting(Remembering):
    """The same, which says how to narrow it."""

    def select(self, memory: Any, rows: Tensor) -> Any:
        return {"inner": super().select(memory["inner"], rows), "damping": memory["damping"][rows]}


@pytest.mark.parametrize(
    ("solver", "drops"),
    [
        (PerSampleDamping(damping=torch.tensor([[0.9], [0.8], [0.7], [1.0]], dtype=DTYPE)), False),
        (Remembering(), False),
        (Selecting(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_solver_of_ones_own_drops_samples_where_it_can_select_them(solver: Solver, drops: bool) -> None:
    with torch.no_grad():
        whole, dropped, rows = both(Map(), [0.1, 0.9, 0.5, 0.0], replace(solver, max_steps=300))
    assert_equal(dropped, whole)
    assert (sum(rows) < 4 * len(rows)) == drops
