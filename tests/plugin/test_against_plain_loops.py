"""What `attach` computes against plain loops and dense matrices, for every solver, gradient and structure of states."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plain_loops import INPUTS, SAMPLES, SIZE, STRUCTURES, Block, Cell, plain_solve, reference, unpack
from torch import Tensor

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
    Solver,
    UnrolledPhantom,
    attach,
)

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
SHORT: dict[str, Any] = {"max_steps": 6, "rtol": 0.0, "atol": 0.0}
"""A solve that stops nowhere, so that errors of any step are left in its result."""
SOLVERS = [
    FixedPointIteration(damping=0.8, **SHORT),
    Anderson(memory=3, mixing=0.9, **SHORT),
    Broyden(**SHORT),
]
ADJOINT_SOLVER = FixedPointIteration(max_steps=400, rtol=1e-14)
GRADIENTS = [
    UnrolledPhantom(steps=4, damping=0.6),
    UnrolledPhantom(steps=4, damping=0.6, recompute=True),
    NeumannPhantom(steps=6, damping=1.0, safeguard=False),
    NeumannPhantom(steps=6, damping=1.0),
    KrylovPhantom(steps=4),
    AdaptivePhantom(target=0.05),
    OneStep(),
    Implicit(solver=ADJOINT_SOLVER),
    Backprop(steps=5),
    Shine(),
    Shine(refine=2),
]


def _inputs(structure: str, dtype: torch.dtype) -> tuple[Cell, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    start, x, cotangent = (
        torch.randn(SAMPLES, size, generator=generator, dtype=torch.float64).to(dtype) for size in (SIZE, INPUTS, SIZE)
    )
    return Cell(structure, dtype), start.requires_grad_(), x.requires_grad_(), cotangent


def _close(found: Tensor | None, expected: Tensor, name: str) -> None:
    assert found is not None, name
    assert expected.abs().max() > 1e-3, name
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCES[found.dtype], f"{name}: {error:.1e}"


def _compare(structure: str, dtype: torch.dtype, solver: Solver, gradient: Gradient, **options: Any) -> None:
    cell, start, x, cotangent = _inputs(structure, dtype)
    expected = reference(cell, start, x, cotangent, solver, gradient)
    attach(cell, gradient, solver=solver, on_failure="ignore", **options)
    z = unpack(cell(cell.split(start), x))
    (z * cotangent).sum().backward()
    _close(z, expected.value, "value")
    for name in "WUb":
        _close(getattr(cell, name).grad, getattr(expected, name), name)
    _close(x.grad, expected.x, "x")
    if expected.start is None:
        assert start.grad is None
    else:
        _close(start.grad, expected.start, "start")
    with torch.no_grad():
        _close(unpack(cell(cell.split(start), x)), expected.solution, "solution")


def _dtypes(structure: str) -> list[torch.dtype]:
    return [torch.float64] if structure.endswith("part") else list(TOLERANCES)


def _pairs() -> Iterator[Any]:
    for solver in SOLVERS:
        for gradient in GRADIENTS:
            if isinstance(solver, Broyden) or not isinstance(gradient, Shine):
                yield pytest.param(solver, gradient, id=f"{type(solver).__name__}-{gradient}")


@pytest.mark.parametrize(("structure", "dtype"), [(each, dtype) for each in STRUCTURES for dtype in _dtypes(each)])
@pytest.mark.parametrize(("solver", "gradient"), list(_pairs()))
def test_values_and_gradients_are_those_of_plain_loops_and_dense_matrices(
    solver: Solver, gradient: Gradient, structure: str, dtype: torch.dtype
) -> None:
    _compare(structure, dtype, solver, gradient)


def test_the_gradients_that_are_compared_differ() -> None:
    """Otherwise one that computed another's would pass; the safeguard, for one, must have cut a series."""
    inputs = _inputs("tensor", torch.float64)
    distinct = [gradient for gradient in GRADIENTS if gradient != UnrolledPhantom(steps=4, damping=0.6, recompute=True)]
    found = [(gradient, reference(*inputs, SOLVERS[-1], gradient).W) for gradient in distinct]
    for (one, W), (other, V) in itertools.combinations(found, 2):
        assert (W - V).norm() > 1e-4 * W.norm(), (one, other)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_every_sample_stops_where_a_plain_loop_of_its_own_does(solver: Solver, structure: str) -> None:
    solver = type(solver)(max_steps=200, rtol=1e-6, atol=0.0)
    cell, start, x, _ = _inputs(structure, torch.float64)
    x = x.detach() * torch.tensor([[0.1], [1.0], [3.0], [9.0]])
    alone = [plain_solve(Block(cell, row), z, solver) for row, z in zip(x, start.detach(), strict=True)]
    attachment = attach(cell, solver=solver)
    with torch.no_grad():
        z = unpack(cell(cell.split(start), x))
    solution = attachment.solution
    assert solution is not None
    assert solution.converged.tolist() == [each.converged for each in alone] == [True] * SAMPLES
    assert solution.steps.tolist() == [each.steps for each in alone]
    assert len(set(solution.steps.tolist())) > 2
    _close(z, torch.stack([each.image for each in alone]), "value")


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


# The compiler reads `.grad` of every tensor that it guards, leaf or not.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
def test_a_compiled_cell_computes_the_same_on_states_of_several_tensors(
    gradient: Gradient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    _compare("dict", torch.float64, SOLVERS[-1], gradient, compile=True)


@pytest.mark.skipif(shutil.which("c++") is None, reason="the default backend of torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
# torch 2.11 warns about its own use of torch.jit when the compiler is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_compiler")
def test_generated_code_computes_the_same() -> None:
    _compare("tuple", torch.float64, SOLVERS[1], NeumannPhantom(steps=6, damping=1.0), compile=True)
