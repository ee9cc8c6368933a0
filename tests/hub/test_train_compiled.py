"""Training with a compiled block."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from trainings import CONFIG, logged, run_training, small_source

from phantomgrad import NeumannPhantom, UnrolledPhantom
from phantomgrad_hub.data import Source
from phantomgrad_hub.train import SolverPhase

# The compiler reads `.grad` of every tensor that it guards, leaf or not, and hides torch's warning only where it is no error.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return small_source(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps one mixed precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The whole of torch.compile but the generated code."""
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixed_precision": "bf16", "channels_last": True},
        {
            "solver_schedule": (
                SolverPhase(until=0.5, solver_steps=2, unrolled=True),
                SolverPhase(until=1.0, solver_steps=3),
            )
        },
    ],
    ids=["float32", "bfloat16, channels last", "unrolled first"],
)
@pytest.mark.parametrize("gradient", [UnrolledPhantom(steps=2, damping=0.7), NeumannPhantom(damping=0.7)], ids=repr)
def test_a_compiled_block_trains_as_a_plain_one_does(
    source: Source, tmp_path: Path, gradient: Any, options: dict[str, Any]
) -> None:
    model = replace(CONFIG.model, gradient=gradient)
    config = replace(CONFIG, model=model, epochs=1, batch_size=18, **options)
    losses = []
    for compile in (False, True):
        run_training(source, tmp_path / str(compile), replace(config, compile=compile))
        losses.append([record["loss"] for record in logged(tmp_path / str(compile), "train")])
    assert len(losses[0]) == 3
    tolerance = 0.02 if "mixed_precision" in options else 1e-5
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2


def test_the_jacobian_penalty_of_a_compiled_block(source: Source, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, batch_size=18, jacobian_penalty=0.1)
    losses = []
    for compile in (False, True):
        run_training(source, tmp_path / str(compile), replace(config, compile=compile))
        losses.append([record["loss"] for record in logged(tmp_path / str(compile), "train")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
