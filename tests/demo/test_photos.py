"""Example photos are where the packages put them, under the licences that those state."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from phantomgrad_demo.photos import PHOTOS, ExamplePhoto, available
from phantomgrad_hub.photos import read_photo


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.origin).parent


def test_all_are_installed_and_readable() -> None:
    package_folder("skimage")
    package_folder("sklearn")
    assert available() == PHOTOS
    for photo in PHOTOS:
        path = photo.find()
        assert path is not None
        assert min(read_photo(path).size) >= 200


def test_a_missing_package_or_file_is_no_error() -> None:
    photo = ExamplePhoto(
        title="x", author="x", licence="x", licence_url=None, package="no_such_package", distribution="x", file="x.png"
    )
    assert photo.find() is None


@pytest.mark.parametrize(
    ("function", "statements"),
    [
        ("chelsea", ["CC0 by the photographer (Stefan van der Walt)"]),
        ("coffee", ["CC0 by the photographer (Rachel Michetti)"]),
        ("rocket", ["captured by SpaceX", "released in the public domain"]),
        ("astronaut", ["NASA Great Images database", "released into the public domain"]),
    ],
)
def test_scikit_image_states_these_licences(function: str, statements: list[str]) -> None:
    source = (package_folder("skimage") / "data/_fetchers.py").read_text(encoding="utf-8")
    docstring = source.split(f"def {function}():", 1)[1].split('"""')[1]
    for statement in statements:
        assert statement in docstring


def test_scikit_learn_states_these_licences() -> None:
    text = (package_folder("sklearn") / "datasets/images/README.txt").read_text(encoding="utf-8")
    china, flower = text.split("Image: flower.jpg")
    for section, author in ((china, "danielbuechele"), (flower, "vultilion")):
        assert "https://creativecommons.org/licenses/by/2.0/" in section
        assert f"https://www.flickr.com/photos/{author}/" in section
