"""Validation during a run: which images it measures, and what of them may be unreadable."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from images import write_folder, write_parquet
from processes_worker import CONFIG

from phantomgrad_hub import MDEQ
from phantomgrad_hub.data import DataError, Source, open_source
from phantomgrad_hub.train import RECIPES, TrainConfig
from phantomgrad_hub.train.build import StopRequest
from phantomgrad_hub.train.loader import training_batches
from phantomgrad_hub.train.validation import Validation, spread

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


def _validation(source: Source, config: TrainConfig = CONFIG) -> Validation:
    from accelerate import Accelerator

    return Validation(accelerator=Accelerator(cpu=True), config=config, source=source, stop=StopRequest())


def _model(source: Source) -> MDEQ:
    return MDEQ(replace(CONFIG.model, num_classes=len(source.labels)), labels=source.labels)


def test_chosen_images_are_evenly_spaced_over_the_classes_in_whatever_order_they_are_listed() -> None:
    assert spread([0] * 4 + [1] * 4 + [2] * 4, 6) == [0, 2, 4, 6, 8, 10]
    assert spread([0, 1, 2] * 4, 6) == [0, 1, 2, 6, 7, 8]
    assert spread([1, 0, 1, 0], 3) == [0, 1, 3]
    assert spread([0, 0, 1], 3) == [0, 1, 2]
    assert spread([0, 0, 1], 9) == [0, 1, 2]


@pytest.mark.parametrize(
    "write", [write_folder, lambda folder, *args, **more: write_parquet(folder.parent, folder.name, *args, **more)]
)
def test_every_class_has_its_share_of_fewer_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    write(tmp_path / "train", 6)
    write(tmp_path / "val", 8, first=50)
    source = open_source(tmp_path)
    shown: list[int] = []
    image = type(source.validation).image

    def noted(self: Any, index: int) -> Any:
        shown.append(index)
        return image(self, index)

    monkeypatch.setattr(type(source.validation), "image", noted)
    validation = _validation(source, replace(CONFIG, validation_images=12))
    assert validation.measure(_model(source)).count == 12
    assert Counter(source.validation.targets[index] for index in shown) == {0: 4, 1: 4, 2: 4}
    first, shown[:] = sorted(shown), []
    validation.measure(_model(source))
    assert sorted(shown) == first


def test_the_recipe_of_tiny_imagenet_validates_on_five_images_of_every_class(shared: Path) -> None:
    targets = open_source(shared / "data" / "tiny-imagenet").validation.targets
    count = RECIPES["tiny_imagenet"]().validation_images
    assert count is not None
    shares = Counter(targets[index] for index in spread(targets, count))
    assert shares == dict.fromkeys(range(200), 5)


def _spoil(source: Source, split: str, *indices: int) -> None:
    for index in indices:
        Path(getattr(source, split).name(index)).write_bytes(b"garbage")


def test_unreadable_validation_images_are_judged_against_the_whole_dataset(tmp_path: Path) -> None:
    write_folder(tmp_path, 40)
    source = open_source(tmp_path)
    assert (len(source.train), len(source.validation)) == (108, 12)
    _spoil(source, "validation", 7)
    model = _model(source)
    found = _validation(source).measure(model)
    assert (found.count, found.unreadable) == (11, 1)
    _spoil(source, "validation", 4)
    message = r"^2 of 12 images to evaluate cannot be read, more than 1% of all 120; repair or replace them\. The first: \S+green/"
    with pytest.raises(DataError, match=message):
        _validation(source).measure(model)


@pytest.mark.parametrize(
    ("memory_gib", "workers"),
    [(1.0, 0), (0.0, 0), (0.0, 1)],
    ids=["decoded at once", "decoded as needed", "decoded by a worker"],
)
def test_unreadable_training_images_are_judged_against_the_whole_dataset(
    tmp_path: Path, memory_gib: float, workers: int
) -> None:
    from accelerate import Accelerator

    write_folder(tmp_path / "train", 30)
    write_folder(tmp_path / "val", 10, first=50)
    source, config = open_source(tmp_path), replace(CONFIG, memory_gib=memory_gib, workers=workers)

    def seen() -> int:
        batches = training_batches(config, source, 16, Accelerator(cpu=True))
        return sum(int(replaced.sum()) for _, _, replaced in batches.epoch(0, 0))

    _spoil(source, "train", 3)
    assert seen() == 1
    _spoil(source, "train", 60)
    with pytest.raises(
        DataError, match=r"^2 training images of 90 cannot be read, more than 1% of all 120: \S+png, \S+png\."
    ) as caught:
        seen()
    # Whoever keeps the error, as this test does, keeps no worker running.
    assert caught.value.__traceback__ is not None
    assert multiprocessing.active_children() == []


def test_where_no_validation_image_can_be_read_there_is_no_figure(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 40)
    write_folder(tmp_path / "val", 1)
    source = open_source(tmp_path)
    validation = replace(_validation(source), config=replace(CONFIG, validation_images=1))
    _spoil(source, "validation", 0)
    with pytest.raises(DataError, match="none of the images to evaluate can be read"):
        validation.measure(_model(source))


def test_unreadable_images_of_all_processes_are_judged_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path, 40)
    source = open_source(tmp_path)
    _spoil(source, "validation", 3, 8)
    two = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"), gather=lambda number: number)
    other = {"readable": torch.tensor([True, False, True, True, True, True])}  # of the images 1, 3, 5, ...
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, (other, None)])
    validation = replace(_validation(source), accelerator=two)
    with pytest.raises(
        DataError, match=rf"^2 of 12 images .* more than 1% of all 120; .*: {source.validation.name(3)}$"
    ):
        validation.measure(_model(source))
