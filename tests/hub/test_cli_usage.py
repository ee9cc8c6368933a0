"""The command line as such: help, bad usage, missing extras, doctor, the encoding of what is printed, and what ends it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import RECIPE, fails
from images import picture

import phantomgrad_hub.cli.predict as predict_command
from phantomgrad_hub.cli.common import print_json
from phantomgrad_hub.cli.main import COMMANDS, build_parser, main


def test_the_program_is_installed_under_its_name() -> None:
    [entry] = importlib.metadata.entry_points(group="console_scripts", name="phantomgrad")
    assert entry.load() is main


def test_without_arguments_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "predict" in capsys.readouterr().out


@pytest.mark.parametrize("command", [command.__name__.rsplit(".", 1)[-1] for command in COMMANDS])
def test_every_help_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    example = capsys.readouterr().out.split("example:\n")[1].strip()
    program, *arguments = example.split()
    assert program == "phantomgrad"
    assert build_parser().parse_args(arguments).command == command


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["predict"], "PHOTO|FOLDER"),
        (["predict", "x.jpg", "--top", "0"], "'0' is not an integer of at least 1"),
        (["predict", "x.jpg", "--batch-size", "many"], "'many' is not an integer of at least 1"),
        (["predict", "x.jpg", "--device", "tpu9000"], "is no device"),
        (["predict", "x.jpg", "--device", "cuda:99"], "CUDA devices"),
        (["predict", "x.jpg", "--fast"], "unrecognized arguments: --fast (see phantomgrad predict --help)"),
        (["--fast"], "unrecognized arguments: --fast (see phantomgrad --help)"),
        (["predict", ""], "a PHOTO is an empty text"),
        (["evaluate", "embedded", "--data", "d", "--seed", "-1"], "'-1' is not an integer of at least 0"),
        (["predict", "x.jpg", "--check", "c"], "unrecognized arguments: --check"),
        (["train", "tiny_imagenet", "--out", "run"], "--data"),
        (
            ["train", "huge", "--data", "d", "--out", "r"],
            "no recipe 'huge'; recipes are finetune, tiny_imagenet, cifar10_tiny, cifar10_large",
        ),
        (["train", "tiny_imagenet", "--data", "d", "--out", "r", "--set", "lr=1"], "did you mean optimizer.lr?"),
        (["train", "tiny_imagenet", "--data", "d", "--out", "r", "--set", "epochs=x"], "expected an integer, not 'x'"),
        (["evaluate", "embedded"], "--data"),
        (["evaluate", "embedded", "--data", "d", "--steps", "1,x"], "'x' is not an integer of at least 1"),
        (["convert", "file.pkl"], "--out"),
        (["demo", "--port", "99999"], "--port must be between 0 and 65535"),
        (["demo", "--port", "http"], "invalid int value: 'http'"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, arguments, 2, part)


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("PIL", "hub", ["predict", "{photo}", "--checkpoint", "{checkpoint}"]),
        ("safetensors", "hub", ["predict", "{photo}", "--checkpoint", "{checkpoint}"]),
        ("torchvision.datasets", "train", ["evaluate", "{checkpoint}", "--data", "cifar10:{data}"]),
        ("accelerate", "train", ["train", "tiny_imagenet", "--data", "{data}", "--out", "{out}", *RECIPE]),
        ("tqdm", "train", ["evaluate", "{checkpoint}", "--data", "{data}"]),
        ("gradio", "demo", ["demo"]),
        ("skimage", "demo", ["demo"]),
        ("sklearn", "demo", ["demo"]),
    ],
)
def test_a_missing_extra_names_the_command_that_installs_it(
    package: str,
    extra: str,
    arguments: list[str],
    checkpoint: str,
    photos: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    values = {"photo": photos / "a.png", "checkpoint": checkpoint, "data": data, "out": tmp_path / "run"}
    fails(capsys, [part.format(**values) for part in arguments], 1, f"pip install 'phantomgrad[{extra}]'")


def test_doctor_reports_what_is_installed_and_checks_the_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["checks"]["fixed point"] == found["checks"]["gradient"] == "ok"
    assert {"gradio", "scikit-image", "scikit-learn"} <= set(found["packages"])
    assert found["packages"]["accelerate"] == importlib.metadata.version("accelerate")
    assert found["checks"]["embedded checkpoint"] == "ok"
    assert status == 0
    assert main(["doctor"]) == 0
    assert "check: gradient" in capsys.readouterr().out


def test_json_has_no_nan_and_fits_the_encoding(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.0], "b": float("inf"), "ü": "ï"})
    printed = capsys.readouterr().out
    assert json.loads(printed, parse_constant=pytest.fail) == {"a": [None, 1.0], "b": None, "ü": "ï"}
    assert "ü" in printed


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_names_that_the_encoding_lacks_are_escaped(options: list[str], checkpoint: str, tmp_path: Path) -> None:
    picture(0, 0, size=20).save(tmp_path / "ünï.png")
    command = [sys.executable, "-m", "phantomgrad_hub.cli.main", "predict", "ünï.png", "missing-ï.png"]
    done = subprocess.run(
        [*command, "--checkpoint", checkpoint, *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == r"phantomgrad predict: there is no file missing-\xef.png"
    if options:
        assert json.loads(done.stdout)[0]["photo"] == "ünï.png"
    else:
        assert done.stdout.startswith(r"\xfcn\xef.png  (4 solver steps")


def test_ctrl_c_is_quiet_and_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict_command, "run", interrupt)
    assert main(["predict", "x.jpg"]) == 130
    assert capsys.readouterr().err == ""


def test_a_bug_is_one_line_and_asks_for_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(predict_command, "run", fail)
    fails(capsys, ["predict", "x.jpg"], 1, "unexpected RuntimeError: first second")
    monkeypatch.setenv("PHANTOMGRAD_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="first"):
        main(["predict", "x.jpg"])
