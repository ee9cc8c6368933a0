"""Solves that fail under torchdeq with our cores, and maps that couple their samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE
from torchdeq_cores import SOLVERS, Model, get_deq

from phantomgrad import AttachError, DivergedError, NotConvergedError, NotConvergedWarning


def test_what_does_not_converge_warns_once_and_says_where() -> None:
    model = Model(get_deq(core="phantom", f_max_iter=5, f_tol=1e-6))
    with pytest.warns(
        NotConvergedWarning, match=r"did not converge in Model.deq.map .*above their tolerance after 5 steps"
    ):
        model(0.9, torch.zeros(2, 2))
    model(0.9, torch.zeros(2, 2))
    assert model.deq.attachment.unconverged == 2
    strict = Model(get_deq(core="phantom", f_max_iter=5, f_tol=1e-6, on_failure="raise"))
    with pytest.raises(NotConvergedError):
        strict(0.9, torch.zeros(2, 2))


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_not_finite_raises(solver: str) -> None:
    model = Model(get_deq(core="phantom", f_solver=solver, f_max_iter=20))
    with pytest.raises(DivergedError, match=r"diverged in Model\.deq\.map"):
        model(math.nan, torch.ones(2, 2))


def test_a_map_that_couples_its_samples_is_refused() -> None:
    nodes = 12
    chain = 0.5 * (torch.diag(torch.ones(nodes - 1), 1) + torch.diag(torch.ones(nodes - 1), -1)).to(DTYPE)
    source = torch.zeros(nodes, 1, dtype=DTYPE)
    source[0] = 1.0
    start = torch.zeros(nodes, 1, dtype=DTYPE)
    for mode in ("abs", "rel"):
        with pytest.raises(
            AttachError, match=r"couples the samples along batch_dim=0: .* Pass batch_dim=None to get_deq"
        ):
            get_deq(core="phantom", f_max_iter=200, f_stop_mode=mode)(lambda z: chain @ z + source, start)
    deq = get_deq(core="phantom", f_max_iter=800, f_tol=1e-9, batch_dim=None).eval()
    (z,), info = deq(lambda z: chain @ z + source, start)
    truth = torch.linalg.solve(torch.eye(nodes, dtype=DTYPE) - chain, source)
    torch.testing.assert_close(z, truth, rtol=1e-6, atol=1e-6)
    assert info["abs_lowest"].shape == (1,)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), mode=st.sampled_from(("abs", "rel")), solver=st.sampled_from(SOLVERS[:3]))
def test_a_map_that_does_not_couple_its_samples_is_never_refused(seed: int, mode: str, solver: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = 0.6 * torch.randn(6, 3, 3, generator=generator)
    offset = torch.randn(6, 3, generator=generator) * torch.tensor([[1.0], [0.0], [1e-3], [1.0], [10.0], [1e-6]])
    deq = get_deq(core="phantom", f_solver=solver, f_stop_mode=mode, on_failure="ignore").eval()
    deq(lambda z: torch.tanh(torch.einsum("bij,bj->bi", weights, z) + offset), torch.ones(6, 3))
