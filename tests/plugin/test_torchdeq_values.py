"""States and gradients of our cores in torchdeq, against torchdeq itself and dense answers in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, LinearBlock
from torch import Tensor
from torchdeq_cores import EXACT, OURS, assert_equal, block_gradients, get_deq

from phantomgrad import Backprop


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    core=st.sampled_from(("sliced", "indexing")),
    solver=st.sampled_from(("fixed_point_iter", "simple_fixed_point_iter")),
    grad=st.integers(1, 6),
    tau=st.floats(0.2, 1.2),
    sampling=st.sampled_from(({}, {"n_states": 3}, {"n_states": 5}, {"indexing": [2, 7]}, {"indexing": (11,)})),
    supervision=st.sampled_from(({}, {"sup_gap": 1}, {"sup_loc": [1]})),
)
def test_states_and_gradients_equal_torchdeqs(
    seed: int,
    core: str,
    solver: str,
    grad: int,
    tau: float,
    sampling: dict[str, Any],
    supervision: dict[str, Any],
) -> None:
    options = {"f_solver": solver, "f_max_iter": 12, "f_tol": 0.0, "f_stop_mode": "rel", "grad": grad, "tau": tau}
    options |= sampling | supervision
    theirs = get_deq(core=core, **options)
    ours = get_deq(core=OURS[core], on_failure="ignore", **options)
    block = LinearBlock.random(seed, size=4, batch=2)
    expected, their_info = theirs(block, block.start)
    actual, our_info = ours(block, block.start)
    assert_equal(actual, expected, 1e-10)
    assert_equal(block_gradients(actual, block), block_gradients(expected, block), 1e-10)
    for key in ("abs_lowest", "rel_lowest", "abs_trace"):
        torch.testing.assert_close(our_info[key], their_info[key], rtol=1e-7, atol=1e-10)
    theirs.eval(), ours.eval()
    assert_equal(ours(block, block.start)[0], theirs(block, block.start)[0], 1e-10)


@pytest.mark.parametrize("core", ["phantom", "phantom-indexing"])
def test_upg_at_the_solution_is_the_closed_form(core: str) -> None:
    block = LinearBlock.random(3)
    (z,), _ = get_deq(core=core, grad=5, tau=0.5, **EXACT)(block, block.start)
    g = torch.randn(z.shape, dtype=DTYPE)
    power = torch.linalg.matrix_power(block.damped_jacobian(0.5), 5)
    adjoint = block.adjoint(g) @ (torch.eye(len(power), dtype=DTYPE) - power)
    expected = torch.autograd.grad((block(block.solution().detach()) * adjoint).sum(), block.parameters)
    assert_equal(torch.autograd.grad((z * g).sum(), block.parameters), expected, 1e-10)


@pytest.mark.parametrize("b_solver", ["fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("switch", ["ift", "hook_ift"])
@pytest.mark.parametrize("f_solver", ["fixed_point_iter", "anderson", "broyden"])
def test_exact_gradients_are_dense_answers(switch: str, b_solver: str, f_solver: str) -> None:
    block = LinearBlock.random(5)
    deq = get_deq(core="phantom", f_solver=f_solver, b_solver=b_solver, **{switch: True}, **EXACT)
    states, _ = deq(block, block.start)
    assert_equal(states, [block.solution()], 1e-10)
    assert_equal(block_gradients(states, block), block_gradients([block.solution()], block), 1e-9)
    # A second backward through the same graph gives the same.
    states, _ = deq(block, block.start)
    loss = states[0].sum()
    first = torch.autograd.grad(loss, block.parameters, retain_graph=True)
    assert_equal(torch.autograd.grad(loss, block.parameters), first, 0.0)


def test_a_backward_of_unchecked_steps_is_that_many_terms_of_the_series() -> None:
    block = LinearBlock.random(6)
    options = {"ift": True, "b_solver": "simple_fixed_point_iter", "b_max_iter": 4, "f_tol": 1e-13, "f_max_iter": 300}
    (z,), _ = get_deq(core="phantom", **options)(block, block.start)
    g = torch.randn(z.shape, dtype=DTYPE)
    J = block.J.detach()
    adjoint = g + g @ J + g @ J @ J + g @ J @ J @ J
    expected = torch.autograd.grad((block(block.solution().detach()) * adjoint).sum(), block.parameters)
    assert_equal(torch.autograd.grad((z * g).sum(), block.parameters), expected, 1e-10)


def test_ift_applies_to_the_last_of_several_states() -> None:
    block = LinearBlock.random(7)
    for core in ("phantom", "phantom-indexing"):
        states, _ = get_deq(core=core, indexing=[200], grad=[2, 1], ift=True, **EXACT)(block, block.start)
        assert len(states) == 2
        assert_equal(block_gradients(states[1:], block), block_gradients([block.solution()], block), 1e-9)
        first = get_deq(core="sliced", grad=2, f_tol=1e-12, f_max_iter=200)(block, block.start)[0]
        assert_equal(block_gradients(states[:1], block), block_gradients(first, block), 1e-9)


def _pair(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * torch.tanh(y[:, :3]) + 1.0, torch.cat((0.3 * y[:, :3], 0.2 * z.sum(dim=1, keepdim=True)), dim=1)


def test_states_of_several_tensors_are_lists_as_in_torchdeq() -> None:
    start = (torch.zeros(2, 3, dtype=DTYPE), torch.zeros(2, 4, dtype=DTYPE))
    for init in (start, list(start)):
        options = {"f_max_iter": 200, "f_tol": 1e-12, "grad": 3, "n_states": 2}
        expected, _ = get_deq(core="sliced", **options)(_pair, init)
        actual, info = get_deq(core="phantom", **options)(_pair, init)
        assert [type(state) for state in actual] == [list, list]
        for ours, theirs in zip(actual, expected, strict=True):
            assert_equal(ours, theirs, 1e-10)
        assert info["abs_lowest"].shape == (2,)
    simple = get_deq(core="phantom", f_solver="simple_fixed_point_iter", f_max_iter=60).eval()
    assert_equal(simple(_pair, start)[0][0], expected[-1], 1e-10)


def test_states_that_torchdeq_does_not_take() -> None:
    w = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    deq = get_deq(core="phantom", ift=True, **EXACT)
    one = torch.zeros(1, 1, dtype=DTYPE)
    (state,), info = deq(lambda z: {"a": w * z["a"] + 1.0, "b": 0.25 * z["b"] + 3.0}, {"a": one, "b": one})
    assert {key: round(value.item(), 9) for key, value in state.items()} == {"a": 2.0, "b": 4.0}
    assert torch.autograd.grad(state["a"].sum(), w)[0].item() == pytest.approx(4.0)
    assert info["nstep"].shape == (1,)
    (state,), _ = deq(lambda a, b: (w * a + 1.0, {"c": 0.25 * b["c"] + a}), (one, {"c": one}))
    assert state[1]["c"].item() == pytest.approx(8 / 3)
    for shape, samples in (((3,), 3), ((), 1)):  # as torchdeq counts them
        (z,), info = deq(lambda z: torch.cos(w * z), torch.zeros(shape, dtype=DTYPE))
        assert z.shape == shape
        assert info["abs_lowest"].shape == (samples,)


def test_training_and_evaluation_differ_as_in_torchdeq() -> None:
    block = LinearBlock.random(12)
    options = {"f_max_iter": 20, "grad": 3, "tau": 0.5, "n_states": 2, "f_tol": 0.0, "f_stop_mode": "rel"}
    theirs = get_deq(core="sliced", **options)
    ours = get_deq(core="phantom", on_failure="ignore", **options)
    trained = ours(block, block.start)[0]
    assert [state.requires_grad for state in trained] == [True, True]
    with torch.no_grad():
        quiet = ours(block, block.start)[0]
        assert_equal(quiet, theirs(block, block.start)[0], 1e-10)
    assert not any(state.requires_grad for state in quiet)
    assert_equal(quiet, [state.detach() for state in trained], 1e-12)
    assert len(ours.eval()(block, block.start)[0]) == 1


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [({}, 7), ({"eval_factor": 2.6}, 18), ({"eval_f_max_iter": 3}, 3), ({"eval_f_max_iter": 3, "eval_factor": 9.0}, 3)],
)
def test_the_budget_of_evaluation(options: dict[str, Any], evaluations: int) -> None:
    calls: list[None] = []

    def growing(z: Tensor) -> Tensor:
        calls.append(None)
        return z + 1.0

    for solver in ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"):
        deq = get_deq(core="phantom", f_solver=solver, f_max_iter=7, on_failure="ignore", **options).eval()
        deq(growing, torch.zeros(1, 1))
        assert len(calls) == evaluations
        calls.clear()


def test_the_start_gets_no_gradient_but_from_backprop() -> None:
    block = LinearBlock.random(13, batch=1)
    start = block.start.requires_grad_()
    (z,), _ = get_deq(core="phantom", f_max_iter=100)(block, start)
    assert torch.autograd.grad(z.sum(), start, allow_unused=True)[0] is None
    deq = get_deq(core="phantom", gradient=Backprop(steps=3), on_failure="ignore")
    (z,), info = deq(block, start)
    (grad,) = torch.autograd.grad(z.sum(), start)
    torch.testing.assert_close(grad, torch.linalg.matrix_power(block.J, 3).sum(dim=0, keepdim=True).detach())
    assert info["abs_trace"].shape == (1, 4)
    assert (info["abs_trace"][:, 1:] < 1e8).all()


def test_two_calls_before_one_backward_and_accumulation() -> None:
    block = LinearBlock.random(19)
    deq = get_deq(core="phantom", hook_ift=True, **EXACT)
    inner = deq(block, block.start)[0][0]
    outer = deq(lambda z: z @ block.J.T + torch.tanh(inner), block.start)[0][0]
    identity = torch.eye(5, dtype=DTYPE)
    truth = torch.linalg.solve(identity - block.J, torch.tanh(block.solution()).T).T
    assert_equal(block_gradients([outer], block), block_gradients([truth], block), 1e-9)


def test_second_derivatives_outlive_the_deq() -> None:
    w = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    (z,), _ = get_deq(core="phantom", ift=True, **EXACT)(lambda z: w * z + 1.0, torch.zeros(1, 1, dtype=DTYPE))
    (first,) = torch.autograd.grad(z.sum(), w, create_graph=True)  # z = 1 / (1 - w)
    (second,) = torch.autograd.grad(first, w)
    assert (first.item(), second.item()) == (pytest.approx(4.0), pytest.approx(16.0))
