"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with data and fixtures beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with data and fixtures is not beside the repository")
    return SHARED
