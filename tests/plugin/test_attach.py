"""Attaching to modules: what stays, what changes, what is refused, and how it lives in other people's code."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import threading
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import phantomgrad
from phantomgrad import (
    Anderson,
    AttachError,
    FixedPointIteration,
    Implicit,
    NeumannPhantom,
    OneStep,
    StateMismatchError,
    UnrolledPhantom,
    attach,
    attachments,
    equilibrium,
    is_attached,
)

SOLVER = FixedPointIteration(max_steps=200, rtol=1e-12)


class Cell(nn.Module):
    """A contraction with parameters and a buffer."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.recurrent = nn.Linear(size, size).double()
        self.register_buffer("scale", torch.tensor(0.4, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * self.recurrent(z) + x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(torch.zeros_like(x), x)


def _x(requires_grad: bool = False) -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_(
        requires_grad
    )


def _equilibrium_of(cell: Cell, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(300):
        z = torch.tanh(cell.scale * cell.recurrent(z) + x)
    return z


def test_the_call_returns_the_equilibrium() -> None:
    model, x = Model(), _x()
    attach(model.cell, solver=SOLVER)
    torch.testing.assert_close(model(x), _equilibrium_of(model.cell, x))


def test_state_dict_parameters_type_and_repr_stay_as_they_are() -> None:
    bare, attached = Model(), Model()
    attached.load_state_dict(bare.state_dict())
    parameters = [id(p) for p in attached.parameters()]
    attach(attached.cell)
    assert list(attached.state_dict()) == list(bare.state_dict())
    for key, value in bare.state_dict().items():
        assert torch.equal(attached.state_dict()[key], value)
    assert [id(p) for p in attached.parameters()] == parameters
    assert type(attached.cell) is Cell
    assert repr(attached) == repr(bare)
    bare.load_state_dict(attached.state_dict())
    attached.load_state_dict(bare.state_dict())
    assert inspect.signature(attached.cell.forward) == inspect.signature(bare.cell.forward)


def test_remove_restores_the_module_exactly() -> None:
    model, x = Model(), _x()
    before = dict(model.cell.__dict__)
    once = model.cell(x, x)
    attachment = attach(model.cell)
    assert is_attached(model.cell)
    attachment.remove()
    attachment.remove()
    assert not is_attached(model.cell)
    assert list(model.cell.__dict__) == list(before)
    assert all(model.cell.__dict__[name] is value for name, value in before.items())
    assert torch.equal(model.cell(x, x), once)


def test_remove_gives_back_an_instance_forward_and_parametrizations() -> None:
    cell, x = Cell(), _x()
    cell.recurrent = nn.utils.parametrizations.weight_norm(cell.recurrent)
    own = lambda z, x: 0.5 * z + x  # noqa: E731
    cell.forward = own  # type: ignore[method-assign]
    with attach(cell, solver=SOLVER) as attachment:
        torch.testing.assert_close(cell(torch.zeros_like(x), x), 2 * x)
        assert torch.equal(attachment.step(x, x), 1.5 * x)
    assert cell.__dict__["forward"] is own
    del cell.forward
    with attach(cell):
        cell(torch.zeros_like(x), x)
    for module in cell.modules():
        assert "forward" not in module.__dict__


def test_disabled_and_step_are_the_original_evaluation() -> None:
    cell, x = Cell(), _x()
    once = cell(x, x)
    attachment = attach(cell)
    assert torch.equal(attachment.step(x, x), once)
    with attachment.disabled():
        assert torch.equal(cell(x, x), once)
    assert not torch.equal(cell(x, x), once)


def test_attachments_yields_every_one_and_settings_are_assignable() -> None:
    model = nn.ModuleList([Model(), Cell(), nn.Linear(2, 2)])
    first, second = attach(model[0].cell), attach(model[1], OneStep())  # type: ignore[arg-type]
    assert list(attachments(model)) == [first, second]
    for attachment in attachments(model):
        attachment.gradient = NeumannPhantom(steps=3)
        attachment.solver = Anderson()
    assert first.gradient == second.gradient == NeumannPhantom(steps=3)
    assert first.solver == Anderson()
    assert first.eval_solver is None
    first.eval_solver = FixedPointIteration(max_steps=3)
    first.solver = FixedPointIteration(max_steps=4)
    assert first.eval_solver == FixedPointIteration(max_steps=3)
    with pytest.raises(TypeError, match="gradient must be a phantomgrad Gradient object"):
        first.gradient = "upg"  # type: ignore[assignment]


def test_eval_solver_holds_where_grad_mode_is_off_whatever_training_says() -> None:
    cell, x = Cell(), _x()
    options: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, "keep": "last"}
    attachment = attach(
        cell,
        solver=FixedPointIteration(max_steps=3, **options),
        eval_solver=FixedPointIteration(max_steps=7, **options),
        on_failure="ignore",
    )
    for training in (True, False):
        cell.train(training)
        cell(torch.zeros_like(x), x)
        assert attachment.solution is not None
        assert attachment.solution.steps.tolist() == [3, 3, 3]
        with torch.no_grad():
            cell(torch.zeros_like(x), x)
        assert attachment.solution.steps.tolist() == [7, 7, 7]


def test_only_the_solve_runs_where_nothing_requires_grad() -> None:
    cell, x = Cell(), _x()
    attachment = attach(cell, NeumannPhantom(), solver=SOLVER)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    cell.recurrent.register_forward_hook(count)

    def evaluations(*, frozen: bool, inputs_require_grad: bool = False) -> int:
        nonlocal calls
        cell.requires_grad_(not frozen)
        calls = 0
        result = cell(torch.zeros_like(x), _x(inputs_require_grad))
        assert result.requires_grad == (torch.is_grad_enabled() and (not frozen or inputs_require_grad))
        assert attachment.solution is not None
        return calls - int(attachment.solution.steps.max())

    assert evaluations(frozen=True) == 0
    assert evaluations(frozen=False) == 1
    assert evaluations(frozen=True, inputs_require_grad=True) == 1
    with torch.no_grad():
        assert evaluations(frozen=False) == 0


def test_captured_tensors_get_gradients_though_nothing_visible_requires_grad() -> None:
    captured = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)

    class Closing(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return 0.5 * z + captured

    cell = Closing()
    attach(cell, Implicit(), solver=SOLVER)
    cell(torch.zeros(2, 4, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(captured.grad, torch.full((4,), 4.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("call", ["positional", "keyword", "second", "by name"])
def test_the_state_may_be_any_argument(call: str) -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor, z: Tensor, *, gain: float = 1.0) -> Tensor:
            return 0.5 * z + gain * x

    x = _x()
    zeros = torch.zeros_like(x)
    if call in ("positional", "keyword"):
        cell = Cell()
        attach(cell, state=0, solver=SOLVER)
        value = cell(zeros, x) if call == "positional" else cell(x=x, z=zeros)
        torch.testing.assert_close(value, _equilibrium_of(cell, x))
    else:
        second = Second()
        attach(second, state=1 if call == "second" else "z", solver=SOLVER)
        torch.testing.assert_close(second(x, zeros, gain=2.0), 4 * x)
        torch.testing.assert_close(second(x, z=zeros), 2 * x)


class Out(NamedTuple):
    state: Tensor
    seen: Tensor


@pytest.mark.parametrize("kind", [tuple, list, dict, Out])
@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom()], ids=repr)
def test_the_rest_of_a_larger_return_value_comes_back(kind: Any, gradient: Any) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, z: Tensor, x: Tensor) -> Any:
            values = self.weight * z + x, z.sum()
            return (
                {"state": values[0], "seen": values[1]}
                if kind is dict
                else Out(*values)
                if kind is Out
                else kind(values)
            )

    cell, x = Wide(), _x()
    attach(cell, gradient, output="state" if kind is dict else 0, solver=SOLVER)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            result = cell(torch.zeros_like(x), x)
        assert type(result) is kind
        state, seen = result.values() if kind is dict else result
        torch.testing.assert_close(state.detach(), 2 * x)
        torch.testing.assert_close(seen.detach(), (2 * x).sum())
    wrong = Wide()
    attach(wrong, output=5)
    if kind is not dict:
        with pytest.raises(StateMismatchError, match=r"in Wide, which has no part output=5"):
            wrong(torch.zeros_like(x), x)


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
def test_deepcopy_and_pickle_follow_the_copy(gradient: Any) -> None:
    model, x = Model(), _x()
    attach(model.cell, gradient, solver=SOLVER)
    model(x)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        [attachment] = attachments(other)
        assert attachment.module is other.cell
        assert attachment.gradient == gradient
        assert attachment.solution is None
        with torch.no_grad():
            other.cell.recurrent.weight.zero_()
            other.cell.recurrent.bias.zero_()
        torch.testing.assert_close(other(x), torch.tanh(x))
        torch.testing.assert_close(model(x), _equilibrium_of(model.cell, x))
        other(x).sum().backward()
        assert other.cell.recurrent.weight.grad is not None
        assert model.cell.recurrent.weight.grad is None


def test_deepcopy_of_weight_norm_inside() -> None:
    model, x = Model(), _x()
    model.cell.recurrent = nn.utils.parametrizations.weight_norm(model.cell.recurrent)
    attach(model.cell, solver=SOLVER)
    model(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.cell.recurrent.parametrizations.weight.original0.zero_()
    other(x).sum().backward()
    assert other.cell.recurrent.parametrizations.weight.original0.grad is not None
    torch.testing.assert_close(model(x), _equilibrium_of(model.cell, x))


def test_parametrizations_are_computed_once_per_solve_and_get_gradients() -> None:
    class Count(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            Count.calls += 1
            return 0.9 * weight

    for gradient in (UnrolledPhantom(), UnrolledPhantom(recompute=True), NeumannPhantom(), Implicit()):
        model, plain, x = Model(), Model(), _x()
        plain.load_state_dict(model.state_dict())
        nn.utils.parametrize.register_parametrization(model.cell.recurrent, "weight", Count())
        with torch.no_grad():
            plain.cell.recurrent.weight.mul_(0.9)
        attach(model.cell, gradient, solver=SOLVER)
        attach(plain.cell, gradient, solver=SOLVER)
        Count.calls = 0
        for _ in range(2):
            model(x).sum().backward()
            plain(x).sum().backward()
        assert Count.calls == 2
        grad = model.cell.recurrent.parametrizations.weight.original.grad
        torch.testing.assert_close(grad, 0.9 * plain.cell.recurrent.weight.grad)
        # An optimizer step between calls is seen.
        with torch.no_grad():
            model.cell.recurrent.parametrizations.weight.original.zero_()
            expected = torch.tanh(0.4 * model.cell.recurrent.bias + x)
        torch.testing.assert_close(model(x), expected)


def test_nested_attachments() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Cell()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.3 * self.inner(torch.zeros_like(z), z + x)

    outer, x = Outer(), _x(True)
    inner = attach(outer.inner, Implicit(), solver=SOLVER)
    attach(outer, Implicit(), solver=SOLVER)
    z = outer(torch.zeros_like(x), x)
    with torch.no_grad():
        torch.testing.assert_close(0.3 * _equilibrium_of(outer.inner, z + x), z, rtol=1e-8, atol=1e-8)
    assert torch.autograd.gradcheck(lambda x: outer(torch.zeros_like(x), x), (x,))
    assert inner.solution is not None


def test_called_twice_and_two_forwards_before_one_backward() -> None:
    for gradient in (UnrolledPhantom(), NeumannPhantom(), Implicit()):
        model, x = Model(), _x()
        attach(model.cell, gradient, solver=SOLVER)
        grads = []
        for inputs in (x, 2 * x):
            model.zero_grad()
            model(inputs).sum().backward()
            grads.append(model.cell.recurrent.weight.grad.clone())  # type: ignore[union-attr]
        model.zero_grad()
        first, second = model(x), model(2 * x)
        (first.sum() + second.sum()).backward()
        torch.testing.assert_close(model.cell.recurrent.weight.grad, grads[0] + grads[1])


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
def test_a_second_backward_with_retain_graph_gives_the_same_gradient(gradient: Any) -> None:
    model, x = Model(), _x()
    attach(model.cell, gradient, solver=SOLVER)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, model.cell.recurrent.weight, retain_graph=True)[0]
    second = torch.autograd.grad(loss, model.cell.recurrent.weight)[0]
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
def test_the_result_may_be_changed_in_place(gradient: Any) -> None:
    class Sum(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.scale * self.recurrent(z)) + x  # a sum does not save its result for backward

    model, x = Model(), _x()
    model.cell = Sum()
    attach(model.cell, gradient, solver=SOLVER)
    expected = torch.autograd.grad((2 * model(x)).square().sum(), model.cell.recurrent.weight)[0]
    z = model(x)
    z.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(z.square().sum(), model.cell.recurrent.weight)[0], expected)


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom(), OneStep(), Implicit()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_state_dtype_and_the_weights_gradients(gradient: Any, dtype: torch.dtype) -> None:
    model = Model().float()
    x = _x().float()
    attach(model.cell, gradient)
    reference = torch.autograd.grad(model(x).sum(), model.cell.recurrent.weight)[0]
    with torch.autocast("cpu", dtype):
        z = model(x)
    assert z.dtype is torch.float32
    z.sum().backward()
    grad = model.cell.recurrent.weight.grad
    assert grad is not None
    assert ((grad - reference).norm() / reference.norm()).item() < 0.03


def test_using_holds_for_its_thread_only_and_solutions_are_per_thread() -> None:
    model, x = Model(), _x()
    attachment = attach(model.cell, solver=SOLVER)
    inside, seen = threading.Event(), threading.Event()
    other_steps: list[int] = []

    def other() -> None:
        inside.wait()
        assert attachment.solution is None
        model(x)
        assert attachment.solution is not None
        other_steps.append(int(attachment.solution.steps.max()))
        seen.set()

    thread = threading.Thread(target=other)
    thread.start()
    fixed = FixedPointIteration(max_steps=2, rtol=0.0, atol=0.0, keep="last")
    with pytest.warns(phantomgrad.NotConvergedWarning), attachment.using(solver=fixed, gradient=OneStep()):
        inside.set()
        seen.wait()
        model(x)
        assert attachment.solution is not None
        assert attachment.solution.steps.tolist() == [2, 2, 2]
        with torch.no_grad():
            model(x)
        assert attachment.solution.steps.tolist() == [2, 2, 2]
    thread.join()
    assert other_steps[0] > 2
    assert attachment.solver == SOLVER


def test_unconverged_counts_and_the_warning_comes_once_with_the_path() -> None:
    model, x = Model(), _x()
    attachment = attach(model.cell, solver=FixedPointIteration(max_steps=2))
    text = r"^The fixed point did not converge in Model\.cell \(Cell\): 3 of 3 samples are above their tolerance after 2 steps"
    with pytest.warns(phantomgrad.NotConvergedWarning, match=text):
        model(x)
    model(x)
    assert attachment.unconverged == 2
    assert attachment.solution is not None
    assert not attachment.solution.converged.any()


def test_silent_mistakes_with_the_start_warn_once_with_the_cure() -> None:
    model, x = Model(), _x()
    attach(model.cell, solver=SOLVER)
    z = torch.zeros_like(x)
    with pytest.warns(
        UserWarning,
        match=r"^The start of the solve in Model\.cell \(Cell\) is the previous call's result: .* z0\.detach\(\)",
    ):
        for _ in range(3):
            z = model.cell(z, x)
    encoder = nn.Linear(4, 4).double()
    other = Model()
    attach(other.cell, solver=SOLVER)
    with pytest.warns(UserWarning, match=r"requires grad and no other input does: a start gets no gradient"):
        other.cell(encoder(x), x)
    other.cell(encoder(x), x)


@pytest.mark.parametrize(
    ("cell", "start", "text"),
    [
        (
            lambda z: z[:, :2],
            torch.zeros(3, 4),
            r"takes the state \(3, 4\) float32 on cpu to \(3, 2\) float32 on cpu in Net\.cell \(Wrap\)\.",
        ),
        (lambda z: z.double(), torch.zeros(3, 4), r"to \(3, 4\) float64 on cpu in Net\.cell"),
        (lambda z: (z, z), torch.zeros(3, 4), r"pass output= with its position or key\."),
        (lambda z: None, torch.zeros(3, 4), r"to a NoneType in Net\.cell"),
        (
            lambda z: z.add_(1),
            torch.zeros(3, 4),
            r"^The map changed its state in place in Net\.cell .* write `z = z \+ \.\.\.`",
        ),
        (
            lambda z: z,
            torch.zeros(3, dtype=torch.int64),
            r"^A fixed point needs floating-point states in Net\.cell \(Wrap\); got \(3,\) int64",
        ),
        (
            lambda z: z,
            "state",
            r"^A state is a tensor, or a non-empty tuple, list or dict of states; got a str in Net\.cell \(Wrap\)\.",
        ),
        (lambda z: z, (), r"non-empty tuple, list or dict of states; got \(\) in Net\.cell \(Wrap\)\."),
    ],
)
def test_mismatching_states_are_refused_with_both_shown(cell: Any, start: Any, text: str) -> None:
    class Wrap(nn.Module):
        def forward(self, z: Any) -> Any:
            return cell(z)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Wrap()

    net = Net()
    attach(net.cell)
    with pytest.raises(StateMismatchError, match=text):
        net.cell(start)


def test_attaching_is_refused_without_a_trace() -> None:
    model = Model()
    before = dict(model.cell.__dict__)
    with pytest.raises(
        AttachError, match=r"^attach takes an nn\.Module, got a function\. For a function use fixed_point"
    ):
        attach(lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(AttachError, match=r"^attach takes an nn\.Module, got the class Cell\."):
        attach(Cell)  # type: ignore[arg-type]
    with pytest.raises(
        AttachError, match=r"Model\.cell \(Cell\) has no argument state='h': its forward takes \(z: .*x: "
    ):
        attach(model.cell, state="h")
    with pytest.raises(AttachError, match=r"has no argument state=2"):
        attach(model.cell, state=2)
    with pytest.raises(ValueError, match=r"^on_failure must be one of 'warn', 'raise', 'ignore', got 'quiet'\."):
        attach(model.cell, on_failure="quiet")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"gradient must be a phantomgrad Gradient object such as UnrolledPhantom\(steps=5\)"
    ):
        attach(model.cell, "upg")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'lam'"):
        attach(model.cell, lam=0.5)  # type: ignore[call-arg]
    assert model.cell.__dict__ == before
    attach(model.cell)
    with pytest.raises(
        AttachError, match=r"^Model\.cell \(Cell\) is attached already\. Change it by assignment .*attachments\(model\)"
    ):
        attach(model.cell)


def test_a_data_parallel_replica_raises() -> None:
    model, x = Model(), _x()
    attach(model.cell)
    replica = model.cell._replicate_for_data_parallel()
    with pytest.raises(
        AttachError, match=r"^nn\.DataParallel cannot run an attached module\. Use DistributedDataParallel"
    ):
        replica(x, x)
    model(x)


def test_everything_is_freed_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        for gradient in (UnrolledPhantom(), NeumannPhantom(), Implicit()):
            model, x = Model(), _x(True)
            handle = attach(model.cell, gradient, solver=SOLVER)
            weight = weakref.ref(model.cell.recurrent.weight)
            z = model(x)
            z.sum().backward()
            model(x)
            del z, model
            assert weight() is None, gradient
            with pytest.raises(AttachError, match="no longer exists"):
                _ = handle.module
    finally:
        gc.enable()


def test_equilibrium_decorates_classes_and_functions() -> None:
    @equilibrium(OneStep(), solver=SOLVER)
    class Decorated(Cell):
        pass

    cell, x = Decorated(), _x()
    assert is_attached(cell)
    torch.testing.assert_close(cell(torch.zeros_like(x), x), _equilibrium_of(cell, x))

    @equilibrium(Implicit(), solver=SOLVER)
    def settle(z: Tensor, x: Tensor) -> Tensor:
        """Halve and add."""
        return 0.5 * z + x

    assert settle.__doc__ == "Halve and add."
    inputs = _x(True)
    z = settle(torch.zeros_like(inputs), inputs)
    torch.testing.assert_close(z, 2 * inputs)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), inputs)[0], torch.full_like(x, 2.0))
    with pytest.raises(AttachError, match=r"^@equilibrium decorates an nn\.Module subclass or a function, got a Cell"):
        equilibrium()(Cell())
    with pytest.raises(AttachError, match=r"has no argument state=1: its forward takes \(z\)"):
        equilibrium(state=1)(lambda z: z)
