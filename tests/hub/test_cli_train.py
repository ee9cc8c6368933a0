"""`phantomgrad train`, `evaluate` and `convert`: together, stopped by a signal, and where they fail."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import RECIPE, fails
from images import NAMES, picture, write_folder

from phantomgrad_hub.cli.main import main
from phantomgrad_hub.data import TrainingImages


def test_train_evaluate_and_predict_work_together(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["train", "tiny_imagenet", "--data", str(data), "--out", str(run), *RECIPE]
    assert main(command) == 0
    assert f"{run}/best: top-1 " in capsys.readouterr().out
    stored = json.loads((run / "result.json").read_text())
    assert main(["evaluate", str(run / "best"), "--data", str(data), "--json", "--no-progress"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in stored} == stored
    assert main(["evaluate", str(run / "best"), "--data", str(data), "--steps", "1,20", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert f"{stored['top1']:.2%}" in printed
    assert f"{stored['steps_mean']:.1f}" in printed
    for command_line in (["evaluate", str(run), "--data", str(data)], ["predict", "x.jpg", "--checkpoint", str(run)]):
        fails(capsys, command_line, 1, f"{run} is a run folder; use {run}/best")
    assert main(["predict", str(data / "val" / "red"), "--checkpoint", str(run / "best")]) == 0
    capsys.readouterr()
    fails(capsys, [*command, "--set", "optimizer.lr=9.0"], 1, "another configuration: config.optimizer.lr differ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_exits_as_the_signal_says_and_goes_on(
    number: signal.Signals,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", "tiny_imagenet", "--data", str(data), "--out", str(tmp_path / "run"), *RECIPE]
    load, sent = TrainingImages.__getitems__, []

    def stopping(self: TrainingImages, indices: list[int]) -> Any:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return load(self, indices)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingImages, "__getitems__", stopping)
        assert main(command) == 128 + number
    assert "Stopped and saved at step 1; the same command resumes." in capsys.readouterr().out
    assert main(command) == 0
    assert main(["train", "--help"]) == 0
    assert f"{128 + number}" in capsys.readouterr().out


def test_a_corrected_command_takes_the_place_of_one_that_failed_to_start(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["train", "tiny_imagenet", "--data", str(data), "--out", str(tmp_path / "run"), "--device=cpu"]
    fails(capsys, [*plain, "--init", "nosuch"], 1, "there is no checkpoint folder nosuch")
    command = [*plain, *RECIPE]
    fails(capsys, [*command, "--set", "batch_size=99"], 1, "18 training images do not fill one batch of 99")
    assert main(command) == 0


def test_failures_of_train_and_evaluate_are_one_line_and_status_1(
    checkpoint: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    fails(capsys, ["train", "tiny_imagenet", "--data", "nowhere", "--out", out], 1, "dataset nowhere does not exist")
    fails(capsys, ["evaluate", checkpoint, "--data", "nowhere"], 1, "dataset nowhere does not exist")
    command = ["train", "tiny_imagenet", "--data", str(data), *RECIPE]
    fails(capsys, [*command, "--out", "/proc/nowhere"], 1, "train: /proc/nowhere cannot be written: ")
    (data / "train" / "mauve").mkdir(exist_ok=True)
    picture(0, 0).save(data / "train" / "mauve" / "x.png")
    try:
        fails(capsys, ["evaluate", checkpoint, "--data", str(data)], 1, "'mauve'", "unknown to the model")
    finally:
        (data / "train" / "mauve" / "x.png").unlink()
        (data / "train" / "mauve").rmdir()


def test_all_photos_of_a_folder_without_splits_can_be_measured(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        (tmp_path / name.upper()).mkdir()
        picture(NAMES.index(name), 0).save(tmp_path / name.upper() / "0.png")
    command = ["evaluate", checkpoint, "--data", str(tmp_path), "--no-progress"]
    fails(capsys, command, 1, "no class has an image to hold out; --split all measures all of them")
    assert main([*command, "--split", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 3
    assert main([*command, "--split", "all"]) == 0
    assert "measured on all" in capsys.readouterr().out


def test_an_evaluation_says_how_many_photos_were_left_out(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "train", 1)
    write_folder(tmp_path / "val", 40)
    (tmp_path / "val" / "red" / "007.png").write_text("no photo")
    assert main(["evaluate", checkpoint, "--data", str(tmp_path), "--no-progress"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["photos", "119"] for line in printed)
    assert any(line.split() == ["photos", "that", "cannot", "be", "read,", "left", "out", "1"] for line in printed)


def test_convert_refuses_what_is_no_official_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "weights.pkl"
    file.write_text("nothing")
    fails(capsys, ["convert", str(file), "--out", str(tmp_path / "out")], 1, str(file))
    fails(capsys, ["convert", str(tmp_path), "--out", str(tmp_path / "out")], 1, f"{tmp_path} is a folder; give the")
    assert not (tmp_path / "out").exists()
