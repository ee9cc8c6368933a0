"""The examples run, learn, settle, and train what computes their input."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from phantomgrad import attachments

EXAMPLES = Path(__file__).parents[1] / "examples"


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["gru", "transformer", "resnet_stage", "huggingface"])
def test_an_example_learns_settles_and_trains_every_weight(name: str) -> None:
    if name == "huggingface":
        pytest.importorskip("transformers", reason="the example uses a layer of transformers")
    example = _load(name)
    torch.manual_seed(0)
    model, figures = example.main(steps=8)
    assert figures["after"] < figures["before"]
    [attachment] = attachments(model)
    assert attachment.solution is not None
    assert attachment.solution.converged.all()
    untrained = [
        parameter_name
        for parameter_name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.numel() > 1 and (parameter.grad is None or not parameter.grad.any())
    ]
    assert not untrained


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 100, path.name
