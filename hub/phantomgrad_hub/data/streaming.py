"""Datasets read as a stream, from the Hub or from parquet files, so that nothing need be stored or fit in memory."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from phantomgrad_hub.errors import LabelError
from phantomgrad_hub.extras import require
from phantomgrad_hub.labels import ClassLabel, check_distinct, parse_labels

from .errors import DataError
from .seeds import derive_seed
from .sources import VALIDATION_NAMES, Source, _decode, _first_line, unreadable_file
from .transforms import MOST_UNREADABLE, Transform, to_uint8

if TYPE_CHECKING:
    from PIL.Image import Image

SHUFFLE_BUFFER = 10_000
"""How many images a process holds, undecoded, to draw the next one from."""
_KEPT = 256
"""Rows kept for readers that do not ask in order, such as two threads."""

Rows = Callable[[list[str] | None], Any]
"""Opens a `datasets.IterableDataset` with these columns, or all of them."""


class StreamedImages:
    """A split that is read from its start to its end: an `ImageSplit` for readers that go through it in order."""

    def __init__(self, rows: Rows, name: str, count: int | None) -> None:
        datasets = require("datasets", "train")
        self._open, self._name, self._count = rows, name, count
        features = rows(None).features or {}
        columns = {
            kind: next((key for key, feature in features.items() if isinstance(feature, getattr(datasets, kind))), None)
            for kind in ("Image", "ClassLabel")
        }
        if missing := [kind for kind, column in columns.items() if column is None]:
            raise DataError(
                f"{name} has no column of type {' and none of type '.join(missing)}; it has "
                f"{', '.join(f'{key}: {type(feature).__name__}' for key, feature in features.items()) or 'none'}."
            )
        self._image, self._label = str(columns["Image"]), str(columns["ClassLabel"])
        self.class_names: tuple[str, ...] = tuple(features[self._label].names)
        self._targets: list[int] | None = None
        self._lock = threading.Lock()
        self._rewind()

    def __len__(self) -> int:
        return len(self.targets) if self._count is None else self._count

    @property
    def targets(self) -> list[int]:
        """The class indices, for which the column of labels is read to its end once."""
        if self._targets is None:
            with self.reading():
                self._targets = [int(row[self._label]) for row in self._open([self._label])]
        return self._targets

    def rows(self, *, seed: int | None = None, process: int = 0, processes: int = 1) -> Any:
        """This process's share of the split, undecoded: rows of `image` and `label`; in a random order where `seed` is given."""
        datasets = require("datasets", "train")
        rows = self._open([self._image, self._label]).cast_column(self._image, datasets.Image(decode=False))
        rows = rows.rename_columns(
            {old: new for old, new in ((self._image, "image"), (self._label, "label")) if old != new}
        )
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        if processes > 1:
            rows = require("datasets.distributed", "train").split_dataset_by_node(rows, process, processes)
        return rows

    @contextmanager
    def reading(self) -> Generator[None, None, None]:
        """What goes wrong while rows are read, as a `DataError`."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:  # pyarrow, datasets and the Hub's client raise a dozen unrelated types
            raise DataError(
                f"{self._name} cannot be read: {_first_line(error)}. Check the file, or the connection to the Hub."
            ) from error

    def name(self, index: int) -> str:
        return f"{self._name} image {index}"

    def image(self, index: int) -> Image:
        """Photo `index`; asking for one that lies far back starts the stream anew."""
        with self._lock:
            if index < self._position and index not in self._kept:
                self._rewind()
            while self._position <= index:
                with self.reading():
                    self._kept[self._position] = next(self._stream)["image"]
                self._kept.pop(self._position - _KEPT, None)
                self._position += 1
            record = self._kept[index]
        return _decode(record["bytes"], self.name(index))

    def _rewind(self) -> None:
        self._position, self._kept = 0, dict[int, Any]()
        self._stream: Iterator[Any] = iter(self.rows())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_stream", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._rewind()


class StreamedTraining(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """One process's share of a streamed split as augmented samples.

    A sample is an image `(3, size, size)` uint8, its class index, and whether it stands for images that could not be read: the
    next readable one comes in their place, and more than this share of 1 % of `whole` images, or of the split, raise a
    `DataError`. The order depends on the seed, the epoch and the round only.
    """

    def __init__(
        self,
        split: StreamedImages,
        transform: Transform,
        *,
        seed: int,
        process: int,
        processes: int,
        whole: int | None = None,
    ) -> None:
        self._split = split
        self._whole = len(split) if whole is None else whole
        self._transform = transform
        self._seed = seed
        self._process, self._processes = process, processes
        self._epoch = self._round = self._blank_batches = 0
        self._size = 1

    def start(self, epoch: int, turn: int, blank_batches: int = 0, size: int = 1) -> None:
        """Take the order of this epoch and turn.

        Images of the first `blank_batches` batches of `size` samples come blank and are not decoded. They do come, so that
        the workers take turns as ever: which of them made a batch depends on which of them still have images.
        """
        self._epoch, self._round = epoch, turn
        self._blank_batches, self._size = blank_batches, size

    def most_workers(self) -> int:
        """How many workers have something to read: each file is read by one."""
        return self._split.rows(process=self._process, processes=self._processes).num_shards

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        seed = derive_seed(self._seed, "order", self._epoch, self._round) % 2**32
        rows = self._split.rows(seed=seed, process=self._process, processes=self._processes)
        unreadable, replaced = 0, False
        blank = self._size * len(range(number, self._blank_batches, workers))
        for position, row in enumerate(self._read(rows)):
            if position < blank:
                yield torch.zeros(3, 1, 1, dtype=torch.uint8), torch.tensor(row["label"]), torch.tensor(False)
                continue
            try:
                image = to_uint8(
                    _decode(row["image"]["bytes"], f"{self._split.name(position)} of process {self._process}")
                )
            except DataError as error:
                unreadable, replaced = unreadable + 1, True
                if unreadable > MOST_UNREADABLE * self._whole / (self._processes * workers):
                    raise DataError(
                        f"{unreadable} training images of this process cannot be read, more than {MOST_UNREADABLE:.0%}. "
                        f"The last: {error}"
                    ) from error
                continue
            with torch.random.fork_rng(devices=[]):
                place = (self._seed, self._epoch, self._round, self._process, number, position)
                torch.default_generator.manual_seed(derive_seed(*place))
                varied = self._transform(image)
            yield varied, torch.tensor(row["label"]), torch.tensor(replaced)
            replaced = False

    def _read(self, rows: Any) -> Iterator[Any]:
        with self._split.reading():
            stream = iter(rows)
        while True:
            with self._split.reading():
                row = next(stream, None)
            if row is None:
                return
            yield row


def is_repository(name: str) -> bool:
    """Whether this looks like the name of a repository: `user/name`."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def open_stream(where: str) -> Source:
    """The dataset `where`, a folder of parquet files or a dataset repository of the Hub, as a stream.

    Its `train` split and its `validation`, `val` or `test`, in this order, each with an image and a class label column.
    """
    folder = Path(where)
    train, validation = _open_folder(folder) if folder.is_dir() else _open_repository(where)
    if validation.class_names != train.class_names:
        raise DataError(f"{where}: the splits have different class names.")
    try:
        labels = parse_labels(_unique(train.class_names))
        check_distinct(labels)
    except LabelError as error:
        raise DataError(f"{where}: {error}.") from error
    return Source(
        train=train,
        validation=validation,
        labels=labels,
        description=f"{where}: {len(train)} training images, {len(validation)} for validation, streamed",
        name=folder.resolve().name if folder.is_dir() else where,
    )


def _unique(names: Sequence[str]) -> list[ClassLabel]:
    """Labels of these names, which are numbered where two classes share one."""
    return [
        ClassLabel(name=name if names.count(name) == 1 else f"{name} (class {index})")
        for index, name in enumerate(names)
    ]


def _open_folder(folder: Path) -> tuple[StreamedImages, StreamedImages]:
    datasets, parquet = require("datasets", "train"), require("pyarrow.parquet", "train")

    def split(name: str) -> StreamedImages | None:
        files = [
            str(file)
            for file in sorted(folder.glob("*.parquet"))
            if file.name.startswith(f"{name}-") or file.stem == name
        ]
        if not files:
            return None
        count = 0
        for file in files:
            try:
                count += parquet.read_metadata(file).num_rows
            except Exception as error:  # pyarrow raises a dozen unrelated types for a damaged file
                raise unreadable_file(Path(file), error) from error
        return StreamedImages(
            lambda columns: datasets.IterableDataset.from_parquet(files, columns=columns), f"{folder} {name}", count
        )

    train = split("train")
    validation = next((found for name in VALIDATION_NAMES if (found := split(name))), None)
    if train is None or validation is None:
        raise DataError(f"{folder} has no train-*.parquet with a validation-*.parquet (or val-, test-) beside it.")
    return train, validation


def _open_repository(name: str) -> tuple[StreamedImages, StreamedImages]:
    datasets = require("datasets", "train")
    try:
        splits = datasets.get_dataset_split_names(name)
        info = datasets.load_dataset_builder(name).info
    except Exception as error:  # requests, the Hub's client and datasets raise a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"dataset {name} is no folder here and cannot be opened on the Hub: {reason}. Check the name; a gated one needs "
            "its terms accepted and `hf auth login`."
        ) from error
    validation = next((split for split in VALIDATION_NAMES if split in splits), None)
    if "train" not in splits or validation is None:
        raise DataError(
            f"dataset {name} has the splits {', '.join(splits)}; train and validation (or val, test) are needed."
        )

    def split(split: str) -> StreamedImages:
        known = (info.splits or {}).get(split)
        return StreamedImages(
            lambda columns: datasets.load_dataset(name, split=split, streaming=True, columns=columns),
            f"{name} {split}",
            known.num_examples if known is not None and known.num_examples else None,
        )

    return split("train"), split(validation)
