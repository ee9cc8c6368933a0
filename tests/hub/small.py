"""Configs and models small enough for every test."""

from __future__ import annotations

from typing import Any

from phantomgrad import FixedPointIteration, UnrolledPhantom
from phantomgrad_hub import MDEQConfig


def pooled_config(**changes: Any) -> MDEQConfig:
    """Three narrow branches, two stem convolutions of stride 2 and the pooled head."""
    options: dict[str, Any] = {
        "channels": (8, 16, 16),
        "num_classes": 5,
        "image_size": 32,
        "groups": 4,
        "expansion": 2,
        "head": "pooled",
        "conv_init_std": None,
        "gradient": UnrolledPhantom(steps=3, damping=0.7),
        "solver": FixedPointIteration(damping=0.7, max_steps=4),
    }
    return MDEQConfig(**{**options, **changes})


def official_config(**changes: Any) -> MDEQConfig:
    """The same with the official head."""
    return pooled_config(**{"head": "official", "head_channels": (2, 4, 4), "final_channels": 16, **changes})
