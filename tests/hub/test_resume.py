"""What a run may be resumed with: the same data and settings, but for those that change no weight."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from images import NAMES, write_folder, write_parquet
from processes_worker import CONFIG
from trainings import at_batch, logged, same_weights

from phantomgrad_hub import MDEQ
from phantomgrad_hub.data import Source, Subset, open_source
from phantomgrad_hub.train import TrainConfig, TrainingError, TrainResult, train
from phantomgrad_hub.train.identity import differences, run_identity
from phantomgrad_hub.train.settings import to_json

ONE = replace(CONFIG, epochs=1)


def _train(data: Path | Source, out: Path, config: TrainConfig = ONE, **options: Any) -> TrainResult:
    source = open_source(data) if isinstance(data, Path) else data
    return train(config, source, out, cpu=True, progress=False, **options)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_folder(folder / "train", 4)
    write_folder(folder / "val", 2, first=50)
    return folder


def _rename_class(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "blue").rename(data / split / "zebra")


def _rename_photo(data: Path) -> None:
    (data / "train" / "red" / "000.png").rename(data / "train" / "red" / "other.png")


def _move_photo(data: Path) -> None:
    (data / "val" / "red" / "050.png").rename(data / "val" / "green" / "new.png")


def _remove_photo(data: Path) -> None:
    (data / "train" / "red" / "000.png").unlink()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_rename_class, "class 0 was 'blue', now 'green' and 2 more"),
        (_rename_photo, "the training images have other file names or classes"),
        (_move_photo, "the validation images have other file names or classes"),
        (_remove_photo, "it had 12 training images, now 11"),
        (lambda data: write_folder(data / "val", 1), "it had 6 validation images, now 9"),
    ],
    ids=["class renamed", "photo renamed", "photo of another class", "photo removed", "photos added"],
)
def test_other_data_is_refused_in_a_line_that_says_what_differs(
    change: Any, what: str, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _train(data, run)
    change(data)
    with pytest.raises(TrainingError) as caught:
        _train(data, run)
    assert str(caught.value) == (
        f"{run} holds a run on other data: {what}. Resume on the data as it was, or give another folder."
    )


def test_the_same_data_elsewhere_is_the_same(data: Path, tmp_path: Path) -> None:
    first = _train(data, tmp_path / "run")
    data.rename(tmp_path / "moved")
    assert _train(tmp_path / "moved", tmp_path / "run") == first


def test_a_run_that_was_written_before_goes_on_and_is_compared_from_then_on(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = _train(data, run)
    stored = json.loads((run / "config.json").read_text())
    stored["data"] = {"train": 12, "validation": 6, "classes": 3}  # what the identity was at first
    (run / "config.json").write_text(json.dumps(stored))
    assert _train(data, run) == first
    _rename_class(data)
    with pytest.raises(TrainingError, match="class 0 was 'blue', now 'green'"):
        _train(data, run)


def test_classes_and_targets_of_parquet_and_streams_are_compared(tmp_path: Path, own_dataset_cache: None) -> None:
    for name, names in (("one", NAMES), ("other", NAMES[::-1])):
        write_parquet(tmp_path / name, "train", 4, names=names)
        write_parquet(tmp_path / name, "validation", 2, names=names, first=20)
    for prefix in ("", "stream:"):
        one, other = (
            run_identity(ONE, open_source(f"{prefix}{tmp_path / name}"), "custom", None) for name in ("one", "other")
        )
        assert one["data"]["class_names"] == list(NAMES)
        assert one["data"]["class_names"] != other["data"]["class_names"]
        assert ("train_sha256" in one["data"]) == (prefix == "")
    assert one["data"]["streamed"]


def test_the_identity_of_a_million_files_takes_seconds(data: Path) -> None:
    source = open_source(data)
    many = replace(source, train=Subset(source.train, [index % 12 for index in range(10**6)]))
    started = time.process_time()
    run_identity(ONE, many, "custom", None)
    assert time.process_time() - started < 10


HARMLESS: dict[str, Any] = {"workers": 1, "log_every": 2, "trackers": ("tensorboard",), "checkpoint_minutes": 3.0}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_what_changes_no_weight_may_change_and_is_logged(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    config = replace(CONFIG, batch_size=3)
    _train(data, whole, config)
    with monkeypatch.context() as patch:
        at_batch(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = _train(data, run, config)
    assert stopped.stopped_by == signal.SIGTERM
    _train(data, run, replace(config, **HARMLESS))
    assert same_weights(run / "last", whole / "last")
    [resumed] = logged(run, "resume")
    assert resumed == {
        "type": "resume",
        "step": stopped.step,
        "changed": {
            f"config.{name}": [to_json(getattr(config, name)), to_json(value)] for name, value in HARMLESS.items()
        },
    }
    assert json.loads((run / "config.json").read_text())["config"]["workers"] == 1


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"validation_batch_size": 3}, "validation_batch_size"),
        ({"validate_every": 2}, "validate_every"),
        ({"seed": 1}, "seed"),
    ],
)
def test_what_changes_the_weights_or_which_are_best_is_refused(
    change: dict[str, Any], key: str, data: Path, tmp_path: Path
) -> None:
    _train(data, tmp_path / "run")
    with pytest.raises(TrainingError, match=rf"another configuration: config\.{key} differs\."):
        _train(data, tmp_path / "run", replace(ONE, workers=0, log_every=7, **change))


def test_the_workers_of_a_stream_are_part_of_its_order(data: Path) -> None:
    one = run_identity(ONE, open_source(data), "custom", None)
    other = run_identity(replace(ONE, workers=2), open_source(data), "custom", None)
    assert differences(one, other) == []
    for identity in (one, other):
        identity["data"]["streamed"] = True
    assert differences(one, other) == ["config.workers"]


def test_a_checkpoint_may_be_spelled_in_another_way(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("start", "other"):
        MDEQ(CONFIG.model).save_pretrained(tmp_path / name)
    first = _train(data, tmp_path / "run", init="start")
    for spelling in ("./start", "start/", tmp_path / "start", Path("other") / ".." / "start"):
        assert _train(data, tmp_path / "run", init=spelling) == first
    with pytest.raises(TrainingError, match="another configuration: init differs"):
        _train(data, tmp_path / "run", init="other")
