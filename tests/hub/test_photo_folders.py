"""Folders of photos as people have them: what can be trained on is counted, the rest said in one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from images import NAMES, picture, write_folder, write_parquet, write_splits

from phantomgrad_hub import ClassLabel
from phantomgrad_hub.cli.main import main
from phantomgrad_hub.data import DataError, Joined, Subset, open_source
from phantomgrad_hub.train import TrainingError, check_source, finetune

Make = Callable[[Path], object]


def _photo(file: Path, index: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(index % 3, index).save(file)


def _photos(folder: Path, *names: str, count: int = 5) -> None:
    for name in names:
        for index in range(count):
            _photo(folder / name / f"{index}.png", index)


def test_files_that_are_no_photos_of_a_class_are_counted_and_named(tmp_path: Path) -> None:
    write_folder(tmp_path, 10)
    _photo(tmp_path / "beside.png")
    for name in ("notes.txt", "red/Thumbs.db", "red/IMG_1.HEIC"):
        (tmp_path / name).write_text("x")
    (tmp_path / "classes.json").write_text("[]")  # is used
    source = open_source(tmp_path)
    assert source.description == (
        f"{tmp_path}: 27 training images of 3 classes, a held-out tenth (3) for validation; "
        "4 ignored: beside.png, notes.txt, red/IMG_1.HEIC and 1 more"
    )
    assert source.held_out
    assert len(source.train) + len(source.validation) == 30


def test_folders_beside_the_splits_are_named_as_ignored(tmp_path: Path) -> None:
    write_splits(tmp_path)
    _photos(tmp_path / "test", "red")
    (tmp_path / "train" / "list.txt").write_text("x")
    source = open_source(tmp_path)
    assert source.description.endswith("6 for validation; 2 ignored: test/, train/list.txt")
    assert not source.held_out


def test_hidden_files_and_folders_do_not_count(tmp_path: Path) -> None:
    write_folder(tmp_path, 10)
    _photo(tmp_path / ".ipynb_checkpoints" / "0.png")
    _photo(tmp_path / "__MACOSX" / "red" / "0.png")
    for name in (".DS_Store", "red/._000.png"):
        (tmp_path / name).write_text("x")
    source = open_source(tmp_path)
    assert [label.name for label in source.labels] == sorted(NAMES)
    assert source.description.endswith("27 training images of 3 classes, a held-out tenth (3) for validation")


def test_endings_in_capitals_are_photos_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for index, ending in enumerate((".PNG", ".Jpg", ".JPEG", ".bmp", ".GIF", ".WebP")):
            _photo(tmp_path / name / f"{index}{ending}", index)
    source = open_source(tmp_path)
    assert len(source.train) + len(source.validation) == 12
    assert source.train.image(1).mode == "RGB"


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    _photos(tmp_path, "plane", "train")
    assert [label.name for label in open_source(tmp_path).labels] == ["plane", "train"]


def test_a_test_folder_without_classes_is_not_taken_for_validation(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", 10)
    _photo(tmp_path / "test" / "0.png")
    assert open_source(tmp_path).description.endswith("a held-out tenth (3) for validation; 1 ignored: test/")


@pytest.mark.parametrize("name", ["validation", "val", "valid", "test"])
def test_every_name_of_a_validation_folder_is_known(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "train", 5)
    write_folder(tmp_path / name, 2, first=50)
    assert len(open_source(tmp_path).validation) == 6


@pytest.mark.parametrize("empty", [True, False], ids=["an empty folder", "no folder"])
def test_a_class_without_validation_images_is_named(tmp_path: Path, empty: bool) -> None:
    write_splits(tmp_path)
    for photo in (tmp_path / "val" / "red").iterdir():
        photo.unlink()
    if not empty:
        (tmp_path / "val" / "red").rmdir()
    source = open_source(tmp_path)
    assert source.description.endswith("15 training images of 3 classes, 4 for validation; no validation image of red")
    assert [source.labels[target].name for target in source.validation.targets] == ["blue", "blue", "green", "green"]


def test_folders_named_by_wordnet_ids_of_imagenet_get_names(tmp_path: Path) -> None:
    _photos(tmp_path, "n01443537", "n02056570", "n99999999")
    assert open_source(tmp_path).labels == (
        ClassLabel(name="goldfish", id="n01443537"),
        ClassLabel(name="king penguin", id="n02056570"),
        ClassLabel(name="n99999999"),
    )


def test_joined_splits_are_one_after_the_other(tmp_path: Path) -> None:
    write_folder(tmp_path, 10)
    source = open_source(tmp_path)
    joined = Joined(source.train, source.validation)
    assert len(joined) == 30
    assert joined.targets == source.train.targets + source.validation.targets
    assert joined.name(28) == source.validation.name(1)
    assert joined.image(28) == source.validation.image(1)


def _empty_class(folder: Path) -> None:
    write_folder(folder, 5)
    (folder / "yellow").mkdir()


def _other_files(folder: Path) -> None:
    _empty_class(folder)
    for name in ("1.HEIC", "2.heic", "README"):
        (folder / "yellow" / name).write_text("x")


def _class_lacking_in_train(folder: Path) -> None:
    write_splits(folder)
    _photo(folder / "val" / "mauve" / "0.png")


def _flat_val(folder: Path) -> None:
    write_folder(folder / "train", 5)
    _photo(folder / "val" / "0.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: _photos(folder / "train", "cat/sub", "dog/sub"),
            "{0}/train/cat/sub/0.png lies too deep: each folder in {0}/train is a class and holds its photos itself, as in "
            "{0}/train/cat/0.png. Move them there, or give {0}/train/cat if that holds the class folders (splits are named "
            "train and val).",
        ),
        (
            lambda folder: _photos(folder / "photos", "cat", "dog"),
            "{0}/photos/cat/0.png lies too deep: each folder in {0} is a class and holds its photos itself, as in "
            "{0}/photos/0.png. Move them there, or give {0}/photos if that holds",
        ),
        (
            lambda folder: (_photos(folder, "cat", "dog"), _photo(folder / "cat" / "old" / "more" / "1.png")),
            "{0}/cat/old/more/1.png lies too deep",
        ),
        (lambda folder: _photos(folder / "Train", "cat", "dog"), "give {0}/Train if that holds the class folders (splits"),
        (_empty_class, "{0}/yellow holds no photo. Add some (.jpg, .jpeg, .png, "),
        (_other_files, "{0}/yellow holds no photo, only other files (2 .heic, 1 no ending). Add some (.jpg, "),
        (lambda folder: _photo(folder / "0.png"), "{0} is not a dataset: it has photos, but no subfolder. Expected one"),
        (lambda folder: None, "{0} is not a dataset: it has no subfolder. Expected one subfolder of photos for each"),
        (_flat_val, "{0}/val is not a dataset: it has photos, but no subfolder."),
        (_class_lacking_in_train, "{0}: validation has classes that training lacks: mauve; both must name a class alike."),
        (lambda folder: _photos(folder, "cat", "do\tg"), "{0}: the name of a class must be 1 to 300 printable characters"),
    ],
    ids=[
        "nested below train", "nested", "nested beside photos", "Train", "empty class", "other files", "flat", "empty",
        "flat val", "class lacking in train", "odd name",
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_meant_is_one_line(
    make: Make, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    make(data)
    with pytest.raises(DataError) as caught:
        open_source(data)
    assert message.format(data) in str(caught.value)
    command = ["train", "finetune", "--init", "embedded", "--data", str(data), "--out", str(tmp_path / "run")]
    assert main(command) == 1
    assert capsys.readouterr().err == f"phantomgrad train: {caught.value}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: _photos(folder, "cat", count=20),
            "the only class is 'cat', and a classifier needs two. Give a folder with one subfolder of photos for each class.",
        ),
        (
            lambda folder: (write_folder(folder, 20), _photo(folder / "mauve" / "0.png")),
            "there is a single image of mauve and none to hold out. Add more, or give folders train and val.",
        ),
        (lambda folder: write_folder(folder, 10), "27 training images do not fill one batch of 32; add --set batch_size=4"),
        (lambda folder: _photos(folder, "a", "b", count=2), "2 training images do not fill one batch of 32; add --set batch_size=2"),
    ],
    ids=["one class", "one photo", "small", "smaller"],
)  # fmt: skip
def test_too_little_to_train_on_is_one_line(
    make: Make, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "data")
    command = [
        "train",
        "finetune",
        "--init",
        "embedded",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.endswith(f"{message}\n")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_batch_size_that_is_named_fits(tmp_path: Path) -> None:
    write_folder(tmp_path, 2)
    source = open_source(tmp_path)
    for count in (*range(2, 40), 1000):
        many = replace(source, train=Subset(source.train, [index % 3 for index in range(count)]), held_out=False)
        with pytest.raises(TrainingError) as caught:
            check_source(replace(finetune(), batch_size=10**6), many)
        named = int(str(caught.value).split("batch_size=")[1])
        assert min(count, 4) / 2 < named <= count
        check_source(replace(finetune(), batch_size=named), many)


def test_few_classes_in_parquet_are_refused_too(tmp_path: Path, own_dataset_cache: None) -> None:
    write_parquet(tmp_path / "data", "train", 2)
    source = replace(open_source(tmp_path / "data"), labels=(ClassLabel(name="red"),))
    with pytest.raises(DataError, match="the only class is 'red'"):
        check_source(replace(finetune(), batch_size=2), source)


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"^dataset photos/cat does not exist; give a folder of parquet files, or of one"
    ):
        open_source("photos/cat")
