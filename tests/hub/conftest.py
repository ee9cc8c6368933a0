"""Fixtures of the hub's tests."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_worker import Worker
    from local_hub import LocalHub

    from phantomgrad_hub import MDEQ


@pytest.fixture
def own_dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` caches inside the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))


@pytest.fixture(scope="session")
def server() -> Generator[LocalHub]:
    """A hub with users who may write and one who may not."""
    from local_hub import LocalHub

    with LocalHub() as hub:
        hub.add_user("ann", token="hf_ann", role="write")
        hub.add_user("bob", token="hf_bob", role="write")
        hub.add_user("eve", token="hf_eve", role="read")
        yield hub


@pytest.fixture(scope="session")
def workers(server: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Generator[dict[str | None, Worker]]:
    """A client for each user, one whose token is wrong, and one without."""
    from hub_worker import Worker

    made: dict[str | None, Worker] = {}
    for name in ("ann", "bob", "eve", "wrong", None):
        home = tmp_path_factory.mktemp(f"home-{name}")
        made[name] = Worker(server.environment(home, token=None if name is None else f"hf_{name}"), home)
    yield made
    for worker in made.values():
        worker.close()


@pytest.fixture
def ann(workers: dict[str | None, Worker], server: LocalHub) -> Worker:
    """A client that may write, and a hub that has forgotten the requests and faults of other tests."""
    server.clear_faults()
    server.reset_requests()
    return workers["ann"]


@pytest.fixture(scope="module")
def model() -> MDEQ:
    """A small model with facts for its card."""
    import torch
    from small import pooled_config

    from phantomgrad_hub import MDEQ
    from phantomgrad_hub.facts import Facts

    torch.manual_seed(0)
    made = MDEQ(pooled_config(), labels=["ant", "bee", "cat", "dog", "eel"])
    made.facts = Facts(title="Ants and bees", data="Insects", license="mit")
    return made


@pytest.fixture
def folder(model: MDEQ, tmp_path: Path) -> Path:
    """A checkpoint of `model`."""
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint for the photos of `data`."""
    from images import NAMES
    from small import pooled_config

    from phantomgrad_hub import MDEQ

    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    MDEQ(pooled_config(channels=(8, 8), num_classes=3, image_size=16), labels=sorted(NAMES)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos, one of them in a folder below, and a file that is none."""
    from images import picture

    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for index, name in enumerate(("a.png", "b.JPG", "below/c.png")):
        picture(index, 0, size=20).save(folder / name)
    (folder / "notes.txt").write_text("not a photo")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of three classes in the folders `train` and `val`."""
    from images import write_folder

    folder = tmp_path_factory.mktemp("data")
    write_folder(folder / "train", 6)
    write_folder(folder / "val", 3, first=30)
    return folder


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return "ann/" + "".join(character if character.isalnum() else "-" for character in request.node.name)[:80].strip(
        "-"
    )
