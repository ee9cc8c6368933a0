"""Runs of the command line that are small, and how they fail."""

from __future__ import annotations

import pytest

from phantomgrad_hub.cli.main import main

RECIPE = [
    "--device=cpu",
    "--no-progress",
    *(
        "--set",
        "model.channels=(8,8)",
        "--set",
        "model.groups=4",
        "--set",
        "model.expansion=1",
        "--set",
        "model.blocks=1",
        "--set",
        "model.head=pooled",
        "--set",
        "model.head_channels=None",
        "--set",
        "model.final_channels=None",
    ),
    *("--set", "model.image_size=16", "--set", "epochs=1", "--set", "batch_size=9", "--set", "workers=0"),
    *("--set", "mixed_precision=no", "--set", "solver_schedule=((1,2,1),)", "--set", "model.eval_solver.max_steps=4"),
]
"""Options of a training that takes seconds."""


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, *parts: str) -> None:
    """The command ends with `status` and one line on stderr that has all `parts`."""
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("phantomgrad")
    for part in parts:
        assert part in printed.err
