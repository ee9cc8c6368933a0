"""Training: it learns, with every option, and says what it does."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from images import NAMES, write_folder, write_parquet
from safetensors.torch import load_file
from trainings import CONFIG, logged, run_training, same_weights, small_source

import phantomgrad
from phantomgrad import Backprop
from phantomgrad_hub import MDEQ
from phantomgrad_hub.data import AugmentationConfig, Source, open_source
from phantomgrad_hub.train import OptimizerConfig, SolverPhase, TrainingError
from phantomgrad_hub.train.average import WeightAverage
from phantomgrad_hub.train.build import SolverSchedule, attach_for_training, build_model, build_optimizer
from phantomgrad_hub.train.run import RunFolder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return small_source(tmp_path_factory.mktemp("data"))


def test_a_small_model_learns_and_leaves_a_complete_run(source: Source, tmp_path: Path) -> None:
    result = run_training(source, tmp_path / "run", replace(CONFIG, epochs=4))
    run = tmp_path / "run"
    losses = [record["loss"] for record in logged(run, "train")]
    assert len(losses) == result.step == 24
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert set(logged(run, "train")[0]) >= {"epoch", "step", "lr", "images_per_s", "solver_steps", "residual"}
    assert [record["epoch"] for record in logged(run, "validation")] == [0, 1, 2, 3]
    assert result.evaluation is not None
    assert result.evaluation.count == 12
    assert result.evaluation.top1 == max(record["top1"] for record in logged(run, "validation"))
    assert set(result.evaluation.accuracy_by_steps) == {1, 2, 3, 4, 6}
    for checkpoint in (run / "last", run / "best"):
        model = MDEQ.from_pretrained(checkpoint)
        assert model.labels == sorted(NAMES)
    assert json.loads((run / "config.json").read_text())["config"]["optimizer"]["lr"] == 5e-3
    assert json.loads((run / "environment.json").read_text())["sessions"][0]["packages"]["torch"] == version("torch")
    assert not [entry.name for entry in run.iterdir() if entry.name.startswith(".")]


def test_a_single_step_trains(source: Source, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, batch_size=50, ema_decay=0.0)
    assert run_training(source, tmp_path, config).step == 1
    [record] = logged(tmp_path, "train")
    assert record["lr"] == config.optimizer.lr
    start = build_model(config, source, None).state_dict()
    trained = load_file(tmp_path / "last" / "model.safetensors")
    kernels = [key for key, value in start.items() if value.dim() == 4]
    assert kernels
    assert not any(torch.equal(trained[key], start[key]) for key in kernels)


def test_the_time_of_saving_is_not_that_of_training(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFolder.save

    def slow(self: RunFolder, *given: Any) -> None:
        time.sleep(3)
        save(self, *given)

    monkeypatch.setattr(RunFolder, "save", slow)
    run_training(source, tmp_path, replace(CONFIG, model=replace(CONFIG.model, dropout=0.0)))
    first = [record for record in logged(tmp_path, "train") if record["step"] == 7]
    assert [record["images_per_s"] > 9 / 3 for record in first] == [True]


def test_the_last_batches_of_an_epoch_weigh_as_much_as_others(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    plain = replace(CONFIG, model=replace(CONFIG.model, dropout=0.0), epochs=1, ema_decay=0.0, clip=None)
    plain = replace(plain, optimizer=OptimizerConfig(lr=0.01, weight_decay=0.0), batch_size=18)
    # Three batches of 18: of four to a step there is one group, which is not whole.
    assert run_training(source, tmp_path / "short", replace(plain, accumulation=4)).step == 1
    assert run_training(source, tmp_path / "whole", replace(plain, accumulation=3)).step == 1
    short, whole = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("short", "whole"))
    for key, value in whole.items():
        torch.testing.assert_close(short[key], value, rtol=1e-5, atol=1e-6)


def test_too_few_images_for_a_batch_are_named(source: Source, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="54 training images do not fill one batch of 512"):
        run_training(source, tmp_path, replace(CONFIG, batch_size=512))


def test_the_solver_schedule_sets_steps_as_training_goes_on(source: Source, tmp_path: Path) -> None:
    phases = (
        SolverPhase(until=0.5, solver_steps=1, phantom_steps=1),
        SolverPhase(until=1.0, solver_steps=4, phantom_steps=2),
    )
    run_training(source, tmp_path, replace(CONFIG, solver_schedule=phases))
    assert [record["solver_steps"] for record in logged(tmp_path, "train")] == [1.0] * 6 + [4.0] * 6
    assert MDEQ.from_pretrained(tmp_path / "last").config.solver == CONFIG.model.solver


def test_accumulated_batches_make_the_step_of_one_large_batch(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # BatchNorm sees batches, not steps: it is left in evaluation mode here.
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    plain = replace(CONFIG, model=replace(CONFIG.model, dropout=0.0), epochs=1, ema_decay=0.0)
    assert run_training(source, tmp_path / "large", replace(plain, batch_size=18)).step == 3
    assert run_training(source, tmp_path / "small", replace(plain, batch_size=9, accumulation=2)).step == 3
    large, small = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("large", "small"))
    for key, value in large.items():
        torch.testing.assert_close(small[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_parquet_data_and_worker_processes_train_too(tmp_path: Path, own_dataset_cache: None) -> None:
    write_parquet(tmp_path / "data", "train", 6)
    write_parquet(tmp_path / "data", "validation", 2, first=20)
    parquet = open_source(tmp_path / "data")
    config = replace(CONFIG, epochs=1)
    run_training(parquet, tmp_path / "alone", config)
    run_training(parquet, tmp_path / "workers", replace(config, workers=1))
    assert same_weights(tmp_path / "alone" / "last", tmp_path / "workers" / "last")


def test_a_checkpoint_is_fine_tuned_with_a_head_for_the_datas_classes(source: Source, tmp_path: Path) -> None:
    start = MDEQ(replace(CONFIG.model, num_classes=5))
    start.save_pretrained(tmp_path / "start")
    frozen = replace(CONFIG, epochs=1, optimizer=OptimizerConfig(name="sgd", lr=1e-12, weight_decay=0.0))
    run_training(source, tmp_path / "run", frozen, init=tmp_path / "start")
    tuned = MDEQ.from_pretrained(tmp_path / "run" / "last")
    assert tuned.labels == sorted(NAMES)
    before, after = start.block.state_dict(), tuned.block.state_dict()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value)


def test_weight_decay_spares_vectors() -> None:
    model = MDEQ(CONFIG.model)
    optimizer = build_optimizer(OptimizerConfig(name="adamw", weight_decay=0.3), model)
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = "norm" in name or name.endswith(("bias", "original0"))
        assert decay[id(parameter)] == (0.0 if spared else 0.3), name


def test_the_average_follows_the_closed_form() -> None:
    trained, average = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    average.load_state_dict(trained.state_dict())
    weights = WeightAverage(average, trained, 0.5)  # type: ignore[arg-type]
    expected = trained.weight.detach().clone()
    for step in range(1, 20):
        with torch.no_grad():
            trained.weight.add_(1.0)
        weights.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trained.weight.detach()
    torch.testing.assert_close(average.weight.detach(), expected)


def test_training_attaches_silently_and_keeps_the_models_options() -> None:
    from phantomgrad_hub.train.build import attach_for_training

    model = MDEQ(CONFIG.model)
    attachment = attach_for_training(model, CONFIG)
    assert [attachment] == list(phantomgrad.attachments(model))
    assert (attachment.gradient, attachment.solver) == (CONFIG.model.gradient, CONFIG.model.solver)
    model(torch.randn(2, 3, 16, 16)).sum().backward()  # warnings are errors


@pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")
def test_a_jacobian_penalty_keeps_the_block_smaller(source: Source, tmp_path: Path) -> None:
    @torch.no_grad()
    def norm(folder: Path) -> float:
        model = MDEQ.from_pretrained(folder).eval()
        injection = model.inject(torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]))
        state = model.equilibrium(injection)
        return float(phantomgrad.diagnostics.jacobian_penalty(model.block, state, injection, probes=20))

    config = replace(CONFIG, epochs=4, ema_decay=0.0, augmentation=AugmentationConfig(crop="none"))
    run_training(source, tmp_path / "free", config)
    run_training(source, tmp_path / "held", replace(config, jacobian_penalty=5.0))
    assert norm(tmp_path / "held" / "last") < 0.8 * norm(tmp_path / "free" / "last")


def test_an_unrolled_phase_backpropagates_through_the_iterations(source: Source, tmp_path: Path) -> None:
    phases = (SolverPhase(until=0.5, solver_steps=2, unrolled=True), SolverPhase(until=1.0, solver_steps=3))
    model = MDEQ(CONFIG.model)
    attachment = attach_for_training(model, CONFIG)
    schedule = SolverSchedule(replace(CONFIG, solver_schedule=phases), attachment)
    schedule.set_progress(0.0)
    assert attachment.gradient == Backprop(steps=2)
    schedule.set_progress(0.5)
    assert attachment.gradient == CONFIG.model.gradient
    assert attachment.solver.max_steps == 3
    with pytest.raises(ValueError, match="phantom_steps has no part in an unrolled phase"):
        SolverPhase(until=1.0, solver_steps=2, phantom_steps=1, unrolled=True)


def test_metrics_go_to_tensorboard_too(source: Source, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_training(source, tmp_path, replace(CONFIG, epochs=1, trackers=("tensorboard",)))
    events = accumulator.EventAccumulator(str(tmp_path / "phantomgrad")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    own = [(record["step"], record["loss"]) for record in logged(tmp_path, "train")]
    assert [step for step, _ in losses] == [step for step, _ in own]
    torch.testing.assert_close([value for _, value in losses], [value for _, value in own])
    assert "validation/top1" in events.Tags()["scalars"]


def test_unknown_and_missing_trackers_are_one_line(source: Source, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^trackers: there is no fancy; Accelerate has aim, .*tensorboard"):
        run_training(source, tmp_path / "run", replace(CONFIG, trackers=("fancy",)))
    with pytest.raises(TrainingError, match=r"^trackers: aim is not installed; run: pip install aim$"):
        run_training(source, tmp_path / "run", replace(CONFIG, trackers=("aim",)))
    assert not (tmp_path / "run").exists()


def test_an_unreadable_photo_is_counted_in_the_log(tmp_path: Path) -> None:
    write_folder(tmp_path / "data" / "train", 35)
    write_folder(tmp_path / "data" / "val", 2)
    source = open_source(tmp_path / "data")
    Path(source.train.name(40)).write_bytes(b"garbage")
    run_training(source, tmp_path / "run", replace(CONFIG, epochs=1))
    assert sum(record.get("unreadable", 0) for record in logged(tmp_path / "run", "train")) == 1
