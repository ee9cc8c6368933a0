"""Whether a dataset can be trained on, asked before anything is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phantomgrad_hub.data.errors import DataError
from phantomgrad_hub.data.sources import Source
from phantomgrad_hub.text import summarise

from .config import TrainConfig
from .errors import TrainingError


def check_source(config: TrainConfig, source: Source, out: str | Path | None = None) -> None:
    """Raise one line that says what to do where `source` has too few classes, or too few images for a batch.

    A class is too small as well where its only image cannot be both trained on and held out. A run in `out` must not lie
    where it would change the data.
    """
    if not isinstance(config, TrainConfig):
        raise TrainingError(f"config must be a TrainConfig, such as finetune(), not {type(config).__name__}")
    if not isinstance(source, Source):
        raise TrainingError(f"source must be a Source, such as open_source(FOLDER), not {type(source).__name__}")
    if out is not None:
        _check_place(Path(out), source.class_folders)
    count = len(source.train)
    if len(source.labels) == 1:
        raise DataError(
            f"{source.description}: the only class is {source.labels[0].name!r}, and a classifier needs two. Give a folder "
            "with one subfolder of photos for each class."
        )
    # Asked only then: of a stream, the class indices mean reading all of it.
    trained, shown = (set(source.train.targets), set(source.validation.targets)) if source.held_out else (set(), set())
    if alone := [source.labels[target].name for target in sorted(trained - shown)]:
        raise DataError(
            f"{source.description}: there is a single image of {summarise(alone, 5)} and none to hold out. Add more, or give "
            "folders train and val."
        )
    if count < config.batch_size:
        raise TrainingError(
            f"{count} training images do not fill one batch of {config.batch_size}; add --set batch_size={_fitting(count)}"
        )


def _check_place(out: Path, class_folders: Sequence[Path]) -> None:
    place = out.resolve()
    if folder := next((folder for folder in class_folders if place.is_relative_to(folder.resolve())), None):
        raise TrainingError(
            f"{out} would become a part of the data: the subfolders of {folder} are its classes. Give a folder elsewhere."
        )


def _fitting(count: int) -> int:
    """A power of two that fits `count` images at least four times, or is four, where there are so many."""
    return 1 << max(count // 4, min(count, 4)).bit_length() - 1
