"""Training in two processes, by DistributedDataParallel and by FSDP2, against one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from images import write_folder
from processes_worker import CONFIG, run
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", 18)
    write_folder(folder / "val", 4, first=50)
    damaged = folder.with_name(f"{folder.name}-damaged")
    shutil.copytree(folder, damaged)
    (damaged / "val" / "blue" / "051.png").write_bytes(b"garbage")
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of `processes_worker.py` in two processes."""
    out = tmp_path_factory.mktemp("runs")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, str(HERE / "processes_worker.py"), str(data), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def _weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "last" / "model.safetensors")


def _assert_close(one: Path, other: Path, but: str = "$^") -> None:
    first, second = _weights(one), _weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if re.search(but, name):
            continue
        torch.testing.assert_close(
            second[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_every_run_says_that_two_processes_made_it(runs: Path) -> None:
    for name in ("copied", "sharded", "copied-resumed", "sharded-resumed"):
        sessions = json.loads((runs / name / "environment.json").read_text())["sessions"]
        assert [session["processes"] for session in sessions] == ([2, 2] if "resumed" in name else [2])
        assert (runs / name / "result.json").is_file()


@pytest.mark.parametrize("kind", ["copied", "sharded"])
def test_stopped_by_a_signal_to_one_process_and_resumed_it_is_the_same_bit_for_bit(runs: Path, kind: str) -> None:
    whole, resumed = _weights(runs / kind), _weights(runs / f"{kind}-resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", ["copied-plain", "sharded-plain"])
def test_two_processes_take_the_steps_of_one_that_accumulates_both_batches(
    runs: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    run(str(data), tmp_path / "one", replace(CONFIG, accumulation=2))
    # The running statistics of batch norm are those of one process's batches.
    _assert_close(tmp_path / "one", runs / kind, but="running_|num_batches")


def test_sharding_changes_no_step_of_sgd_with_accumulated_batches(runs: Path) -> None:
    _assert_close(runs / "copied-sgd", runs / "sharded-sgd")


def test_a_sharded_run_goes_on_in_one_process(runs: Path, data: Path, tmp_path: Path) -> None:
    state = torch.load(runs / "sharded-plain" / "state" / "state.pt", weights_only=True)
    assert all(type(tensor) is Tensor for tensor in state["model"].values())
    moments = [entry for entries in state["optimizer"]["state"].values() for entry in entries.values()]
    assert moments
    assert all(type(tensor) is Tensor for tensor in moments)
    resumed = run(str(data), runs / "sharded-plain", replace(CONFIG, shard=True))
    assert resumed.evaluation is not None


def test_a_loss_that_is_not_finite_ends_every_process_with_the_same_line(runs: Path) -> None:
    lines = {(runs / f"infinite-{rank}").read_text() for rank in range(2)}
    assert len(lines) == 1
    assert lines.pop().startswith("TrainingError: the loss became nan by step")


def test_a_process_without_an_image_to_validate_takes_part(runs: Path) -> None:
    records = [json.loads(line) for line in (runs / "one-image" / "metrics.jsonl").read_text().splitlines()]
    assert [record["count"] for record in records if record["type"] == "validation"] == [1]
    assert json.loads((runs / "one-image" / "result.json").read_text())["count"] == 12


def test_too_many_unreadable_images_of_one_process_end_all_with_the_same_line(runs: Path) -> None:
    lines = {(runs / f"unreadable-{rank}").read_text() for rank in range(2)}
    assert len(lines) == 1
    assert lines.pop().startswith("DataError: 1 of 6 images to evaluate cannot be read, more than 1% of all 66; ")


def test_fp16_is_not_sharded() -> None:
    with pytest.raises(ValueError, match="shard has no loss scaling: take mixed_precision 'bf16' or 'no'"):
        replace(CONFIG, shard=True, mixed_precision="fp16")
