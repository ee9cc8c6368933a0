"""What training loops do with a module: freezing, capturing, accumulating, several threads."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from compat import GRADIENTS, Cell, assert_same, attached, batch, gradients, loss, reference, settings
from torch import Tensor, nn

from phantomgrad import FixedPointIteration, Gradient, NeumannPhantom, OneStep, attach, fixed_point


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_frozen_parameters_get_no_gradient_and_the_others_keep_theirs(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient)
    model.cell.recurrent.weight.requires_grad_(False)
    loss(model, batch()).backward()
    del expected["cell.recurrent.weight"]
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_a_frozen_cell_still_trains_what_computes_its_input(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient)
    model.cell.requires_grad_(False)
    loss(model, batch()).backward()
    assert_same(gradients(model), {name: g for name, g in expected.items() if not name.startswith("cell.")})


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_an_input_may_be_a_view_and_may_be_captured_instead_of_passed(gradient: Gradient) -> None:
    class Capturing(nn.Module):
        def __init__(self, cell: Cell) -> None:
            super().__init__()
            self.cell = cell
            self.injected = torch.empty(0)

        def forward(self, z: Tensor) -> Tensor:
            return self.cell(z, self.injected)

    expected = reference(gradient, batch())
    model, attachment = attached(gradient)
    attachment.remove()
    capturing = Capturing(model.cell)
    attach(capturing, **settings(gradient))
    injected = model.encoder(batch()).T.contiguous().T  # neither a leaf nor contiguous
    capturing.injected = injected
    model.head(capturing(torch.zeros_like(injected))).square().sum().backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_gradients_accumulate_over_micro_batches(gradient: Gradient) -> None:
    expected = reference(gradient, batch(6))
    model, _ = attached(gradient)
    for part in batch(6).split(2):
        loss(model, part).backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_a_deepcopy_and_a_saved_model_have_gradients_of_their_own(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient)
    loss(model, batch()).backward()  # what the call leaves behind must not be copied
    model.zero_grad()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        loss(other, batch()).backward()
        assert_same(gradients(other), expected)
    assert gradients(model) == {}


def test_two_threads_solve_at_once_each_with_its_own_settings_and_solution() -> None:
    class Normed(Cell):
        def __init__(self) -> None:
            super().__init__()
            nn.utils.parametrizations.weight_norm(self.recurrent)

    torch.manual_seed(0)
    cell, x = Normed().double(), torch.randn(3, 4, dtype=torch.float64)
    attachment = attach(cell, NeumannPhantom(), solver=FixedPointIteration(max_steps=200, rtol=1e-12))
    weights = list(cell.parameters())

    def solve(gradient: Gradient, rtol: float) -> tuple[list[Tensor], int]:
        with attachment.using(gradient=gradient, solver=FixedPointIteration(max_steps=200, rtol=rtol)):
            z = cell(torch.zeros_like(x), x)
            grads = torch.autograd.grad(z.square().sum(), weights)
            assert attachment.solution is not None
            return list(grads), int(attachment.solution.steps.max())

    tasks: list[tuple[Gradient, float]] = [(NeumannPhantom(steps=3), 1e-4), (OneStep(), 1e-10)]
    expected = [solve(*task) for task in tasks]
    found: list[list[tuple[list[Tensor], int]]] = [[], []]
    together = threading.Barrier(2)

    def work(index: int) -> None:
        together.wait()
        for _ in range(20):
            found[index].append(solve(*tasks[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(results) for results in found] == [20, 20]
    for results, (grads, steps) in zip(found, expected, strict=True):
        for result in results:
            assert result[1] == steps
            assert all(torch.equal(a, b) for a, b in zip(result[0], grads, strict=True))


def test_fixed_point_says_that_it_takes_inputs_by_position() -> None:
    x = torch.ones(1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(1), x=x)  # type: ignore[call-arg]
    torch.testing.assert_close(
        fixed_point(lambda z: 0.5 * z + x, torch.zeros(1)).value, torch.tensor([2.0]), rtol=1e-3, atol=0
    )
