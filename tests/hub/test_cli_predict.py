"""`phantomgrad predict`: what it prints, and one line for a bad photo or checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import fails
from images import NAMES, picture
from small import pooled_config

from phantomgrad_hub import MDEQ
from phantomgrad_hub.cli.main import main


def test_predict_prints_classes_steps_and_residual(
    checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(photos / "a.png"), "--checkpoint", checkpoint, "--top", "2"]) == 0
    printed = capsys.readouterr()
    first, *classes = printed.out.splitlines()
    assert first.startswith(str(photos / "a.png"))
    assert "4 solver steps, residual " in first
    assert "not converged" in first
    assert len(classes) == 2
    assert all(line.split()[0] in NAMES and line.endswith("%") for line in classes)
    assert printed.err == ""


@pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")  # of `classify`
def test_predict_reads_folders_in_batches_and_prints_json(
    checkpoint: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(photos), "--checkpoint", checkpoint, "--json"]
    assert main([*command, "--batch-size", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [Path(record["photo"]).name for record in found] == ["a.png", "b.JPG", "c.png"]
    model = MDEQ.from_pretrained(checkpoint)
    for record in found:
        assert [entry["label"] for entry in record["predictions"]] == [
            label for label, _ in model.classify(record["photo"])
        ]
        assert sum(entry["probability"] for entry in record["predictions"]) == pytest.approx(1, abs=1e-5)
        assert set(record) == {"photo", "predictions", "steps", "residual", "converged"}


def test_one_bad_photo_among_many_is_named_and_the_others_predicted(
    checkpoint: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = tmp_path / "fake.jpg"
    fake.write_text("this is text")
    command = ["predict", str(photos / "a.png"), str(fake), str(photos / "b.JPG"), "--checkpoint", checkpoint]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert printed.out.count("solver steps") == 2
    assert printed.err.splitlines()[0].startswith(f"phantomgrad predict: {fake} is not a photo")
    assert printed.err.splitlines()[1] == "phantomgrad predict: 1 of 3 photos could not be read"
    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert ["error" in record for record in found] == [False, True, False]


def _missing(folder: Path) -> Path:
    return folder / "missing.jpg"


def _truncated(folder: Path) -> Path:
    file = folder / "short.jpg"
    picture(0, 0, size=64).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    return file


def _text(folder: Path) -> Path:
    file = folder / "text.jpg"
    file.write_text("hello")
    return file


def _empty(folder: Path) -> Path:
    file = folder / "empty.png"
    file.touch()
    return file


def _empty_folder(folder: Path) -> Path:
    return folder


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.jpg")
    return folder / "pipe.jpg"


def _hidden_only(folder: Path) -> Path:
    (folder / ".cache").mkdir()
    picture(0, 0).save(folder / ".cache" / "a.png")
    return folder


def _url(folder: Path) -> str:
    return "http://127.0.0.1:9/photo.jpg"


@pytest.mark.parametrize(
    ("make", "part"),
    [
        pytest.param(
            _pipe,
            "is not a regular file",
            marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here"),
        ),
        (_hidden_only, "there is no photo in"),
        (_url, "URLs are not fetched: download the photo first"),
        (_missing, "there is no file"),
        (_truncated, "damaged or truncated"),
        (_text, "is not a photo in a known format"),
        (_empty, "is not a photo in a known format"),
        (_empty_folder, "there is no photo in"),
    ],
)
def test_a_bad_photo_is_one_line_and_status_1(
    make: Any, part: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = make(tmp_path)
    fails(capsys, ["predict", str(photo), "--checkpoint", checkpoint], 1, str(photo), part)


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _foreign_keys(folder: Path) -> None:
    MDEQ(pooled_config(channels=(8, 8, 8), num_classes=3)).save_pretrained(folder / "other")
    (folder / "other" / "model.safetensors").replace(folder / "model.safetensors")


def _no_steps(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["solver"]["max_steps"] = 0
    (folder / "config.json").write_text(json.dumps(config))


def _bad_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (_no_weights, "model.safetensors"),
        (_foreign_keys, "model.safetensors"),
        (_bad_json, "config.json"),
        (_no_steps, "solver: max_steps must be at least 1, got 0"),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_status_1(
    spoil: Any, part: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    MDEQ(pooled_config(channels=(8, 8), num_classes=3)).save_pretrained(folder)
    spoil(folder)
    fails(capsys, ["predict", str(photos / "a.png"), "--checkpoint", str(folder)], 1, part)


def test_a_local_checkpoint_needs_no_network(checkpoint: str, photos: Path) -> None:
    script = (
        "import socket, sys\n"
        "def refuse(*arguments): raise AssertionError('a connection was tried')\n"
        "socket.socket.connect = refuse\n"
        "from phantomgrad_hub.cli.main import main\n"
        f"sys.exit(main(['predict', {str(photos / 'a.png')!r}, '--checkpoint', {checkpoint!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
