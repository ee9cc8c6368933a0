"""Trains in every process of a launch, for test_train_processes.py: `torchrun processes_worker.py DATA OUT`."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import trainings

from phantomgrad_hub.data import TrainingImages, open_source
from phantomgrad_hub.train import OptimizerConfig, TrainConfig, train
from phantomgrad_hub.train.loop import TrainResult

DROPOUT = replace(trainings.CONFIG, batch_size=5)
CONFIG = replace(DROPOUT, model=replace(DROPOUT.model, dropout=0.0))


def run(data: str, out: Path, config: TrainConfig, stop_at: int = 0) -> TrainResult:
    """Train; with `stop_at`, one process alone is asked to stop at that batch of its own."""
    load, asked = TrainingImages.__getitems__, []

    def counted(self: TrainingImages, indices: list[int]) -> object:
        asked.append(indices)
        if len(asked) == stop_at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return load(self, indices)

    TrainingImages.__getitems__ = counted  # type: ignore[method-assign]
    try:
        return train(config, open_source(data), out, cpu=True, progress=False)
    finally:
        TrainingImages.__getitems__ = load  # type: ignore[method-assign]


def main() -> None:
    from accelerate import PartialState

    data, out = sys.argv[1], Path(sys.argv[2])
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    for kind, config in (("copied", DROPOUT), ("sharded", replace(DROPOUT, shard=True))):
        run(data, out / kind, config)
        stopped = run(data, out / f"{kind}-resumed", config, stop_at=3)
        assert stopped.stopped_by == signal.SIGTERM, stopped
        run(data, out / f"{kind}-resumed", config)
    run(data, out / "copied-plain", CONFIG)
    run(data, out / "sharded-plain", replace(CONFIG, shard=True))
    run(
        data,
        out / "sharded-sgd",
        replace(CONFIG, shard=True, optimizer=OptimizerConfig(), ema_decay=0.0, accumulation=2),
    )
    run(data, out / "copied-sgd", replace(CONFIG, optimizer=OptimizerConfig(), ema_decay=0.0, accumulation=2))
    run(data, out / "one-image", replace(CONFIG, epochs=1, validation_images=1))
    infinite = replace(CONFIG, optimizer=OptimizerConfig(lr=1e30), clip=None)
    for name, folder, config in (("infinite", data, infinite), ("unreadable", f"{data}-damaged", CONFIG)):
        try:
            run(folder, out / name, config)
        except Exception as error:
            (out / f"{name}-{state.process_index}").write_text(f"{type(error).__name__}: {error}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
