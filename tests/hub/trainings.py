"""A training of seconds, and what tests of it share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from images import write_folder
from safetensors.torch import load_file
from small import pooled_config

from phantomgrad import FixedPointIteration, UnrolledPhantom
from phantomgrad_hub.data import AugmentationConfig, Source, TrainingImages, open_source
from phantomgrad_hub.train import OptimizerConfig, TrainConfig, TrainResult, train

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


def run_training(source: Source, out: Path, config: TrainConfig = CONFIG, **options: Any) -> TrainResult:
    return train(config, source, out, cpu=True, progress=False, **options)


def logged(out: Path, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["type"] == kind]


def at_batch(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Run `action` when the loader asks for batch `number`, counted from 1."""
    load, asked = TrainingImages.__getitems__, []

    def counted(self: TrainingImages, indices: list[int]) -> Any:
        asked.append(indices)
        if len(asked) == number:
            action()
        return load(self, indices)

    monkeypatch.setattr(TrainingImages, "__getitems__", counted)


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def small_source(folder: Path) -> Source:
    """Eighteen photos of each class to train on, four to validate with."""
    write_folder(folder / "train", 18)
    write_folder(folder / "val", 4, first=50)
    return open_source(folder)
