"""The command line: what it prints, its exit status, and one line for everything that can be wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from images import NAMES, picture, write_folder
from small import pooled_config

import phantomgrad_hub.cli.predict as predict_command
from phantomgrad_hub import MDEQ
from phantomgrad_hub.cli.common import print_json
from phantomgrad_hub.cli.main import COMMANDS, build_parser, main
from phantomgrad_hub.data import TrainingImages

RECIPE = [
    "--device=cpu",
    "--no-progress",
    *(
        "--set",
        "model.channels=(8,8)",
        "--set",
        "model.groups=4",
        "--set",
        "model.expansion=1",
        "--set",
        "model.blocks=1",
        "--set",
        "model.head=pooled",
        "--set",
        "model.head_channels=None",
        "--set",
        "model.final_channels=None",
    ),
    *("--set", "model.image_size=16", "--set", "epochs=1", "--set", "batch_size=9", "--set", "workers=0"),
    *("--set", "mixed_precision=no", "--set", "solver_schedule=((1,2,1),)", "--set", "model.eval_solver.max_steps=4"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    MDEQ(pooled_config(channels=(8, 8), num_classes=3, image_size=16), labels=sorted(NAMES)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for index, name in enumerate(("a.png", "b.JPG", "below/c.png")):
        picture(index, 0, size=20).save(folder / name)
    (folder / "notes.txt").write_text("not a photo")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", 6)
    write_folder(folder / "val", 3, first=30)
    return folder


def _fails(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, *parts: str) -> None:
    """The command ends with `status` and one line on stderr that has all `parts`."""
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("phantomgrad")
    for part in parts:
        assert part in printed.err


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
    _fails(capsys, arguments, 2, part)


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
    _fails(capsys, ["predict", str(photo), "--checkpoint", checkpoint], 1, str(photo), part)


def _no_checkpoint(folder: Path) -> None:
    folder.rmdir()


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
    _fails(capsys, ["predict", str(photos / "a.png"), "--checkpoint", str(folder)], 1, part)


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
        _fails(capsys, command_line, 1, f"{run} is a run folder; use {run}/best")
    assert main(["predict", str(data / "val" / "red"), "--checkpoint", str(run / "best")]) == 0
    capsys.readouterr()
    _fails(capsys, [*command, "--set", "optimizer.lr=9.0"], 1, "another configuration: config.optimizer.lr differ")


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
    _fails(capsys, [*plain, "--init", "nosuch"], 1, "there is no checkpoint folder nosuch")
    command = [*plain, *RECIPE]
    _fails(capsys, [*command, "--set", "batch_size=99"], 1, "18 training images do not fill one batch of 99")
    assert main(command) == 0


def test_failures_of_train_and_evaluate_are_one_line_and_status_1(
    checkpoint: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    _fails(capsys, ["train", "tiny_imagenet", "--data", "nowhere", "--out", out], 1, "dataset nowhere does not exist")
    _fails(capsys, ["evaluate", checkpoint, "--data", "nowhere"], 1, "dataset nowhere does not exist")
    command = ["train", "tiny_imagenet", "--data", str(data), *RECIPE]
    _fails(capsys, [*command, "--out", "/proc/nowhere"], 1, "train: /proc/nowhere cannot be written: ")
    (data / "train" / "mauve").mkdir(exist_ok=True)
    picture(0, 0).save(data / "train" / "mauve" / "x.png")
    try:
        _fails(capsys, ["evaluate", checkpoint, "--data", str(data)], 1, "'mauve'", "unknown to the model")
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
    _fails(capsys, command, 1, "no class has an image to hold out; --split all measures all of them")
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
    _fails(capsys, ["convert", str(file), "--out", str(tmp_path / "out")], 1, str(file))
    _fails(capsys, ["convert", str(tmp_path), "--out", str(tmp_path / "out")], 1, f"{tmp_path} is a folder; give the")
    assert not (tmp_path / "out").exists()


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
    _fails(capsys, [part.format(**values) for part in arguments], 1, f"pip install 'phantomgrad[{extra}]'")


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
    _fails(capsys, ["predict", "x.jpg"], 1, "unexpected RuntimeError: first second")
    monkeypatch.setenv("PHANTOMGRAD_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="first"):
        main(["predict", "x.jpg"])


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
