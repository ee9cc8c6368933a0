"""Our cores registered in torchdeq and used in models: copies, norms, autocast, memory, and the page and example that show it."""

from __future__ import annotations

import copy
import gc
import importlib.util
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import DTYPE, LinearBlock
from torch import Tensor, nn
from torchdeq_cores import EXACT, Model, assert_equal, get_deq, registered_torchdeq

import phantomgrad.torchdeq
from phantomgrad import FixedPointIteration, attachments

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def torchdeq() -> Any:
    return registered_torchdeq()


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


def test_copies_and_pickles_of_a_model_work_alone() -> None:
    block = LinearBlock.random(18)
    deq = get_deq(core="phantom", ift=True, **EXACT)
    assert dict(deq.state_dict()) == {}
    assert list(attachments(Model(deq))) == [deq.attachment]
    for copied in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        assert copied.attachment is not deq.attachment
        assert_equal(copied(block, block.start)[0], deq(block, block.start)[0], 0.0)
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
    assert_equal(grads["phantom"], grads["sliced"], 1e-9)


@pytest.mark.parametrize("core", ["phantom", "phantom-indexing"])
def test_autocast_keeps_the_states_dtype(core: str) -> None:
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
def test_nothing_waits_for_the_garbage_collector(options: dict[str, Any]) -> None:
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


def test_batch_statistics_are_updated_at_every_evaluation_as_in_torchdeq() -> None:
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
