"""Where a run may lie beside its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from images import write_folder, write_parquet
from processes_worker import CONFIG

from phantomgrad_hub.data import open_source
from phantomgrad_hub.train import TrainingError, check_source

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


@pytest.mark.parametrize("split", [None, "train"])
@pytest.mark.parametrize("inside", ["run", "runs/one", "red/run", "../link/run"])
def test_a_run_among_the_class_folders_is_refused(tmp_path: Path, split: str | None, inside: str) -> None:
    folder = tmp_path / "data" / (split or "")
    write_folder(folder, 12)
    (folder.parent / "link").symlink_to(folder)
    message = rf"^{folder / inside} would become a part of the data: the subfolders of {folder} are its classes"
    with pytest.raises(TrainingError, match=message):
        check_source(CONFIG, open_source(tmp_path / "data"), folder / inside)
    assert not (folder / inside).exists()


def test_a_relative_path_is_seen_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "data", 12)
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(
        TrainingError, match=r"^run would become a part of the data: the subfolders of \. are its classes"
    ):
        check_source(CONFIG, open_source("."), "run")


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_run_that_would_count_as_a_split_is_refused(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "train", 12)
    message = (
        rf"^{tmp_path / name} would become a part of the data: the subfolders of {tmp_path / name} are its classes"
    )
    with pytest.raises(TrainingError, match=message):
        check_source(CONFIG, open_source(tmp_path), tmp_path / name)


def test_a_run_beside_the_splits_or_beside_the_data_is_not(tmp_path: Path) -> None:
    write_folder(tmp_path / "data" / "train", 12)
    write_folder(tmp_path / "data" / "val", 2)
    write_parquet(tmp_path / "parquet", "train", 12)
    config = replace(CONFIG, batch_size=2)
    check_source(config, open_source(tmp_path / "data"), tmp_path / "data" / "run")
    check_source(config, open_source(tmp_path / "data"), tmp_path / "run")
    check_source(config, open_source(tmp_path / "parquet"), tmp_path / "parquet" / "run")
