"""States, starts and returns at the edge of what a cell may be: empty, complex, nested in other types, in inference mode."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compat import GRADIENTS
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import (
    AdaptivePhantom,
    Anderson,
    AttachError,
    Backprop,
    Broyden,
    DivergedError,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    NotConvergedError,
    NotConvergedWarning,
    OneStep,
    Shine,
    Solver,
    StateMismatchError,
    UnrolledPhantom,
    attach,
    attachments,
    equilibrium,
    fixed_point,
    is_attached,
)

EXACT = Anderson(max_steps=300, rtol=1e-12)
SOLVERS = [FixedPointIteration(), Anderson(), Broyden()]


class Cell(nn.Module):
    """`tanh(W z + x)` with a contracting `W`, in float64."""

    def __init__(self, size: int = 4, gain: float = 0.6) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.recurrent = nn.Linear(size, size).double()
        with torch.no_grad():
            self.recurrent.weight.copy_(gain * torch.linalg.qr(torch.randn(size, size, dtype=DTYPE)).Q)

    def forward(self, z: Tensor, x: Tensor) -> Any:
        return torch.tanh(self.recurrent(z) + x)


# -- empty states --------------------------------------------------------------------------------------------------------


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


# -- complex states ------------------------------------------------------------------------------------------------------


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


# -- containers ----------------------------------------------------------------------------------------------------------


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


# -- what is returned beside the state -------------------------------------------------------------------------------------


class WithHead(Cell):
    """Returns the new state, and a head's result on the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2).double()

    def forward(self, z: Tensor, x: Tensor) -> Any:
        return super().forward(z, x), self.head(z)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_what_is_returned_beside_the_state_has_the_gradient_through_the_solution(gradient: Gradient) -> None:
    solver = Broyden(max_steps=300, rtol=1e-12) if isinstance(gradient, Shine) else EXACT
    cell, start = WithHead(), torch.zeros(3, 4, dtype=DTYPE)
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True)
    with attach(cell, gradient, solver=solver, output=0, on_failure="ignore"):
        z, beside = cell(start, x)
        inputs = [x, *cell.parameters()]
        found = torch.autograd.grad(beside.sum(), inputs, retain_graph=True)
        expected = torch.autograd.grad(cell.head(z).sum(), inputs)
    exact = isinstance(gradient, (Implicit, Backprop))
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0
        cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
        assert cosine > (1 - 1e-9 if exact else 0.9)
        if exact:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("gradient", [g for g in GRADIENTS if not isinstance(g, Backprop)], ids=repr)
def test_values_beside_the_state_are_the_same_with_and_without_grad(gradient: Gradient) -> None:
    solver = Broyden(max_steps=300, rtol=1e-12) if isinstance(gradient, Shine) else EXACT
    cell, start, x = WithHead(), torch.zeros(3, 4, dtype=DTYPE), torch.randn(3, 4, dtype=DTYPE)
    attach(cell, gradient, solver=solver, output=0)
    recorded = cell(start, x)
    with torch.no_grad():
        constant = cell(start, x)
    torch.testing.assert_close(recorded, constant, rtol=1e-9, atol=1e-9)


def test_refined_values_agree_in_evaluation_beside_the_state_too() -> None:
    # An expanding map, whose best iterate is not the last one.
    cell, x = WithHead(), torch.full((1, 4), 0.1, dtype=DTYPE)
    with torch.no_grad():
        cell.recurrent.weight.mul_(3)
    start = torch.zeros(1, 4, dtype=DTYPE)
    solver = FixedPointIteration(max_steps=5)
    attach(cell, UnrolledPhantom(steps=2, refine_in_eval=True), solver=solver, output=0, on_failure="ignore")
    recorded = cell(start, x)
    with torch.no_grad():
        constant = cell(start, x)
    assert torch.equal(recorded[0], constant[0])
    assert torch.equal(recorded[1], constant[1])


def test_the_rest_of_the_return_comes_back_where_the_start_is_the_solution() -> None:
    cell, start = WithHead(), torch.ones(2, 4, dtype=DTYPE)
    attach(cell, Implicit(), solver=FixedPointIteration(max_steps=0), output=0)
    with torch.no_grad():
        z, beside = cell(start, start)
        assert torch.equal(z, start)
        torch.testing.assert_close(beside, cell.head(start))
        z.add_(1)
    assert torch.equal(start, torch.ones_like(start))  # the result is not the start itself


def test_output_of_a_cell_that_returns_a_tensor() -> None:
    cell = Cell()
    attach(cell, output=0)
    with pytest.raises(StateMismatchError, match=r"returned a tensor in Cell, .* no parts: leave out output=0\."):
        cell(torch.zeros(1, 4, dtype=DTYPE), torch.zeros(1, 4, dtype=DTYPE))


# -- inference mode, meta tensors ------------------------------------------------------------------------------------------


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


# -- tolerances of the adjoint, values that are no solutions ---------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, Anderson(max_steps=200)], ids=["forward's", "its own"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-9, 1e6])
def test_the_exact_gradient_is_as_exact_for_a_loss_of_any_scale(scale: float, solver: Solver | None) -> None:
    cell, start, x = Cell(6, gain=0.95), torch.zeros(3, 6, dtype=DTYPE), torch.randn(3, 6, dtype=DTYPE)
    attach(cell, Implicit(rtol=1e-5, solver=solver), solver=Anderson(max_steps=300), on_failure="raise")
    found = torch.autograd.grad(scale * cell(start, x).square().mean(), list(cell.parameters()))
    with attach_exact(cell):
        exact = torch.autograd.grad(cell(start, x).square().mean(), list(cell.parameters()))
    for one, other in zip(found, exact, strict=True):
        assert (one / scale - other).norm() < 1e-3 * other.norm()


def attach_exact(cell: Cell) -> Any:
    """The same cell with an adjoint to rounding."""
    [attachment] = attachments(cell)
    return attachment.using(gradient=Implicit(rtol=1e-12))


def test_unrolled_steps_that_lead_away_from_the_solution_are_reported() -> None:
    p = torch.tensor(-8.0, dtype=DTYPE, requires_grad=True)
    start = torch.full((4, 3), (1 + 1e-7) / 9, dtype=DTYPE)  # near the solution 1/9, from which a step leads away
    solver = FixedPointIteration(rtol=1e-6)
    with pytest.warns(NotConvergedWarning, match=r"^The 5 steps of UnrolledPhantom led away from the solution: 4 of 4"):
        solution = fixed_point(lambda z: p * z + 1, start, solver=solver)
    assert not solution.converged.any()
    with pytest.raises(NotConvergedError, match="led away"):
        fixed_point(lambda z: p * z + 1, start, solver=solver, on_failure="raise")
    assert fixed_point(lambda z: p * z + 1, start, solver=solver, gradient=NeumannPhantom()).converged.all()
    with torch.no_grad():
        assert fixed_point(lambda z: p * z + 1, start, solver=solver).converged.all()


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
def test_a_sample_that_was_never_finite_keeps_its_start_with_and_without_grad(gradient: Gradient) -> None:
    p = torch.ones((), dtype=DTYPE, requires_grad=True)
    x = torch.tensor([[0.5], [-1.0]], dtype=DTYPE)

    def cell(z: Tensor) -> Tensor:  # from zero the second sample is the root of a negative number
        return p * torch.sqrt(z + x)

    start = torch.zeros(2, 1, dtype=DTYPE)
    value = fixed_point(cell, start, gradient=gradient, on_failure="ignore").value
    with torch.no_grad():
        constant = fixed_point(cell, start, gradient=gradient, on_failure="ignore").value
    assert value[1] == constant[1] == 0.0
    torch.testing.assert_close(value.detach(), constant, rtol=1e-6, atol=1e-6)


def test_a_failed_call_leaves_its_solution_on_the_attachment_and_the_error() -> None:
    cell, x = Cell(gain=1.5), torch.full((2, 4), 0.1, dtype=DTYPE)
    attachment = attach(cell, solver=FixedPointIteration(max_steps=3), on_failure="raise")
    with pytest.raises(NotConvergedError) as failed:
        cell(torch.zeros_like(x), x)
    assert attachment.solution is failed.value.solution is not None
    assert attachment.solution.steps.tolist() == [3, 3]
    with pytest.raises(
        DivergedError, match=r"not finite after 1 step\. The first evaluation is not finite already"
    ) as lost:
        cell(torch.zeros_like(x), x * torch.nan)
    assert attachment.solution is lost.value.solution
    assert not attachment.solution.converged.any()


def test_the_advice_of_a_warning_fits_the_solver() -> None:
    def slow(z: Tensor) -> Tensor:
        return torch.roll(z, 1, 1) * 0.99 + torch.arange(8.0)

    for solver, text in (
        (FixedPointIteration(max_steps=3), r"Raise max_steps, use Anderson\(\) or damping below 1, or pass"),
        (Anderson(max_steps=3), r"Raise max_steps or rtol, or pass"),
        (Broyden(max_steps=3), r"Raise max_steps, use Anderson\(\), or pass"),
    ):
        with pytest.warns(NotConvergedWarning, match=text):
            fixed_point(slow, torch.zeros(1, 8), solver=solver)


# -- higher derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [KrylovPhantom(), KrylovPhantom(steps=9), AdaptivePhantom(target=0.01)], ids=repr)
def test_krylov_gradients_of_degenerate_blocks_can_be_differentiated(gradient: Gradient) -> None:
    u = torch.tensor([[0.5], [0.2], [0.1]], dtype=DTYPE, requires_grad=True)
    mask = torch.tensor([[1.0], [0.0]], dtype=DTYPE)  # the second sample's cotangent is zero
    for scale in (1.0, 0.0):  # a Jacobian of rank one, and none at all

        def cell(z: Tensor, x: Tensor, scale: float = scale) -> Tensor:
            return scale * z @ u @ u.T + x

        x = torch.ones(2, 3, dtype=DTYPE, requires_grad=True)
        value = fixed_point(cell, torch.zeros(2, 3, dtype=DTYPE), x, gradient=gradient, solver=EXACT).value
        (first,) = torch.autograd.grad((mask * value.square()).sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, u], allow_unused=True)
        assert first[0].abs().max() > 0
        assert torch.isfinite(second[0]).all()
        assert second[0].abs().max() > 0
        if scale:
            assert torch.isfinite(second[1]).all()


def test_a_second_backward_draws_no_random_numbers() -> None:
    class Dropping(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(z, 0.3), x)

    cell, x = Dropping(), torch.randn(2, 4, dtype=DTYPE, requires_grad=True)
    attach(cell, Implicit(), solver=EXACT)
    z = cell(torch.zeros(2, 4, dtype=DTYPE), x)
    before = torch.get_rng_state()
    torch.autograd.grad(z.square().sum(), x, create_graph=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_norm_and_a_start_that_is_the_solution_can_be_differentiated_twice() -> None:
    cell, x = Cell(), torch.randn(2, 4, dtype=DTYPE, requires_grad=True)
    nn.utils.parametrizations.weight_norm(cell.recurrent)
    attachment = attach(cell, Implicit(rtol=1e-10), solver=EXACT)
    with torch.no_grad():
        solution = cell(torch.zeros(2, 4, dtype=DTYPE), x)

    def second(start: Tensor, solver: Solver) -> Tensor:
        with attachment.using(solver=solver):
            (first,) = torch.autograd.grad(cell(start, x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    found = second(solution, FixedPointIteration(max_steps=0))
    torch.testing.assert_close(found, second(torch.zeros_like(solution), EXACT), rtol=1e-5, atol=1e-6)


# -- statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [Implicit(), OneStep(), NeumannPhantom(), Backprop(steps=60)], ids=repr)
@pytest.mark.parametrize("frozen", [True, False])
def test_running_statistics_are_those_of_the_solution(gradient: Gradient, frozen: bool) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, momentum=1.0).double()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            self.norm(z)
            return 0.5 * z + x

    cell, x = Normed(), torch.randn(8, 4, dtype=DTYPE)
    cell.requires_grad_(not frozen)
    x.requires_grad_(not frozen)
    attach(cell, gradient, batch_dim=None, solver=FixedPointIteration(max_steps=100, rtol=1e-10))
    cell(torch.full((8, 4), 7.0, dtype=DTYPE), x)
    torch.testing.assert_close(cell.norm.running_mean, 2 * x.detach().mean(0), rtol=1e-6, atol=1e-6)
    assert cell.norm.num_batches_tracked == 1


def test_a_thread_never_takes_another_ones_scratch_buffers_for_the_modules_own() -> None:
    from phantomgrad._batch_statistics import BatchStatistics

    norm = nn.BatchNorm1d(4)
    own = [id(buffer) for buffer in norm.buffers()]
    one = BatchStatistics([norm])
    with one():
        other = BatchStatistics([norm])  # as another thread would, in the middle of an evaluation
        with other():
            norm(torch.randn(3, 4))
    one.commit()
    other.commit()
    assert [id(buffer) for buffer in norm.buffers()] == own


# -- attaching -----------------------------------------------------------------------------------------------------------


def test_a_shallow_copy_is_not_attached_and_says_what_to_do() -> None:
    cell = Cell()
    attach(cell)
    shallow = copy.copy(cell)
    assert not is_attached(shallow)
    with pytest.raises(AttachError, match=r"Cell is a shallow copy of an attached module .* Use copy\.deepcopy"):
        attach(shallow)


def test_options_that_cannot_be_assigned_or_have_the_wrong_type() -> None:
    attachment = attach(Cell())
    for name in ("sovler", "batch_dim", "on_failure"):
        with pytest.raises(AttributeError, match=f"An attachment has no '{name}' to assign: gradient, solver"):
            setattr(attachment, name, 1)
    with pytest.raises(TypeError, match=r"output must be a position, a key or None, got 1\.5\."):
        attach(Cell(), output=1.5)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"compile must be True, False or a mode of torch\.compile \(.*\), got 'yes'\."
    ):
        attach(Cell(), compile="yes")  # type: ignore[arg-type]


def test_the_handle_of_a_module_that_is_gone_can_be_printed() -> None:
    attachment = attach(Cell())
    assert repr(attachment).startswith("Attachment(a module that no longer exists, UnrolledPhantom(")


def test_a_missing_state_says_where_and_what_to_do() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(3, 4)

    net = Net()
    attach(net.cell, state="hx")
    with pytest.raises(TypeError, match=r"lacks the state argument 'hx' in Net\.cell \(GRUCell\): pass the start"):
        net.cell(torch.zeros(2, 3))


def test_an_input_inside_a_container_counts_as_an_input() -> None:
    class Tupled(Cell):
        def forward(self, z: Tensor, xs: tuple[Tensor]) -> Tensor:
            return super().forward(z, xs[0])

    cell = Tupled()
    attach(cell, solver=EXACT)
    x = torch.randn(2, 4, dtype=DTYPE, requires_grad=True)
    cell(torch.zeros(2, 4, dtype=DTYPE, requires_grad=True), (x,)).sum().backward()  # warnings are errors
    assert x.grad is not None


def test_the_decorator_without_parentheses_says_so() -> None:
    for target in (Cell, lambda z: z):
        with pytest.raises(AttachError, match=r"Write @equilibrium\(\)"):
            equilibrium(target)  # type: ignore[arg-type]


def test_one_step_at_a_given_solution_works_within_torch_func() -> None:
    def loss(x: Tensor) -> Tensor:
        start = torch.full((2, 3), 2.0)
        solver = FixedPointIteration(max_steps=0)
        return fixed_point(lambda z: 0.5 * z + x, start, gradient=OneStep(), solver=solver).value.sum()

    torch.testing.assert_close(torch.func.grad(loss)(torch.ones(2, 3)), torch.ones(2, 3))


# -- failures: where they are reported, and whose they are -------------------------------------------------------------------


def _steep(z: Tensor, a: Tensor, x: Tensor) -> Tensor:
    return torch.exp(a * z * x) * x


@pytest.mark.parametrize(
    "gradient", [UnrolledPhantom(steps=9, damping=1.0), UnrolledPhantom(steps=9, damping=1.0, recompute=True)]
)
def test_unrolled_steps_to_infinity_raise_or_keep_the_solution(gradient: Gradient) -> None:
    a, x = torch.ones((), dtype=DTYPE, requires_grad=True), torch.tensor([[0.2], [2.0]], dtype=DTYPE)
    start, solver = torch.full((2, 1), 0.1, dtype=DTYPE), FixedPointIteration(max_steps=1)
    text = r"^The 9 steps of UnrolledPhantom diverged: 1 of 2 samples are not finite"
    with pytest.warns(NotConvergedWarning), pytest.raises(DivergedError, match=text):
        fixed_point(_steep, start, a, x, gradient=gradient, solver=solver)
    solution = fixed_point(_steep, start, a, x, gradient=gradient, solver=solver, on_failure="ignore")
    with torch.no_grad():
        constant = fixed_point(_steep, start, a, x, gradient=gradient, solver=solver, on_failure="ignore")
    assert solution.value[1] == constant.value[1]
    (found,) = torch.autograd.grad(solution.value.sum(), a)
    alone = fixed_point(_steep, start[:1], a, x[:1], gradient=gradient, solver=solver, on_failure="ignore")
    torch.testing.assert_close(found, torch.autograd.grad(alone.value.sum(), a)[0])


def test_a_sample_that_did_not_converge_does_not_hide_one_that_was_led_away() -> None:
    slopes = torch.tensor([[-8.0], [0.999]], dtype=DTYPE, requires_grad=True)
    start = torch.tensor([[(1 + 1e-7) / 9], [0.0]], dtype=DTYPE)
    solution = fixed_point(
        lambda z: slopes * z + 1, start, solver=FixedPointIteration(rtol=1e-6, max_steps=5), on_failure="ignore"
    )
    assert solution.converged.tolist() == [False, False]
    assert not fixed_point(
        lambda z: slopes.detach() * z + 1,
        start,
        solver=FixedPointIteration(rtol=1e-6, max_steps=5),
        on_failure="ignore",
    ).converged[1]


class Nested(nn.Module):
    """A cell that calls a cell of another shape."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.inner = Cell(4, gain=gain)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inner = self.inner(torch.zeros(5, 4, dtype=DTYPE), torch.full((5, 4), 0.3, dtype=DTYPE))
        return 0.5 * z + x + inner.mean()


def test_the_failure_of_a_cell_inside_is_not_the_outer_ones() -> None:
    cell = Nested(gain=1.5)
    inner = attach(cell.inner, solver=FixedPointIteration(max_steps=2), on_failure="raise")
    outer = attach(cell)
    x = torch.zeros(2, 3, dtype=DTYPE)
    with pytest.raises(NotConvergedError, match=r"in Nested\.inner") as failed:
        cell(x, x)
    assert failed.value.solution is inner.solution is not None
    assert inner.solution.value.shape == (5, 4)
    assert outer.solution is None


def test_batch_norm_inside_two_solves_is_updated_once() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.3 * torch.tanh(self.norm(z + x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * self.inner(torch.zeros_like(z), z + x)

    cell, x = Outer(), torch.randn(6, 4, dtype=DTYPE)
    attach(cell.inner, batch_dim=None)
    attach(cell, batch_dim=None)
    own = [id(buffer) for buffer in cell.buffers()]
    for calls in (1, 2):
        cell(torch.zeros_like(x), x)
        assert cell.inner.norm.num_batches_tracked == calls
    assert [id(buffer) for buffer in cell.buffers()] == own


def test_a_copy_and_a_pickle_warn_anew() -> None:
    model = nn.ModuleList([Cell(gain=1.5)])
    attach(model[0], solver=FixedPointIteration(max_steps=2))
    x = torch.full((1, 4), 0.3, dtype=DTYPE)
    with pytest.warns(NotConvergedWarning):
        model[0](x, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        [attachment] = attachments(other)
        assert attachment.unconverged == 0
        with pytest.warns(NotConvergedWarning):
            other[0](x, x)


def test_a_warning_made_an_error_is_one_every_time_and_leaves_the_solution() -> None:
    cell, x = Cell(gain=1.5), torch.full((1, 4), 0.3, dtype=DTYPE)
    attachment = attach(cell, solver=FixedPointIteration(max_steps=2))
    for _ in range(2):  # the tests' own filter
        with pytest.raises(NotConvergedWarning) as raised:
            cell(x, x)
        assert attachment.solution is raised.value.solution is not None


def test_a_warning_of_backward_points_at_the_callers_line() -> None:
    cell, x = Cell(gain=0.95), torch.randn(3, 4, dtype=DTYPE)
    attach(cell, AdaptivePhantom(target=1e-12, max_steps=2), solver=EXACT)
    z = cell(torch.zeros_like(x), x)
    with pytest.warns(NotConvergedWarning, match="AdaptivePhantom stopped") as caught:
        z.sum().backward()
    assert caught[0].filename == __file__


def test_adaptive_says_nothing_where_the_solve_has_been_reported() -> None:
    cell, x = Cell(gain=0.95), torch.randn(3, 4, dtype=DTYPE)
    attach(cell, AdaptivePhantom(target=1e-12, max_steps=2), solver=FixedPointIteration(max_steps=2))
    with pytest.warns(NotConvergedWarning, match="The fixed point did not converge") as caught:
        cell(torch.zeros_like(x), x).sum().backward()
    assert len(caught) == 1


# -- half precision --------------------------------------------------------------------------------------------------------


def test_an_adjoint_of_subnormal_numbers_settles_as_far_as_they_can() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.copy_(0.7 * torch.linalg.qr(torch.randn(64, 64)).Q)
    layer.half()
    x = torch.randn(64, 64, dtype=torch.float16)

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(layer(z) + x)

    solution = fixed_point(cell, torch.zeros_like(x), x, gradient=Implicit(), solver=Anderson(), on_failure="raise")
    solution.value.backward(torch.full_like(x, 3e-7))  # warnings and NotConvergedError would be errors
    assert solution.adjoint.steps is not None
    assert solution.adjoint.steps < 30


@pytest.mark.parametrize("scale", [1e4, 6e4])
def test_an_adjoint_that_overflows_float16_is_the_loss_scalers_to_skip(scale: float) -> None:
    x = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    value = fixed_point(
        lambda z: 0.97 * z + 0.01 * x,
        torch.zeros(2, 3, dtype=torch.float16),
        gradient=Implicit(),
        solver=Anderson(),
        on_failure="ignore",
    ).value
    value.backward(torch.full_like(value, scale))
    assert x.grad is not None
    assert not torch.isfinite(x.grad).all()


# -- more of what is returned beside the state ------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
@pytest.mark.parametrize("use", ["nothing", "state", "beside", "both"])
def test_no_graph_is_left_by_what_is_returned_beside_the_state(gradient: Gradient, use: str) -> None:
    solver = Broyden(max_steps=100) if isinstance(gradient, Shine) else EXACT
    cell = WithHead()
    attach(cell, gradient, solver=solver, output=0, on_failure="ignore")
    x = torch.randn(3, 4, dtype=DTYPE, requires_grad=True) * 1
    left = weakref.ref(x)
    gc.disable()
    try:
        z, beside = cell(torch.zeros(3, 4, dtype=DTYPE), x)
        parts = {"nothing": [], "state": [z], "beside": [beside], "both": [z, beside]}[use]
        if parts:
            sum(part.sum() for part in parts).backward()
        del z, beside, parts, x
        assert left() is None
    finally:
        gc.enable()


def test_what_depends_on_a_captured_tensor_alone_has_its_gradient() -> None:
    w = torch.ones(3, dtype=DTYPE, requires_grad=True)

    class Beside(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Any:
            return torch.tanh(0.3 * z + x), (z * w).sum()

    for gradient in (NeumannPhantom(), Implicit(), UnrolledPhantom(), OneStep()):
        cell = Beside()
        attach(cell, gradient, output=0)
        z, beside = cell(torch.zeros(2, 3, dtype=DTYPE), torch.ones(2, 3, dtype=DTYPE))
        torch.testing.assert_close(torch.autograd.grad(beside, w)[0], z.detach().sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beside", [None, 3, "text", torch.zeros(2), {"a": [torch.zeros(1)]}], ids=repr)
def test_what_carries_no_gradient_costs_no_evaluation(beside: Any) -> None:
    counts = []
    for rest in (beside, None):
        evaluations = []

        class Counting(Cell):
            def forward(self, z: Tensor, x: Tensor, rest: Any = rest, seen: list[int] = evaluations) -> Any:
                seen.append(1)
                return super().forward(z, x), rest

        cell = Counting()
        attach(cell, KrylovPhantom(), solver=EXACT, output=0)
        cell(torch.zeros(2, 4, dtype=DTYPE), torch.ones(2, 4, dtype=DTYPE))
        counts.append(len(evaluations))
    bare = Cell()
    attachment = attach(bare, KrylovPhantom(), solver=EXACT)
    bare(torch.zeros(2, 4, dtype=DTYPE), torch.ones(2, 4, dtype=DTYPE))
    assert attachment.solution is not None
    assert counts == [int(attachment.solution.steps.max()) + 1] * 2


def test_a_mapping_that_is_no_dict_is_refused() -> None:
    class Mapped(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Any:
            return UserDict(z=super().forward(z, x))

    cell = Mapped()
    attach(cell, output="z")
    with pytest.raises(StateMismatchError, match=r"returned a UserDict in Mapped, which has no part output='z'\."):
        cell(torch.zeros(1, 4, dtype=DTYPE), torch.zeros(1, 4, dtype=DTYPE))


def test_an_input_inside_a_dataclass_counts_as_an_input() -> None:
    @dataclass
    class Inputs:
        x: Tensor

    class Wrapped(Cell):
        def forward(self, z: Tensor, inputs: Inputs) -> Tensor:
            return super().forward(z, inputs.x)

    cell, x = Wrapped(), torch.randn(2, 4, dtype=DTYPE, requires_grad=True)
    attach(cell, solver=EXACT)
    cell(torch.zeros(2, 4, dtype=DTYPE, requires_grad=True), Inputs(x)).sum().backward()  # warnings are errors
    assert x.grad is not None


def test_a_forward_tolerance_that_is_absolute_alone_is_not_the_adjoints() -> None:
    cell, x = Cell(gain=0.9), torch.randn(3, 4, dtype=DTYPE)
    for rtol in (0.0, 1e-20):
        attachment = attach(cell, Implicit(), solver=Anderson(rtol=rtol, atol=1e-9), on_failure="raise")
        cell(torch.zeros_like(x), x).sum().backward()
        assert attachment.solution is not None
        assert attachment.solution.adjoint.residual is not None
        assert attachment.solution.adjoint.residual.max() <= 1e-8
        attachment.remove()
