"""The training loop."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from phantomgrad import NotConvergedWarning
from phantomgrad_hub.data.seeds import derive_seed
from phantomgrad_hub.data.sources import Source
from phantomgrad_hub.data.transforms import batch_transform
from phantomgrad_hub.evaluate import Evaluation
from phantomgrad_hub.extras import require

from .average import WeightAverage
from .build import (
    SolverSchedule,
    StopRequest,
    TrainedModel,
    attach_for_training,
    build_model,
    build_optimizer,
)
from .card_facts import training_facts
from .checks import check_source
from .config import TrainConfig
from .errors import TrainingError
from .identity import run_identity
from .loader import training_batches
from .meter import Meter
from .processes import agreed, highest, others_may_end, own_state, precision_in_force, shard
from .run import RunFolder, machine
from .start import checkpoint_config, with_checkpoint
from .state import TrainingState
from .tracker import Tracker, check_trackers
from .validation import Validation, ValidationStoppedError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int
    """Optimizer steps done in all."""
    stopped_by: int | None = None
    """The signal that stopped it, None where the run is finished; the same call resumes it."""
    evaluation: Evaluation | None = None
    """Of the best checkpoint on the whole validation split, once finished."""


@own_state()
def train(
    config: TrainConfig,
    source: Source,
    out: str | Path,
    *,
    recipe: str = "custom",
    init: str | Path | None = None,
    cpu: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train a model on `source` in the folder `out`, or resume the run that is there.

    `out/last` and `out/best` are checkpoints of the averaged weights, `out/metrics.jsonl` is the log, `out/state` what
    resuming needs. SIGTERM and Ctrl-C save and return. Raises `TrainingError` where `out` holds another run, or where
    the loss stops being finite.
    """
    check_source(config, source, out)
    if init is not None:
        config = with_checkpoint(config, recipe, init, len(source.labels))
    accelerator = _accelerator(config, out, cpu)
    run = RunFolder(out, writes=accelerator.is_main_process)
    identity = run_identity(config, source, recipe, init)
    run.check(identity)

    model = build_model(config, source, init)
    averaged = copy.deepcopy(model).to(accelerator.device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(memory_format=layout)  # type: ignore[call-overload]
    attachment = attach_for_training(model, config)
    solver_schedule = SolverSchedule(config, attachment)
    trained: Any = TrainedModel(model, penalised=config.jacobian_penalty > 0)
    sharded = config.shard and accelerator.num_processes > 1
    if sharded:
        shard(trained, accelerator)
    optimizer = build_optimizer(config.optimizer, model)
    loader = training_batches(config, source, model.config.image_size, accelerator)
    # Only now: a start that fails for want of a checkpoint, of photos or of a readable one leaves no folder behind.
    run.open(identity)
    with others_may_end(accelerator, run):
        accelerator.wait_for_everyone()
    optimizer = accelerator.prepare(optimizer)
    if not sharded:
        trained = accelerator.prepare(trained)
    average = WeightAverage(averaged, model, config.ema_decay)
    mixed = batch_transform(config.augmentation, len(source.labels))
    tracker = Tracker(accelerator, identity)

    total_steps = math.ceil(len(loader) / config.accumulation) * config.epochs
    state = TrainingState(run, accelerator, model, average, optimizer)
    position = state.position
    stop = StopRequest()
    validation = Validation(accelerator=accelerator, config=config, source=source, stop=stop)
    meter = Meter(position.step, total_steps, shown=progress and accelerator.is_main_process)

    with (
        run,
        others_may_end(accelerator, run),
        stop.listening(),
        meter,
        tracker,
        warnings.catch_warnings(),
        suppress(ValidationStoppedError),
    ):
        warnings.simplefilter("ignore", NotConvergedWarning)
        for epoch in range(position.epoch - position.awaiting_validation, config.epochs):
            batches = () if position.awaiting_validation else loader.epoch(epoch, position.batch)
            for images, targets, replaced in batches:
                progressed = position.step / total_steps
                rate = config.optimizer.lr * config.schedule.factor(position.step, total_steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                solver_schedule.set_progress(progressed)
                # Dropout depends on the position alone, so that a resumed run draws what an uninterrupted one does.
                torch.manual_seed(derive_seed(config.seed, epoch, position.batch, accelerator.process_index))

                trained.train()
                with accelerator.accumulate(trained):
                    images = solver_schedule.resized(model.preprocessing.normalise(images))
                    images, shares = mixed(images, targets)
                    with accelerator.autocast():
                        logits, penalty = trained(images.contiguous(memory_format=layout))
                    loss = functional.cross_entropy(logits.float(), shares, label_smoothing=config.label_smoothing)
                    total = loss if penalty is None else loss + config.jacobian_penalty * penalty
                    # Accelerate divides by `accumulation`, and the last group of an epoch may have fewer batches.
                    group = len(loader) - position.batch + position.batch % config.accumulation
                    accelerator.backward(total * (config.accumulation / min(group, config.accumulation)))
                    if config.clip is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained.parameters(), config.clip)
                    optimizer.step()
                    optimizer.zero_grad()

                position.batch += 1
                meter.add(loss, len(targets) * accelerator.num_processes, attachment.solution, replaced)
                if not accelerator.sync_gradients:
                    continue
                position.step += 1
                average.update(position.step)
                meter.step()
                if position.step % config.log_every == 0:
                    record = meter.record()
                    state.check_finite(record["loss"])
                    run.log({"type": "train", "epoch": epoch, "step": position.step, "lr": rate, **record})
                    tracker.log("train", {"lr": rate, **record}, position.step)
                stopped_by = highest(accelerator, stop.signal or 0)
                if stopped_by or agreed(accelerator, meter.minutes_since_save() > config.checkpoint_minutes):
                    state.check_finite(meter.mean_loss())
                    with meter.paused("saving"):
                        state.save(meter.lap())
                if stopped_by:
                    return TrainResult(step=position.step, stopped_by=stopped_by)

            if not position.awaiting_validation:
                state.check_finite(meter.mean_loss())
                position.epoch, position.batch, position.awaiting_validation = epoch + 1, 0, True
                with meter.paused("saving"):
                    state.save(meter.lap())
            if position.epoch == config.epochs or position.epoch % config.validate_every == 0:
                with meter.paused("validating"):
                    found = validation.measure(average.model)
                run.log({"type": "validation", "epoch": epoch, "step": position.step, **found.to_dict()})
                tracker.log("validation", found.to_dict(), position.step)
                meter.show(top1=f"{found.top1:.3f}")
                if found.top1 >= position.best_top1:
                    position.best_top1 = found.top1
                    with meter.paused("saving"):
                        run.save_checkpoint(run.best, average.model)
            position.awaiting_validation = False
            with meter.paused("saving"):
                state.save(meter.lap())

        with meter.paused("evaluating the best checkpoint"):
            evaluation = validation.measure_best(run)
        facts = training_facts(
            config,
            source,
            evaluation,
            recipe=recipe,
            base=model.facts.base,
            model=None if init is None else checkpoint_config(init),
            hours=position.seconds / 3600,
            machine=machine(accelerator.device, accelerator.num_processes),
        )
        run.save_facts(facts)
        return TrainResult(step=position.step, evaluation=evaluation)
    return TrainResult(step=position.step, stopped_by=highest(accelerator, stop.signal or 0))


def _accelerator(config: TrainConfig, out: str | Path, cpu: bool) -> Accelerator:
    check_trackers(config.trackers)
    if (precision := precision_in_force()) not in (None, config.mixed_precision):
        raise TrainingError(
            f"mixed_precision is {config.mixed_precision!r}, but this process has an Accelerator of mixed_precision "
            f"{precision!r}, and Accelerate keeps one for all: take that, or train in another process."
        )
    try:
        accelerator = require("accelerate", "train").Accelerator(
            cpu=cpu,
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulation,
            log_with=list(config.trackers) or None,
            project_dir=out,
        )
    except ValueError as error:  # such as fp16 without a GPU
        raise TrainingError(f"mixed_precision={config.mixed_precision!r}: {error}") from error
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise TrainingError(
            f"launched for {accelerator.distributed_type.value}: leave that out of the launch; shard=True (FSDP2) is a setting "
            "of the training."
        )
    return accelerator
