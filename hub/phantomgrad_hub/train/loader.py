"""The training batches of every epoch, from a split that can be indexed or from a stream."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from phantomgrad_hub.data.errors import DataError
from phantomgrad_hub.data.seeds import derive_seed
from phantomgrad_hub.data.sources import ImageSplit, Source
from phantomgrad_hub.data.streaming import StreamedImages, StreamedTraining
from phantomgrad_hub.data.transforms import TrainingImages, keep_batch, train_transform

from .config import TrainConfig
from .errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

Batch = tuple[Tensor, Tensor, Tensor]
"""Images `(B, 3, H, W)` uint8, class indices `(B,)`, and which images stand for unreadable ones `(B,)`."""


class TrainingBatches(Protocol):
    """One process's batches."""

    def __len__(self) -> int:
        """How many an epoch has, the same for every process."""
        ...

    def epoch(self, epoch: int, skip: int) -> Iterable[Batch]:
        """The batches of an epoch but for the first `skip`, on the run's device."""
        ...


def training_batches(config: TrainConfig, source: Source, size: int, accelerator: Accelerator) -> TrainingBatches:
    """Augmented batches of the training split; raises `TrainingError` where it does not fill one for every process."""
    split, images = source.train, config.batch_size * accelerator.num_processes
    if len(split) < images:
        raise TrainingError(f"{len(split)} training images do not fill one batch of {images}; set batch_size lower.")
    kind = StreamedBatches if isinstance(split, StreamedImages) else IndexedBatches
    return kind(config, split, size, accelerator, source.count)  # pyright: ignore[reportArgumentType]


class EpochSampler(Sampler[int]):
    """All indices in an order that depends on the seed and the epoch only."""

    def __init__(self, length: int, seed: int) -> None:
        self._length = length
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of `epoch` from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "order", self._epoch))
        yield from torch.randperm(self._length, generator=generator).tolist()


class IndexedBatches:
    """Batches of a split in memory or on disk; the same ones whenever an epoch is asked for."""

    def __init__(
        self, config: TrainConfig, split: ImageSplit, size: int, accelerator: Accelerator, whole: int | None = None
    ) -> None:
        transform = train_transform(config.augmentation, size)
        self._images = TrainingImages(split, transform, seed=config.seed, memory_gib=config.memory_gib, whole=whole)
        self._sampler = EpochSampler(len(split), config.seed)
        self._accelerator = accelerator
        loader = DataLoader(
            self._images,
            sampler=self._sampler,
            collate_fn=keep_batch,  # pyright: ignore[reportArgumentType]  (typed for a list of samples)
            **_loading(config),
        )
        self._loader: Any = accelerator.prepare(loader)

    def __len__(self) -> int:
        return len(self._loader)

    def epoch(self, epoch: int, skip: int) -> Iterable[Batch]:
        self._sampler.set_epoch(epoch)
        self._images.set_epoch(epoch)
        self._loader.set_epoch(epoch)
        return _in_own_words(self._accelerator.skip_first_batches(self._loader, skip))


class StreamedBatches:
    """Batches of a stream, of which every process reads its own share.

    An epoch has as many batches as the split fills in all, a whole number of optimizer steps; a process whose share ends before
    that goes on with its share in another order.
    """

    def __init__(
        self, config: TrainConfig, split: StreamedImages, size: int, accelerator: Accelerator, whole: int | None = None
    ) -> None:
        self._device = accelerator.device
        self._samples = StreamedTraining(
            split,
            train_transform(config.augmentation, size),
            seed=config.seed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            whole=whole,
        )
        self._size = config.batch_size
        batches = len(split) // (config.batch_size * accelerator.num_processes)
        self._length = max(batches - batches % config.accumulation, min(batches, config.accumulation))
        # More would only be started and ended, and `datasets` warns of them.
        workers = min(config.workers, self._samples.most_workers())
        self._loader: DataLoader[Any] = DataLoader(self._samples, **_loading(replace(config, workers=workers)))

    def __len__(self) -> int:
        return self._length

    def epoch(self, epoch: int, skip: int) -> Iterator[Batch]:
        made, turn = 0, 0
        while made < self._length:
            before = made
            self._samples.start(epoch, turn, max(skip - made, 0), self._size)
            for images, targets, replaced in _in_own_words(self._loader):
                made += 1
                if made > skip:
                    yield images.to(self._device), targets.to(self._device), replaced.to(self._device)
                if made == self._length:
                    return
            if made == before:
                raise DataError(f"this process's share of the stream does not fill one batch of {self._size}.")
            turn += 1


def _in_own_words(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; a `DataError` of a worker process, which torch hands on as a traceback, is its one line again."""
    try:
        yield from batches
        return
    except DataError as error:
        *_, line = str(error).strip().splitlines()
        traceback.clear_frames(error.__traceback__)  # they hold the iterator, and it the workers, which would run on
    raise DataError(line.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: "))


def _loading(config: TrainConfig) -> dict[str, Any]:
    return {
        "batch_size": config.batch_size,
        "drop_last": True,
        "num_workers": config.workers,
        "worker_init_fn": _leave_signals_to_parent,
        "multiprocessing_context": _start_method(config.workers),
    }


def _start_method(workers: int) -> str | None:
    """`fork` where there is one: the workers then read the decoded images in the memory they are in."""
    return "fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None


def _leave_signals_to_parent(worker: int) -> None:
    """A signal to the whole process group must not end the workers before the parent has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
