"""Monitor with TensorBoard, Accelerate, torch.compile, autocast and recomputed steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from monitored import Log, Model, attached, batch, train
from torch import Tensor, nn

from phantomgrad import UnrolledPhantom, attach
from phantomgrad.diagnostics import Monitor


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show for a folder of event files."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    files = sorted({path.parent for path in folder.rglob("events.out.tfevents*")})
    found: dict[str, list[tuple[int, float]]] = {}
    for each in files:
        events = accumulator.EventAccumulator(str(each)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_through_a_small_lambda(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    writer = tensorboard.SummaryWriter(tmp_path)
    model = attached()

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    Monitor(model, every=2, measure_every=2, log=log)
    train(model, 4)
    writer.close()
    scalars = _scalars(tmp_path)
    assert [step for step, _ in scalars["backbone.cell/solver_steps"]] == [2, 4]
    assert 0 < scalars["backbone.cell/gradient_cosine"][0][1] <= 1
    assert 0 < scalars["backbone.cell/spectral_radius"][0][1] < 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_accelerate_with_its_tensorboard_tracker(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    accelerator = accelerate.Accelerator(log_with="tensorboard", project_dir=tmp_path, cpu=True)
    accelerator.init_trackers("run")
    model = attached()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    with Monitor(model, every=2, measure_every=4, log=accelerator.log):
        for step in range(6):
            loss = model(batch(step)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.end_training()
    scalars = _scalars(tmp_path)
    assert [step for step, _ in scalars["backbone.cell/residual_max"]] == [2, 4, 6]
    assert [step for step, _ in scalars["backbone.cell/gradient_cosine"]] == [4]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own
def test_a_compiled_model_is_watched() -> None:
    model, log = Model(), Log()
    model.dropout.eval()
    attach(model.backbone["cell"])
    Monitor(model, every=2, measure_every=2, log=log)
    compiled = torch.compile(model, backend="eager")
    for step in range(4):
        compiled(batch(step)).sum().backward()
    assert [step for step, _ in log.entries] == [2, 4]
    assert "backbone.cell/gradient_cosine" in log.entries[1][1]


def test_autocast_and_gradient_checkpointing() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.recurrent = nn.Linear(3, 8), nn.Linear(8, 8)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.recurrent(z) + self.inputs(x))

    cell, log = Mixed(), Log()
    attach(cell, UnrolledPhantom(recompute=True))
    Monitor(cell, every=2, measure_every=2, log=log)
    for step in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = cell(torch.zeros(5, 8), batch(step).float())
        z.square().mean().backward()
    assert 0.9 < log.entries[-1][1]["gradient_cosine"] <= 1.0001
