"""torch.func and forward mode: what passes through an attached module, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compat import GRADIENTS, RECORDING, attached, batch, loss
from torch import Tensor
from torch.autograd import forward_ad

from phantomgrad import (
    FixedPointIteration,
    Gradient,
    NeumannPhantom,
    OneStep,
    PhantomGradError,
    UnrolledPhantom,
    fixed_point,
)

# torch compiles its own formulas of forward mode with torch.jit.script, and warns about that itself.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

UNROLLING: list[Gradient] = [UnrolledPhantom(), OneStep()]
"""Gradients that are plain recorded operations."""

BACKWARD_ONLY = (
    r"^This gradient works in backward only: in torch\.func\.grad, .* take UnrolledPhantom\(\) or OneStep\(\)"
)


def _functional(gradient: Gradient) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The loss as a function of parameters and input, and the parameters, detached as torch.func wants them."""
    model, _ = attached(gradient)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def value(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    return value, parameters


def _by_backward(value: Callable[..., Tensor], parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    return dict(zip(leaves, torch.autograd.grad(value(leaves, x), list(leaves.values())), strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS, ids=repr)
def test_functional_call_solves_and_differentiates_with_the_given_parameters(gradient: Gradient) -> None:
    value, parameters = _functional(gradient)
    model, _ = attached(gradient)
    loss(model, batch()).backward()
    found = _by_backward(value, parameters, batch())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
    halved = {name: 0.5 * p for name, p in parameters.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(value(halved, batch()), loss(model, batch()))


@pytest.mark.parametrize("gradient", UNROLLING, ids=repr)
def test_grad_vjp_and_jacrev_are_backwards(gradient: Gradient) -> None:
    value, parameters = _functional(gradient)
    expected = _by_backward(value, parameters, batch())
    one = torch.ones((), dtype=torch.float64)
    for found in (
        torch.func.grad(value)(parameters, batch()),
        torch.func.vjp(value, parameters, batch())[1](one)[0],
        torch.func.jacrev(value)(parameters, batch()),
    ):
        for name, truth in expected.items():
            torch.testing.assert_close(found[name], truth)


@pytest.mark.parametrize("gradient", UNROLLING, ids=repr)
def test_second_derivatives_by_jacrev_are_autograds(gradient: Gradient) -> None:
    value, parameters = _functional(gradient)
    found = torch.func.jacrev(torch.func.jacrev(value, argnums=1), argnums=1)(parameters, batch(1))
    expected = torch.autograd.functional.hessian(lambda x: value(parameters, x), batch(1))
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev"])
@pytest.mark.parametrize("gradient", RECORDING, ids=repr)
def test_gradients_that_work_in_backward_only_say_so_within_transforms(gradient: Gradient, transform: str) -> None:
    value, parameters = _functional(gradient)
    differentiate = partial(torch.func.vjp, value) if transform == "vjp" else getattr(torch.func, transform)(value)
    with pytest.raises(PhantomGradError, match=BACKWARD_ONLY):
        differentiate(parameters, batch())


def test_recomputing_says_that_transforms_do_not_support_it() -> None:
    value, parameters = _functional(UnrolledPhantom(recompute=True))
    with pytest.raises(PhantomGradError, match=r"^torch\.func transforms do not support recompute=True"):
        torch.func.grad(value)(parameters, batch())


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad], ids=["value", "grad"])
@pytest.mark.parametrize("gradient", [UnrolledPhantom(), NeumannPhantom()], ids=repr)
def test_vmap_is_refused_and_points_to_the_batch_dimension(gradient: Gradient, transform: Any) -> None:
    text = (
        r"^torch\.func\.vmap cannot map over a solve in Model\.cell \(Cell\): where it stops depends on the values\. Add a batch "
        r"dimension to the state instead: each sample along batch_dim is solved and stopped by itself\.$"
    )
    value, parameters = _functional(gradient)
    function = transform(lambda x: value(parameters, x[None]))
    with pytest.raises(PhantomGradError, match=text):
        torch.func.vmap(function)(batch())
    with pytest.raises(PhantomGradError, match=r"^torch\.func\.vmap cannot map over a solve: where it stops"):
        torch.func.vmap(lambda x: fixed_point(lambda z: 0.5 * z + x, torch.zeros(1)).value)(torch.ones(3, 1))


def test_vmap_over_what_the_cell_does_not_see_works() -> None:
    model, _ = attached(UnrolledPhantom())
    x = batch()
    scaled = torch.func.vmap(lambda scale: scale * model(x).detach())(torch.arange(3.0, dtype=torch.float64))
    torch.testing.assert_close(scaled[2], 2 * model(x).detach())


@pytest.mark.parametrize("gradient", [*UNROLLING, *RECORDING], ids=repr)
def test_a_batched_backward_works_for_unrolled_steps_and_is_refused_for_the_rest(gradient: Gradient) -> None:
    model, _ = attached(gradient)

    def jacobian(*, vectorize: bool) -> Tensor:
        return torch.autograd.functional.jacobian(model, batch(1), vectorize=vectorize)

    expected = jacobian(vectorize=False)
    assert expected.abs().max() > 0
    if gradient in UNROLLING:
        torch.testing.assert_close(jacobian(vectorize=True), expected)
    else:
        with pytest.raises(RuntimeError, match=r"Batching rule not implemented|doesn't have storage"):
            jacobian(vectorize=True)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("gradient", UNROLLING, ids=repr)
def test_jvp_is_the_transpose_of_backward(gradient: Gradient, frozen: bool) -> None:
    model, _ = attached(gradient)
    model.requires_grad_(not frozen)
    x, tangent = batch(), torch.randn(3, 3, dtype=torch.float64)
    leaf = batch().requires_grad_()
    expected = (torch.autograd.grad(loss(model, leaf), leaf)[0] * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(lambda x: loss(model, x), (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(loss(model, dual)).tangent, expected)


@pytest.mark.parametrize("gradient", UNROLLING, ids=repr)
def test_hessian_and_jacfwd_are_autograds(gradient: Gradient) -> None:
    value, parameters = _functional(gradient)
    expected = torch.autograd.functional.hessian(lambda x: value(parameters, x), batch(1))
    torch.testing.assert_close(torch.func.hessian(value, argnums=1)(parameters, batch(1)), expected)
    torch.testing.assert_close(
        torch.func.jacfwd(value, argnums=1)(parameters, batch(1)),
        torch.autograd.functional.jacobian(lambda x: value(parameters, x), batch(1)),
    )


@pytest.mark.parametrize("gradient", RECORDING, ids=repr)
def test_gradients_that_work_in_backward_only_refuse_forward_mode(gradient: Gradient) -> None:
    value, parameters = _functional(gradient)
    with pytest.raises(PhantomGradError, match=BACKWARD_ONLY):
        torch.func.jvp(lambda x: value(parameters, x), (batch(),), (batch(),))
    with forward_ad.dual_level(), pytest.raises(PhantomGradError, match=BACKWARD_ONLY):
        value(parameters, forward_ad.make_dual(batch(), batch()))


def test_one_step_at_a_given_solution_works_within_torch_func() -> None:
    def loss(x: Tensor) -> Tensor:
        start = torch.full((2, 3), 2.0)
        solver = FixedPointIteration(max_steps=0)
        return fixed_point(lambda z: 0.5 * z + x, start, gradient=OneStep(), solver=solver).value.sum()

    torch.testing.assert_close(torch.func.grad(loss)(torch.ones(2, 3)), torch.ones(2, 3))
