"""Classes of many photos, with how far the block settled on each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phantomgrad import NotConvergedWarning, attachments

from .errors import ImageError
from .models.mdeq import MDEQ
from .photos import SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The best classes of one photo, or why it could not be read."""

    photo: str
    classes: tuple[tuple[str, float], ...] = ()
    """Class names and probabilities, best first."""
    steps: int = 0
    """Evaluations of the block that the solver made."""
    residual: float = float("nan")
    """The final relative residual."""
    converged: bool = False
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        if self.error is not None:
            return {"photo": self.photo, "error": self.error}
        classes = [{"label": name, "probability": probability} for name, probability in self.classes]
        return {
            "photo": self.photo,
            "predictions": classes,
            "steps": self.steps,
            "residual": self.residual,
            "converged": self.converged,
        }


def find_photos(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The given files, and every photo in the given folders and below, in the order of their names.

    Hidden files and folders inside a given folder are left out.
    """
    photos: list[str] = []
    for given in paths:
        path = Path(given)
        if not path.is_dir():
            photos.append(os.fspath(given))
            continue
        found = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
            and file.is_file()
        )
        if not found:
            raise ImageError(f"there is no photo in {path} (looked for {', '.join(SUFFIXES)})")
        photos += map(str, found)
    return photos


def predict(model: MDEQ, photos: Sequence[str], *, top: int = 5, batch_size: int = 32) -> Iterator[Prediction]:
    """Classify photo after photo, `batch_size` at a time; one that cannot be read yields its error."""
    for names in _batched(photos, batch_size):
        images: list[Tensor] = []
        errors: dict[str, str] = {}
        for name in names:
            try:
                images.append(model.preprocess(name))
            except ImageError as error:
                errors[name] = str(error)
        found = iter(_classified(model, torch.cat(images), top) if images else [])
        for name in names:
            yield (
                Prediction(photo=name, error=errors[name]) if name in errors else Prediction(photo=name, **next(found))
            )


def _classified(model: MDEQ, images: Tensor, top: int) -> list[dict[str, Any]]:
    [attachment] = attachments(model.block)
    parameter = next(model.parameters())
    with torch.inference_mode(), warnings.catch_warnings():
        # Whether the solve converged is part of the result.
        warnings.simplefilter("ignore", NotConvergedWarning)
        probabilities = model(images.to(parameter.device, parameter.dtype)).float().softmax(dim=1)
    solution = attachment.solution
    assert solution is not None
    values, indices = probabilities.topk(min(top, len(model.labels)), dim=1)
    return [
        {
            "classes": tuple((model.labels[index], value) for index, value in zip(row, best, strict=True)),
            "steps": steps,
            "residual": residual,
            "converged": converged,
        }
        for row, best, steps, residual, converged in zip(
            indices.tolist(),
            values.tolist(),
            solution.steps.tolist(),
            solution.residual.tolist(),
            solution.converged.tolist(),
            strict=True,
        )
    ]


def _batched(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
