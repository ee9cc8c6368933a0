"""Datasets read as a stream, shared by processes, and training on them."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from images import NAMES, write_parquet
from processes_worker import CONFIG
from safetensors.torch import load_file

from phantomgrad_hub.data import DataError, Source, open_source, streaming
from phantomgrad_hub.data.streaming import StreamedImages, StreamedTraining
from phantomgrad_hub.train import train
from phantomgrad_hub.train.loader import StreamedBatches

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    # How long datasets waits for its threads at the end of every shuffled stream.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
    write_parquet(tmp_path / "data", "train", 18)
    write_parquet(tmp_path / "data", "validation", 4, first=50)
    return tmp_path / "data"


def _split(source: Source) -> StreamedImages:
    assert isinstance(source.train, StreamedImages)
    return source.train


def test_a_stream_has_the_images_and_classes_of_the_stored_dataset(folder: Path) -> None:
    stored, stream = open_source(folder), open_source(f"stream:{folder}")
    assert stream.labels == stored.labels
    for ours, theirs in ((stream.train, stored.train), (stream.validation, stored.validation)):
        assert len(ours) == len(theirs)
        assert ours.targets == theirs.targets
        for index in (0, 3, 1, len(theirs) - 1, 0):  # in order or not
            assert ours.image(index).tobytes() == theirs.image(index).tobytes()


def test_a_stream_travels_to_worker_processes(folder: Path) -> None:
    split = _split(open_source(f"stream:{folder}"))
    split.image(5)
    copied = _sent(split)
    assert copied.image(2).tobytes() == split.image(2).tobytes()


def _sent(split: StreamedImages) -> StreamedImages:
    state = pickle.loads(pickle.dumps({name: value for name, value in split.__getstate__().items() if name != "_open"}))
    other = StreamedImages.__new__(StreamedImages)
    other.__setstate__({**state, "_open": split._open})
    return other


def _drawn(split: StreamedImages, epoch: int, process: int = 0, processes: int = 1) -> list[bytes]:
    samples = StreamedTraining(split, lambda image: image, seed=3, process=process, processes=processes)
    samples.start(epoch, 0)
    return [image.numpy().tobytes() for image, _, _ in samples]


def test_every_process_reads_a_share_in_an_order_of_the_epochs_own(folder: Path) -> None:
    split = _split(open_source(f"stream:{folder}"))
    everything = {split.image(index).tobytes() for index in range(len(split))}
    whole = _drawn(split, 0)
    assert len(whole) == len(split) == 54
    assert whole == _drawn(split, 0)
    assert whole != _drawn(split, 1)
    assert sorted(whole) == sorted(_drawn(split, 1))
    halves = [_drawn(split, 0, process, 2) for process in range(2)]
    assert [len(half) for half in halves] == [27, 27]
    assert sorted(halves[0] + halves[1]) == sorted(whole)
    assert len(set(whole)) == len(everything)


def test_training_on_a_stream_learns_and_resumes_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, epochs=3, batch_size=9)
    result = train(config, open_source(f"stream:{folder}"), tmp_path / "whole", cpu=True, progress=False)
    assert result.evaluation is not None
    assert result.evaluation.count == 12
    assert result.step == 18

    epoch = StreamedBatches.epoch

    def failing(self: StreamedBatches, number: int, skip: int) -> Any:
        for index, batch in enumerate(epoch(self, number, skip)):
            if (number, index) == (1, 2):
                raise KeyboardInterrupt
            yield batch

    always = replace(config, checkpoint_minutes=1e-9)
    with monkeypatch.context() as patched:
        patched.setattr(StreamedBatches, "epoch", failing)
        with pytest.raises(KeyboardInterrupt):
            train(always, open_source(f"stream:{folder}"), tmp_path / "cut", cpu=True, progress=False)
    train(always, open_source(f"stream:{folder}"), tmp_path / "cut", cpu=True, progress=False)
    whole, cut = (load_file(tmp_path / run / "last" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


def test_worker_processes_read_every_image_once(folder: Path) -> None:
    from accelerate import Accelerator

    split = _split(open_source(f"stream:{folder}"))
    config = replace(
        CONFIG,
        batch_size=6,
        workers=1,
        augmentation=replace(CONFIG.augmentation, crop="none", flip=False, color_jitter=0),
    )
    batches = StreamedBatches(config, split, 16, Accelerator(cpu=True))
    assert len(batches) == 9
    found = [image.numpy().tobytes() for images, _, _ in batches.epoch(0, 0) for image in images]
    assert sorted(found) == sorted(_drawn(split, 0))


def _shards(folder: Path, *counts: int) -> StreamedImages:
    """A stream of as many files, with so many images of each class."""
    for file in folder.glob("train-*"):
        file.unlink()
    for number, count in enumerate(counts):
        write_parquet(folder, "train", count, first=20 * number)
        (folder / "train-00000-of-00001.parquet").rename(folder / f"train-{number}.parquet")
    return _split(open_source(f"stream:{folder}"))


def _batches(split: StreamedImages, workers: int, size: int = 3) -> StreamedBatches:
    from accelerate import Accelerator

    return StreamedBatches(replace(CONFIG, batch_size=size, workers=workers), split, 16, Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("counts", "workers"), [((6,), 0), ((6,), 2), ((3, 3), 2), ((3, 3), 3), ((2, 3, 2), 2)], ids=str
)
def test_an_epoch_goes_on_after_any_batch_whatever_the_workers(
    folder: Path,
    counts: tuple[int, ...],
    workers: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    batches = _batches(_shards(folder, *counts), workers)
    whole = [(images.numpy().tobytes(), targets.tolist()) for images, targets, _ in batches.epoch(0, 0)]
    assert len(whole) == len(batches) == sum(counts)
    for skip in (1, 2, 4):
        rest = [(images.numpy().tobytes(), targets.tolist()) for images, targets, _ in batches.epoch(0, skip)]
        assert rest == whole[skip:]
    assert not caplog.messages


def test_what_is_left_out_is_not_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = streaming._decode

    def counted(data: bytes, name: str) -> Any:
        decoded.append(name)
        return decode(data, name)

    batches = _batches(_split(open_source(f"stream:{folder}")), 0, size=9)
    monkeypatch.setattr("phantomgrad_hub.data.streaming._decode", counted)
    assert len(list(batches.epoch(0, 4))) == 2
    assert len(decoded) == 18


def test_unreadable_images_are_judged_by_the_workers_that_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = _shards(folder, 20)
    monkeypatch.setattr("phantomgrad_hub.data.streaming.MOST_UNREADABLE", 0.05)  # of 60, all read by one of the workers
    decode, bad = streaming._decode, [1, 5, 7]

    def spoilt(data: bytes, name: str) -> Any:
        if any(name.startswith(f"{folder} train image {index} ") for index in bad):
            raise DataError("no image")
        return decode(data, name)

    monkeypatch.setattr("phantomgrad_hub.data.streaming._decode", spoilt)
    assert sum(int(replaced.sum()) for _, _, replaced in list(_batches(split, 2).epoch(0, 0))[:19]) == 3
    bad.append(9)
    with pytest.raises(DataError, match=r"^4 training images of this process cannot be read, more than 5%"):
        list(_batches(split, 2).epoch(0, 0))


def test_a_share_that_ends_early_goes_on_in_another_order(folder: Path) -> None:
    from accelerate import Accelerator

    batches = StreamedBatches(
        replace(CONFIG, batch_size=6), _split(open_source(f"stream:{folder}")), 16, Accelerator(cpu=True)
    )
    batches._length = 12  # of which the share fills 9
    targets = [batch[1].tolist() for batch in batches.epoch(0, 0)]
    assert len(targets) == 12
    assert targets[9:] != targets[:3]
    assert [batch[1].tolist() for batch in batches.epoch(0, 4)] == targets[4:]


def test_unreadable_images_are_replaced_by_the_next_and_too_many_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = _split(open_source(f"stream:{folder}"))
    rows = split.rows

    def damaged(count: int) -> Any:
        def opened(**options: Any) -> Any:
            for index, row in enumerate(rows(**options)):
                yield {**row, "image": {"bytes": b"no image"}} if index in range(3, 3 + count) else row

        return opened

    monkeypatch.setattr("phantomgrad_hub.data.streaming.MOST_UNREADABLE", 0.05)
    monkeypatch.setattr(split, "rows", damaged(2))
    samples = StreamedTraining(split, lambda image: image, seed=3, process=0, processes=1)
    replaced = [bool(flag) for _, _, flag in samples]
    assert [index for index, flag in enumerate(replaced) if flag] == [3]
    assert len(replaced) == 52
    monkeypatch.setattr(split, "rows", damaged(3))
    with pytest.raises(DataError, match="3 training images of this process cannot be read, more than 5%"):
        list(samples)


def test_a_name_with_a_slash_that_is_no_folder_is_a_dataset_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def load(name: str, *, split: str, streaming: bool, columns: list[str] | None) -> Any:
        assert (name, streaming) == ("user/photos", True)
        [file] = folder.glob(f"{split}-*")
        return datasets.IterableDataset.from_parquet(str(file), columns=columns)

    builder = SimpleNamespace(info=SimpleNamespace(splits=None))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: builder)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("user/photos")
    assert [label.name for label in source.labels] == list(NAMES)
    assert len(source.train) == 54  # counted, where the Hub does not say
    assert source.description == "user/photos: 54 training images, 12 for validation, streamed"
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
    with pytest.raises(DataError, match="user/photos has the splits train; train and validation"):
        open_source("user/photos")


def test_what_cannot_be_streamed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(name: str) -> Any:
        raise ConnectionError("the Hub is not there.\nTrace")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    with pytest.raises(
        DataError,
        match=r"dataset user/photos is no folder here and cannot be opened on the Hub: the Hub is not there. Check",
    ):
        open_source("user/photos")
    tmp_path.joinpath("empty").mkdir()
    with pytest.raises(DataError, match=r"has no train-.*parquet with a validation"):
        open_source(f"stream:{tmp_path / 'empty'}")
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / f"{split}-0.parquet"))
    with pytest.raises(DataError, match="has no column of type Image and none of type ClassLabel; it has text: Value"):
        open_source(f"stream:{tmp_path}")
