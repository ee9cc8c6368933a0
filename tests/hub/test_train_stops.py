"""A training stops, fails and resumes as if nothing had happened, and never loses a run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from images import write_folder
from trainings import CONFIG, at_batch, logged, run_training, same_weights, small_source

from phantomgrad_hub import MDEQ, CheckpointError
from phantomgrad_hub.data import AugmentationConfig, DataError, Source, open_source
from phantomgrad_hub.train import OptimizerConfig, SolverPhase, TrainConfig, TrainingError
from phantomgrad_hub.train.files import repair_folder, write_file
from phantomgrad_hub.train.files import write_folder as write_folder_atomically
from phantomgrad_hub.train.run import RunFolder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return small_source(tmp_path_factory.mktemp("data"))


def test_a_finished_run_is_not_trained_again(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, epochs=1)
    first = run_training(source, tmp_path, config)
    at_batch(monkeypatch, 1, lambda: pytest.fail("a batch was loaded"))
    assert run_training(source, tmp_path, config) == first


@pytest.mark.parametrize("batch", [3, 7, 9])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    whole = run_training(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        at_batch(patch, batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = run_training(source, tmp_path / "parts")
    assert stopped.stopped_by == signal.SIGTERM
    assert stopped.evaluation is None
    assert 0 < stopped.step < 12
    torch.manual_seed(12345)
    resumed = run_training(source, tmp_path / "parts")
    assert resumed == whole
    assert same_weights(tmp_path / "parts" / "last", tmp_path / "whole" / "last")
    assert same_weights(tmp_path / "parts" / "best", tmp_path / "whole" / "best")
    for kind in ("train", "validation"):
        steps = [record["step"] for record in logged(tmp_path / "parts", kind)]
        assert steps == [record["step"] for record in logged(tmp_path / "whole", kind)]


def test_a_crash_loses_what_came_after_the_last_checkpoint_only(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise OSError("no space left on device")

    config = replace(CONFIG, checkpoint_minutes=1e-9)
    whole = run_training(source, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        at_batch(patch, 5, crash)
        with pytest.raises(OSError, match="no space left"):
            run_training(source, tmp_path / "parts", config)
    assert len(logged(tmp_path / "parts", "train")) == 3
    assert run_training(source, tmp_path / "parts", config) == whole
    assert same_weights(tmp_path / "parts" / "last", tmp_path / "whole" / "last")


def test_a_signal_while_validating_is_obeyed_and_the_validation_repeated(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, validation_batch_size=5)
    whole = run_training(source, tmp_path / "whole", config)
    preprocess = MDEQ.preprocess

    def interrupting(self: MDEQ, image: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return preprocess(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(MDEQ, "preprocess", interrupting)
        stopped = run_training(source, tmp_path / "parts", config)
    assert (stopped.step, stopped.stopped_by) == (6, signal.SIGTERM)
    assert logged(tmp_path / "parts", "validation") == []
    assert run_training(source, tmp_path / "parts", config) == whole
    assert len(logged(tmp_path / "parts", "validation")) == 2


def test_another_config_for_a_run_is_refused_with_the_keys(source: Source, tmp_path: Path) -> None:
    run_training(source, tmp_path, replace(CONFIG, epochs=1))
    other = replace(CONFIG, epochs=1, optimizer=replace(CONFIG.optimizer, lr=0.5), clip=None)
    with pytest.raises(TrainingError, match=r"another configuration: config\.optimizer\.lr, config\.clip differ\."):
        run_training(source, tmp_path, other)
    with pytest.raises(TrainingError, match=r"another configuration: init differs\."):
        run_training(source, tmp_path, replace(CONFIG, epochs=1), init=tmp_path / "best")
    optimizer = OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.5, momentum=0.5)
    many = replace(CONFIG, epochs=9, optimizer=optimizer, batch_size=3, clip=None, seed=1)
    with pytest.raises(TrainingError, match=r"config\.optimizer\.name, (\S+, ){3}\S+ and 3 more differ\."):
        run_training(source, tmp_path, many)


@pytest.mark.parametrize(
    ("changes", "init", "message"),
    [
        ({"batch_size": 512}, None, "do not fill one batch"),
        ({}, "nosuch", "there is no checkpoint folder nosuch"),
    ],
)
def test_a_start_that_fails_leaves_nothing_behind(
    source: Source, tmp_path: Path, changes: dict[str, Any], init: str | None, message: str
) -> None:
    with pytest.raises((TrainingError, CheckpointError), match=message):
        run_training(source, tmp_path / "run", replace(CONFIG, epochs=1, **changes), init=init)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("memory_gib", [4.0, 0.0], ids=["decoded at once", "decoded in training"])
def test_where_nothing_was_saved_another_config_takes_its_place(tmp_path: Path, memory_gib: float) -> None:
    write_folder(tmp_path / "data" / "train", 6)
    write_folder(tmp_path / "data" / "val", 2, first=50)
    photo = tmp_path / "data" / "train" / "red" / "003.png"
    content = photo.read_bytes()
    photo.write_bytes(b"garbage")
    config = replace(CONFIG, epochs=1, memory_gib=memory_gib)
    with pytest.raises(DataError, match=r"003\.png"):
        run_training(open_source(tmp_path / "data"), tmp_path / "run", config)
    assert (tmp_path / "run").exists() == (memory_gib == 0)
    photo.write_bytes(content)
    other = replace(config, batch_size=6)
    assert run_training(open_source(tmp_path / "data"), tmp_path / "run", other).step == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["batch_size"] == 6
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]) == 1


def test_a_run_whose_state_was_deleted_starts_anew(source: Source, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    first = run_training(source, tmp_path, config)
    (tmp_path / "state" / "state.pt").unlink()
    (tmp_path / "result.json").write_text("{}")  # of the earlier run
    with pytest.raises(TrainingError, match="another configuration"):
        run_training(source, tmp_path, replace(config, seed=1))
    assert run_training(source, tmp_path, config) == first


def test_a_folder_that_is_no_run_is_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(TrainingError, match="is not empty and is no run"):
        run_training(source, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    MDEQ(CONFIG.model).save_pretrained(tmp_path / "checkpoint")
    before = (tmp_path / "checkpoint" / "config.json").read_text()
    with pytest.raises(TrainingError, match="is not empty and is no run"):
        run_training(source, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "config.json").read_text() == before
    with pytest.raises(TrainingError, match="is a file"):
        run_training(source, tmp_path / "thesis.tex")


def test_a_folder_that_cannot_be_made_is_named(source: Source) -> None:
    with pytest.raises(TrainingError, match=r"^/proc/nowhere cannot be written: .+; give another folder\.$"):
        run_training(source, Path("/proc/nowhere"))


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line_and_keeps_the_last_state(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_batch(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        before = run_training(source, tmp_path)
    cross_entropy = torch.nn.functional.cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "cross_entropy", lambda *given, **options: cross_entropy(*given, **options) * torch.nan
        )
        with pytest.raises(TrainingError, match=f"the loss became nan .* still holds step {before.step}") as caught:
            run_training(source, tmp_path)
    assert "\n" not in str(caught.value)
    assert run_training(source, tmp_path).evaluation is not None


def test_a_loss_that_is_not_finite_before_anything_is_saved_says_so(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda logits, *given, **options: logits.sum() * torch.nan
    )
    with pytest.raises(TrainingError, match=rf"^the loss became nan by step 1; {tmp_path} holds nothing yet\. Start"):
        run_training(source, tmp_path)


def test_a_damaged_state_says_what_to_delete(source: Source, tmp_path: Path) -> None:
    run_training(source, tmp_path, replace(CONFIG, epochs=1))
    (tmp_path / "state" / "state.pt").write_bytes(b"garbage")
    with pytest.raises(TrainingError, match=r"state\.pt is damaged; delete"):
        run_training(source, tmp_path, replace(CONFIG, epochs=1))


def test_files_and_folders_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("disk full")

    def fill(text: str) -> Any:
        return lambda partial: (partial.mkdir(), (partial / "a").write_text(text))

    write_file(tmp_path / "file", lambda partial: partial.write_text("old") and None)
    with pytest.raises(OSError, match="disk full"):
        write_file(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "old"
    write_folder_atomically(tmp_path / "folder", fill("old"))
    write_folder_atomically(tmp_path / "folder", fill("new"))
    assert (tmp_path / "folder" / "a").read_text() == "new"
    (tmp_path / "folder").rename(tmp_path / ".folder.old")  # killed between the two renames of a swap
    repair_folder(tmp_path / "folder")
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, augmentation=AugmentationConfig(mixup=0.2, cutmix=1.0, rand_augment=9)),
        replace(CONFIG, optimizer=OptimizerConfig(name="lamb", lr=5e-3)),
        replace(CONFIG, jacobian_penalty=0.5),
        replace(
            CONFIG,
            solver_schedule=(
                SolverPhase(until=0.5, solver_steps=2, unrolled=True),
                SolverPhase(until=1.0, solver_steps=3, phantom_steps=1),
            ),
        ),
    ],
    ids=["mixing", "lamb", "penalty", "unrolled"],
)
def test_every_option_trains_and_resumes_bit_for_bit(
    config: TrainConfig, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_training(source, tmp_path / "whole", config)
    plain = run_training(source, tmp_path / "plain")
    assert not same_weights(tmp_path / "whole" / "last", tmp_path / "plain" / "last")
    assert plain.step == whole.step
    with monkeypatch.context() as patch:
        at_batch(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run_training(source, tmp_path / "parts", config).stopped_by == signal.SIGTERM
    assert run_training(source, tmp_path / "parts", config) == whole
    assert same_weights(tmp_path / "parts" / "last", tmp_path / "whole" / "last")


def test_two_processes_cannot_train_in_one_folder(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(TrainingError) as caught:
            RunFolder(tmp_path / "run").open(json.loads((tmp_path / "run" / "config.json").read_text()))
        refused.append(str(caught.value))

    with monkeypatch.context() as patch:
        at_batch(patch, 2, second)
        run_training(source, tmp_path / "run", replace(CONFIG, epochs=1))
    assert refused == [
        f"{tmp_path / 'run'} is in use: another process trains there. Wait for it, stop it, or give another folder."
    ]
    run_training(source, tmp_path / "run", replace(CONFIG, epochs=1))  # free again
