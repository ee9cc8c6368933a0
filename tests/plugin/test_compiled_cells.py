"""What a compiled cell does not do again: cast its weights, and differentiate what only the last product needs."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compat import GRADIENTS, RECORDING, Cell, assert_same, settings
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrizations

from phantomgrad import (
    Anderson,
    Backprop,
    Broyden,
    FixedPointIteration,
    Gradient,
    Implicit,
    NeumannPhantom,
    OneStep,
    Shine,
    Solver,
    attach,
)

# The compiler reads `.grad` of every tensor that it guards, leaf or not, and hides torch's warning only where it is no error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SIZE = 4


class Graphs:
    """The graphs that were compiled."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []

    def backend(self) -> Any:
        def keep(into: list[torch.fx.GraphModule]) -> Any:
            def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
                into.append(graph)
                return torch._functorch.aot_autograd.make_boxed_func(graph.forward)

            return compiler

        return aot_autograd(fw_compiler=keep(self.forward), bw_compiler=keep(self.backward))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    found = Graphs()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=found.backend()))
    yield found
    torch.compiler.reset()


class Layers(nn.Module):
    """A contraction of several layers, whose further input is nested and which returns more than its state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.plain = nn.Linear(SIZE, SIZE)
        self.normed = parametrizations.weight_norm(nn.Linear(SIZE, SIZE))
        self.again = self.plain
        self.gain = nn.Parameter(torch.full((SIZE,), 0.4))

    def forward(self, z: Tensor, inputs: dict[str, Tensor], *, shift: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.again(self.normed(self.plain(z)))
        shifted = hidden if shift is None else hidden + shift
        return {"state": torch.tanh(self.gain * shifted + inputs["x"]), "hidden": hidden}


def _gradients(gradient: Gradient, *, compile: bool | str, low: bool = False) -> dict[str, Tensor]:
    cell = Layers() if low else Layers().double()
    dtype = torch.float32 if low else torch.float64
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(3, SIZE, generator=generator, dtype=dtype).requires_grad_()
    shift = torch.randn(SIZE, generator=generator, dtype=dtype).requires_grad_()
    options = settings(gradient, output="state", compile=compile)
    if low:
        options |= {"solver": type(options["solver"])(max_steps=100), "on_failure": "ignore"}
    attach(cell, **options)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        found = cell(torch.zeros_like(x), {"x": x}, shift=shift)
    weights = torch.linspace(-1, 2, x.numel(), dtype=dtype).view_as(x)
    ((found["state"] * weights).sum() + 0.3 * found["hidden"].square().sum()).backward()
    grads = {name: p.grad for name, p in cell.named_parameters() if p.grad is not None}
    assert len(grads) == 6
    assert x.grad is not None
    assert shift.grad is not None
    return grads | {"x": x.grad, "shift": shift.grad}


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_compiled_and_plain_have_the_same_gradients(gradient: Gradient, graphs: Graphs) -> None:
    assert_same(_gradients(gradient, compile=True), _gradients(gradient, compile=False))
    assert graphs.forward


@pytest.mark.parametrize(
    "gradient", [Implicit() if isinstance(each, Implicit) else each for each in GRADIENTS], ids=repr
)
def test_under_autocast_they_are_those_of_float32_to_its_rounding(gradient: Gradient, graphs: Graphs) -> None:
    expected = _gradients(gradient, compile=False)
    for name, found in _gradients(gradient, compile=True, low=True).items():
        assert found.dtype is torch.float32
        assert ((found - expected[name]).norm() / expected[name].norm()).item() < 0.06, name


def test_autocast_casts_no_weight_in_a_compiled_evaluation(graphs: Graphs) -> None:
    _gradients(NeumannPhantom(), compile=True, low=True)
    shapes = [
        tuple(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
        for graph in graphs.forward
        for node in graph.graph.nodes
        if node.target is torch.ops.aten._to_copy.default
    ]
    assert shapes.count((3, SIZE)) >= len(graphs.forward)
    assert (SIZE, SIZE) not in shapes
    assert (SIZE,) not in shapes


class LeavingAutocast(Cell):
    """A cell with a layer for which autocast is switched off, and one whose weight a hook computes from others."""

    def __init__(self) -> None:
        super().__init__()
        self.careful = nn.Linear(4, 4)
        self.normed = nn.utils.spectral_norm(nn.Linear(4, 4))
        self.normed.eval()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            careful = self.careful(z)
        return torch.tanh(0.3 * (self.recurrent(z) + careful + self.normed(z)) + x)


@pytest.mark.parametrize("gradient", [NeumannPhantom(), Implicit()], ids=repr)
def test_a_cast_weight_is_used_by_what_autocast_casts_alone(gradient: Gradient, graphs: Graphs) -> None:
    found: list[dict[str, Tensor]] = []
    for compile in (False, True):
        torch.manual_seed(0)
        cell, x = LeavingAutocast(), torch.randn(3, 4)
        solver = FixedPointIteration(max_steps=30, rtol=0.0, atol=0.0)
        attach(cell, gradient, solver=solver, on_failure="ignore", compile=compile)
        with torch.autocast("cpu", torch.bfloat16):
            z = cell(torch.zeros_like(x), x)
        z.square().sum().backward()
        found.append({name: p.grad for name, p in cell.named_parameters() if p.grad is not None} | {"z": z.detach()})
    assert graphs.forward
    for name, expected in found[0].items():
        assert found[1][name].dtype is torch.float32
        torch.testing.assert_close(found[1][name], expected, rtol=0.02, atol=2e-3)


def test_what_breaks_the_graph_finds_the_modules_own_weights_as_other_threads_must(graphs: Graphs) -> None:
    cell = Breaking()
    before = dict(cell.named_parameters())
    found: list[dict[str, Tensor]] = []

    def look(*_: Any) -> None:  # runs within an evaluation, after what breaks the graph
        found.append(dict(cell.named_parameters()))

    cell.recurrent.register_forward_hook(torch._dynamo.disable(look))
    attach(cell, NeumannPhantom(), solver=FixedPointIteration(max_steps=100), compile=True)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        cell(torch.zeros_like(x), x).sum().backward()
    assert found
    assert all(weights[name] is weight for weights in found for name, weight in before.items())


def test_a_changing_size_compiles_each_kind_of_evaluation_anew_and_no_more(graphs: Graphs) -> None:
    torch._dynamo.utils.counters.clear()
    cell = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh())
    attach(cell, NeumannPhantom(), solver=FixedPointIteration(max_steps=5), on_failure="ignore", compile=True)
    for low in (False, True):
        for size in (2, 3, 5, 8):
            for training in (True, False):
                cell.train(training)
                with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=low):
                    cell(torch.zeros(size, SIZE))
    assert not torch._dynamo.utils.counters["unimplemented"]  # where reaching the limit of recompilations is noted
    assert len(graphs.forward) > 8


def _differentiated(graph: torch.fx.GraphModule) -> int:
    """For how many of a backward graph's inputs it returns a gradient."""
    [output] = [node for node in graph.graph.nodes if node.op == "output"]
    return sum(each is not None for each in output.args[0])


@pytest.mark.parametrize("gradient", RECORDING, ids=repr)
def test_products_differentiate_the_state_alone(gradient: Gradient, graphs: Graphs) -> None:
    cell = Layers().double()
    attach(cell, **settings(gradient, output="state", compile=True))
    x = torch.randn(3, SIZE, dtype=torch.float64, requires_grad=True)
    cell(torch.zeros_like(x), {"x": x})["state"].sum().backward()
    counts = sorted(map(_differentiated, graphs.backward))
    assert counts[0] == 1
    assert counts[-1] >= 7  # the state, x, gain and the weights and biases as the layers use them


@pytest.mark.parametrize("gradient", [OneStep(), NeumannPhantom(steps=1), NeumannPhantom(steps=2)], ids=repr)
def test_a_gradient_with_hardly_a_product_makes_no_evaluation_for_it(gradient: Gradient, graphs: Graphs) -> None:
    cell = Cell().double()
    attach(cell, **settings(gradient, compile=True))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    cell(torch.zeros_like(x), x).sum().backward()
    assert len(graphs.forward) == 2  # without and with grad


def test_running_statistics_are_updated_once(graphs: Graphs) -> None:
    means = []
    for compile in (False, True):
        torch.manual_seed(0)
        cell = nn.Sequential(nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE), nn.Tanh())
        solver = FixedPointIteration(max_steps=5, rtol=0.0, atol=0.0)
        attach(cell, NeumannPhantom(), solver=solver, batch_dim=None, on_failure="ignore", compile=compile)
        cell(torch.randn(8, SIZE)).sum().backward()
        norm: Any = cell[1]
        assert norm.num_batches_tracked == 1
        means.append(norm.running_mean)
    torch.testing.assert_close(*means)


class Own(nn.Parameter):
    """A parameter of a class of its own, about which nothing is known."""


def test_parameters_of_an_unknown_kind_are_left_in_their_place(graphs: Graphs) -> None:
    found = []
    for kind in (nn.Parameter, Own):
        torch.manual_seed(0)
        cell, x = Cell(), torch.randn(3, 4)
        cell.recurrent.weight = kind(cell.recurrent.weight.detach().clone())
        attach(cell, NeumannPhantom(), solver=FixedPointIteration(max_steps=100), compile=True)
        with torch.autocast("cpu", torch.bfloat16):
            cell(torch.zeros_like(x), x).square().sum().backward()
        found.append(cell.recurrent.weight.grad)
    assert len(graphs.forward) == 5  # the second has no evaluation for the state alone
    torch.testing.assert_close(*found, rtol=0.02, atol=1e-3)


class Breaking(Cell):
    """A cell of which the compiler makes two graphs."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        hidden = self.recurrent(z)
        torch._dynamo.graph_break()
        return torch.tanh(0.4 * hidden + x)


class Nesting(Cell):
    """A cell with an equilibrium inside, which is solved outside the compiler."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Cell()
        attach(self.inner, Implicit(rtol=1e-12), solver=FixedPointIteration(max_steps=200, rtol=1e-13))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.recurrent(z) + 0.3 * self.inner(torch.zeros_like(z), z) + x)


@pytest.mark.parametrize("gradient", RECORDING, ids=repr)
@pytest.mark.parametrize("kind", [Breaking, Nesting])
def test_a_cell_with_breaks_keeps_its_weights_and_has_the_same_gradients(
    kind: type[Cell], gradient: Gradient, graphs: Graphs
) -> None:
    found: list[dict[str, Tensor]] = []
    for compile in (False, True):
        torch.manual_seed(0)
        cell = kind().double()
        before = dict(cell.named_parameters())
        attach(cell, **settings(gradient, compile=compile))
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        (cell(torch.zeros_like(x), x) * torch.arange(1, 13).view(3, 4)).sum().backward()
        assert all(weight is before[name] for name, weight in cell.named_parameters())
        grads = {name: p.grad for name, p in before.items() if p.grad is not None}
        assert len(grads) == len(before)
        assert x.grad is not None
        found.append(grads | {"x": x.grad})
    assert_same(found[1], found[0])
    assert graphs.forward


class Output(dict[str, Tensor]):
    """What many libraries' modules return."""


class Returning(Layers):
    def forward(self, z: Tensor, inputs: dict[str, Tensor], *, shift: Tensor | None = None) -> dict[str, Tensor]:
        return Output(super().forward(z, inputs, shift=shift))


class SameMemory:
    """`torch.compile` whose "reduce-overhead" writes the results of all calls to the same memory, as CUDA graphs do."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, function: Any, *, mode: str | None = None) -> Any:
        if mode is None:
            return function
        assert mode == "reduce-overhead"
        memory: list[Tensor] = []

        def replay(*args: Any, **kwargs: Any) -> Any:
            assert not torch.is_grad_enabled()
            found = function(*args, **kwargs)
            if not memory:
                memory.extend(map(torch.clone, found.values()))
            for into, leaf in zip(memory, found.values(), strict=True):
                into.copy_(leaf)
            self.replays += 1
            return Output(zip(found, memory, strict=True))

        return replay


@pytest.mark.parametrize(
    ("gradient", "solver"),
    [
        (gradient, solver)
        for gradient in GRADIENTS
        for solver in (FixedPointIteration, Anderson, Broyden)
        if not isinstance(gradient, Backprop) and (solver is Broyden or not isinstance(gradient, Shine))
    ],
    ids=repr,
)
def test_a_solve_may_write_all_its_images_to_the_same_memory(
    gradient: Gradient, solver: type[Solver], monkeypatch: pytest.MonkeyPatch
) -> None:
    same_memory = SameMemory()
    monkeypatch.setattr(torch, "compile", same_memory)
    found = []
    for compile in (False, "reduce-overhead"):
        cell = Returning().double()
        short = solver(max_steps=9, rtol=0.0, atol=0.0, trace="state")
        attachment = attach(cell, gradient, solver=short, output="state", on_failure="ignore", compile=compile)
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
        returned = cell(torch.zeros_like(x), {"x": x})
        (returned["state"].square().sum() + returned["hidden"].sum()).backward()
        with torch.no_grad():
            settled = cell(torch.zeros_like(x), {"x": x})
        assert attachment.solution is not None
        assert attachment.solution.trace is not None
        found.append(
            [*settled.values(), *attachment.solution.trace.states, *(p.grad for p in cell.parameters()), x.grad]
        )
    assert same_memory.replays == 2 * 9
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(shutil.which("c++") is None, reason="the default backend of torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch's own modules
def test_a_mode_of_the_compiler_gives_the_same() -> None:
    expected = _gradients(NeumannPhantom(), compile=False)
    assert_same(_gradients(NeumannPhantom(), compile="reduce-overhead"), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("compile", ["fast", 1, None, {"mode": "default"}])
def test_a_mode_that_torch_does_not_have_is_refused(compile: Any) -> None:
    with pytest.raises(
        ValueError if isinstance(compile, str) else TypeError,
        match=r"^compile must be True, False or a mode of torch.compile \(default, reduce-ov",
    ):
        attach(Cell(), compile=compile)
