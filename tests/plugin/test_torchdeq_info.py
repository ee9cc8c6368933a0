"""The info of a call of torchdeq with our cores: its keys, its shapes, and what it measures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import DTYPE, LinearBlock
from torch import Tensor
from torchdeq_cores import OURS, SOLVERS, assert_equal, get_deq


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_info_has_torchdeqs_keys_shapes_and_dtypes(solver: str, core: str, mode: str) -> None:
    block = LinearBlock.random(8)
    options = {"f_solver": solver, "f_max_iter": 90, "f_stop_mode": mode, "f_tol": 1e-2, "n_states": 2}
    theirs, ours = get_deq(core=core, **options), get_deq(core=OURS[core], **options)
    for training in (True, False):
        theirs.train(training), ours.train(training)
        expected, actual = theirs(block, block.start)[1], ours(block, block.start)[1]
        assert isinstance(actual, dict)
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert (actual[key].shape, actual[key].dtype) == (value.shape, value.dtype), key
            assert not actual[key].requires_grad


@pytest.mark.parametrize("mode", ["abs", "rel"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_info_is_what_a_hand_written_measurement_finds(solver: str, mode: str) -> None:
    block = LinearBlock.random(9)
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(z: Tensor) -> Tensor:
        image = block(z)
        seen.append((z.detach(), image.detach()))
        return image

    deq = get_deq(core="phantom", f_solver=solver, f_max_iter=40, f_stop_mode=mode, f_tol=1e-4).eval()
    (z,), info = deq(watched, block.start)
    assert not z.requires_grad
    gaps = torch.stack([(image - z).norm(dim=1) for z, image in seen])
    ratios = gaps / torch.stack([image.norm(dim=1) for _, image in seen])
    if solver == "simple_fixed_point_iter":
        assert len(seen) == 40
        gaps, ratios = gaps[-1:], ratios[-1:]
        assert info["nstep"].tolist() == [40.0] * 4
    else:
        assert (info[f"{mode}_lowest"] < 1e-4).all()
        best = (gaps if mode == "abs" else ratios).min(dim=0).indices + 1
        assert info["nstep"].tolist() == best.tolist()
        shown = gaps[2:] if solver == "anderson" else gaps
        torch.testing.assert_close(info["abs_trace"][:, 1 : len(shown) + 1], shown.T)
        assert (info["abs_trace"][:, 0] == 1e8).all()
        filled = info["abs_trace"][:, len(shown) + 1 :]
        assert torch.equal(filled, info["abs_lowest"].unsqueeze(1).expand_as(filled))
    torch.testing.assert_close(info["abs_lowest"], gaps.amin(dim=0))
    torch.testing.assert_close(info["rel_lowest"], ratios.amin(dim=0))
    images = torch.stack([image for _, image in seen])
    assert all(any(torch.equal(row, image[i]) for image in images) for i, row in enumerate(z))


def test_no_stat_reports_the_end_alone() -> None:
    block = LinearBlock.random(10)
    full = get_deq(core="phantom", f_tol=1e-4).eval()(block, block.start)[1]
    brief = get_deq(core="phantom", f_tol=1e-4, no_stat=True).eval()(block, block.start)[1]
    assert torch.equal(brief["abs_lowest"], full["abs_lowest"])
    assert torch.equal(brief["rel_trace"], full["rel_lowest"].unsqueeze(1))


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson"])
def test_backward_writer_gets_the_adjoint_solve_as_torchdeqs_does(solver: str) -> None:
    block = LinearBlock.random(11)
    written: dict[str, list[Any]] = {"sliced": [], "phantom": []}
    for core, infos in written.items():
        deq = get_deq(core=core, ift=True, b_solver=solver, b_max_iter=60, b_tol=1e-5)
        (z,), _ = deq(block, block.start, backward_writer=infos.append)
        assert infos == []
        grads = [torch.autograd.grad(z.sum(), block.c, retain_graph=True)[0] for _ in range(2)]
        assert len(infos) == 2
        assert_equal(grads[1:], grads[:1], 1e-12)
    for ours, theirs in zip(written["phantom"], written["sliced"], strict=True):
        assert list(ours) == list(theirs)
        assert [value.shape for value in ours.values()] == [value.shape for value in theirs.values()]
        assert (ours["abs_lowest"] <= 1e-5).all()
        assert (ours["nstep"] >= 2).all()
        falling = ours["abs_trace"][:, 1 : int(ours["nstep"].max())]
        assert (falling[:, 0] > falling[:, -1]).all()


def test_sradius_is_the_spectral_radius_also_of_complex_pairs() -> None:
    deq = get_deq(core="phantom", f_max_iter=300)
    turn = torch.tensor([[math.cos(1.2), -math.sin(1.2)], [math.sin(1.2), math.cos(1.2)]], dtype=DTYPE)
    factors = torch.tensor([[0.9], [0.5]], dtype=DTYPE)

    def rotation(z: Tensor) -> Tensor:
        return factors * (z @ turn.T) + 1.0

    start = torch.zeros(2, 2, dtype=DTYPE)
    assert deq(rotation, start, sradius_mode=True)[1]["sradius"].tolist() == [-1.0]  # as torchdeq in training
    deq.eval()
    assert deq(rotation, start)[1]["sradius"].tolist() == [0.0]
    with torch.no_grad():
        radius = deq(rotation, start, sradius_mode=True)[1]["sradius"]
    assert radius.tolist() == pytest.approx([0.9, 0.5], rel=1e-6)
    block = LinearBlock.random(17)
    radius = deq(block, block.start, sradius_mode=True)[1]["sradius"]
    assert radius.tolist() == pytest.approx([0.7] * 4, rel=1e-3)
    constant = deq(lambda z: torch.ones_like(z), start, sradius_mode=True)[1]["sradius"]
    assert constant.tolist() == [0.0, 0.0]
