"""States at the edge of what a cell may have: empty, complex, in other containers, from inference mode, without values."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from compat import GRADIENTS
from problems import DTYPE
from tanh_cell import Cell
from torch import Tensor, nn

from phantomgrad import (
    Anderson,
    Broyden,
    FixedPointIteration,
    Gradient,
    Shine,
    Solver,
    StateMismatchError,
    attach,
    fixed_point,
)

SOLVERS = [FixedPointIteration(), Anderson(), Broyden()]


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_an_empty_state_is_its_own_fixed_point(gradient: Gradient, shape: tuple[int, int]) -> None:
    for solver in [Broyden()] if isinstance(gradient, Shine) else SOLVERS:
        cell = Cell(shape[1]) if shape[1] else nn.Identity()
        if not isinstance(cell, Cell):
            cell.forward = lambda z, x: z * x  # type: ignore[method-assign]
        x = torch.zeros(shape, dtype=DTYPE, requires_grad=True)
        attachment = attach(cell, gradient, solver=solver, on_failure="raise")
        value = cell(torch.zeros(shape, dtype=DTYPE), x)
        assert value.shape == shape
        value.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
        for parameter in cell.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()
        assert attachment.solution is not None
        assert attachment.solution.converged.tolist() == [True] * shape[0]
        assert attachment.solution.steps.tolist() == [0] * shape[0]
        assert str(attachment.solution)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_state_that_is_empty_in_part_is_solved(solver: Solver) -> None:
    start = (torch.zeros(3, 2, dtype=DTYPE), torch.zeros(3, 0, dtype=DTYPE))
    solution = fixed_point(lambda z: (0.5 * z[0] + 1, z[1]), start, solver=solver)
    torch.testing.assert_close(solution.value[0], torch.full((3, 2), 2.0, dtype=DTYPE))
    assert solution.value[1].shape == (3, 0)


@pytest.mark.parametrize("refine", [0, 2])
def test_shine_of_a_complex_block_is_that_of_its_real_twin(refine: int) -> None:
    generator = torch.Generator().manual_seed(1)
    W = 0.25 * torch.randn(3, 3, dtype=torch.complex128, generator=generator)
    b = torch.randn(1, 3, dtype=torch.complex128, generator=generator).requires_grad_()
    target = torch.randn(1, 3, dtype=torch.complex128, generator=generator)
    exact_value = torch.linalg.solve(torch.eye(3, dtype=W.dtype) - W, b, left=False)
    (exact,) = torch.autograd.grad((exact_value - target).abs().square().sum(), b)
    solver = Broyden(rtol=1e-12)
    value = fixed_point(
        lambda z: z @ W + b, torch.zeros_like(target), gradient=Shine(refine=refine), solver=solver
    ).value
    (found,) = torch.autograd.grad((value - target).abs().square().sum(), b)
    assert (found - exact).norm() < 0.3 * exact.norm()


def test_a_state_that_mixes_real_and_complex_is_refused() -> None:
    start = (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.complex64))
    with pytest.raises(StateMismatchError, match=r"mixes real and complex tensors: .*view_as_real"):
        fixed_point(lambda z: z, start)


def test_an_ordered_dict_stays_one_inside_and_outside() -> None:
    seen: set[type] = set()

    def cell(z: Any) -> Any:
        seen.add(type(z))
        return OrderedDict(a=0.5 * z["a"] + z["b"], b=0.5 * z["b"] + 1)

    value = fixed_point(cell, OrderedDict(a=torch.zeros(2, 1), b=torch.zeros(2, 1))).value
    assert type(value) is OrderedDict
    assert seen == {OrderedDict}
    assert list(value) == ["a", "b"]


def test_a_model_output_of_transformers_stays_one() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def step(z: Any) -> Any:
        return outputs.BaseModelOutput(last_hidden_state=0.5 * z.last_hidden_state + 1)

    value = fixed_point(step, outputs.BaseModelOutput(last_hidden_state=torch.zeros(2, 3))).value
    torch.testing.assert_close(value.last_hidden_state, torch.full((2, 3), 2.0), rtol=1e-3, atol=1e-3)

    class Layer(nn.Module):
        def forward(self, z: Tensor) -> Any:
            return outputs.BaseModelOutput(last_hidden_state=0.5 * z + 1, attentions=(z,))

    for output in ("last_hidden_state", 0):
        layer = Layer()
        attach(layer, output=output)
        with torch.no_grad():
            returned = layer(torch.zeros(2, 3))
        assert isinstance(returned, outputs.BaseModelOutput)
        assert list(returned) == ["last_hidden_state", "attentions"]
        torch.testing.assert_close(returned.last_hidden_state, torch.full((2, 3), 2.0), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(returned[0], returned.last_hidden_state)


def test_other_kinds_of_dict_are_refused_as_states() -> None:
    with pytest.raises(StateMismatchError, match=r"got defaultdict\{'a': \(2,\) float32 on cpu\}"):
        fixed_point(lambda z: z, defaultdict(None, a=torch.zeros(2)))


def test_a_plain_tuple_for_a_namedtuple_is_called_by_its_name() -> None:
    Pair = namedtuple("Pair", "a b")
    with pytest.raises(StateMismatchError, match=r"takes the state Pair\(\(2,\) .*\) to \(\(2,\) "):
        fixed_point(lambda z: (z.a, z.b), Pair(torch.zeros(2), torch.zeros(2)))


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("max_steps", [0, 50])
def test_a_warm_start_from_inference_mode(gradient: Gradient, max_steps: int) -> None:
    cell, x = Cell(), torch.randn(2, 4, dtype=DTYPE)
    solver = Broyden(max_steps=max_steps) if isinstance(gradient, Shine) else FixedPointIteration(max_steps=max_steps)
    attach(cell, gradient, solver=solver)
    with torch.inference_mode():
        start = cell(torch.zeros(2, 4, dtype=DTYPE), x)
    cell(start, x).sum().backward()
    assert cell.recurrent.weight.grad is not None


def test_a_change_in_place_is_seen_in_inference_mode() -> None:
    def cell(z: Tensor) -> Tensor:
        z.mul_(0.5)
        return torch.tanh(z + 1)

    with torch.inference_mode(), pytest.raises(StateMismatchError, match="changed its state in place"):
        fixed_point(cell, torch.full((2, 3), 4.0))
    with torch.inference_mode():
        assert fixed_point(lambda z: torch.tanh(z + 1), torch.full((2, 3), 4.0)).converged.all()


def test_states_without_values_are_refused() -> None:
    with pytest.raises(StateMismatchError, match=r"A solve needs values; got \(2, 3\) float32 on meta"):
        fixed_point(lambda z: z, torch.zeros(2, 3, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64])
def test_autocast_excuses_only_its_own_dtypes(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(StateMismatchError, match=str(dtype).split(".")[1]):
        fixed_point(lambda z: (0.5 * z).to(dtype), torch.zeros(2, 3))
