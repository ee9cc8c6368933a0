"""Datasets from parquet files and folders, and their augmentation."""

from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from images import NAMES, picture, write_class_table, write_folder, write_parquet

from phantomgrad_hub.data import AugmentationConfig, DataError, Subset, TrainingImages, open_source, train_transform
from phantomgrad_hub.data.transforms import batch_transform, decode_all
from phantomgrad_hub.labels import ClassLabel

pytestmark = pytest.mark.usefixtures("own_dataset_cache")


def test_parquet_folder_has_the_images_labels_and_names_that_were_written(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", "train", 4)
    write_parquet(tmp_path / "data", "test", 2, first=10)
    source = open_source(tmp_path / "data")
    assert [label.name for label in source.labels] == list(NAMES)
    assert source.train.targets == [0, 1, 2] * 4
    assert source.validation.targets == [0, 1, 2] * 2
    assert np.array_equal(np.asarray(source.train.image(4)), np.asarray(picture(1, 1)))
    assert np.array_equal(np.asarray(source.validation.image(2)), np.asarray(picture(2, 10)))


def test_image_folders_train_and_val_are_the_splits(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 3)
    write_folder(tmp_path / "val", 2, first=10)
    source = open_source(tmp_path)
    assert sorted(label.name for label in source.labels) == sorted(NAMES)
    assert (len(source.train), len(source.validation)) == (9, 6)
    assert source.labels[source.train.targets[0]].name in source.train.name(0)


def test_a_tenth_is_held_out_where_there_is_no_validation_split(tmp_path: Path) -> None:
    write_folder(tmp_path, 20)
    source = open_source(tmp_path, seed=3)
    held_out = {source.validation.name(index) for index in range(len(source.validation))}
    kept = {source.train.name(index) for index in range(len(source.train))}
    assert (len(kept), len(held_out)) == (54, 6)
    assert not kept & held_out
    assert sorted(source.validation.targets) == [0, 0, 1, 1, 2, 2]
    again, other = open_source(tmp_path, seed=3), open_source(tmp_path, seed=4)
    assert {again.validation.name(index) for index in range(6)} == held_out
    assert {other.validation.name(index) for index in range(6)} != held_out


def test_class_table_gives_names_and_wordnet_ids(tmp_path: Path) -> None:
    ids = tuple(f"n{label:08}" for label in range(len(NAMES)))
    write_parquet(tmp_path, "train", 2, names=ids)
    write_parquet(tmp_path, "validation", 1, names=ids)
    write_class_table(tmp_path)
    assert open_source(tmp_path).labels[1] == ClassLabel(name="green thing", id="n00000001")


def test_splits_whose_classes_are_numbered_differently_are_matched_by_name(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", 2)
    write_parquet(tmp_path, "validation", 1, names=("blue", "red", "green"))
    source = open_source(tmp_path)
    assert source.validation.targets == [0, 1, 2]


def test_validation_classes_that_training_lacks_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", 2)
    write_parquet(tmp_path, "validation", 1, names=("red", "green", "blue", "mauve"))
    with pytest.raises(DataError, match="validation has classes that training lacks: mauve"):
        open_source(tmp_path)


def test_a_parquet_folder_is_read_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was tried")

    write_parquet(tmp_path, "train", 10)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert len(open_source(tmp_path).train) == 27


def _empty(folder: Path) -> None:
    folder.mkdir()


def _only_validation(folder: Path) -> None:
    write_parquet(folder, "validation", 1)


def _damaged(folder: Path) -> None:
    folder.mkdir()
    (folder / "train-0.parquet").write_bytes(b"PAR1 not really")


def _photos_without_classes(folder: Path) -> None:
    folder.mkdir()
    picture(0, 0).save(folder / "photo.png")


def _empty_class(folder: Path) -> None:
    write_folder(folder, 2)
    (folder / "yellow").mkdir()


def _bad_table(folder: Path) -> None:
    write_parquet(folder, "train", 2)
    (folder / "classes.json").write_text(json.dumps([{"name": "red"}]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text("x"), "is not a folder"),
        (_empty, "is not a dataset"),
        (_only_validation, r"has no train-\*.parquet; it has validation-00000"),
        (_damaged, "cannot read train-0.parquet"),
        (_photos_without_classes, "is not a dataset"),
        (_empty_class, "yellow"),
        (_bad_table, "is not a list of rows with label, wnid and name"),
    ],
)
def test_what_is_no_dataset_is_one_line(tmp_path: Path, make, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "data"
    make(folder)
    with pytest.raises(DataError, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 2)
    write_folder(tmp_path / "val", 1)
    (tmp_path / "train" / "red" / "001.png").write_text("no photo")
    source = open_source(tmp_path)
    with pytest.raises(DataError, match=r"red/001\.png: .* is not a photo"):
        source.train.image(len(source.train) - 1)


def _augmented(tmp_path: Path, **options: object) -> TrainingImages:
    if not (tmp_path / "red").exists():
        write_folder(tmp_path, 10)
    augmentation = AugmentationConfig(**{"crop": "pad", "padding": 0.25, "color_jitter": 0.3, **options})  # type: ignore[arg-type]
    return TrainingImages(open_source(tmp_path).train, train_transform(augmentation, 16), seed=5)


def test_an_augmented_image_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    images = _augmented(tmp_path)
    first, _, _ = images.__getitems__([3, 7, 11])
    torch.rand(10)
    again, _, _ = images.__getitems__([11, 3])
    assert torch.equal(first[2], again[0])
    assert torch.equal(first[0], again[1])
    images.set_epoch(1)
    assert not torch.equal(first[0], images[3][0])


def test_augmentation_leaves_the_models_random_numbers_alone(tmp_path: Path) -> None:
    images = _augmented(tmp_path)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    images.__getitems__([0, 1])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("crop", ["pad", "resized", "none"])
def test_every_crop_gives_images_of_the_size_asked_for(tmp_path: Path, crop: str) -> None:
    images = _augmented(tmp_path, crop=crop, random_erasing=0.5)
    batch, targets, _ = images.__getitems__([0, 5])
    assert batch.shape == (2, 3, 16, 16)
    assert batch.dtype == torch.uint8
    assert targets.tolist() == [images._split.targets[0], images._split.targets[5]]


def test_pad_crop_equals_a_window_of_the_image_padded_by_reflection() -> None:
    image = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    transform = train_transform(AugmentationConfig(crop="pad", padding=0.25, flip=False), 8)
    padded = torch.nn.functional.pad(image.float(), (2, 2, 2, 2), mode="reflect").byte()
    windows = padded.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 8, 8)
    seen = set()
    for seed in range(200):
        torch.manual_seed(seed)
        matches = (windows == transform(image)).flatten(1).all(1).nonzero().flatten().tolist()
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 25


def test_images_stay_decoded_only_where_they_fit_and_agree_in_size(tmp_path: Path) -> None:
    write_folder(tmp_path, 10)
    split = open_source(tmp_path).train
    decoded, unreadable = decode_all(split, memory_gib=1)
    assert decoded is not None
    assert not unreadable
    assert decoded.shape == (27, 3, 16, 16)
    assert decode_all(split, memory_gib=1e-6) == (None, {})
    picture(0, 99, size=20).save(tmp_path / "red" / "zzz.png")
    assert decode_all(Subset(open_source(tmp_path).train, range(28)), memory_gib=1) == (None, {})


def test_unreadable_images_are_counted_and_named_where_all_are_decoded(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 10)
    write_folder(tmp_path / "val", 1)
    for index in (3, 7):
        (tmp_path / "train" / "red" / f"00{index}.png").write_bytes(b"garbage")
    split = open_source(tmp_path).train
    with pytest.raises(
        DataError,
        match=r"^2 training images of 30 cannot be read, more than 1%: \S+003\.png, \S+007\.png\. The first: ",
    ):
        decode_all(split, memory_gib=1)
    (tmp_path / "train" / "red" / "003.png").unlink()
    with pytest.raises(
        DataError, match=r"^1 training image of 29 cannot be read, more than 1%: \S+007\.png\. The first: "
    ):
        decode_all(open_source(tmp_path).train, memory_gib=1)


def test_augmentation_options_are_checked() -> None:
    for options, message in (
        ({"crop": "zoom"}, "crop must be"),
        ({"padding": 1.0}, "padding must be"),
        ({"scale": (0.5, 0.2)}, "scale must be"),
        ({"color_jitter": 2.0}, "color_jitter must be"),
        ({"random_erasing": -1.0}, "random_erasing must be"),
        ({"rand_augment": 31}, "rand_augment must be"),
        ({"mixup": -0.1}, "mixup must be"),
        ({"cutmix": float("inf")}, "cutmix must be"),
    ):
        with pytest.raises(ValueError, match=message):
            AugmentationConfig(**options)  # type: ignore[arg-type]


def test_tiny_imagenet_as_it_is_described(shared: Path) -> None:
    source = open_source(shared / "data" / "tiny-imagenet")
    assert (len(source.train), len(source.validation), len(source.labels)) == (99993, 8000, 200)
    assert source.labels[0] == ClassLabel(name="goldfish", id="n01443537")
    assert source.train.image(0).size == (64, 64)
    assert source.train.image(0).mode == "RGB"


def test_cifar10_as_it_is_described(shared: Path) -> None:
    source = open_source(shared / "data" / "cifar10")
    assert (len(source.train), len(source.validation)) == (50000, 10000)
    assert [label.name for label in source.labels][:3] == ["airplane", "automobile", "bird"]
    assert source.validation.targets.count(9) == 1000


@pytest.mark.parametrize("memory_gib", [1.0, 0.0], ids=["decoded at once", "decoded as needed"])
def test_an_unreadable_image_is_replaced_by_the_next_readable_one_and_its_class(
    tmp_path: Path, memory_gib: float
) -> None:
    write_folder(tmp_path / "train", 110)
    write_folder(tmp_path / "val", 1)
    whole = TrainingImages(
        open_source(tmp_path).train, train_transform(AugmentationConfig(crop="none", flip=False), 16), seed=5
    )
    expected, targets, replaced = whole.__getitems__(range(105, 115))
    assert not replaced.any()
    split = open_source(tmp_path).train
    for index in (109, 2, 329):  # the last of a class, one in the middle, and the last of all
        Path(split.name(index)).write_bytes(b"garbage")
    images = TrainingImages(
        open_source(tmp_path).train,
        train_transform(AugmentationConfig(crop="none", flip=False), 16),
        seed=5,
        memory_gib=memory_gib,
    )
    found, shown, replaced = images.__getitems__(range(105, 115))
    assert replaced.tolist() == [index == 109 for index in range(105, 115)]
    assert torch.equal(found[4], expected[5])
    assert shown[4] == targets[5] != targets[4]
    assert torch.equal(found[replaced.logical_not()], expected[replaced.logical_not()])
    assert images.__getitems__([329])[1] == images.__getitems__([0])[1]  # after the last comes the first
    assert set(images.unreadable) == ({2, 109, 329} if memory_gib else {109, 329})


def test_too_many_unreadable_images_stop_where_they_are_decoded_as_needed(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 40)
    write_folder(tmp_path / "val", 1)
    split = open_source(tmp_path).train
    for index in (1, 5):
        Path(split.name(index)).write_bytes(b"garbage")
    images = TrainingImages(split, train_transform(AugmentationConfig(), 16), seed=5, memory_gib=0.0)
    images[1]
    with pytest.raises(DataError, match=r"^2 training images of 120 cannot be read, more than 1%"):
        images[5]


def test_mixing_shares_the_classes_of_a_batch(tmp_path: Path) -> None:
    images, targets = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    same = batch_transform(AugmentationConfig(), 3)(images, targets)
    assert same[0] is images
    assert same[1] is targets
    for options in ({"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}):
        mixed = batch_transform(AugmentationConfig(**options), 3)  # type: ignore[arg-type]
        torch.manual_seed(1)
        first, shares = mixed(images, targets)
        torch.manual_seed(1)
        again, _ = mixed(images, targets)
        assert torch.equal(first, again)
        assert first.shape == images.shape
        assert shares.shape == (6, 3)
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(6))
        assert ((shares > 0).sum(dim=1) <= 2).all()
        assert (shares.gather(1, targets[:, None]) > 0).all()


def test_rand_augment_varies_an_image_by_seed_alone(tmp_path: Path) -> None:
    images = _augmented(tmp_path, rand_augment=15, crop="none", flip=False, color_jitter=0.0)
    first = images[4][0]
    assert torch.equal(first, images[4][0])
    images.set_epoch(1)
    assert not torch.equal(first, images[4][0])


def test_cifar10_as_torchvision_lays_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    with pytest.raises(
        DataError, match=r"does not hold cifar10 as torchvision lays it out: .*download=True\) fetches it"
    ):
        open_source(f"cifar10:{tmp_path}")
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3 * 32 * 32), dtype=np.uint8)
    for name in ("train", "test"):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 1, 0, 9]}))
    (folder / "meta").write_bytes(pickle.dumps({"label_names": [f"kind {index}" for index in range(10)]}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["train", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test", None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    source = open_source(f"cifar10:{tmp_path}")
    assert source.train.targets == source.validation.targets == [3, 1, 0, 9]
    assert [label.name for label in source.labels][:2] == ["kind 0", "kind 1"]
    assert np.array_equal(np.asarray(source.train.image(2)), pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))


def test_imagenet_and_imagenette_as_torchvision_lays_them_out(tmp_path: Path) -> None:
    wnids = {
        "n02012849": ("crane",),
        "n03126707": ("crane",),
        "n03710637": ("maillot",),
        "n03710721": ("maillot", "tank suit"),
    }
    for split in ("train", "val"):
        for index, wnid in enumerate(wnids):
            (tmp_path / split / wnid).mkdir(parents=True)
            picture(index % 3, 0).save(tmp_path / split / wnid / "0.JPEG")
    torch.save((wnids, ["n02012849"]), tmp_path / "meta.bin")
    source = open_source(f"imagenet:{tmp_path}")
    assert source.train.targets == [0, 1, 2, 3]
    names = ["crane (n02012849)", "crane (n03126707)", "maillot", "maillot, tank suit"]
    assert [(label.name, label.id) for label in source.labels] == list(zip(names, wnids, strict=True))
    assert source.validation.image(0).size == (16, 16)
    (tmp_path / "train" / "n02012849" / "0.JPEG").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"train image 0: cannot identify image file"):
        source.train.image(0)

    datasets = pytest.importorskip("torchvision.datasets")
    root = tmp_path / "imagenette2"
    for split in ("train", "val"):
        for wnid in datasets.Imagenette._WNID_TO_CLASS:
            (root / split / wnid).mkdir(parents=True)
            picture(0, 0).save(root / split / wnid / "0.JPEG")
    source = open_source(f"imagenette:{tmp_path}")
    assert source.train.targets == list(range(10))
    assert source.labels[0].name == "tench"
    assert source.labels[0].id == "n01440764"


def _folders(root: Path, *names: str) -> str:
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(2):
            picture(0, index).save(root / name / f"{index}.png")
    return str(root)


def _parquet_with(root: Path, *names: str) -> str:
    write_parquet(root, "train", 2, names=names)
    write_parquet(root, "validation", 1, names=names)
    return str(root)


@pytest.mark.parametrize("names", [("Cat", "cat", "dog"), ("dog", "Hot_dog", "hot dog")])
@pytest.mark.parametrize(
    "make",
    [
        _folders,
        _parquet_with,
        lambda root, *names: f"stream:{_parquet_with(root, *names)}",
    ],
)
def test_classes_that_differ_only_by_case_or_underscore_are_refused(tmp_path: Path, make, names) -> None:  # type: ignore[no-untyped-def]
    where = make(tmp_path / "data", *names)
    first, second = (name for name in names if name != "dog")
    with pytest.raises(
        DataError, match=rf"data: the classes '{first}' and '{second}' differ only by case or _\. Rename"
    ):
        open_source(where)


def test_classes_with_wordnet_ids_of_their_own_may_share_a_name_but_for_case(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", 2, names=("n1", "n2", "n3"))
    rows = [
        {"label": label, "wnid": f"n{label + 1}", "name": name} for label, name in enumerate(("crane", "Crane", "ox"))
    ]
    (tmp_path / "classes.json").write_text(json.dumps(rows))
    assert [label.name for label in open_source(tmp_path).labels] == ["crane", "Crane", "ox"]
