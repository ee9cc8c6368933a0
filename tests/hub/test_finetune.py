"""Folders of photos as people have them: what can be trained on is said in one line, and fine-tuning keeps what it should."""

from __future__ import annotations

import errno
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from images import NAMES, picture, write_folder, write_parquet
from safetensors.torch import load_file, save_file
from small import pooled_config

import phantomgrad_hub.train.files as files
import phantomgrad_hub.train.run as run_module
from phantomgrad import FixedPointIteration, NeumannPhantom
from phantomgrad_hub import MDEQ, ClassLabel
from phantomgrad_hub.cli.main import build_parser, main
from phantomgrad_hub.data import DataError, Joined, Subset, open_source
from phantomgrad_hub.train import RECIPES, TrainingError, apply_settings, check_source, finetune
from phantomgrad_hub.train.files import repair_folder
from phantomgrad_hub.train.run import RunFolder

Make = Callable[[Path], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MDEQ of five classes."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    config = pooled_config(
        channels=(8, 8),
        image_size=16,
        expansion=1,
        gradient=NeumannPhantom(steps=2, damping=0.7),
        eval_solver=FixedPointIteration(damping=0.7, max_steps=4),
    )
    MDEQ(config).save_pretrained(folder)
    return folder


def _photo(file: Path, index: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture(index % 3, index).save(file)


def _photos(folder: Path, *names: str, count: int = 5) -> None:
    for name in names:
        for index in range(count):
            _photo(folder / name / f"{index}.png", index)


def _splits(folder: Path) -> None:
    write_folder(folder / "train", 5)
    write_folder(folder / "val", 2, first=50)


# What is used, and what is said about the rest.


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
    _splits(tmp_path)
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
    _splits(tmp_path)
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


# What cannot be meant.


def _empty_class(folder: Path) -> None:
    write_folder(folder, 5)
    (folder / "yellow").mkdir()


def _other_files(folder: Path) -> None:
    _empty_class(folder)
    for name in ("1.HEIC", "2.heic", "README"):
        (folder / "yellow" / name).write_text("x")


def _class_lacking_in_train(folder: Path) -> None:
    _splits(folder)
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


# Fine-tuning.

SMALL = ("--device=cpu", "--no-progress", "--set", "batch_size=4", "--set", "epochs=2", "--set", "workers=0", "--set",
         "mixed_precision=no", "--set", "log_every=1", "--set", "trackers=()")  # fmt: skip


def test_fine_tuning_keeps_body_and_preprocessing_and_names_the_folders_classes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _splits(tmp_path / "data")
    preprocessor = json.loads((checkpoint / "preprocessor.json").read_text())
    command = ["train", "finetune", "--init", str(checkpoint), "--data", str(tmp_path / "data")]
    assert main([*command, "--out", str(tmp_path / "run"), *SMALL, "--set", "optimizer.lr=1e-9"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'data'}: 15 training images of 3 classes, 6 for validation"
    assert last.startswith(f"{tmp_path / 'run' / 'best'}: top-1 ")
    tuned = MDEQ.from_pretrained(tmp_path / "run" / "best")
    assert tuned.labels == sorted(NAMES)
    assert json.loads((tmp_path / "run" / "best" / "preprocessor.json").read_text()) == preprocessor
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "run/best/model.safetensors")
    for key, value in before.items():
        if key.startswith("head.classifier"):
            assert after[key].shape[0] == 3
        elif "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(after[key], value, atol=1e-6, rtol=1e-4, msg=key)


def test_json_is_alone_on_stdout(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _splits(tmp_path / "data")
    command = ["train", "finetune", "--init", str(checkpoint), "--data", str(tmp_path / "data")]
    assert main([*command, "--out", str(tmp_path / "run"), *SMALL, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["count"] == 6


def test_fine_tuning_without_a_checkpoint_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "finetune", "--data", "photos", "--out", "run"]) == 2
    assert "finetune needs --init CHECKPOINT, such as --init embedded;" in capsys.readouterr().err


def test_the_help_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in RECIPES)


@pytest.mark.parametrize("page", ["training.md", "official-checkpoints.md"])
def test_the_commands_of_the_page_exist(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8").replace("\\\n", "")
    commands = re.findall(r"^ +(?:\$ )?phantomgrad (.+)$", text, flags=re.MULTILINE)
    assert len(commands) > 3
    for command in commands:
        options = build_parser().parse_args(shlex.split(command))
        if options.command == "train" and options.recipe != "RECIPE":
            apply_settings(RECIPES[options.recipe](), options.set)


# Full disks and weights that stop being finite.


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and an uninterrupted run of two epochs on it, `run`."""
    folder = tmp_path_factory.mktemp("whole")
    _splits(folder / "data")
    command = ["train", "finetune", "--init", str(checkpoint), "--data", str(folder / "data")]
    assert main([*command, "--out", str(folder / "run"), *SMALL]) == 0
    return folder


@pytest.mark.parametrize("what", ["state", "checkpoint", "metrics"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    what: str,
    checkpoint: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    command = ["train", "finetune", "--init", str(checkpoint), "--data", str(whole / "data"), "--out", str(run), *SMALL]
    calls: list[None] = []
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails_the_second_time(wrapped: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) == 2:
                raise full
            return wrapped(*given, **options)

        return call

    with monkeypatch.context() as patch:
        if what == "state":
            patch.setattr(run_module.torch, "save", fails_the_second_time(torch.save))
        elif what == "checkpoint":
            patch.setattr(MDEQ, "save_pretrained", fails_the_second_time(MDEQ.save_pretrained))
        else:
            opened, refusing = Path.open, fails_the_second_time(Path.open)
            patch.setattr(
                files.Path,
                "open",
                lambda path, *given, **options: (refusing if path.name == "metrics.jsonl" else opened)(
                    path, *given, **options
                ),
            )
        capsys.readouterr()
        assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"phantomgrad train: {run} cannot be written: No space left on device; it ")
    assert error.endswith("Free some space, then the same command goes on.\n")
    assert error.count("\n") == 1
    assert not [entry.name for entry in run.rglob(".*partial*")]
    assert main(command) == 0
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (run, whole / "run"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EFBIG, "Raise the limit on the size of files (ulimit -f), then the same command goes on."),
        (errno.EDQUOT, "Free some space, then the same command goes on."),
        (errno.EACCES, "Make it writable, then the same command goes on."),
    ],
)
def test_the_cure_is_that_of_the_cause(
    number: int, cure: str, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MDEQ.from_pretrained(checkpoint)
    state = {"position": {"step": 7}, "model": model.state_dict(), "average": model.state_dict()}
    with RunFolder(tmp_path / "run") as run:
        run.open({"recipe": "r", "config": {}})

        def fail(*given: object) -> None:
            raise OSError(number, "no")

        monkeypatch.setattr(files.Path, "replace", fail)
        with pytest.raises(TrainingError, match=rf"{re.escape(cure)}$"):
            run.save(state, model)
    how = "" if number == errno.EACCES else f"{cure[0].lower()}{cure[1:].partition(',')[0]}, or "
    with pytest.raises(TrainingError, match=rf"cannot be written: no; {re.escape(how)}give another folder\.$"):
        RunFolder(tmp_path / "other").open({"recipe": "r", "config": {}})


def test_what_the_run_holds_is_said_where_it_cannot_be_written(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MDEQ.from_pretrained(checkpoint)
    state = {"position": {"step": 7}, "model": model.state_dict(), "average": model.state_dict()}
    with RunFolder(tmp_path / "run") as run:
        run.open({"recipe": "r", "config": {}})
        run.save(state, model)

        def fail(*given: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(files.Path, "replace", fail)
        with pytest.raises(
            TrainingError, match=r"run cannot be written: Read-only file system; it still holds step 7\. Make it"
        ):
            run.save(state | {"position": {"step": 9}}, model)
        monkeypatch.undo()
        for key in ("model", "average"):
            broken = {name: value.clone() for name, value in model.state_dict().items()}
            broken["stem.layers.0.norm.running_var"][0] = torch.nan
            with pytest.raises(
                TrainingError,
                match=r"^stem\.layers\.0\.norm\.running_var became infinite or NaN by step 9; \S+run still holds step 7\.",
            ):
                run.save(state | {"position": {"step": 9}, key: broken}, model)
        assert run.load_state() is not None
        assert run.load_state()["position"]["step"] == 7  # type: ignore[index]


def test_a_rate_that_is_too_high_ends_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _splits(tmp_path / "data")
    command = [
        "train",
        "finetune",
        "--init",
        str(checkpoint),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, *SMALL, "--set", "optimizer.lr=1e30", "--set", "clip=None"]) == 1
    error = capsys.readouterr().err
    assert "Start another run with a lower optimizer.lr or a lower clip." in error
    assert error.count("\n") == 1


def test_too_many_unreadable_photos_are_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _splits(tmp_path / "data")
    (tmp_path / "data" / "train" / "red" / "000.png").write_text("no photo")
    command = [
        "train",
        "finetune",
        "--init",
        str(checkpoint),
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*command, *SMALL]) == 1
    error = capsys.readouterr().err
    assert "1 training image of 15 cannot be read, more than 1% of all 21: " in error
    assert "red/000.png" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path) -> None:
    for name in (".last.partial", "..last.partial.x1y2", ".other"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / name / "model.safetensors")
    repair_folder(tmp_path / "last")
    assert [entry.name for entry in tmp_path.iterdir()] == [".other"]
