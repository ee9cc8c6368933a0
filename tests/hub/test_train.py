"""Training: it learns, stops, resumes as if nothing had happened, and never loses a run."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from images import NAMES, write_folder, write_parquet
from safetensors.torch import load_file
from small import pooled_config

import phantomgrad
from phantomgrad import Backprop, FixedPointIteration, UnrolledPhantom
from phantomgrad_hub import MDEQ, CheckpointError
from phantomgrad_hub.data import AugmentationConfig, DataError, Source, TrainingImages, open_source
from phantomgrad_hub.train import OptimizerConfig, SolverPhase, TrainConfig, TrainingError, TrainResult, train
from phantomgrad_hub.train.average import WeightAverage
from phantomgrad_hub.train.build import SolverSchedule, attach_for_training, build_model, build_optimizer
from phantomgrad_hub.train.files import repair_folder, write_file
from phantomgrad_hub.train.files import write_folder as write_folder_atomically
from phantomgrad_hub.train.run import RunFolder

CONFIG = TrainConfig(
    model=pooled_config(
        channels=(8, 8),
        image_size=16,
        input_downsamplings=1,
        expansion=1,
        dropout=0.1,
        gradient=UnrolledPhantom(steps=2, damping=0.7),
        solver=FixedPointIteration(damping=0.7, max_steps=3),
        eval_solver=FixedPointIteration(damping=0.7, max_steps=6),
    ),
    augmentation=AugmentationConfig(crop="pad", padding=0.125, color_jitter=0.1),
    optimizer=OptimizerConfig(name="adamw", lr=5e-3, weight_decay=0.01),
    epochs=2,
    batch_size=9,
    clip=1.0,
    ema_decay=0.9,
    workers=0,
    log_every=1,
    trackers=(),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", 18)
    write_folder(folder / "val", 4, first=50)
    return open_source(folder)


def _train(source: Source, out: Path, config: TrainConfig = CONFIG, **options: Any) -> TrainResult:
    return train(config, source, out, cpu=True, progress=False, **options)


def _log(out: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["type"] == kind]


def _stop_at_batch(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Run `action` when the loader asks for batch `number`, counted from 1."""
    load, asked = TrainingImages.__getitems__, []

    def counted(self: TrainingImages, indices: list[int]) -> Any:
        asked.append(indices)
        if len(asked) == number:
            action()
        return load(self, indices)

    monkeypatch.setattr(TrainingImages, "__getitems__", counted)


def _same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_small_model_learns_and_leaves_a_complete_run(source: Source, tmp_path: Path) -> None:
    result = _train(source, tmp_path / "run", replace(CONFIG, epochs=4))
    run = tmp_path / "run"
    losses = [record["loss"] for record in _log(run, "train")]
    assert len(losses) == result.step == 24
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert set(_log(run, "train")[0]) >= {"epoch", "step", "lr", "images_per_s", "solver_steps", "residual"}
    assert [record["epoch"] for record in _log(run, "validation")] == [0, 1, 2, 3]
    assert result.evaluation is not None
    assert result.evaluation.count == 12
    assert result.evaluation.top1 == max(record["top1"] for record in _log(run, "validation"))
    assert set(result.evaluation.accuracy_by_steps) == {1, 2, 3, 4, 6}
    for checkpoint in (run / "last", run / "best"):
        model = MDEQ.from_pretrained(checkpoint)
        assert model.labels == sorted(NAMES)
    assert json.loads((run / "config.json").read_text())["config"]["optimizer"]["lr"] == 5e-3
    assert json.loads((run / "environment.json").read_text())["sessions"][0]["packages"]["torch"] == version("torch")
    assert not [entry.name for entry in run.iterdir() if entry.name.startswith(".")]


def test_a_single_step_trains(source: Source, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, batch_size=50, ema_decay=0.0)
    assert _train(source, tmp_path, config).step == 1
    [record] = _log(tmp_path, "train")
    assert record["lr"] == config.optimizer.lr
    start = build_model(config, source, None).state_dict()
    trained = load_file(tmp_path / "last" / "model.safetensors")
    kernels = [key for key, value in start.items() if value.dim() == 4]
    assert kernels
    assert not any(torch.equal(trained[key], start[key]) for key in kernels)


def test_a_finished_run_is_not_trained_again(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, epochs=1)
    first = _train(source, tmp_path, config)
    _stop_at_batch(monkeypatch, 1, lambda: pytest.fail("a batch was loaded"))
    assert _train(source, tmp_path, config) == first


@pytest.mark.parametrize("batch", [3, 7, 9])
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    whole = _train(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _stop_at_batch(patch, batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped = _train(source, tmp_path / "parts")
    assert stopped.stopped_by == signal.SIGTERM
    assert stopped.evaluation is None
    assert 0 < stopped.step < 12
    torch.manual_seed(12345)
    resumed = _train(source, tmp_path / "parts")
    assert resumed == whole
    assert _same_weights(tmp_path / "parts" / "last", tmp_path / "whole" / "last")
    assert _same_weights(tmp_path / "parts" / "best", tmp_path / "whole" / "best")
    for kind in ("train", "validation"):
        steps = [record["step"] for record in _log(tmp_path / "parts", kind)]
        assert steps == [record["step"] for record in _log(tmp_path / "whole", kind)]


def test_a_crash_loses_what_came_after_the_last_checkpoint_only(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise OSError("no space left on device")

    config = replace(CONFIG, checkpoint_minutes=1e-9)
    whole = _train(source, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        _stop_at_batch(patch, 5, crash)
        with pytest.raises(OSError, match="no space left"):
            _train(source, tmp_path / "parts", config)
    assert len(_log(tmp_path / "parts", "train")) == 3
    assert _train(source, tmp_path / "parts", config) == whole
    assert _same_weights(tmp_path / "parts" / "last", tmp_path / "whole" / "last")


def test_a_signal_while_validating_is_obeyed_and_the_validation_repeated(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, validation_batch_size=5)
    whole = _train(source, tmp_path / "whole", config)
    preprocess = MDEQ.preprocess

    def interrupting(self: MDEQ, image: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return preprocess(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(MDEQ, "preprocess", interrupting)
        stopped = _train(source, tmp_path / "parts", config)
    assert (stopped.step, stopped.stopped_by) == (6, signal.SIGTERM)
    assert _log(tmp_path / "parts", "validation") == []
    assert _train(source, tmp_path / "parts", config) == whole
    assert len(_log(tmp_path / "parts", "validation")) == 2


def test_another_config_for_a_run_is_refused_with_the_keys(source: Source, tmp_path: Path) -> None:
    _train(source, tmp_path, replace(CONFIG, epochs=1))
    other = replace(CONFIG, epochs=1, optimizer=replace(CONFIG.optimizer, lr=0.5), clip=None)
    with pytest.raises(TrainingError, match=r"another configuration: config\.optimizer\.lr, config\.clip differ\."):
        _train(source, tmp_path, other)
    with pytest.raises(TrainingError, match=r"another configuration: init differs\."):
        _train(source, tmp_path, replace(CONFIG, epochs=1), init=tmp_path / "best")
    optimizer = OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.5, momentum=0.5)
    many = replace(CONFIG, epochs=9, optimizer=optimizer, batch_size=3, clip=None, seed=1)
    with pytest.raises(TrainingError, match=r"config\.optimizer\.name, (\S+, ){3}\S+ and 3 more differ\."):
        _train(source, tmp_path, many)


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
        _train(source, tmp_path / "run", replace(CONFIG, epochs=1, **changes), init=init)
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
        _train(open_source(tmp_path / "data"), tmp_path / "run", config)
    assert (tmp_path / "run").exists() == (memory_gib == 0)
    photo.write_bytes(content)
    other = replace(config, batch_size=6)
    assert _train(open_source(tmp_path / "data"), tmp_path / "run", other).step == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["batch_size"] == 6
    assert len(json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]) == 1


def test_a_run_whose_state_was_deleted_starts_anew(source: Source, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    first = _train(source, tmp_path, config)
    (tmp_path / "state" / "state.pt").unlink()
    (tmp_path / "result.json").write_text("{}")  # of the earlier run
    with pytest.raises(TrainingError, match="another configuration"):
        _train(source, tmp_path, replace(config, seed=1))
    assert _train(source, tmp_path, config) == first


def test_a_folder_that_is_no_run_is_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(TrainingError, match="is not empty and is no run"):
        _train(source, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    MDEQ(CONFIG.model).save_pretrained(tmp_path / "checkpoint")
    before = (tmp_path / "checkpoint" / "config.json").read_text()
    with pytest.raises(TrainingError, match="is not empty and is no run"):
        _train(source, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "config.json").read_text() == before
    with pytest.raises(TrainingError, match="is a file"):
        _train(source, tmp_path / "thesis.tex")


def test_a_folder_that_cannot_be_made_is_named(source: Source) -> None:
    with pytest.raises(TrainingError, match=r"^/proc/nowhere cannot be written: .+; give another folder\.$"):
        _train(source, Path("/proc/nowhere"))


def test_a_loss_that_is_not_finite_ends_the_run_in_one_line_and_keeps_the_last_state(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _stop_at_batch(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        before = _train(source, tmp_path)
    cross_entropy = torch.nn.functional.cross_entropy
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "cross_entropy", lambda *given, **options: cross_entropy(*given, **options) * torch.nan
        )
        with pytest.raises(TrainingError, match=f"the loss became nan .* still holds step {before.step}") as caught:
            _train(source, tmp_path)
    assert "\n" not in str(caught.value)
    assert _train(source, tmp_path).evaluation is not None


def test_a_loss_that_is_not_finite_before_anything_is_saved_says_so(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda logits, *given, **options: logits.sum() * torch.nan
    )
    with pytest.raises(TrainingError, match=rf"^the loss became nan by step 1; {tmp_path} holds nothing yet\. Start"):
        _train(source, tmp_path)


def test_the_time_of_saving_is_not_that_of_training(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunFolder.save

    def slow(self: RunFolder, *given: Any) -> None:
        time.sleep(3)
        save(self, *given)

    monkeypatch.setattr(RunFolder, "save", slow)
    _train(source, tmp_path, replace(CONFIG, model=replace(CONFIG.model, dropout=0.0)))
    first = [record for record in _log(tmp_path, "train") if record["step"] == 7]
    assert [record["images_per_s"] > 9 / 3 for record in first] == [True]


def test_the_last_batches_of_an_epoch_weigh_as_much_as_others(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    plain = replace(CONFIG, model=replace(CONFIG.model, dropout=0.0), epochs=1, ema_decay=0.0, clip=None)
    plain = replace(plain, optimizer=OptimizerConfig(lr=0.01, weight_decay=0.0), batch_size=18)
    # Three batches of 18: of four to a step there is one group, which is not whole.
    assert _train(source, tmp_path / "short", replace(plain, accumulation=4)).step == 1
    assert _train(source, tmp_path / "whole", replace(plain, accumulation=3)).step == 1
    short, whole = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("short", "whole"))
    for key, value in whole.items():
        torch.testing.assert_close(short[key], value, rtol=1e-5, atol=1e-6)


def test_a_damaged_state_says_what_to_delete(source: Source, tmp_path: Path) -> None:
    _train(source, tmp_path, replace(CONFIG, epochs=1))
    (tmp_path / "state" / "state.pt").write_bytes(b"garbage")
    with pytest.raises(TrainingError, match=r"state\.pt is damaged; delete"):
        _train(source, tmp_path, replace(CONFIG, epochs=1))


def test_too_few_images_for_a_batch_are_named(source: Source, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="54 training images do not fill one batch of 512"):
        _train(source, tmp_path, replace(CONFIG, batch_size=512))


def test_the_solver_schedule_sets_steps_as_training_goes_on(source: Source, tmp_path: Path) -> None:
    phases = (
        SolverPhase(until=0.5, solver_steps=1, phantom_steps=1),
        SolverPhase(until=1.0, solver_steps=4, phantom_steps=2),
    )
    _train(source, tmp_path, replace(CONFIG, solver_schedule=phases))
    assert [record["solver_steps"] for record in _log(tmp_path, "train")] == [1.0] * 6 + [4.0] * 6
    assert MDEQ.from_pretrained(tmp_path / "last").config.solver == CONFIG.model.solver


def test_accumulated_batches_make_the_step_of_one_large_batch(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # BatchNorm sees batches, not steps: it is left in evaluation mode here.
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    plain = replace(CONFIG, model=replace(CONFIG.model, dropout=0.0), epochs=1, ema_decay=0.0)
    assert _train(source, tmp_path / "large", replace(plain, batch_size=18)).step == 3
    assert _train(source, tmp_path / "small", replace(plain, batch_size=9, accumulation=2)).step == 3
    large, small = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("large", "small"))
    for key, value in large.items():
        torch.testing.assert_close(small[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_parquet_data_and_worker_processes_train_too(tmp_path: Path, own_dataset_cache: None) -> None:
    write_parquet(tmp_path / "data", "train", 6)
    write_parquet(tmp_path / "data", "validation", 2, first=20)
    parquet = open_source(tmp_path / "data")
    config = replace(CONFIG, epochs=1)
    _train(parquet, tmp_path / "alone", config)
    _train(parquet, tmp_path / "workers", replace(config, workers=1))
    assert _same_weights(tmp_path / "alone" / "last", tmp_path / "workers" / "last")


def test_a_checkpoint_is_fine_tuned_with_a_head_for_the_datas_classes(source: Source, tmp_path: Path) -> None:
    start = MDEQ(replace(CONFIG.model, num_classes=5))
    start.save_pretrained(tmp_path / "start")
    frozen = replace(CONFIG, epochs=1, optimizer=OptimizerConfig(name="sgd", lr=1e-12, weight_decay=0.0))
    _train(source, tmp_path / "run", frozen, init=tmp_path / "start")
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
    whole = _train(source, tmp_path / "whole", config)
    plain = _train(source, tmp_path / "plain")
    assert not _same_weights(tmp_path / "whole" / "last", tmp_path / "plain" / "last")
    assert plain.step == whole.step
    with monkeypatch.context() as patch:
        _stop_at_batch(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert _train(source, tmp_path / "parts", config).stopped_by == signal.SIGTERM
    assert _train(source, tmp_path / "parts", config) == whole
    assert _same_weights(tmp_path / "parts" / "last", tmp_path / "whole" / "last")


@pytest.mark.filterwarnings("ignore::phantomgrad.NotConvergedWarning")
def test_a_jacobian_penalty_keeps_the_block_smaller(source: Source, tmp_path: Path) -> None:
    @torch.no_grad()
    def norm(folder: Path) -> float:
        model = MDEQ.from_pretrained(folder).eval()
        injection = model.inject(torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]))
        state = model.equilibrium(injection)
        return float(phantomgrad.diagnostics.jacobian_penalty(model.block, state, injection, probes=20))

    config = replace(CONFIG, epochs=4, ema_decay=0.0, augmentation=AugmentationConfig(crop="none"))
    _train(source, tmp_path / "free", config)
    _train(source, tmp_path / "held", replace(config, jacobian_penalty=5.0))
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
    _train(source, tmp_path, replace(CONFIG, epochs=1, trackers=("tensorboard",)))
    events = accumulator.EventAccumulator(str(tmp_path / "phantomgrad")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    logged = [(record["step"], record["loss"]) for record in _log(tmp_path, "train")]
    assert [step for step, _ in losses] == [step for step, _ in logged]
    torch.testing.assert_close([value for _, value in losses], [value for _, value in logged])
    assert "validation/top1" in events.Tags()["scalars"]


def test_unknown_and_missing_trackers_are_one_line(source: Source, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"^trackers: there is no fancy; Accelerate has aim, .*tensorboard"):
        _train(source, tmp_path / "run", replace(CONFIG, trackers=("fancy",)))
    with pytest.raises(TrainingError, match=r"^trackers: aim is not installed; run: pip install aim$"):
        _train(source, tmp_path / "run", replace(CONFIG, trackers=("aim",)))
    assert not (tmp_path / "run").exists()


def test_an_unreadable_photo_is_counted_in_the_log(tmp_path: Path) -> None:
    write_folder(tmp_path / "data" / "train", 35)
    write_folder(tmp_path / "data" / "val", 2)
    source = open_source(tmp_path / "data")
    Path(source.train.name(40)).write_bytes(b"garbage")
    _train(source, tmp_path / "run", replace(CONFIG, epochs=1))
    assert sum(record.get("unreadable", 0) for record in _log(tmp_path / "run", "train")) == 1


def test_two_processes_cannot_train_in_one_folder(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(TrainingError) as caught:
            RunFolder(tmp_path / "run").open(json.loads((tmp_path / "run" / "config.json").read_text()))
        refused.append(str(caught.value))

    with monkeypatch.context() as patch:
        _stop_at_batch(patch, 2, second)
        _train(source, tmp_path / "run", replace(CONFIG, epochs=1))
    assert refused == [
        f"{tmp_path / 'run'} is in use: another process trains there. Wait for it, stop it, or give another folder."
    ]
    _train(source, tmp_path / "run", replace(CONFIG, epochs=1))  # free again
