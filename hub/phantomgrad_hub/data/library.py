"""Datasets that torchvision knows how to read, once they are on disk: `cifar10:ROOT`, `imagenette:ROOT`, `imagenet:ROOT`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phantomgrad_hub.extras import require
from phantomgrad_hub.labels import ClassLabel, parse_labels

from .errors import DataError
from .sources import ImageSplit, Source

if TYPE_CHECKING:
    from PIL.Image import Image


class TorchvisionImages:
    """A split of a torchvision dataset."""

    def __init__(self, dataset: Any, targets: Sequence[int], name: str) -> None:
        self._dataset = dataset
        self._name = name
        self.targets: list[int] = list(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return f"{self._name} image {index}"

    def image(self, index: int) -> Image:
        try:
            return self._dataset[index][0].convert("RGB")
        except OSError as error:
            raise DataError(f"{self.name(index)}: {error}.") from error


def _cifar10(root: Path) -> tuple[ImageSplit, ImageSplit, tuple[ClassLabel, ...]]:
    kind = require("torchvision.datasets", "train").CIFAR10
    train, test = kind(root, train=True), kind(root, train=False)
    labels = parse_labels([ClassLabel(name=name) for name in train.classes])
    return (
        TorchvisionImages(train, train.targets, f"{root} train"),
        TorchvisionImages(test, test.targets, f"{root} test"),
        labels,
    )


def _imagenette(root: Path) -> tuple[ImageSplit, ImageSplit, tuple[ClassLabel, ...]]:
    kind = require("torchvision.datasets", "train").Imagenette
    train, val = kind(root, split="train"), kind(root, split="val")
    return (
        TorchvisionImages(train, [target for _, target in train._samples], f"{root} train"),
        TorchvisionImages(val, [target for _, target in val._samples], f"{root} val"),
        _named(train.wnids, train.classes),
    )


def _imagenet(root: Path) -> tuple[ImageSplit, ImageSplit, tuple[ClassLabel, ...]]:
    kind = require("torchvision.datasets", "train").ImageNet
    train, val = kind(root, split="train"), kind(root, split="val")
    return (
        TorchvisionImages(train, train.targets, f"{root} train"),
        TorchvisionImages(val, val.targets, f"{root} val"),
        _named(train.wnids, train.classes),
    )


def _named(wnids: Sequence[str], classes: Sequence[Sequence[str]]) -> tuple[ClassLabel, ...]:
    """ImageNet's classes by their first name; where two share it by all their names, and if need be by their WordNet id."""
    first, full = [names[0] for names in classes], [", ".join(names) for names in classes]
    labels = []
    for wnid, short, long in zip(wnids, first, full, strict=True):
        name = short if first.count(short) == 1 else long if full.count(long) == 1 else f"{long} ({wnid})"
        labels.append(ClassLabel(name=name, id=wnid))
    return parse_labels(labels)


LIBRARY: dict[str, Callable[[Path], tuple[ImageSplit, ImageSplit, tuple[ClassLabel, ...]]]] = {
    "cifar10": _cifar10,
    "imagenette": _imagenette,
    "imagenet": _imagenet,
}
"""The datasets by the prefix that stands before their folder."""


def open_library(name: str, root: Path) -> Source:
    """The dataset `name` under `root`, as torchvision lays it out; nothing is downloaded."""
    try:
        train, validation, labels = LIBRARY[name](root)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{root} does not hold {name} as torchvision lays it out: {reason}. {_SOURCES[name]}"
        ) from error
    description = f"{name} in {root}: {len(train)} training images, {len(validation)} for validation"
    return Source(train=train, validation=validation, labels=labels, description=description, name=_NAMES[name])


_NAMES = {"cifar10": "CIFAR-10", "imagenette": "Imagenette", "imagenet": "ImageNet-1k"}
_SOURCES = {
    "cifar10": "torchvision.datasets.CIFAR10(FOLDER, download=True) fetches it.",
    "imagenette": "torchvision.datasets.Imagenette(FOLDER, download=True) fetches it.",
    "imagenet": "Its archives come from image-net.org.",
}
