"""Labelled images from a parquet folder or an image folder, as map-style splits in a fixed order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from phantomgrad_hub.errors import ImageError, LabelError
from phantomgrad_hub.extras import require
from phantomgrad_hub.labels import ClassLabel, check_distinct, imagenet_labels, parse_labels
from phantomgrad_hub.photos import read_photo
from phantomgrad_hub.text import summarise

from .errors import DataError
from .folders import LAYOUT, TABLE_FILE, has_subfolders, said_of, scan_classes, split_folders
from .seeds import derive_seed

if TYPE_CHECKING:
    from PIL.Image import Image

VALIDATION_NAMES = ("validation", "val", "valid", "test")
HELD_OUT_FRACTION = 0.1


class ImageSplit(Protocol):
    """A map-style set of photos in a fixed order.

    `targets` is a list of class indices; `image(i)` decodes photo `i` as RGB; `name(i)` says which one it is.
    """

    @property
    def targets(self) -> list[int]: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image: ...

    def name(self, index: int) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset: its two splits and the classes that `targets` index."""

    train: ImageSplit
    validation: ImageSplit
    labels: tuple[ClassLabel, ...]
    description: str
    """One line: where it is, how many images of how many classes, what was held out and what was left out."""
    name: str = ""
    """What the data is called: `CIFAR-10`, a dataset repository, or the last part of the folder's path."""
    held_out: bool = False
    """Whether the validation images are a part of those given for training, set apart."""
    class_folders: tuple[Path, ...] = ()
    """The folders whose subfolders are classes, or would be if they were there."""

    @property
    def count(self) -> int:
        """How many images there are in both splits."""
        return len(self.train) + len(self.validation)


class ParquetImages:
    """A split stored with the `Image` and `ClassLabel` features of Hugging Face `datasets`."""

    def __init__(self, files: Sequence[Path]) -> None:
        datasets = require("datasets", "train")
        # `Dataset.from_parquet` and not `load_dataset`: the latter reports its use to a server, and gives every
        # split of one call the class names of the first.
        shows_progress = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            rows = datasets.Dataset.from_parquet([str(file) for file in files])
        except Exception as error:  # pyarrow and datasets raise a dozen unrelated types for a damaged file
            raise unreadable_file(_first_damaged(files), error) from error
        finally:
            if shows_progress:
                datasets.enable_progress_bars()
        features = rows.features
        missing = [column for column in ("image", "label") if column not in features]
        if missing:
            raise DataError(
                f"{files[0]} has no column {' and no column '.join(map(repr, missing))}; "
                f"it has {', '.join(map(repr, features))}."
            )
        label = features["label"]
        self.class_names: tuple[str, ...] | None = tuple(label.names) if hasattr(label, "names") else None
        self._rows = rows.cast_column("image", datasets.Image(decode=False))
        self._file = files[0]
        self.targets: list[int] = [int(target) for target in rows["label"]]

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return self._name(index, self._rows[index]["image"])

    def _name(self, index: int, record: dict[str, Any]) -> str:
        stored = f" ({record['path']})" if record.get("path") else ""
        return f"{self._file.parent}/{self._file.name.split('-')[0]} image {index}{stored}"

    def image(self, index: int) -> Image:
        record = self._rows[index]["image"]
        return _decode(record["bytes"], self._name(index, record))


class FolderImages:
    """The photos in the subfolders of `root`, one a class."""

    def __init__(self, root: Path, *, empty: bool = False) -> None:
        found = scan_classes(root, empty=empty)
        self.root = root
        self.class_names: tuple[str, ...] = found.names
        self.ignored = found.ignored
        """Files that are no photos or lie beside the class folders, relative to `root`."""
        self.files = found.files
        """Where each photo is."""
        self.targets: list[int] = list(found.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return self.files[index]

    def image(self, index: int) -> Image:
        try:
            data = Path(self.files[index]).read_bytes()
        except OSError as error:
            raise DataError(f"{self.name(index)} cannot be read: {error.strerror}.") from error
        return _decode(data, self.name(index))


class Subset:
    """Chosen rows of a split, in the given order, their class indices optionally renumbered."""

    def __init__(self, split: ImageSplit, indices: Sequence[int], renumber: Sequence[int] | None = None) -> None:
        self._split = split
        self._indices = list(indices)
        targets = [split.targets[index] for index in self._indices]
        self.targets: list[int] = targets if renumber is None else [renumber[target] for target in targets]

    @property
    def files(self) -> list[str] | None:
        """Where each photo is; None where they are not files."""
        files: Sequence[str] | None = getattr(self._split, "files", None)
        return None if files is None else [files[index] for index in self._indices]

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        return self._split.name(self._indices[index])

    def image(self, index: int) -> Image:
        return self._split.image(self._indices[index])


class Joined:
    """The images of several splits, one after the other."""

    def __init__(self, *splits: ImageSplit) -> None:
        self._places = [(split, index) for split in splits for index in range(len(split))]
        self.targets: list[int] = [target for split in splits for target in split.targets]

    def __len__(self) -> int:
        return len(self.targets)

    def name(self, index: int) -> str:
        split, place = self._places[index]
        return split.name(place)

    def image(self, index: int) -> Image:
        split, place = self._places[index]
        return split.image(place)


def open_source(path: str | Path, *, seed: int = 0) -> Source:
    """Open the dataset at `path`: parquet files, or one subfolder of photos a class.

    Parquet: `train-*.parquet` and `validation-*.parquet` (or `val-`, `valid-`, `test-`). Folders: `train/` and `val/`
    (or `validation/`, `valid/`, `test/`) of class folders, else the class folders themselves. Without a validation split
    a tenth of each class is held out, chosen by `seed`. A `classes.json` in the folder (rows with `label`, `wnid`, `name`)
    names the classes; WordNet ids of ImageNet-1k are known without. With a prefix, `cifar10:FOLDER`, `imagenette:FOLDER` or
    `imagenet:FOLDER`: as torchvision lays these out. `user/name`, where no such folder is here, is a dataset of the Hub, and
    `stream:FOLDER` a folder of parquet files, read as a stream. Raises `DataError` where `path` holds no such dataset.
    """
    from .library import LIBRARY, open_library
    from .streaming import is_repository, open_stream

    prefix, separator, rest = str(path).partition(":")
    known = bool(separator) and prefix in (*LIBRARY, "stream")
    if not (rest if known else str(path)).strip():
        raise DataError(f"dataset {str(path)!r} names no folder; give one of parquet files, or of {LAYOUT}.")
    if separator and prefix in LIBRARY:
        return open_library(prefix, Path(rest))
    if separator and prefix == "stream":
        return open_stream(rest)
    root = Path(path)
    # Where the folder above is here, a folder is meant.
    if not root.exists() and not root.parent.is_dir() and is_repository(str(path)):
        return open_stream(str(path))
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"dataset {root} {what}; give a folder of parquet files, or of {LAYOUT}.")
    parquet = sorted(root.glob("*.parquet"))
    train, validation, notes = _open_parquet(root, parquet) if parquet else _open_folders(root)
    folders: tuple[Path, ...] = ()
    if isinstance(train, FolderImages):
        folders = (root,) if train.root == root else tuple(root / name for name in ("train", *VALIDATION_NAMES))
    names = train.class_names
    if names is None:
        names = tuple(str(row["label"]) for row in _class_table(root))
    if not names:
        raise DataError(f"{root}: the label column has no class names; add a classes.json with label, wnid and name.")
    labels = _labels(root, names)
    _check_targets(train, len(labels), root)
    classes = f"{len(labels)} classes" if len(labels) > 1 else "1 class"
    if validation is None:
        kept, held_out = _hold_out(train.targets, seed)
        return Source(
            train=Subset(train, kept),
            validation=Subset(train, held_out),
            labels=labels,
            description=f"{root}: {len(kept)} training images of {classes}, a held-out tenth ({len(held_out)}) for "
            f"validation{notes}",
            name=root.resolve().name,
            held_out=True,
            class_folders=folders,
        )
    _check_targets(validation, len(validation.class_names or labels), root)
    renumbered = _renumbered(validation, names, root)
    shown = set(renumbered.targets)
    if unseen := [label.name for index, label in enumerate(labels) if index not in shown]:
        notes = f"; no validation image of {summarise(unseen, 3)}{notes}"
    return Source(
        train=train,
        validation=renumbered,
        labels=labels,
        description=f"{root}: {len(train)} training images of {classes}, {len(validation)} for validation{notes}",
        name=root.resolve().name,
        class_folders=folders,
    )


def _open_parquet(root: Path, files: list[Path]) -> tuple[ParquetImages, ParquetImages | None, str]:
    """The splits, and what the description says of them."""

    def matching(prefix: str) -> list[Path]:
        return [file for file in files if file.name.startswith(f"{prefix}-") or file.stem == prefix]

    train = matching("train")
    if not train:
        raise DataError(f"{root} has no train-*.parquet; it has {summarise((file.name for file in files), 5)}.")
    validation = next((found for name in VALIDATION_NAMES if (found := matching(name))), [])
    used = {*train, *validation}
    notes = said_of(file.name for file in files if file not in used)
    return ParquetImages(train), ParquetImages(validation) if validation else None, notes


def _open_folders(root: Path) -> tuple[FolderImages, FolderImages | None, str]:
    """The splits, and what the description says of them."""
    if not has_subfolders(root / "train"):  # a class may be called train
        images = FolderImages(root)
        return images, None, said_of(images.ignored)
    validation, beside = split_folders(root, VALIDATION_NAMES)
    train = FolderImages(root / "train")
    ignored = [*beside, *(f"train/{name}" for name in train.ignored)]
    if validation is None:
        return train, None, said_of(ignored)
    images = FolderImages(validation, empty=True)
    return train, images, said_of([*ignored, *(f"{validation.name}/{name}" for name in images.ignored)])


def _class_table(root: Path) -> list[dict[str, Any]]:
    file = root / TABLE_FILE
    if not file.is_file():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        table = sorted(({"label": int(row["label"]), **row} for row in rows), key=lambda row: row["label"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a list of rows with label, wnid and name: {_first_line(error)}.") from error
    for row in table:
        name = row.get("name", row["label"])
        if not (type(name) is int or (isinstance(name, str) and name.strip())):
            raise DataError(f"{file}: the name of class {row['label']} must be a text, not {name!r:.60}.")
    return table


def _labels(root: Path, names: tuple[str, ...]) -> tuple[ClassLabel, ...]:
    """The label records of the classes `names`, described by `classes.json` or by ImageNet's names of WordNet ids."""
    rows = _class_table(root)
    known = {label.id: label for label in imagenet_labels()}
    described = {str(row["label"]): row for row in rows} | {str(row["wnid"]): row for row in rows if "wnid" in row}
    try:
        labels = [
            ClassLabel(name=str(row.get("name", name)), id=row.get("wnid"))
            if (row := described.get(name))
            else known.get(name, ClassLabel(name=name))
            for name in names
        ]
        parsed = parse_labels(labels)
        check_distinct(parsed)
        return parsed
    except LabelError as error:
        raise DataError(f"{root}: {error}.") from error


def _check_targets(split: ImageSplit, classes: int, root: Path) -> None:
    if not len(split):
        raise DataError(f"{root}: a split has no images.")
    wrong = [index for index, target in enumerate(split.targets) if not 0 <= target < classes]
    if wrong:
        raise DataError(f"{split.name(wrong[0])} has label {split.targets[wrong[0]]}, but there are {classes} classes.")


def _renumbered(validation: ParquetImages | FolderImages, names: tuple[str, ...], root: Path) -> ImageSplit:
    """`validation` with its class indices those of the training split, matched by name."""
    if validation.class_names is None or validation.class_names == names:
        return validation
    unknown = [name for name in validation.class_names if name not in names]
    if unknown:
        raise DataError(
            f"{root}: validation has classes that training lacks: {summarise(unknown, 5)}; both must name a class alike."
        )
    return Subset(validation, range(len(validation)), [names.index(name) for name in validation.class_names])


def _hold_out(targets: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Indices kept and held out: a tenth of every class, at least one of each class that has two images."""
    by_class: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        by_class.setdefault(target, []).append(index)
    held_out: list[int] = []
    for target, members in by_class.items():
        generator = torch.Generator().manual_seed(derive_seed("hold out", seed, target))
        order = torch.randperm(len(members), generator=generator).tolist()
        count = max(round(len(members) * HELD_OUT_FRACTION), 1 if len(members) > 1 else 0)
        held_out += [members[position] for position in order[:count]]
    chosen = set(held_out)
    return [index for index in range(len(targets)) if index not in chosen], sorted(held_out)


def unreadable_file(file: Path, error: Exception) -> DataError:
    """What to say of a parquet file that pyarrow does not read."""
    return DataError(f"{file.parent}: cannot read {file.name}: {_first_line(error)}. Fetch or write it again.")


def _first_damaged(files: Sequence[Path]) -> Path:
    """The first of the parquet files whose metadata cannot be read, or else the first of all."""
    parquet = require("pyarrow.parquet", "train")
    for file in files:
        try:
            parquet.read_metadata(file)
        except Exception:  # as above
            return file
    return files[0]


def _decode(data: bytes, name: str) -> Image:
    try:
        return read_photo(data)
    except ImageError as error:
        raise DataError(f"{name}: {error}.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
