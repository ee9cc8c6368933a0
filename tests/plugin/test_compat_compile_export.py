"""torch.compile of the whole model and of the cell, and torch.export."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compat import GRADIENTS, Cell, Model, assert_same, attached, batch, gradients, loss, reference
from torch import Tensor, nn

from phantomgrad import (
    Anderson,
    FixedPointIteration,
    Gradient,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    PhantomGradError,
    UnrolledPhantom,
    attach,
    attachments,
    fixed_point,
)

# The compiler reads `.grad` of every tensor that it guards, leaf or not, and hides torch's warning only where it is no error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

OUTSIDE = (
    r"phantomgrad solves outside the compiler: compile the model without fullgraph=True and export it with strict=False"
)
EAGER_BACKEND: dict[str, Any] = {"backend": "aot_eager"}  # the whole of torch.compile but the generated code


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def eager_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, **EAGER_BACKEND))


class Normed(Cell):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.recurrent)


def _stats(name: str) -> int:
    return torch._dynamo.utils.counters["stats"][name]


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_a_compiled_model_solves_outside_the_compiler_and_has_the_same_gradients(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, attachment = attached(gradient)
    compiled = torch.compile(model, **EAGER_BACKEND)
    for _ in range(2):
        model.zero_grad()
        loss(compiled, batch()).backward()
        assert_same(gradients(model), expected)
    assert attachment.solution is not None
    assert attachment.solution.converged.all()
    assert list(attachments(compiled)) == [attachment]
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch(5)), model(batch(5)))


def test_a_compiled_model_breaks_its_graph_once_per_attached_call() -> None:
    model, _ = attached(NeumannPhantom())
    explanation = torch._dynamo.explain(model)(batch())
    assert (explanation.graph_count, explanation.graph_break_count) == (2, 1)


def test_fullgraph_says_where_the_solve_takes_place() -> None:
    model, _ = attached(UnrolledPhantom())
    compiled = torch.compile(model, fullgraph=True, **EAGER_BACKEND)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=OUTSIDE):
        compiled(batch())
    with pytest.raises(Exception, match=OUTSIDE):
        torch.export.export(model.eval(), (batch(),), strict=True)


def test_fixed_point_in_a_compiled_function_is_outside_too() -> None:
    def function(x: Tensor) -> Tensor:
        return 2 * fixed_point(lambda z: 0.5 * z + x, torch.zeros_like(x)).value

    explanation = torch._dynamo.explain(function)(torch.ones(3, 1))
    assert (explanation.graph_count, explanation.graph_break_count) == (2, 1)


@pytest.mark.usefixtures("eager_backend")
@pytest.mark.parametrize(
    ("gradient", "cell"),
    [(g, Cell) for g in GRADIENTS] + [(g, Normed) for g in (UnrolledPhantom(), NeumannPhantom(), Implicit(rtol=1e-10))],
    ids=repr,
)
def test_a_compiled_cell_has_the_same_gradients(gradient: Gradient, cell: type[Cell]) -> None:
    expected = reference(gradient, batch(), cell=cell)
    model, _ = attached(gradient, cell=cell, compile=True)
    for _ in range(3):
        model.zero_grad()
        loss(model, batch()).backward()
        assert_same(gradients(model), expected)
    # Without and with grad, and for unrolled steps also with a state that requires it: no more, however many calls.
    assert 1 <= _stats("unique_graphs") <= 3


@pytest.mark.usefixtures("eager_backend")
@pytest.mark.parametrize("cell", [Cell, Normed])
def test_a_copy_of_a_compiled_cell_uses_its_own_weights(cell: type[Cell]) -> None:
    model, _ = attached(NeumannPhantom(), cell=cell, compile=True)
    model(batch())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.cell.parameters():
            parameter.zero_()
        x = other.encoder(batch())
        if cell is Normed:  # a direction of length zero has no normed weight
            other.cell.recurrent.parametrizations.weight.original1.fill_(1.0)
        torch.testing.assert_close(other(batch()), other.head(torch.tanh(x)))
        assert not torch.equal(model(batch()), other(batch()))
    loss(other, batch()).backward()
    assert gradients(other)["cell.recurrent.bias"].abs().max() > 0
    assert gradients(model) == {}


@pytest.mark.usefixtures("eager_backend")
def test_what_is_compiled_for_one_cell_does_not_count_against_another() -> None:
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for size in (4, 5, 6):
            torch.manual_seed(0)
            cell, x = Cell(size), torch.randn(3, size)
            attach(cell, NeumannPhantom(), solver=FixedPointIteration(max_steps=200), compile=True)
            cell(torch.zeros_like(x), x).sum().backward()
    assert _stats("unique_graphs") == 9  # each without grad, with it, and with it for the state alone


@pytest.mark.usefixtures("eager_backend")
def test_second_derivatives_through_a_compiled_cell_are_refused() -> None:
    model, _ = attached(Implicit(rtol=1e-10), compile=True)
    grads = torch.autograd.grad(loss(model, batch()), list(model.cell.parameters()), create_graph=False)
    assert grads[0].abs().max() > 0
    with pytest.raises(PhantomGradError, match=r"^Second derivatives through a compiled cell are not available"):
        torch.autograd.grad(loss(model, batch()), list(model.cell.parameters()), create_graph=True)


@pytest.mark.usefixtures("eager_backend")
def test_a_compiled_cell_within_a_compiled_model() -> None:
    expected = reference(NeumannPhantom(), batch())
    model, _ = attached(NeumannPhantom(), compile=True)
    compiled = torch.compile(model)
    loss(compiled, batch()).backward()
    assert_same(gradients(model), expected)
    # What is before and after the cell, and the cell without grad, with it, and with it for the state alone.
    assert _stats("unique_graphs") == 5


def test_a_module_that_was_compiled_before_may_be_attached() -> None:
    expected = reference(NeumannPhantom(), batch())
    torch.manual_seed(7)
    model = Model().double()
    model.cell = torch.compile(model.cell, **EAGER_BACKEND)
    attach(model.cell, NeumannPhantom(), solver=FixedPointIteration(max_steps=200, rtol=1e-12))
    loss(model, batch()).backward()
    found = {name.replace("_orig_mod.", ""): grad for name, grad in gradients(model).items()}
    assert_same(found, expected)


@pytest.mark.skipif(shutil.which("c++") is None, reason="the default backend of torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch's own modules
def test_dropout_in_a_compiled_cell_draws_one_mask_per_solve() -> None:
    class Dropping(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.4 * self.recurrent(nn.functional.dropout(z, 0.5, self.training)) + x)

    model, attachment = attached(NeumannPhantom(), cell=Dropping, compile=True)
    torch.manual_seed(0)
    recorded = model(batch())
    assert attachment.solution is not None
    assert attachment.solution.converged.all()
    torch.manual_seed(0)
    with torch.no_grad():
        torch.testing.assert_close(model(batch()), recorded)
    assert not torch.equal(model(batch()), recorded)


def test_nothing_of_the_compiler_is_imported_without_it() -> None:
    script = (
        "import sys, torch; from phantomgrad import attach; cell = torch.nn.Linear(2, 2); attach(cell);"
        "cell.weight.data.mul_(0.1); cell(torch.zeros(1, 2)).sum().backward(); print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class BatchNormed(nn.Module):
    """A cell whose compiled backward would hand over its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.weight = nn.Parameter(0.3 * torch.eye(4))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.norm(z @ self.weight + x))


@pytest.mark.skipif(shutil.which("c++") is None, reason="the default backend of torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch's own modules
@pytest.mark.parametrize("gradient", [KrylovPhantom(), NeumannPhantom(), Implicit()], ids=repr)
def test_a_compiled_cell_is_differentiated_several_times(gradient: Gradient) -> None:
    torch.manual_seed(0)
    x, grads = torch.randn(8, 4), []
    for compile in (False, True):
        cell = BatchNormed()
        attach(cell, gradient, batch_dim=None, compile=compile)
        cell(torch.zeros(8, 4), x).sum().backward()
        grads.append([parameter.grad for parameter in cell.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_an_attached_module_is_exported_by_itself() -> None:
    solver = FixedPointIteration(max_steps=6, rtol=0.0, atol=0.0)
    model, _ = attached(NeumannPhantom(), eval_solver=solver, on_failure="ignore")
    start, x = torch.zeros(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(model.cell, (start, x), strict=False).module()
        torch.testing.assert_close(program(start, x), model.cell(start, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [FixedPointIteration(max_steps=12), Anderson(max_steps=10, memory=3)], ids=repr)
def test_an_exported_model_takes_every_step_and_returns_what_the_model_does(solver: Any) -> None:
    model = Model().eval()
    attach(model.cell, NeumannPhantom(), solver=solver)
    x, batch_size = torch.randn(3, 3), torch.export.Dim("batch")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch_size},))
    more = torch.randn(7, 3)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(more), model(more), rtol=1e-4, atol=1e-5)
    evaluations = sum(node.target is torch.ops.aten.tanh.default for node in _nodes(exported.graph_module))
    assert evaluations == solver.max_steps


def _nodes(module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    """The nodes of a graph and of the regions within it."""
    yield from module.graph.nodes
    for child in module.children():
        if isinstance(child, torch.fx.GraphModule):
            yield from _nodes(child)
