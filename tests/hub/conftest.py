"""Fixtures of the hub's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def own_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches inside the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
