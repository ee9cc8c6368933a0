"""The inputs that `batched_inputs` names: how they are named, what is refused, and modules that drop converged samples."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from compat import GRADIENTS, assert_same
from torch import Tensor, nn

from phantomgrad import (
    AttachError,
    Backprop,
    Broyden,
    FixedPointIteration,
    Gradient,
    Shine,
    StateMismatchError,
    attach,
    equilibrium,
    fixed_point,
)
from phantomgrad.diagnostics import spectral_radius

pytestmark = pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")

DTYPE = torch.float64
SIZE = 6


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
