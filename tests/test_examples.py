"""The examples run: the loss falls, samples settle, and what computes the injected input is trained."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from phantomgrad import attachments

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Case:
    """An example, how many steps show that it trains, and what must be true of it."""

    name: str
    steps: int
    module: str
    """The class that the example uses as its package ships it."""
    injection: tuple[str, ...]
    """Prefixes of the parameters that compute the injected input."""
    needs: str = "torch"


CASES = [
    Case("gru", 15, "torch.nn.modules.rnn.GRUCell", ("encoder.", "cell.weight_ih")),
    Case("transformer", 10, "torch.nn.modules.transformer.TransformerEncoderLayer", ("node", "parent.")),
    Case("resnet_stage", 15, "torchvision.models.resnet.BasicBlock", ("stem.",), needs="torchvision"),
    Case(
        "huggingface",
        20,
        "transformers.models.bert.modeling_bert.BertLayer",
        ("bert.embeddings.word_embeddings", "bert.embeddings.LayerNorm"),
        needs="transformers",
    ),
    Case("graph", 30, "torch.sparse.mm", ("encoder.",)),
]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def load(name: str) -> Any:
    """The example as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def untrained(name: str) -> nn.Module:
    """The model of an example after no training."""
    return load(name).main(0)[0]


@by_name
def test_example_trains(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(case.needs)
    example = load(case.name)
    model, figures = example.main(case.steps)
    assert figures["after"] < 0.8 * figures["before"]
    (attachment,) = attachments(model)
    assert attachment.solution is not None
    assert attachment.solution.converged.all()
    assert attachment.unconverged == 0
    assert str(attachment.solution) in capsys.readouterr().out

    start = dict(untrained(case.name).named_parameters())
    injection = {name: p for name, p in model.named_parameters() if name.startswith(case.injection)}
    assert all(any(name.startswith(prefix) for name in injection) for prefix in case.injection)
    for name, parameter in injection.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        moved = (parameter - start[name]).norm() / start[name].norm().clamp_min(1e-3)
        assert moved > 1e-3, name


@by_name
def test_example_uses_the_package_module_unedited(case: Case) -> None:
    source = (EXAMPLES / f"{case.name}.py").read_text(encoding="utf-8")
    assert source.count("\n") < 80
    if case.module == "torch.sparse.mm":  # torch has no graph layer: the cell is written with its sparse product
        assert case.module in source
        return
    pytest.importorskip(case.needs)
    (attachment,) = attachments(untrained(case.name))
    names = {f"{type(each).__module__}.{type(each).__qualname__}" for each in attachment.module.modules()}
    assert case.module in names


def test_gru_holds_its_update_gate_and_trains_the_rest() -> None:
    example = load("gru")
    start, (model, _) = untrained("gru"), example.main(3)
    gate = slice(example.HIDDEN, 2 * example.HIDDEN)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        before, after = getattr(start.cell, name), getattr(model.cell, name)
        assert torch.equal(before[gate], after[gate]), name
        for rest in (slice(0, example.HIDDEN), slice(2 * example.HIDDEN, None)):
            assert not torch.equal(before[rest], after[rest]), name


def test_equilibrium_of_the_graph_sees_farther_than_three_layers() -> None:
    example = load("graph")
    _, deep = example.main(40)
    _, shallow = example.main(40, layers=3)
    assert deep["accuracy"] > 0.98
    assert shallow["accuracy"] < 0.7


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_readme_lists_the_example_and_its_command_exists(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(rf"`python examples/{path.name}( [^`]*)?`", readme)
    assert f"[{path.name}]({path.name})" in readme
    if path.stem in ("from_torchdeq", "service"):
        return  # run by the tests of phantomgrad.torchdeq, and by those of the service
    case = next(case for case in CASES if case.name == path.stem)
    pytest.importorskip(case.needs)
    monkeypatch.setattr(sys, "argv", [path.name, *command.split(), "--steps", "0"])
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), {"__name__": "__main__"})
    assert "after 0 training steps" in capsys.readouterr().out
