"""Several trainings in one process, each with its own options of Accelerate."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from images import write_folder
from processes_worker import CONFIG

from phantomgrad_hub.data import Source, open_source
from phantomgrad_hub.train import TrainingError, train

ONE = replace(CONFIG, epochs=1)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    write_folder(tmp_path / "data" / "train", 4)
    write_folder(tmp_path / "data" / "val", 1, first=50)
    return open_source(tmp_path / "data")


@pytest.fixture(autouse=True)
def own_state() -> Generator[None]:
    """No state of Accelerate before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_trainings_of_one_process_may_differ_in_precision(source: Source, tmp_path: Path) -> None:
    for number, precision in enumerate(("no", "bf16", "no")):
        config = replace(ONE, mixed_precision=precision)  # type: ignore[arg-type]
        assert train(config, source, tmp_path / f"run{number}", cpu=True, progress=False).evaluation is not None
        assert not AcceleratorState._shared_state
        assert not PartialState._shared_state


def test_the_callers_own_accelerator_stays_as_it_is(source: Source, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(TrainingError) as caught:
        train(ONE, source, tmp_path / "other", cpu=True, progress=False)
    assert str(caught.value) == (
        "mixed_precision is 'no', but this process has an Accelerator of mixed_precision 'bf16', and Accelerate keeps one for "
        "all: take that, or train in another process."
    )
    assert not (tmp_path / "other").exists()
    train(replace(ONE, mixed_precision="bf16"), source, tmp_path / "run", cpu=True, progress=False)
    assert accelerator.mixed_precision == "bf16"
