"""Activation checkpointing, offloaded activations, and the user's hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compat import GRADIENTS, RECORDING, Cell, Counting, assert_same, attached, batch, gradients, loss, reference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from phantomgrad import Gradient, NeumannPhantom, OneStep, PhantomGradError, UnrolledPhantom

AROUND = [(gradient, kind) for gradient in GRADIENTS for kind in (False, True)]


class Checkpointing(Cell):
    """A cell whose body is checkpointed."""

    reentrant = False

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return checkpoint(super().forward, z, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointing):
    reentrant = True


@pytest.mark.parametrize(("gradient", "reentrant"), AROUND, ids=repr)
def test_checkpointing_around_the_module_solves_once_more_and_no_oftener(gradient: Gradient, reentrant: bool) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient, cell=Counting)
    x = batch().requires_grad_()  # the reentrant kind wants an input that does
    out = checkpoint(model, x, use_reentrant=reentrant)
    forward, model.cell.evaluations = model.cell.evaluations, 0
    out.square().sum().backward()
    assert_same(gradients(model), expected, rtol=1e-6)
    again = gradient.steps if gradient == UnrolledPhantom(recompute=True) else 0
    with_grad = 0 if not reentrant else 1 if gradient in (OneStep(), *RECORDING) else 5
    assert model.cell.evaluations <= forward + with_grad + again  # type: ignore[operator]


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_checkpointing_around_the_module_gives_the_same_gradients(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient)
    checkpoint(model, batch(), use_reentrant=False).square().sum().backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_checkpointing_inside_the_cell(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient, cell=Checkpointing)
    loss(model, batch()).backward()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize(
    "gradient",
    [
        UnrolledPhantom(),
        OneStep(),
        *RECORDING,
    ],
    ids=repr,
)
def test_the_reentrant_kind_inside_the_cell_works_for_unrolled_steps_and_is_refused_for_the_rest(
    gradient: Gradient,
) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient, cell=Reentrant)
    if gradient in RECORDING:
        value = loss(model, batch())
        with pytest.raises(
            PhantomGradError, match=r"^Activation checkpointing inside the cell needs use_reentrant=False"
        ):
            value.backward()
    else:
        loss(model, batch()).backward()
        assert_same(gradients(model), expected)


@pytest.mark.parametrize("gradient", [UnrolledPhantom(), OneStep()], ids=repr)
def test_the_reentrant_kind_inside_a_cell_without_a_trained_input_is_warned_about_by_torch(gradient: Gradient) -> None:
    model, _ = attached(gradient, cell=Reentrant)
    model.encoder.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"^None of the inputs have requires_grad=True\. Gradients will be None$"):
        loss(model, batch()).backward()
    assert "cell.recurrent.weight" not in gradients(model)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_saved_tensors_may_be_packed_elsewhere(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient)
    with torch.autograd.graph.save_on_cpu():
        value = loss(model, batch())
    for last in (False, True):
        model.zero_grad()
        value.backward(retain_graph=not last)
        assert_same(gradients(model), expected)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_hooks_on_the_attached_module_see_one_call_and_one_backward(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, attachment = attached(gradient)
    seen: list[str] = []
    cotangents: list[Tensor] = []

    def full_backward(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        seen.append("backward")
        cotangents.append(grad_output[0])
        assert grad_input[0] is None or gradient in GRADIENTS[-1:] or not grad_input[0].any()  # the start's
        assert grad_input[1].abs().max() > 0

    model.cell.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model.cell.register_forward_hook(lambda module, args, output: seen.append("forward"))
    model.cell.register_full_backward_pre_hook(lambda module, grad_output: seen.append("backward pre"))
    model.cell.register_full_backward_hook(full_backward)
    model.cell.recurrent.weight.register_hook(lambda grad: seen.append("weight"))
    out = model(batch())
    out.square().sum().backward()
    assert_same(gradients(model), expected)
    assert sorted(seen) == ["backward", "backward pre", "forward", "pre", "weight"]
    torch.testing.assert_close(cotangents[0], 2 * out.detach() @ model.head.weight.detach())
    assert attachment.solution is not None


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_a_hook_on_the_result_may_change_the_cotangent(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient)
    model.cell.register_full_backward_pre_hook(lambda module, grad_output: (2 * grad_output[0],))
    loss(model, batch()).backward()
    for name, value in gradients(model).items():
        factor = 1 if name.startswith("head") else 2
        torch.testing.assert_close(value, factor * expected[name], rtol=1e-6, atol=1e-9)


def _grad_in_forward_hook(model: Any, found: list[Tensor]) -> None:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(torch.autograd.grad(output.sum(), module.recurrent.weight, retain_graph=True)[0])

    model.cell.register_forward_hook(hook)


def _grad_in_hook_of_the_result(model: Any, found: list[Tensor]) -> None:
    def forward_hook(module: nn.Module, args: Any, output: Tensor) -> None:
        def tensor_hook(grad: Tensor) -> None:
            if not found:  # asking for the result's own gradient calls this hook again
                found.append(grad)
                found[0] = torch.autograd.grad(output, module.recurrent.weight, grad, retain_graph=True)[0]

        output.register_hook(tensor_hook)

    model.cell.register_forward_hook(forward_hook)


def _grad_in_hook_within_the_cell(model: Any, found: list[Tensor]) -> None:
    def forward_hook(module: nn.Module, args: Any, output: Tensor) -> None:
        def tensor_hook(grad: Tensor) -> None:
            if not found:
                found.append(grad)
                found[0] = torch.autograd.grad(output, module.weight, grad, retain_graph=True)[0]

        if output.requires_grad:
            output.register_hook(tensor_hook)

    model.cell.recurrent.register_forward_hook(forward_hook)


@pytest.mark.parametrize("hook", [_grad_in_forward_hook, _grad_in_hook_of_the_result, _grad_in_hook_within_the_cell])
@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_a_hook_may_itself_ask_for_gradients(gradient: Gradient, hook: Callable[..., None]) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient)
    found: list[Tensor] = []
    hook(model, found)
    loss(model, batch()).backward()
    assert_same(gradients(model), expected)
    assert len(found) == 1
    assert found[0].shape == model.cell.recurrent.weight.shape
    assert found[0].abs().max() > 0


def test_a_hook_within_the_cell_runs_in_every_product() -> None:
    model, _ = attached(NeumannPhantom(steps=5))
    calls: list[int] = []
    model.cell.recurrent.register_full_backward_hook(lambda *_: calls.append(1))
    loss(model, batch()).backward()
    assert len(calls) == 5


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_anomaly_detection_finds_nothing(gradient: Gradient) -> None:
    expected = reference(gradient, batch())
    model, _ = attached(gradient)
    # torch says itself that the mode is slow.
    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"), torch.autograd.detect_anomaly():
        loss(model, batch()).backward()
    assert_same(gradients(model), expected)
