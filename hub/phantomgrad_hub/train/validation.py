"""Validation during a run, shared by its processes and ended early by a signal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from phantomgrad_hub.data.sources import ImageSplit, Source, Subset
from phantomgrad_hub.evaluate import Evaluation, default_steps, evaluate_images, summarise
from phantomgrad_hub.extras import require
from phantomgrad_hub.models.mdeq import MDEQ

from .build import StopRequest
from .config import TrainConfig
from .processes import agreed
from .run import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator


class ValidationStoppedError(Exception):
    """A signal came while validating."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Evaluates models on the validation split, every process taking its share of the images."""

    accelerator: Accelerator
    config: TrainConfig
    source: Source
    stop: StopRequest

    def measure(self, model: MDEQ) -> Evaluation:
        """The evaluation of the first `validation_images` images; raises `ValidationStoppedError`."""
        split, count = self.source.validation, self.config.validation_images
        chosen = split if count is None or count >= len(split) else Subset(split, range(count))
        return self._evaluate(model, chosen, ())

    def measure_best(self, run: RunFolder) -> Evaluation:
        """The best checkpoint on all images, as `evaluate` measures it; kept in `result.json`.

        Raises `ValidationStoppedError`.
        """
        stored = run.load_result()
        if stored is not None:
            return Evaluation.from_dict(stored)
        self.accelerator.wait_for_everyone()
        best = MDEQ.from_pretrained(run.best).to(self.accelerator.device)
        evaluation = self._evaluate(best, self.source.validation, default_steps(best))
        run.save_result(evaluation.to_dict())
        return evaluation

    def _evaluate(self, model: MDEQ, split: ImageSplit, steps: Sequence[int]) -> Evaluation:
        share = range(self.accelerator.process_index, len(split), self.accelerator.num_processes)
        records = None
        with suppress(ValidationStoppedError):
            records = evaluate_images(
                model,
                Subset(split, share),
                self.source.labels,
                steps=steps,
                batch_size=self.config.validation_batch_size,
                progress=self._check,
            )
        # A signal to one process ends it in all: the others would wait for its records.
        if agreed(self.accelerator, records is None) or records is None:
            raise ValidationStoppedError
        shares = require("accelerate.utils", "train").gather_object([records])
        return summarise({name: torch.cat([part[name] for part in shares]) for name in records})

    def _check(self, done: int, total: int) -> None:
        if self.stop.signal is not None and done < total:
            raise ValidationStoppedError
