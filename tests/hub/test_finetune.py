"""Fine-tuning keeps what it should; a run that cannot go on says why in one line, and is resumable."""

from __future__ import annotations

import errno
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from images import NAMES, write_splits
from safetensors.torch import load_file, save_file
from small import pooled_config

import phantomgrad_hub.train.files as files
import phantomgrad_hub.train.run as run_module
from phantomgrad import FixedPointIteration, NeumannPhantom
from phantomgrad_hub import MDEQ
from phantomgrad_hub.cli.main import build_parser, main
from phantomgrad_hub.train import RECIPES, TrainingError, apply_settings
from phantomgrad_hub.train.files import repair_folder
from phantomgrad_hub.train.run import RunFolder


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


SMALL = ("--device=cpu", "--no-progress", "--set", "batch_size=4", "--set", "epochs=2", "--set", "workers=0", "--set",
         "mixed_precision=no", "--set", "log_every=1", "--set", "trackers=()")  # fmt: skip


def test_fine_tuning_keeps_body_and_preprocessing_and_names_the_folders_classes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_splits(tmp_path / "data")
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
    write_splits(tmp_path / "data")
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


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and an uninterrupted run of two epochs on it, `run`."""
    folder = tmp_path_factory.mktemp("whole")
    write_splits(folder / "data")
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
    write_splits(tmp_path / "data")
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
    write_splits(tmp_path / "data")
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
