"""What docs/from-torchdeq.md says about torchdeq itself, beside what our cores do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import LinearBlock
from torch import Tensor
from torchdeq_cores import EXACT, block_gradients, get_deq

from phantomgrad import DivergedError


def test_torchdeq_itself_ignores_misspelt_options() -> None:
    assert get_deq(f_slover="anderson", f_max_itr=3).f_max_iter == 40


def test_torchdeq_itself_returns_the_start_of_a_short_anderson_solve() -> None:
    options = {"f_solver": "anderson", "f_max_iter": 2}
    (z,), info = get_deq(**options).eval()(lambda z: 0.5 * z + 1.0, torch.zeros(1, 1))
    assert (z.item(), info["abs_lowest"].item()) == (0.0, 1e8)
    ours = get_deq(core="phantom", on_failure="ignore", **options).eval()
    (z,), info = ours(lambda z: 0.5 * z + 1.0, torch.zeros(1, 1))
    assert (z.item(), info["abs_lowest"].item()) == (1.5, 0.5)


@pytest.mark.parametrize(
    ("dtype", "kwargs"), [(torch.bfloat16, {}), (torch.float16, {}), (torch.float32, {"m": 1})], ids=str
)
def test_torchdeq_itself_cannot_run_anderson_in_half_precision_or_with_memory_1(
    dtype: torch.dtype, kwargs: dict[str, Any]
) -> None:
    def cell(z: Tensor) -> Tensor:
        return 0.5 * z + 1.0

    with pytest.raises((NotImplementedError, IndexError)):
        get_deq(f_solver="anderson").eval()(cell, torch.zeros(1, 1, dtype=dtype), kwargs)
    deq = get_deq(core="phantom", f_solver="anderson", f_tol=2e-2).eval()
    assert deq(cell, torch.zeros(1, 1, dtype=dtype), kwargs)[0][0].item() == pytest.approx(2.0, abs=0.05)


def test_torchdeq_itself_is_silent_about_divergence_and_nan() -> None:
    (z,), info = get_deq().eval()(lambda z: 3 * z + 1, torch.zeros(1, 1))
    assert (z.item(), info["nstep"].item()) == (1.0, 1.0)
    (z,), info = get_deq().eval()(lambda z: z * math.nan, torch.zeros(1, 1))
    assert z.isnan().all()
    with pytest.raises(DivergedError):
        get_deq(core="phantom", f_max_iter=100).eval()(lambda z: 3 * z + 1, torch.zeros(1, 1))


def test_torchdeq_itself_drops_states_and_ift_where_indexing_ends_early() -> None:
    block = LinearBlock.random(4)
    exact = block_gradients([block.solution()], block)
    errors: dict[str, float] = {}
    counts: dict[str, int] = {}
    for core in ("indexing", "phantom-indexing"):
        states, _ = get_deq(core=core, n_states=3, ift=True, **EXACT)(block, block.start)
        counts[core] = len(states)
        grads = block_gradients(states[-1:], block)
        errors[core] = ((grads[2] - exact[2]).norm() / exact[2].norm()).item()
    assert counts == {"indexing": 1, "phantom-indexing": 3}
    assert errors["indexing"] > 0.1
    assert errors["phantom-indexing"] < 1e-9


def test_torchdeq_itself_gives_another_gradient_on_the_second_backward_of_hook_ift() -> None:
    block = LinearBlock.random(4)
    (z,), _ = get_deq(hook_ift=True, **EXACT)(block, block.start)
    first, second = (torch.autograd.grad(z.sum(), block.c, retain_graph=True)[0] for _ in range(2))
    assert ((first - second).norm() / first.norm()).item() > 0.1


def test_torchdeq_itself_has_wrong_second_derivatives() -> None:
    block = LinearBlock.random(4, radius=0.5)

    def cell(z: Tensor) -> Tensor:
        return torch.tanh(block(z))

    def second(z: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad((z**3).sum(), block.J, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), block.c)[0]

    unrolled = block.start
    for _ in range(120):
        unrolled = cell(unrolled)
    truth = second(unrolled)
    errors = []
    for core in ("sliced", "phantom"):
        (z,), _ = get_deq(core=core, ift=True, **EXACT)(cell, block.start)
        errors.append(((second(z) - truth).norm() / truth.norm()).item())
    assert errors[0] > 0.1
    assert errors[1] < 1e-8


def test_torchdeq_itself_cannot_differentiate_with_a_simple_b_solver() -> None:
    block = LinearBlock.random(4)
    (z,), _ = get_deq(ift=True, b_solver="simple_fixed_point_iter", f_max_iter=100)(block, block.start)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        z.sum().backward()


def test_torchdeq_itself_takes_a_rayleigh_quotient_for_the_radius() -> None:
    turn = 0.9 * torch.tensor([[math.cos(1.2), -math.sin(1.2)], [math.sin(1.2), math.cos(1.2)]])
    info = get_deq().eval()(lambda z: z @ turn.T + 1.0, torch.zeros(1, 2), sradius_mode=True)[1]
    assert info["sradius"].item() == pytest.approx(0.9 * math.cos(1.2), abs=1e-3)


@pytest.mark.parametrize("core", ["sliced", "phantom"])
def test_an_absolute_b_tol_ends_the_adjoint_solve_of_a_small_loss(core: str) -> None:
    block = LinearBlock.random(4)
    exact = torch.autograd.grad(block.solution().sum(), block.c)[0]
    errors = []
    for mode in ("abs", "rel"):
        deq = get_deq(core=core, ift=True, b_stop_mode=mode, f_tol=1e-12, f_max_iter=300, b_max_iter=100)
        (z,), _ = deq(block, block.start)
        (grad,) = torch.autograd.grad(1e-8 * z.sum(), block.c)
        errors.append(((1e8 * grad - exact).norm() / exact.norm()).item())
    assert errors[0] > 0.1
    assert errors[1] < 1e-4
