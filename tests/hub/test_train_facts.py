"""What a finished training tells its card: its figures, and a command that trains the same again."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from images import write_folder
from small import pooled_config

from phantomgrad_hub import MDEQ
from phantomgrad_hub.cli.main import main
from phantomgrad_hub.data import open_source
from phantomgrad_hub.evaluation import Evaluation
from phantomgrad_hub.facts import Source
from phantomgrad_hub.train import RECIPES, apply_settings
from phantomgrad_hub.train.card_facts import training_facts

FOUND = Evaluation(count=9, top1=1.0, top5=1.0, steps_mean=4.0, residual_median=0.1, residual_p90=0.2, unconverged=0)
SMALL = [
    *("model.channels=(8,8)", "model.groups=4", "model.expansion=1", "model.blocks=1", "model.image_size=16"),
    *("model.head=pooled", "model.head_channels=None", "model.final_channels=None", "epochs=1", "batch_size=9"),
    *("workers=0", "mixed_precision=no", "solver_schedule=((1,2,1),)", "model.eval_solver.max_steps=4"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("here") / "insects"
    write_folder(folder / "train", 6)
    write_folder(folder / "val", 3, first=30)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["epochs=3", "optimizer.lr=0.01"],
        SMALL,
        [
            "model.gradient=OneStep()",
            "solver_schedule=()",
            "model.eval_solver=Broyden(max_steps=7)",
            "model.solver.damping=0.5",
        ],
        ["solver_schedule=()", "ema_decay=0.9", "optimizer.betas=(0.8,0.9)", "augmentation.flip=False"],
    ],
)
def test_the_command_on_the_card_trains_the_same(settings: list[str], data: Path) -> None:
    config = apply_settings(RECIPES["tiny_imagenet"](), settings)
    facts = training_facts(
        config, open_source(str(data)), FOUND, recipe="tiny_imagenet", base=None, hours=1.0, machine="x"
    )
    assert facts.command is not None
    words = shlex.split(facts.command)
    assert words[:7] == ["phantomgrad", "train", "tiny_imagenet", "--data", "FOLDER", "--out", "RUN"]
    assert set(words[7::2]) <= {"--set"}
    assert apply_settings(RECIPES["tiny_imagenet"](), words[8::2]) == config


def test_a_finished_run_tells_its_card(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["train", "tiny_imagenet", "--data", str(data), "--out", str(run), "--device=cpu", "--no-progress"]
    assert main([*command, *(word for setting in SMALL for word in ("--set", setting))]) == 0
    stored = json.loads((run / "result.json").read_text())
    facts = json.loads((run / "best" / "card.json").read_text())
    assert facts["evaluation"] == stored
    assert (facts["data"], facts["split"]) == ("insects", "validation")
    assert facts["hours"] > 0
    assert facts["machine"]
    assert facts["details"] == "1 epoch of 18 photos."
    # A card is public: it names no folder of the machine.
    assert str(tmp_path) not in json.dumps(facts)
    assert str(data.parent) not in json.dumps(facts)
    (run / "best" / "card.json").unlink()
    measured = ["evaluate", str(run / "best"), "--data", str(data), "--no-progress", "--card"]
    assert main(measured) == 0
    again = json.loads((run / "best" / "card.json").read_text())
    assert again == {"data": "insects", "split": "validation", "evaluation": stored}
    capsys.readouterr()
    assert main(["evaluate", "embedded", "--data", str(data), "--card"]) == 2
    assert "--card writes to the checkpoint's folder" in capsys.readouterr().err


def test_the_tenth_that_a_training_held_out_is_the_one_that_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run, copy = tmp_path / "insects", tmp_path / "run", tmp_path / "copy"
    write_folder(data, 12)
    command = ["train", "tiny_imagenet", "--data", str(data), "--out", str(run), "--device=cpu", "--no-progress"]
    assert main([*command, *(word for setting in [*SMALL, "seed=5"] for word in ("--set", setting))]) == 0
    stored = json.loads((run / "result.json").read_text())
    assert json.loads((run / "best" / "card.json").read_text())["held_out_seed"] == 5
    shutil.copytree(run / "best", copy)

    def measured(checkpoint: Path, *options: str) -> dict[str, Any]:
        arguments = ["evaluate", str(checkpoint), "--data", str(data), "--no-progress", *options]
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(arguments) == 0
        return {**found, "line": capsys.readouterr().out.splitlines()[0].split("; ", 1)[1]}

    # From its card, and while there is none, as of `last`, from the run's configuration.
    for checkpoint in (copy, run / "best", run / "last"):
        found = measured(checkpoint)
        assert found["seed"] == 5
        assert found["line"] == "measured on the held-out tenth of seed 5, that of the training"
    assert {key: measured(run / "best")[key] for key in stored} == stored
    other = measured(copy, "--seed", "0")
    assert other["seed"] == 0
    assert other["line"] == "measured on the held-out tenth of seed 0; that of the training is of seed 5"
    assert other["residual_median"] != stored["residual_median"]
    train = measured(copy, "--split", "train")
    assert (train["count"], train["seed"]) == (33, 5)
    assert train["line"] == "measured on all but the held-out tenth of seed 5, that of the training"
    everything = measured(copy, "--split", "all")
    assert (everything["seed"], everything["line"]) == (None, "measured on all")
    (copy / "card.json").unlink()
    unknown = measured(copy, "--card")
    assert (unknown["seed"], unknown["line"]) == (0, "measured on the held-out tenth of seed 0")
    card = json.loads((copy / "card.json").read_text())
    assert card["split"] == "a held-out tenth"
    assert "held_out_seed" not in card


@pytest.mark.parametrize("fetched", [True, False])
def test_a_fine_tuned_model_names_the_checkpoint_it_began_with(fetched: bool, data: Path, tmp_path: Path) -> None:
    model = MDEQ(pooled_config(num_classes=3), labels=["red", "green", "blue"])
    source = Source(repository="ann/model", commit="a" * 40)
    if fetched:
        model.source = source
    model.save_pretrained(tmp_path / "base")
    command: list[Any] = [
        "train",
        "finetune",
        "--data",
        str(data),
        "--init",
        str(tmp_path / "base"),
        "--out",
        str(tmp_path / "run"),
    ]
    options = [
        "--device=cpu",
        "--no-progress",
        "--set",
        "epochs=1",
        "--set",
        "batch_size=9",
        "--set",
        "mixed_precision=no",
    ]
    assert main([*command, *options]) == 0
    facts = json.loads((tmp_path / "run" / "best" / "card.json").read_text())
    assert facts.get("base") == (str(source) if fetched else None)
    assert not (tmp_path / "run" / "best" / "source.json").exists()
