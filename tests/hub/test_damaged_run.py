"""A run folder of which something is missing or damaged: one line says what, and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from images import write_folder
from processes_worker import CONFIG

from phantomgrad_hub.data import Source, open_source
from phantomgrad_hub.train import TrainingError, TrainResult, train

ONE = replace(CONFIG, epochs=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", 4)
    write_folder(folder / "val", 1, first=50)
    return open_source(folder)


@pytest.fixture(scope="module")
def finished(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    _train(source, out)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def _train(source: Source, out: Path) -> TrainResult:
    return train(ONE, source, out, cpu=True, progress=False)


def _without(*names: str) -> Callable[[Path], None]:
    def remove(run: Path) -> None:
        for name in names:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return remove


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def _state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        stored = torch.load(run / "state" / "state.pt", weights_only=True)
        changed = change(stored)
        torch.save(stored if changed is None else changed, run / "state" / "state.pt")

    return damage


FOREIGN = "RUN/state/state.pt is not the state of this run; delete RUN/state to start the run anew."
BEST = "RUN/best is missing or incomplete: put it back from a copy, or delete RUN/state to start the run anew."
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no best": (_without("best"), BEST),
    "no weights in best": (_without("best/model.safetensors"), BEST),
    "no best and no result": (_without("best", "result.json"), BEST),
    "a state that is a list": (_state(lambda state: [1]), FOREIGN),
    "a state without a position": (_state(lambda state: state.pop("position") and None), FOREIGN),
    "a position of another release": (_state(lambda state: state["position"].update(phase=1)), FOREIGN),
    "a step that is a text": (_state(lambda state: state["position"].update(step="1")), FOREIGN),
    "weights of another model": (_state(lambda state: state["model"].popitem() and None), FOREIGN),
    "a weight of another shape": (_state(lambda state: state["model"].update({"head.classifier.bias": torch.zeros(7)})), FOREIGN),
    "an average that is none": (_state(lambda state: state.update(average=3)), FOREIGN),
    "another optimizer": (_state(lambda state: state.update(optimizer={"state": {}, "param_groups": []})), FOREIGN),
    "an optimizer that is none": (_state(lambda state: state.update(optimizer=[])), FOREIGN),
    "an empty result": (_text("result.json", ""), "RUN/result.json is damaged; delete it, then the same command goes on."),
    "another result": (_text("result.json", "{}"), "RUN/result.json is damaged; delete it, then the same command goes on."),
    "half an environment": (_text("environment.json", "{"), "RUN/environment.json is damaged; delete it, then the same command goes on."),
    "another environment": (_text("environment.json", "[]"), "RUN/environment.json is damaged; delete it, then the same command goes on."),
    "another log": (_text("metrics.jsonl", "5\n"), "RUN/metrics.jsonl is damaged; delete it, then the same command goes on."),
    "another configuration": (_text("config.json", "[]"), "RUN is not empty and is no run; give another folder."),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_damaged_is_named_with_what_to_do(what: str, source: Source, run: Path) -> None:
    damage, message = DAMAGE[what]
    damage(run)
    with pytest.raises(TrainingError) as caught:
        _train(source, run)
    assert str(caught.value) == message.replace("RUN", str(run))


@pytest.mark.parametrize("name", ["result.json", "environment.json", "metrics.jsonl", "last", "state"])
def test_what_is_missing_is_made_again(name: str, source: Source, run: Path) -> None:
    best = json.loads((run / "result.json").read_text())
    _without(name)(run)
    result = _train(source, run)
    assert result.evaluation is not None
    assert result.evaluation.to_dict() == best
