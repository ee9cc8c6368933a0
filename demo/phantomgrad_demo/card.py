"""What a checkpoint's card says about its model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from phantomgrad_hub import MDEQ

CARD_FILE = "README.md"
_ACCURACY = ("accuracy", "top1", "top-1", "top_1")
_STEPS_TABLE = re.compile(
    r"^\| *solver stopped after *\| *top-1 *\|\n\|[ -|]+\|\n((?:\| *\d+ *\| *[\d.]+ *% *\|\n?)+)", re.MULTILINE
)
_STEPS_ROW = re.compile(r"\| *(\d+) *\| *([\d.]+) *%")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts a visitor should know; nothing where the card does not tell."""

    dataset: str | None = None
    accuracy: float | None = None
    """Top-1, as a fraction."""
    accuracy_by_steps: Mapping[int, float] = field(default_factory=dict[int, float])
    """Top-1, as a fraction, where the solver is stopped after so many steps; empty where the card does not tell."""


def read_facts(folder: Path) -> Facts:
    """The training data and accuracies on the card in `folder`."""
    try:
        card = ModelCard.load(folder / CARD_FILE, ignore_metadata_errors=True)
    except (OSError, ValueError, YAMLError):
        return Facts()
    data = card.data
    if not isinstance(data, ModelCardData):
        return Facts()
    result = next(filter(_is_top1, data.eval_results or []), None)
    named = data.datasets[0] if isinstance(data.datasets, list) and data.datasets else data.datasets
    dataset = named if result is None else result.dataset_name
    return Facts(
        dataset=dataset if isinstance(dataset, str) else None,
        accuracy=None if result is None else _fraction(result.metric_value),
        accuracy_by_steps=_by_steps(card.text),
    )


def model_line(model: MDEQ, facts: Facts) -> str:
    """One line on the model: what it is, on what it was trained, and how good it is."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    trained = f" trained with phantom gradients on {facts.dataset}" if facts.dataset else ""
    accuracy = f"; {100 * facts.accuracy:.1f} % of its validation images right" if facts.accuracy is not None else ""
    size = f"{millions:.1f} million" if millions >= 0.1 else f"{millions * 1e6:,.0f}"
    return f"Multiscale DEQ of {size} parameters{trained}; {len(model.labels)} classes{accuracy}."


def _by_steps(text: str) -> dict[int, float]:
    """The rows of the card's table of accuracies by solver steps."""
    table = _STEPS_TABLE.search(text)
    rows = [] if table is None else _STEPS_ROW.findall(table[1])
    return {int(steps): float(share) / 100 for steps, share in sorted(rows, key=lambda row: int(row[0]))}


def _is_top1(result: EvalResult) -> bool:
    """Whether this is the share of images whose best class is right."""
    return str(result.metric_type).lower() in _ACCURACY and "5" not in str(result.metric_name)


def _fraction(value: object) -> float | None:
    """An accuracy given as a fraction or in percent."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        return None
    return value if value <= 1 else value / 100
