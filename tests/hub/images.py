"""Small labelled images that a small model learns in seconds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
"""The classes: an image is of a class if it has about this colour."""
NAMES = tuple(COLOURS)


def picture(label: int, index: int, size: int = 16) -> Image.Image:
    """Image `index` of a class: its colour with noise."""
    noise = np.random.default_rng(1000 * label + index).integers(-40, 41, (size, size, 3))
    pixels = np.clip(np.array(COLOURS[NAMES[label]]) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    """The image as a file's bytes."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_parquet(folder: Path, split: str, per_class: int, *, names: tuple[str, ...] = NAMES, first: int = 0) -> None:
    """A split of `per_class` images of each class as `datasets` stores them."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    rows = [(label, index) for index in range(first, first + per_class) for label in range(len(NAMES))]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    columns = {
        "image": [{"bytes": png(picture(label, index)), "path": f"{index}.png"} for label, index in rows],
        "label": [names.index(NAMES[label]) if NAMES[label] in names else label for label, _ in rows],
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def write_folder(folder: Path, per_class: int, *, first: int = 0) -> None:
    """The same images as files, one subfolder a class."""
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(first, first + per_class):
            picture(label, index).save(folder / name / f"{index:03}.png")


def write_splits(folder: Path) -> None:
    """`train/` of five images of each class and `val/` of two others."""
    write_folder(folder / "train", 5)
    write_folder(folder / "val", 2, first=50)


def write_class_table(folder: Path) -> None:
    """A `classes.json` that gives the classes WordNet ids and longer names."""
    rows = [{"label": label, "wnid": f"n{label:08}", "name": f"{name} thing"} for label, name in enumerate(NAMES)]
    (folder / "classes.json").write_text(json.dumps(rows))
