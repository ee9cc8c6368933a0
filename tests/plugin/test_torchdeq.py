"""phantomgrad as a core of torchdeq, against torchdeq itself, dense answers and hand-written loops, in float64."""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import importlib.util
import math
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, LinearBlock
from torch import Tensor, nn

import phantomgrad.torchdeq
from phantomgrad import (
    Anderson,
    AttachError,
    Backprop,
    Broyden,
    DivergedError,
    FixedPointIteration,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    NotConvergedError,
    NotConvergedWarning,
    Shine,
    StateMismatchError,
    UnrolledPhantom,
    attachments,
)

ROOT = Path(__file__).parents[2]
SOLVERS = ("fixed_point_iter", "anderson", "broyden", "simple_fixed_point_iter")
OURS = {"sliced": "phantom", "indexing": "phantom-indexing"}
EXACT = {"f_tol": 1e-12, "b_tol": 1e-12, "f_max_iter": 300, "b_max_iter": 300}


def _import_torchdeq() -> Any:
    with warnings.catch_warnings():
        # Its docstrings hold "\|", of which Python complains when it compiles them for the first time.
        warnings.filterwarnings("ignore", "invalid escape sequence", Warning)
        return pytest.importorskip("torchdeq", reason="needs torchdeq: pip install 'phantomgrad[torchdeq]'")


@pytest.fixture(scope="module")
def torchdeq() -> Any:
    """torchdeq with our cores registered."""
    module = _import_torchdeq()
    phantomgrad.torchdeq.register()
    return module


@pytest.fixture
def get_deq(torchdeq: Any) -> Callable[..., Any]:
    return torchdeq.get_deq


def _grads(states: list[Any], block: LinearBlock, power: int = 2) -> tuple[Tensor, ...]:
    """Gradients of a loss that weighs the returned states differently."""
    loss = sum(((1.7 + i) * (state**power).sum() for i, state in enumerate(states)), torch.zeros((), dtype=DTYPE))
    return torch.autograd.grad(loss, block.parameters)


def _assert_equal(actual: Any, expected: Any, tolerance: float) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# -- importing ---------------------------------------------------------------------------------------------------------


def test_importing_the_adapter_imports_torchdeq_no_sooner_than_register() -> None:
    code = "import sys, phantomgrad.torchdeq; assert 'torchdeq' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_register_names_the_extra_where_torchdeq_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    with pytest.raises(ImportError) as caught:
        phantomgrad.torchdeq.register()
    assert str(caught.value) == "torchdeq is not installed; run: pip install 'phantomgrad[torchdeq]'"
    assert caught.value.name == "torchdeq"


def test_register_does_not_blame_torchdeq_for_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        phantomgrad.torchdeq.register()


# -- equal to torchdeq, where it is right --------------------------------------------------------------------------------


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
    torchdeq = _import_torchdeq()
    phantomgrad.torchdeq.register()
    options = {"f_solver": solver, "f_max_iter": 12, "f_tol": 0.0, "f_stop_mode": "rel", "grad": grad, "tau": tau}
    options |= sampling | supervision
    theirs = torchdeq.get_deq(core=core, **options)
    ours = torchdeq.get_deq(core=OURS[core], on_failure="ignore", **options)
    block = LinearBlock.random(seed, size=4, batch=2)
    expected, their_info = theirs(block, block.start)
    actual, our_info = ours(block, block.start)
    _assert_equal(actual, expected, 1e-10)
    _assert_equal(_grads(actual, block), _grads(expected, block), 1e-10)
    for key in ("abs_lowest", "rel_lowest", "abs_trace"):
        torch.testing.assert_close(our_info[key], their_info[key], rtol=1e-7, atol=1e-10)
    theirs.eval(), ours.eval()
    _assert_equal(ours(block, block.start)[0], theirs(block, block.start)[0], 1e-10)


@pytest.mark.parametrize("core", ["phantom", "phantom-indexing"])
def test_upg_at_the_solution_is_the_closed_form(get_deq: Callable[..., Any], core: str) -> None:
    block = LinearBlock.random(3)
    (z,), _ = get_deq(core=core, grad=5, tau=0.5, **EXACT)(block, block.start)
    g = torch.randn(z.shape, dtype=DTYPE)
    power = torch.linalg.matrix_power(block.damped_jacobian(0.5), 5)
    adjoint = block.adjoint(g) @ (torch.eye(len(power), dtype=DTYPE) - power)
    expected = torch.autograd.grad((block(block.solution().detach()) * adjoint).sum(), block.parameters)
    _assert_equal(torch.autograd.grad((z * g).sum(), block.parameters), expected, 1e-10)


@pytest.mark.parametrize("b_solver", ["fixed_point_iter", "anderson", "broyden"])
@pytest.mark.parametrize("switch", ["ift", "hook_ift"])
@pytest.mark.parametrize("f_solver", ["fixed_point_iter", "anderson", "broyden"])
def test_exact_gradients_are_dense_answers(
    get_deq: Callable[..., Any], switch: str, b_solver: str, f_solver: str
) -> None:
    block = LinearBlock.random(5)
    deq = get_deq(core="phantom", f_solver=f_solver, b_solver=b_solver, **{switch: True}, **EXACT)
    states, _ = deq(block, block.start)
    _assert_equal(states, [block.solution()], 1e-10)
    _assert_equal(_grads(states, block), _grads([block.solution()], block), 1e-9)
    # A second backward through the same graph gives the same.
    states, _ = deq(block, block.start)
    loss = states[0].sum()
    first = torch.autograd.grad(loss, block.parameters, retain_graph=True)
    _assert_equal(torch.autograd.grad(loss, block.parameters), first, 0.0)


def test_a_backward_of_unchecked_steps_is_that_many_terms_of_the_series(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(6)
    options = {"ift": True, "b_solver": "simple_fixed_point_iter", "b_max_iter": 4, "f_tol": 1e-13, "f_max_iter": 300}
    (z,), _ = get_deq(core="phantom", **options)(block, block.start)
    g = torch.randn(z.shape, dtype=DTYPE)
    J = block.J.detach()
    adjoint = g + g @ J + g @ J @ J + g @ J @ J @ J
    expected = torch.autograd.grad((block(block.solution().detach()) * adjoint).sum(), block.parameters)
    _assert_equal(torch.autograd.grad((z * g).sum(), block.parameters), expected, 1e-10)


def test_ift_applies_to_the_last_of_several_states(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(7)
    for core in ("phantom", "phantom-indexing"):
        states, _ = get_deq(core=core, indexing=[200], grad=[2, 1], ift=True, **EXACT)(block, block.start)
        assert len(states) == 2
        _assert_equal(_grads(states[1:], block), _grads([block.solution()], block), 1e-9)
        first = get_deq(core="sliced", grad=2, f_tol=1e-12, f_max_iter=200)(block, block.start)[0]
        _assert_equal(_grads(states[:1], block), _grads(first, block), 1e-9)


# -- what a call returns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_info_has_torchdeqs_keys_shapes_and_dtypes(
    get_deq: Callable[..., Any], solver: str, core: str, mode: str
) -> None:
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
def test_info_is_what_a_hand_written_measurement_finds(get_deq: Callable[..., Any], solver: str, mode: str) -> None:
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


def test_no_stat_reports_the_end_alone(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(10)
    full = get_deq(core="phantom", f_tol=1e-4).eval()(block, block.start)[1]
    brief = get_deq(core="phantom", f_tol=1e-4, no_stat=True).eval()(block, block.start)[1]
    assert torch.equal(brief["abs_lowest"], full["abs_lowest"])
    assert torch.equal(brief["rel_trace"], full["rel_lowest"].unsqueeze(1))


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson"])
def test_backward_writer_gets_the_adjoint_solve_as_torchdeqs_does(get_deq: Callable[..., Any], solver: str) -> None:
    block = LinearBlock.random(11)
    written: dict[str, list[Any]] = {"sliced": [], "phantom": []}
    for core, infos in written.items():
        deq = get_deq(core=core, ift=True, b_solver=solver, b_max_iter=60, b_tol=1e-5)
        (z,), _ = deq(block, block.start, backward_writer=infos.append)
        assert infos == []
        grads = [torch.autograd.grad(z.sum(), block.c, retain_graph=True)[0] for _ in range(2)]
        assert len(infos) == 2
        _assert_equal(grads[1:], grads[:1], 1e-12)
    for ours, theirs in zip(written["phantom"], written["sliced"], strict=True):
        assert list(ours) == list(theirs)
        assert [value.shape for value in ours.values()] == [value.shape for value in theirs.values()]
        assert (ours["abs_lowest"] <= 1e-5).all()
        assert (ours["nstep"] >= 2).all()
        falling = ours["abs_trace"][:, 1 : int(ours["nstep"].max())]
        assert (falling[:, 0] > falling[:, -1]).all()


def _pair(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * torch.tanh(y[:, :3]) + 1.0, torch.cat((0.3 * y[:, :3], 0.2 * z.sum(dim=1, keepdim=True)), dim=1)


def test_states_of_several_tensors_are_lists_as_in_torchdeq(get_deq: Callable[..., Any]) -> None:
    start = (torch.zeros(2, 3, dtype=DTYPE), torch.zeros(2, 4, dtype=DTYPE))
    for init in (start, list(start)):
        options = {"f_max_iter": 200, "f_tol": 1e-12, "grad": 3, "n_states": 2}
        expected, _ = get_deq(core="sliced", **options)(_pair, init)
        actual, info = get_deq(core="phantom", **options)(_pair, init)
        assert [type(state) for state in actual] == [list, list]
        for ours, theirs in zip(actual, expected, strict=True):
            _assert_equal(ours, theirs, 1e-10)
        assert info["abs_lowest"].shape == (2,)
    simple = get_deq(core="phantom", f_solver="simple_fixed_point_iter", f_max_iter=60).eval()
    _assert_equal(simple(_pair, start)[0][0], expected[-1], 1e-10)


def test_states_that_torchdeq_does_not_take(get_deq: Callable[..., Any]) -> None:
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


def test_training_and_evaluation_differ_as_in_torchdeq(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(12)
    options = {"f_max_iter": 20, "grad": 3, "tau": 0.5, "n_states": 2, "f_tol": 0.0, "f_stop_mode": "rel"}
    theirs = get_deq(core="sliced", **options)
    ours = get_deq(core="phantom", on_failure="ignore", **options)
    trained = ours(block, block.start)[0]
    assert [state.requires_grad for state in trained] == [True, True]
    with torch.no_grad():
        quiet = ours(block, block.start)[0]
        _assert_equal(quiet, theirs(block, block.start)[0], 1e-10)
    assert not any(state.requires_grad for state in quiet)
    _assert_equal(quiet, [state.detach() for state in trained], 1e-12)
    assert len(ours.eval()(block, block.start)[0]) == 1


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [({}, 7), ({"eval_factor": 2.6}, 18), ({"eval_f_max_iter": 3}, 3), ({"eval_f_max_iter": 3, "eval_factor": 9.0}, 3)],
)
def test_the_budget_of_evaluation(get_deq: Callable[..., Any], options: dict[str, Any], evaluations: int) -> None:
    calls: list[None] = []

    def growing(z: Tensor) -> Tensor:
        calls.append(None)
        return z + 1.0

    for solver in ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"):
        deq = get_deq(core="phantom", f_solver=solver, f_max_iter=7, on_failure="ignore", **options).eval()
        deq(growing, torch.zeros(1, 1))
        assert len(calls) == evaluations
        calls.clear()


def test_the_start_gets_no_gradient_but_from_backprop(get_deq: Callable[..., Any]) -> None:
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


# -- options -------------------------------------------------------------------------------------------------------------


def _namespace(torchdeq: Any, *argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    torchdeq.add_deq_args(parser)
    parser.add_argument("--lr", type=float, default=0.1)
    return parser.parse_args(argv)


def test_options_come_from_a_namespace_a_dict_or_keywords(torchdeq: Any) -> None:
    argv = ["--core", "phantom", "--f_solver", "anderson", "--f_max_iter", "9", "--grad", "5", "--tau", "0.5"]
    script = argparse.Namespace(epochs=3, f_solver="anderson", f_max_iter=9, grad=5, tau=0.5)
    for deq in (
        torchdeq.get_deq(_namespace(torchdeq, *argv)),
        torchdeq.get_deq({"core": "phantom", "f_solver": "anderson", "f_max_iter": 9, "grad": [5], "tau": 0.5}),
        torchdeq.get_deq(core="phantom", f_solver="anderson", f_max_iter=9, grad=5, tau=0.5),
        torchdeq.get_deq(_namespace(torchdeq, *argv[2:]), core="phantom"),
        torchdeq.get_deq(script, core="phantom"),
    ):
        assert deq.attachment.gradient == UnrolledPhantom(steps=5, damping=0.5)
        assert deq.attachment.solver == Anderson(max_steps=9, rtol=0.0, atol=1e-3, memory=6)


def test_the_default_options_are_torchdeqs(torchdeq: Any) -> None:
    deq = torchdeq.get_deq(core="phantom")
    assert deq.attachment.solver == FixedPointIteration(max_steps=40, rtol=0.0, atol=1e-3)
    assert deq.attachment.gradient == UnrolledPhantom(steps=1, damping=1.0)
    theirs = torchdeq.get_deq()
    for name in ("f_max_iter", "b_max_iter", "f_tol", "b_tol", "f_stop_mode", "b_stop_mode"):
        assert getattr(deq, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_slover": "anderson"}, r"has no option 'f_slover': did you mean 'f_solver'\?"),
        ({"f_max_itr": 3, "grads": 5}, r"has no option 'f_max_itr', 'grads': did you mean 'f_max_iter', 'grad'\?"),
        ({"memory": 3}, r"has no option 'memory'. Its options are 'core', 'f_solver', "),
        ({"gradient": "upg"}, r"gradient must be a phantomgrad Gradient object, got 'upg'\."),
        ({"solver": "anderson"}, r"solver must be a phantomgrad Solver object, got 'anderson'\."),
    ],
)
def test_unknown_options_and_wrong_objects_are_type_errors(
    get_deq: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    for args in ({"core": "phantom"} | options, None):
        with pytest.raises(TypeError, match=message):
            get_deq(args, **({} if args else {"core": "phantom"} | options))


def test_in_a_namespace_only_misspelt_options_are_errors(torchdeq: Any) -> None:
    args = _namespace(torchdeq)
    args.f_slover = "anderson"
    with pytest.raises(
        TypeError, match=r"has no option 'f_slover': did you mean 'f_solver'\? If the name is the script's"
    ):
        torchdeq.get_deq(args, core="phantom")
    for args, keywords in (({"core": "phantom", "lr": 0.1}, {}), (None, {"core": "phantom", "lr": 0.1})):
        with pytest.raises(TypeError, match="has no option 'lr'"):
            torchdeq.get_deq(args, **keywords)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"f_solver": "newton"}, r"f_solver must be one of 'fixed_point_iter', .*, got 'newton'. For any other pass a phantomgrad solver, as in solver=Broyden\(\)\."),
        ({"b_solver": "newton"}, r"b_solver must be one of .* as in gradient=Implicit\(solver=Broyden\(\)\)\."),
        ({"f_max_iter": 1.5}, r"f_max_iter of DEQOptions must be an integer of at least 0, got 1\.5\."),
        ({"b_max_iter": 0}, r"b_max_iter of DEQOptions must be an integer of at least 1, got 0\."),
        ({"f_tol": -1e-3}, r"f_tol of DEQOptions must be a finite number at least 0\.0, got -0\.001\."),
        ({"f_stop_mode": "absolute"}, r"f_stop_mode of DEQOptions must be one of 'abs', 'rel', got 'absolute'\."),
        ({"tau": 0.0}, r"tau of DEQOptions must be a finite number above 0\.0 and at most 2\.0, got 0\.0\."),
        ({"ift": "yes"}, r"ift of DEQOptions must be True or False, got 'yes'\."),
        ({"no_stat": 2}, r"no_stat of DEQOptions must be one of None, True, False, got 2\."),
        ({"grad": 0}, r"grad of DEQOptions must hold integers of at least 1, got \[0\]\."),
        ({"grad": []}, r"grad of DEQOptions must name at least one number of steps\."),
        ({"grad": "5"}, r"grad of DEQOptions must hold integers of at least 1, got '5'\."),
        ({"grad": [1, 2]}, r"grad of DEQOptions must name one number of steps, or one for each of the 1 returned states, got \[1, 2\]\."),
        ({"n_states": 50}, r"n_states=50 of DEQOptions needs an f_max_iter of at least as many, got 40\."),
        ({"indexing": [5, 3]}, r"indexing of DEQOptions must increase and end below f_max_iter=40, got \[5, 3\]\."),
        ({"indexing": [40]}, r"indexing of DEQOptions must increase and end below f_max_iter=40, got \[40\]\."),
        ({"grad": 3, "sup_gap": 4}, r"choose among the grad=3 steps of the phantom gradient, got sup_gap=4, sup_loc=\[\]\."),
        ({"grad": 3, "sup_loc": [4]}, r"choose among the grad=3 steps of the phantom gradient, got sup_gap=-1, sup_loc=\[4\]\."),
        ({"grad": 3, "sup_gap": 1, "sup_loc": [2]}, r"sup_gap and sup_loc of DEQOptions exclude each other"),
        ({"gradient": Implicit(), "grad": 5, "tau": 0.5}, r"gradient=Implicit\(.*\) replaces grad=\(5,\), tau=0\.5: give the one or the other\."),
        ({"solver": Broyden(), "f_tol": 1e-5}, r"solver=Broyden\(.*\) replaces f_tol=1e-05: give the one or the other\."),
        ({"on_failure": "shout"}, r"on_failure must be one of 'warn', 'raise', 'ignore', got 'shout'\."),
        ({"gradient": Shine()}, r"Shine reuses the inverse estimate of Broyden's method"),
    ],
)  # fmt: skip
def test_refusals_name_the_option(get_deq: Callable[..., Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_deq(core="phantom", **options)


def test_our_own_gradients_and_solvers_pass_through(torchdeq: Any) -> None:
    block = LinearBlock.random(14, radius=0.5)
    exact = _grads([block.solution()], block)
    solver = Broyden(max_steps=60, rtol=1e-13)
    for gradient, tolerance in (
        (NeumannPhantom(steps=60, damping=1.0), 1e-9),
        (KrylovPhantom(steps=7), 1e-9),
        (Implicit(), 1e-9),
        (Implicit(solver=Anderson(max_steps=60), rtol=1e-11), 1e-9),
        (Shine(refine=30), 1e-5),
    ):
        deq = torchdeq.get_deq(_namespace(torchdeq), core="phantom", gradient=gradient, solver=solver)
        assert (deq.attachment.gradient, deq.attachment.solver) == (gradient, solver)
        states, info = deq(block, block.start)
        _assert_equal(_grads(states, block), exact, tolerance)
        assert info["abs_trace"].shape == (4, 61)
    assert deq.f_max_iter == 60
    # The handle's settings hold from the next call on.
    deq.attachment.gradient = UnrolledPhantom(steps=1, damping=1.0)
    one_step = _grads(deq(block, block.start)[0], block)
    assert max((a - b).abs().max().item() for a, b in zip(one_step, exact, strict=True)) > 1e-3


# -- solver_kwargs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kwargs", "solver"),
    [
        ({}, {"tau": 0.5, "f_max_iter": 7}, FixedPointIteration(max_steps=7, rtol=0.0, atol=1e-3, damping=0.5)),
        ({}, {"f_max_iter": None}, FixedPointIteration(max_steps=40, rtol=0.0, atol=1e-3)),
        ({}, {"return_final": False}, FixedPointIteration(max_steps=40, rtol=0.0, atol=1e-3)),
        ({"f_solver": "anderson"}, {"m": 3, "tau": 0.8}, Anderson(max_steps=40, rtol=0.0, atol=1e-3, memory=3, mixing=0.8)),
        ({"f_solver": "broyden", "f_stop_mode": "rel"}, {"LBFGS_thres": 4, "ls": False}, Broyden(max_steps=40, rtol=1e-3, atol=0.0, memory=4)),
    ],
)  # fmt: skip
def test_solver_kwargs_hold_for_one_call(
    get_deq: Callable[..., Any], options: dict[str, Any], kwargs: dict[str, Any], solver: Any
) -> None:
    block = LinearBlock.random(15)
    deq = get_deq(core="phantom", on_failure="ignore", **options)
    before = deq.attachment.solver
    states, info = deq(block, block.start, solver_kwargs=kwargs)
    expected, wanted = get_deq(core="phantom", on_failure="ignore", solver=solver)(block, block.start)
    _assert_equal(states, expected, 0.0)
    assert torch.equal(info["abs_trace"], wanted["abs_trace"])
    assert deq.attachment.solver == before


def test_return_final_runs_all_steps_and_returns_the_last(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(16)
    deq = get_deq(core="phantom", f_max_iter=60, f_tol=1e-2).eval()
    (z,), info = deq(block, block.start, {"return_final": True})
    expected = block.start
    for _ in range(60):
        expected = block(expected)
    torch.testing.assert_close(z, expected.detach(), rtol=0, atol=1e-14)
    assert info["nstep"].tolist() == [60.0] * 4
    assert torch.equal(info["abs_lowest"], info["abs_trace"][:, -1])
    with pytest.warns(NotConvergedWarning, match="after 3 steps"):
        deq(block, block.start, {"return_final": True, "f_max_iter": 3})


@pytest.mark.parametrize(
    ("solver", "kwargs", "message"),
    [
        ("fixed_point_iter", {"m": 5}, r"solver_kwargs cannot hold m=5: FixedPointIteration takes f_max_iter, return_final, tau\."),
        ("anderson", {"lam": 1e-4}, r"cannot hold lam=0\.0001: our ridge is relative to the system: pass solver=Anderson\(ridge=\.\.\.\) to get_deq\."),
        ("broyden", {"ls": True}, r"cannot hold ls=True: there is no line search"),
        ("broyden", {"tau": 0.5}, r"cannot hold tau=0\.5: Broyden takes f_max_iter, return_final, LBFGS_thres\."),
        ("anderson", {"tol": 0.5}, r"cannot hold tol=0\.5: pass f_tol to get_deq\."),
        ("anderson", {"max_iter": 5}, r"cannot hold max_iter=5: it is called f_max_iter here\."),
    ],
)  # fmt: skip
def test_unknown_solver_kwargs_are_refused(
    get_deq: Callable[..., Any], solver: str, kwargs: dict[str, Any], message: str
) -> None:
    deq = get_deq(core="phantom", f_solver=solver)
    for training in (True, False):
        with pytest.raises(TypeError, match=message):
            deq.train(training)(torch.cos, torch.zeros(2, 2), kwargs)


def test_wrong_calls_are_refused(get_deq: Callable[..., Any]) -> None:
    z = torch.zeros(2, 2)
    with pytest.raises(
        ValueError, match=r"max_steps of FixedPointIteration must be an integer of at least 0, got 1\.5"
    ):
        get_deq(core="phantom")(torch.cos, z, {"f_max_iter": 1.5})
    with pytest.raises(ValueError, match="n_states=4 of DEQOptions needs an f_max_iter of at least as many, got 3"):
        get_deq(core="phantom", n_states=4)(torch.cos, z, {"f_max_iter": 3})
    with pytest.raises(ValueError, match="backward_writer needs a b_solver that measures its steps"):
        get_deq(core="phantom", ift=True, b_solver="simple_fixed_point_iter")(torch.cos, z, backward_writer=print)
    with pytest.raises(TypeError, match="unexpected keyword argument 'f_max_iter'"):
        get_deq(core="phantom")(torch.cos, z, f_max_iter=3)
    with pytest.raises(StateMismatchError, match=r"takes the state \(2, 2\) float32 on cpu to \(2, 1\) float32 on cpu"):
        get_deq(core="phantom")(lambda z: z[:, :1], z)


# -- failures ------------------------------------------------------------------------------------------------------------


class _Model(nn.Module):
    def __init__(self, deq: nn.Module) -> None:
        super().__init__()
        self.deq = deq

    def forward(self, factor: float, z: Tensor) -> Any:
        return self.deq(lambda z: factor * z + 1.0, z)


def test_what_does_not_converge_warns_once_and_says_where(get_deq: Callable[..., Any]) -> None:
    model = _Model(get_deq(core="phantom", f_max_iter=5, f_tol=1e-6))
    with pytest.warns(
        NotConvergedWarning, match=r"did not converge in _Model.deq.map .*above their tolerance after 5 steps"
    ):
        model(0.9, torch.zeros(2, 2))
    model(0.9, torch.zeros(2, 2))
    assert model.deq.attachment.unconverged == 2
    strict = _Model(get_deq(core="phantom", f_max_iter=5, f_tol=1e-6, on_failure="raise"))
    with pytest.raises(NotConvergedError):
        strict(0.9, torch.zeros(2, 2))


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_not_finite_raises(get_deq: Callable[..., Any], solver: str) -> None:
    model = _Model(get_deq(core="phantom", f_solver=solver, f_max_iter=20))
    with pytest.raises(DivergedError, match=r"diverged in _Model\.deq\.map"):
        model(math.nan, torch.ones(2, 2))


def test_a_map_that_couples_its_samples_is_refused(get_deq: Callable[..., Any]) -> None:
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
    torchdeq = _import_torchdeq()
    phantomgrad.torchdeq.register()
    generator = torch.Generator().manual_seed(seed)
    weights = 0.6 * torch.randn(6, 3, 3, generator=generator)
    offset = torch.randn(6, 3, generator=generator) * torch.tensor([[1.0], [0.0], [1e-3], [1.0], [10.0], [1e-6]])
    deq = torchdeq.get_deq(core="phantom", f_solver=solver, f_stop_mode=mode, on_failure="ignore").eval()
    deq(lambda z: torch.tanh(torch.einsum("bij,bj->bi", weights, z) + offset), torch.ones(6, 3))


# -- the rest of torchdeq's surface --------------------------------------------------------------------------------------


def test_sradius_is_the_spectral_radius_also_of_complex_pairs(get_deq: Callable[..., Any]) -> None:
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


def test_options_can_be_read_and_not_assigned(get_deq: Callable[..., Any]) -> None:
    deq = get_deq(core="phantom", f_tol=1e-4)
    assert (deq.f_tol, deq.f_solver, deq.n_states) == (1e-4, "fixed_point_iter", 1)
    with pytest.raises(AttributeError, match=r"f_tol of a deq cannot be assigned. Assign deq\.attachment\.solver"):
        deq.f_tol = 1e-5
    with pytest.raises(AttributeError, match="no attribute 'f_tolerance'"):
        deq.f_tolerance  # noqa: B018
    assert "UnrolledPhantom(steps=1" in repr(deq)


def test_copies_and_pickles_of_a_model_work_alone(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(18)
    deq = get_deq(core="phantom", ift=True, **EXACT)
    assert dict(deq.state_dict()) == {}
    assert list(attachments(_Model(deq))) == [deq.attachment]
    for copied in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert copied.attachment is not deq.attachment
        _assert_equal(copied(block, block.start)[0], deq(block, block.start)[0], 0.0)
        copied.attachment.solver = FixedPointIteration(max_steps=1)
    assert deq.attachment.solver.max_steps == 300


def test_torchdeqs_norms_and_dropout_go_on_working(torchdeq: Any) -> None:
    x = torch.randn(4, 8, dtype=DTYPE)
    grads: dict[str, list[Tensor]] = {}
    for core in ("sliced", "phantom"):
        torch.manual_seed(1)
        cell = nn.Sequential(nn.Linear(8, 8), torchdeq.VariationalDropout(0.3), nn.Tanh()).to(DTYPE)
        torchdeq.apply_norm(cell, "weight_norm", args={"norm_clip": True, "norm_clip_value": 0.2})
        torchdeq.reset_deq(cell)
        deq = torchdeq.get_deq(core=core, grad=5, tau=0.5, f_max_iter=200, f_tol=1e-11)
        states, _ = deq(lambda z, cell=cell: cell(z) + x, torch.zeros_like(x))
        states[-1].square().sum().backward()
        grads[core] = [parameter.grad for parameter in cell.parameters() if parameter.grad is not None]
        assert len(grads[core]) == 3  # weight_g, weight_v, bias
    _assert_equal(grads["phantom"], grads["sliced"], 1e-9)


def test_two_calls_before_one_backward_and_accumulation(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(19)
    deq = get_deq(core="phantom", hook_ift=True, **EXACT)
    inner = deq(block, block.start)[0][0]
    outer = deq(lambda z: z @ block.J.T + torch.tanh(inner), block.start)[0][0]
    identity = torch.eye(5, dtype=DTYPE)
    truth = torch.linalg.solve(identity - block.J, torch.tanh(block.solution()).T).T
    _assert_equal(_grads([outer], block), _grads([truth], block), 1e-9)


@pytest.mark.parametrize("core", ["phantom", "phantom-indexing"])
def test_autocast_keeps_the_states_dtype(get_deq: Callable[..., Any], core: str) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    nn.init.constant_(layer.weight, 0.1)
    deq = get_deq(core=core, n_states=2, grad=3, ift=True, f_tol=0.05, b_tol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, info = deq(lambda z: layer(z) + x, torch.zeros(3, 4))
    assert {value.dtype for value in (*states, *info.values())} == {torch.float32}
    states[-1].sum().backward()
    exact = torch.linalg.solve(torch.eye(4) - layer.weight.T, torch.ones(4)).detach() * 3
    torch.testing.assert_close(layer.bias.grad, exact, rtol=2e-2, atol=0.0)


@pytest.mark.parametrize(
    "options",
    [{"ift": True}, {"grad": 5}, {"core": "phantom-indexing", "n_states": 3}, {"grad": 4, "sup_gap": 2}],
    ids=repr,
)
def test_nothing_waits_for_the_garbage_collector(get_deq: Callable[..., Any], options: dict[str, Any]) -> None:
    block = LinearBlock.random(20)
    deq = get_deq(**{"core": "phantom", "f_max_iter": 120, "b_max_iter": 120} | options)
    gc.collect()
    gc.disable()
    try:
        states, _ = deq(block, block.start, backward_writer=lambda info: None)
        states[-1].sum().backward()
        alive = weakref.ref(deq), weakref.ref(states[-1])
        del deq, states
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


def test_second_derivatives_outlive_the_deq(get_deq: Callable[..., Any]) -> None:
    w = torch.tensor(0.5, dtype=DTYPE, requires_grad=True)
    (z,), _ = get_deq(core="phantom", ift=True, **EXACT)(lambda z: w * z + 1.0, torch.zeros(1, 1, dtype=DTYPE))
    (first,) = torch.autograd.grad(z.sum(), w, create_graph=True)  # z = 1 / (1 - w)
    (second,) = torch.autograd.grad(first, w)
    assert (first.item(), second.item()) == (pytest.approx(4.0), pytest.approx(16.0))


def test_batch_statistics_are_updated_at_every_evaluation_as_in_torchdeq(get_deq: Callable[..., Any]) -> None:
    x = torch.randn(8, 4)
    for core in ("sliced", "phantom"):
        norm = nn.BatchNorm1d(4)
        get_deq(core=core, f_max_iter=100)(lambda z, norm=norm: torch.tanh(0.3 * norm(z) + x), torch.zeros(8, 4))
        assert norm.num_batches_tracked is not None
        assert norm.num_batches_tracked > 3


def test_the_migration_page_runs_as_printed(torchdeq: Any) -> None:
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "from-torchdeq.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) == 2
    for block in blocks:
        namespace: dict[str, Any] = {}
        exec(compile(block, "from-torchdeq.md", "exec"), namespace)
        parameters = [namespace["weight"]] if "weight" in namespace else list(namespace["cell"].parameters())
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in parameters)


def test_the_example_switches_with_one_word(torchdeq: Any, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("from_torchdeq", ROOT / "examples" / "from_torchdeq.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = {core: example.main(["--core", core, "--steps", "40"]) for core in ("sliced", "phantom")}
    assert capsys.readouterr().out.count("step 40: loss") == 2
    assert losses["phantom"][0] == pytest.approx(losses["sliced"][0], abs=1e-3)
    for each in losses.values():
        assert sum(each[-5:]) < 0.75 * sum(each[:5])


# -- what docs/from-torchdeq.md says about torchdeq itself ---------------------------------------------------------------


def test_torchdeq_itself_ignores_misspelt_options(get_deq: Callable[..., Any]) -> None:
    assert get_deq(f_slover="anderson", f_max_itr=3).f_max_iter == 40


def test_torchdeq_itself_returns_the_start_of_a_short_anderson_solve(get_deq: Callable[..., Any]) -> None:
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
    get_deq: Callable[..., Any], dtype: torch.dtype, kwargs: dict[str, Any]
) -> None:
    def cell(z: Tensor) -> Tensor:
        return 0.5 * z + 1.0

    with pytest.raises((NotImplementedError, IndexError)):
        get_deq(f_solver="anderson").eval()(cell, torch.zeros(1, 1, dtype=dtype), kwargs)
    deq = get_deq(core="phantom", f_solver="anderson", f_tol=2e-2).eval()
    assert deq(cell, torch.zeros(1, 1, dtype=dtype), kwargs)[0][0].item() == pytest.approx(2.0, abs=0.05)


def test_torchdeq_itself_is_silent_about_divergence_and_nan(get_deq: Callable[..., Any]) -> None:
    (z,), info = get_deq().eval()(lambda z: 3 * z + 1, torch.zeros(1, 1))
    assert (z.item(), info["nstep"].item()) == (1.0, 1.0)
    (z,), info = get_deq().eval()(lambda z: z * math.nan, torch.zeros(1, 1))
    assert z.isnan().all()
    with pytest.raises(DivergedError):
        get_deq(core="phantom", f_max_iter=100).eval()(lambda z: 3 * z + 1, torch.zeros(1, 1))


def test_torchdeq_itself_drops_states_and_ift_where_indexing_ends_early(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(4)
    exact = _grads([block.solution()], block)
    errors: dict[str, float] = {}
    counts: dict[str, int] = {}
    for core in ("indexing", "phantom-indexing"):
        states, _ = get_deq(core=core, n_states=3, ift=True, **EXACT)(block, block.start)
        counts[core] = len(states)
        grads = _grads(states[-1:], block)
        errors[core] = ((grads[2] - exact[2]).norm() / exact[2].norm()).item()
    assert counts == {"indexing": 1, "phantom-indexing": 3}
    assert errors["indexing"] > 0.1
    assert errors["phantom-indexing"] < 1e-9


def test_torchdeq_itself_gives_another_gradient_on_the_second_backward_of_hook_ift(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(4)
    (z,), _ = get_deq(hook_ift=True, **EXACT)(block, block.start)
    first, second = (torch.autograd.grad(z.sum(), block.c, retain_graph=True)[0] for _ in range(2))
    assert ((first - second).norm() / first.norm()).item() > 0.1


def test_torchdeq_itself_has_wrong_second_derivatives(get_deq: Callable[..., Any]) -> None:
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


def test_torchdeq_itself_cannot_differentiate_with_a_simple_b_solver(get_deq: Callable[..., Any]) -> None:
    block = LinearBlock.random(4)
    (z,), _ = get_deq(ift=True, b_solver="simple_fixed_point_iter", f_max_iter=100)(block, block.start)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tau'"):
        z.sum().backward()


def test_torchdeq_itself_takes_a_rayleigh_quotient_for_the_radius(get_deq: Callable[..., Any]) -> None:
    turn = 0.9 * torch.tensor([[math.cos(1.2), -math.sin(1.2)], [math.sin(1.2), math.cos(1.2)]])
    info = get_deq().eval()(lambda z: z @ turn.T + 1.0, torch.zeros(1, 2), sradius_mode=True)[1]
    assert info["sradius"].item() == pytest.approx(0.9 * math.cos(1.2), abs=1e-3)


@pytest.mark.parametrize("core", ["sliced", "phantom"])
def test_an_absolute_b_tol_ends_the_adjoint_solve_of_a_small_loss(get_deq: Callable[..., Any], core: str) -> None:
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
