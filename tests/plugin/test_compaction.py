"""Converged samples leave the batch where the caller says which inputs carry it, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from compat import GRADIENTS, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from phantomgrad import (
    Anderson,
    AttachError,
    Backprop,
    Broyden,
    DivergedError,
    FixedPointIteration,
    Gradient,
    NotConvergedWarning,
    Shine,
    Solution,
    Solver,
    StateMismatchError,
    attach,
    equilibrium,
    fixed_point,
)
from phantomgrad.diagnostics import spectral_radius

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


class Cell(nn.Module):
    """A contraction with an optional shift, which counts the samples it is given."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        self.layers = nn.Sequential(*layers)
        self.rows: list[int] = []

    def forward(self, z: Tensor, rate: Tensor, x: Tensor, shift: Tensor | None = None) -> Tensor:
        self.rows.append(len(z))
        image = torch.tanh(rate * self.linear(z) + x if shift is None else rate * self.linear(z) + x + shift)
        return self.layers(image)


def inputs(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, SIZE, dtype=DTYPE, generator=torch.Generator().manual_seed(9))
    return torch.zeros_like(x), torch.linspace(0.0, 1.2, batch, dtype=DTYPE)[:, None], x


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Dropout(0.3),),
        (nn.BatchNorm1d(SIZE, momentum=0.2),),
        (nn.BatchNorm1d(SIZE, track_running_stats=False),),
        (nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()),
    ],
    ids=repr,
)
def test_no_sample_is_dropped_where_the_map_would_become_another(layers: tuple[nn.Module, ...]) -> None:
    results = []
    for batched_inputs in (None, ("rate", "x")):
        torch.manual_seed(3)
        cell = Cell(*copy.deepcopy(layers)).double()
        with attach(cell, batched_inputs=batched_inputs, on_failure="ignore") as attachment, torch.no_grad():
            value = cell(*inputs())
            assert attachment.solution is not None
            results.append((value, attachment.solution.steps, cell.rows, cell.state_dict(), torch.rand(1)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.BatchNorm1d(SIZE)], ids=repr)
def test_in_evaluation_mode_the_same_layers_treat_every_sample_alone(layer: nn.Module) -> None:
    cell = Cell(layer).double().eval()
    z0, rate, x = inputs()
    with torch.no_grad(), attach(cell):
        whole = cell(z0, rate, x)
    cell.rows.clear()
    with torch.no_grad(), attach(cell, batched_inputs=(1, 2)):
        torch.testing.assert_close(cell(z0, rate, x), whole, rtol=1e-10, atol=1e-10)
    assert min(cell.rows) < len(x)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_every_gradient_is_that_of_the_whole_batch(gradient: Gradient) -> None:
    found = []
    for batched_inputs in (None, ("rate", "x")):
        torch.manual_seed(3)
        cell = Cell().double()
        z0, rate, x = inputs()
        leaves = rate.requires_grad_(), x.requires_grad_()
        solver = Broyden() if isinstance(gradient, Shine) else FixedPointIteration()
        with attach(cell, gradient, solver=solver, batched_inputs=batched_inputs, on_failure="ignore"):
            cell(z0, *leaves).square().sum().backward()
        named = {"rate": rate, "x": x, **dict(cell.named_parameters())}
        found.append({name: value.grad for name, value in named.items() if value.grad is not None})
        dropped = min(cell.rows) < len(x)
        assert dropped == (batched_inputs is not None and not isinstance(gradient, Shine | Backprop))
    assert_same(found[1], found[0], rtol=1e-9)


def test_what_is_returned_beside_the_state_is_that_of_the_whole_batch() -> None:
    class Two(Cell):
        def forward(self, *arguments: Any) -> Any:
            image = super().forward(*arguments)
            return image, image.sum(1)

    cell = Two().double()
    with torch.no_grad(), attach(cell, output=0, batched_inputs=(1, 2)):
        z, beside = cell(*inputs())
    torch.testing.assert_close(beside, z.sum(1), rtol=1e-12, atol=1e-12)


def test_arguments_are_named_by_position_or_keyword_and_may_be_left_out() -> None:
    cell = Cell().double()
    z0, rate, x = inputs()
    whole = cell.double()
    with torch.no_grad(), attach(whole):
        expected = whole(z0, rate, x)
    for names in ((1, 2), ("rate", "x"), (1, "x", 3), ["rate", 2, "shift"]):
        with torch.no_grad(), attach(cell, batched_inputs=names):
            for result in (cell(z0, rate, x), cell(z0, x=x, rate=rate), cell(rate=rate, shift=None, x=x, z=z0)):
                torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    assert min(cell.rows) < len(x)


def test_an_input_that_is_not_named_is_passed_whole() -> None:
    shape_seen = set()

    def f(z: Tensor, rate: Tensor, table: Tensor) -> Tensor:
        shape_seen.add(table.shape)
        return rate * z + table.sum()

    rate = torch.linspace(0.0, 0.5, 6, dtype=DTYPE)[:, None]
    solution = fixed_point(f, torch.zeros(6, 1, dtype=DTYPE), rate, torch.ones(6, 2, dtype=DTYPE), batched_inputs=[1])
    assert shape_seen == {(6, 2)}
    torch.testing.assert_close(solution.value, 12 / (1 - rate), rtol=1e-6, atol=0)


def test_no_further_input_needs_to_carry_the_batch() -> None:
    rows = []

    def f(z: Tensor) -> Tensor:
        rows.append(len(z))
        return torch.cos(z)

    start = torch.tensor([[0.739085133], [5.0], [-3.0]], dtype=DTYPE)
    assert fixed_point(f, start, batched_inputs=()).converged.all()
    assert min(rows[:-5]) < 3


def test_functions_and_classes_may_be_decorated_with_it() -> None:
    rows = []

    @equilibrium(batched_inputs=("x",))
    def f(z: Tensor, x: Tensor) -> Tensor:
        rows.append(len(z))
        return torch.cos(x * z)

    with torch.no_grad():
        f(torch.zeros(4, 1), torch.linspace(0, 1, 4)[:, None])
    assert min(rows) < 4


def test_copies_and_pickles_drop_samples_too() -> None:
    cell = Cell().double()
    attach(cell, batched_inputs=("rate", "x"))
    for clone in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        clone.rows.clear()
        with torch.no_grad():
            clone(*inputs())
        assert min(clone.rows) < 6


def test_diagnostics_see_the_whole_batch() -> None:
    cell = Cell().double()
    plain = spectral_radius(cell, *inputs())
    attach(cell, batched_inputs=("rate", "x"))
    torch.testing.assert_close(spectral_radius(cell, *inputs()), plain, rtol=1e-6, atol=1e-6)


def test_an_exported_program_evaluates_all() -> None:
    cell = Cell().eval()
    z0, rate, x = (each.float() for each in inputs())
    attach(cell, solver=FixedPointIteration(max_steps=12, rtol=0.1), batched_inputs=("rate", "x"))
    with torch.no_grad():
        program = torch.export.export(cell, (z0, rate, x), strict=False)
        torch.testing.assert_close(program.module()(z0, rate, x), cell(z0, rate, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"batched_inputs": "x"}, TypeError, "batched_inputs must be a tuple of positions and keywords, or None, got 'x'"),
        ({"batched_inputs": (True,)}, TypeError, "batched_inputs must be a tuple of positions and keywords"),
        ({"batched_inputs": ("rates",)}, AttachError, "has no argument 'rates', which batched_inputs names: it takes (z"),
        ({"batched_inputs": (4,)}, AttachError, "has no argument 4, which batched_inputs names"),
        ({"batched_inputs": (0,)}, AttachError, "batched_inputs names the state of Cell"),
        ({"batched_inputs": ("z",)}, AttachError, "batched_inputs names the state of Cell"),
        ({"batched_inputs": (1,), "batch_dim": None}, ValueError, "which batch_dim=None rules out"),
        ({"batched_inputs": (1,), "process_group": object()}, ValueError, "which process_group rules out"),
        ({"batched_inputs": (1,), "compile": True}, ValueError, "with compile=True every size of it would be"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], error: type[Exception], text: str) -> None:
    cell = Cell()
    with pytest.raises(error) as raised:
        attach(cell, **options)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "value", [torch.zeros(4, SIZE), torch.zeros(()), [torch.zeros(6, 1), 0.5], {"a": "text"}], ids=repr
)
def test_a_named_input_without_the_batch_dimension_is_refused(value: Any) -> None:
    z0, rate, x = inputs()
    with pytest.raises(StateMismatchError, match="does not have the 6 samples of the state along batch_dim=0"):
        fixed_point(lambda z, x, y: z, z0, x, value, batched_inputs=(1, 2))
    cell = Cell().double()
    with (
        attach(cell, batched_inputs=("shift",)),
        pytest.raises(StateMismatchError, match=r"The input 'shift'.* in Cell"),
    ):
        cell(z0, rate, x, shift=value)


def test_functions_without_a_signature_have_inputs_by_position() -> None:
    z0, x = torch.tensor([[1.0], [3.0], [2.0]]), torch.tensor([[2.0], [1.0], [3.0]])
    assert fixed_point(torch.fmin, z0, x, batched_inputs=(1,)).value.tolist() == [[1.0], [1.0], [2.0]]


def test_the_error_of_a_function_has_its_name() -> None:
    def f(z: Tensor, x: Tensor) -> Tensor:
        return z

    with pytest.raises(AttachError, match=r"^f has no argument 2, which batched_inputs names: it takes"):
        fixed_point(f, torch.zeros(3, 1), torch.zeros(3, 1), batched_inputs=(2,))
