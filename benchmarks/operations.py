"""Operations of stem, block and head for one photo, counted: `python -m benchmarks.operations`. Writes JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from phantomgrad import attachments
from phantomgrad_hub import MDEQ, mdeq_cifar_large, mdeq_imagenet_small, mdeq_imagenet_xl

RESULTS = Path(__file__).parent / "results"
MODELS: dict[str, tuple[Callable[[], MDEQ], int]] = {
    "MDEQ-Small": (mdeq_imagenet_small, 224),
    "MDEQ-XL": (mdeq_imagenet_xl, 224),
    "MDEQ-Large, CIFAR": (mdeq_cifar_large, 32),
}


def counted(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` gives, and its billions of floating-point operations, additions counted too."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = call()
    return found, counter.get_total_flops() / 1e9


def count(model: MDEQ, size: int) -> dict[str, float]:
    """The operations of one photo of `size` pixels, one evaluation of the block."""
    [attachment] = attachments(model.eval().block)
    injection, stem = counted(lambda: model.inject(torch.randn(1, 3, size, size)))
    start = model.initial_state(injection)
    with attachment.disabled():
        state, block = counted(lambda: model.block(start, *model.block_inputs(injection)))
    _, head = counted(lambda: model.head(state))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"stem_gflop": stem, "block_gflop": block, "head_gflop": head, "parameters": parameters}


def main() -> None:
    """Count, print and write."""
    rows = {name: count(build(), size) for name, (build, size) in MODELS.items()}
    for name, row in rows.items():
        print(f"{name:<20}" + "  ".join(f"{key} {value:,.3f}" for key, value in row.items()))
    (RESULTS / "operations.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
