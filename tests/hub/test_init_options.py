"""What a checkpoint that a training begins with decides, and what may be set beside it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from images import write_folder
from processes_worker import CONFIG

from phantomgrad import Anderson, FixedPointIteration, NeumannPhantom, OneStep, UnrolledPhantom
from phantomgrad_hub import MDEQ, MDEQConfig
from phantomgrad_hub.cli.main import main
from phantomgrad_hub.data import open_source
from phantomgrad_hub.train import TrainConfig, TrainingError, apply_settings, finetune, tiny_imagenet, train
from phantomgrad_hub.train.settings import to_json

SMALL = ["epochs=1", "batch_size=6", "workers=0", "mixed_precision=no", "trackers=()"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", 4)
    write_folder(folder / "val", 2, first=50)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of the one-step gradient."""
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    MDEQ(replace(CONFIG.model, gradient=OneStep())).save_pretrained(folder)
    return folder


def _command(start: Path, data: Path, out: Path, *settings: str, recipe: str = "finetune") -> int:
    command = [
        "train",
        recipe,
        "--init",
        str(start),
        "--data",
        str(data),
        "--out",
        str(out),
        "--device=cpu",
        "--no-progress",
    ]
    return main([*command, *(word for setting in (*SMALL, *settings) for word in ("--set", setting))])


def test_gradient_solver_and_dropout_may_be_set_and_are_recorded(start: Path, data: Path, tmp_path: Path) -> None:
    settings = ["model.gradient=NeumannPhantom(steps=2)", "model.solver.max_steps=2", "model.eval_solver=Anderson(max_steps=5)",
                "model.dropout=0.25", "model.head_dropout=0.5", "log_every=1"]  # fmt: skip
    run = tmp_path / "run"
    assert _command(start, data, run, *settings) == 0
    expected: dict[str, Any] = {
        "gradient": NeumannPhantom(steps=2),
        "solver": replace(CONFIG.model.solver, max_steps=2),
        "eval_solver": Anderson(max_steps=5),
        "dropout": 0.25,
        "head_dropout": 0.5,
    }
    trained = MDEQ.from_pretrained(run / "best").config
    assert trained == replace(CONFIG.model, num_classes=3, **expected)
    stored = json.loads((run / "config.json").read_text())["config"]["model"]
    assert {name: stored[name] for name in expected} == {name: to_json(value) for name, value in expected.items()}
    assert stored["channels"] == [8, 8]
    steps = [record.get("solver_steps") for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert steps[0] == 2
    # The card's command says the same once more.
    words = shlex.split(json.loads((run / "best" / "card.json").read_text())["command"])
    kept = [word for word in words if word.startswith("model.")]
    again = apply_settings(finetune(), kept, given={"model": MDEQ.from_pretrained(start).config})
    assert replace(again.model, num_classes=3) == trained


def test_without_settings_the_checkpoint_decides(start: Path, data: Path, tmp_path: Path) -> None:
    assert _command(start, data, tmp_path / "run") == 0
    assert MDEQ.from_pretrained(tmp_path / "run" / "best").config == replace(
        CONFIG.model, num_classes=3, gradient=OneStep()
    )
    assert "model." not in json.loads((tmp_path / "run" / "best" / "card.json").read_text())["command"]


@pytest.mark.parametrize(
    "setting", ["model.channels=(8,8)", "model.num_classes=7", "model.image_size=32", "model.groups=8"]
)
def test_what_the_checkpoint_decides_cannot_be_set(
    setting: str, start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(start, data, tmp_path / "run", setting) == 2
    assert capsys.readouterr().err == (
        f"phantomgrad train: --set {setting.split('=')[0]}: the checkpoint of --init decides it; of the model only gradient, "
        "solver, eval_solver, dropout and head_dropout can be set\n"
    )
    assert not (tmp_path / "run").exists()


def test_an_option_is_that_of_the_checkpoints_own_gradient(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(start, data, tmp_path / "run", "model.gradient.steps=4") == 2
    assert "--set model.gradient.steps: no such field" in capsys.readouterr().err


def test_a_schedule_of_phantom_steps_asks_for_a_gradient_that_has_them(
    start: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(start, data, tmp_path / "run", recipe="tiny_imagenet") == 2
    error = capsys.readouterr().err
    assert error == (
        "phantomgrad train: solver_schedule sets phantom_steps, but OneStep has no steps; take another model.gradient, or "
        "solver_schedule=()\n"
    )
    assert _command(start, data, tmp_path / "run", "solver_schedule=()", recipe="tiny_imagenet") == 0


def _python(config: TrainConfig, start: Path, data: Path, out: Path) -> MDEQConfig:
    train(config, open_source(data), out, init=start, cpu=True, progress=False)
    return MDEQ.from_pretrained(out / "last").config


def test_in_python_the_model_of_a_recipe_leaves_all_to_the_checkpoint(start: Path, data: Path, tmp_path: Path) -> None:
    small = apply_settings(finetune(), SMALL)
    assert _python(small, start, data, tmp_path / "run").gradient == OneStep()
    with pytest.raises(TrainingError, match="solver_schedule sets phantom_steps, but OneStep has no steps"):
        _python(apply_settings(tiny_imagenet(), SMALL), start, data, tmp_path / "other")


def test_in_python_another_model_must_be_the_checkpoints_but_for_its_options(
    start: Path, data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"gradient": UnrolledPhantom(steps=1), "solver": FixedPointIteration(max_steps=2)}
    config = replace(CONFIG, epochs=1, model=replace(CONFIG.model, num_classes=9, **options))
    used = _python(config, start, data, tmp_path / "run")
    assert (used.gradient, used.solver) == (options["gradient"], options["solver"])
    with pytest.raises(TrainingError) as caught:
        _python(replace(config, model=replace(config.model, groups=8)), start, data, tmp_path / "other")
    assert str(caught.value) == (
        f"model.groups is 8, and 4 in the checkpoint {start}, which decides it: give its own config, of which gradient, "
        "solver, eval_solver, dropout and head_dropout may differ."
    )
    assert not (tmp_path / "other").exists()


def test_a_run_of_an_earlier_release_goes_on(start: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _command(start, data, run) == 0
    stored = json.loads((run / "config.json").read_text())
    stored["data"] = {"train": 12, "validation": 6, "classes": 3}
    stored["config"]["model"] = to_json(finetune().model)  # which had no part in it
    (run / "config.json").write_text(json.dumps(stored))
    assert _command(start, data, run) == 0
    assert json.loads((run / "config.json").read_text())["config"]["model"]["channels"] == [8, 8]
