"""Options of torchdeq with our cores: of get_deq, of one call, and what is refused."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from problems import LinearBlock
from torchdeq_cores import assert_equal, block_gradients, get_deq, registered_torchdeq

from phantomgrad import (
    Anderson,
    Broyden,
    FixedPointIteration,
    Implicit,
    KrylovPhantom,
    NeumannPhantom,
    NotConvergedWarning,
    Shine,
    StateMismatchError,
    UnrolledPhantom,
)


@pytest.fixture(scope="module")
def torchdeq() -> Any:
    return registered_torchdeq()


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
def test_unknown_options_and_wrong_objects_are_type_errors(options: dict[str, Any], message: str) -> None:
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
def test_refusals_name_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_deq(core="phantom", **options)


def test_our_own_gradients_and_solvers_pass_through(torchdeq: Any) -> None:
    block = LinearBlock.random(14, radius=0.5)
    exact = block_gradients([block.solution()], block)
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
        assert_equal(block_gradients(states, block), exact, tolerance)
        assert info["abs_trace"].shape == (4, 61)
    assert deq.f_max_iter == 60
    # The handle's settings hold from the next call on.
    deq.attachment.gradient = UnrolledPhantom(steps=1, damping=1.0)
    one_step = block_gradients(deq(block, block.start)[0], block)
    assert max((a - b).abs().max().item() for a, b in zip(one_step, exact, strict=True)) > 1e-3


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
def test_solver_kwargs_hold_for_one_call(options: dict[str, Any], kwargs: dict[str, Any], solver: Any) -> None:
    block = LinearBlock.random(15)
    deq = get_deq(core="phantom", on_failure="ignore", **options)
    before = deq.attachment.solver
    states, info = deq(block, block.start, solver_kwargs=kwargs)
    expected, wanted = get_deq(core="phantom", on_failure="ignore", solver=solver)(block, block.start)
    assert_equal(states, expected, 0.0)
    assert torch.equal(info["abs_trace"], wanted["abs_trace"])
    assert deq.attachment.solver == before


def test_return_final_runs_all_steps_and_returns_the_last() -> None:
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
def test_unknown_solver_kwargs_are_refused(solver: str, kwargs: dict[str, Any], message: str) -> None:
    deq = get_deq(core="phantom", f_solver=solver)
    for training in (True, False):
        with pytest.raises(TypeError, match=message):
            deq.train(training)(torch.cos, torch.zeros(2, 2), kwargs)


def test_wrong_calls_are_refused() -> None:
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


def test_options_can_be_read_and_not_assigned() -> None:
    deq = get_deq(core="phantom", f_tol=1e-4)
    assert (deq.f_tol, deq.f_solver, deq.n_states) == (1e-4, "fixed_point_iter", 1)
    with pytest.raises(AttributeError, match=r"f_tol of a deq cannot be assigned. Assign deq\.attachment\.solver"):
        deq.f_tol = 1e-5
    with pytest.raises(AttributeError, match="no attribute 'f_tolerance'"):
        deq.f_tolerance  # noqa: B018
    assert "UnrolledPhantom(steps=1" in repr(deq)
