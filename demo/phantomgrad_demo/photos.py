"""Example photos with free licences, read in place from packages that ship them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

CC0 = "https://creativecommons.org/publicdomain/zero/1.0/"
CC_BY = "https://creativecommons.org/licenses/by/2.0/"


@dataclass(frozen=True, kw_only=True)
class ExamplePhoto:
    """One photo: what it shows, where it lies, and whom to thank."""

    title: str
    author: str
    licence: str
    licence_url: str | None
    package: str
    """The name the package is imported by."""
    distribution: str
    """The name the package is known by."""
    file: str
    """Its path inside the package."""
    fits: tuple[str, ...] = ()
    """Names of ImageNet classes that are right for it."""

    @property
    def key(self) -> str:
        """Its name in addresses: the file's, without folder and ending."""
        return Path(self.file).stem

    def find(self) -> Path | None:
        """The file, or None where the package is not installed or does not ship it."""
        # The package is located, not imported: that would take a second.
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin).parent / self.file
        return path if path.is_file() else None


def _from_skimage(
    file: str, title: str, author: str, licence: str, licence_url: str | None = None, *, fits: tuple[str, ...] = ()
) -> ExamplePhoto:
    return ExamplePhoto(
        title=title,
        author=author,
        licence=licence,
        licence_url=licence_url,
        package="skimage",
        distribution="scikit-image",
        file=f"data/{file}",
        fits=fits,
    )


def _from_sklearn(file: str, title: str, author: str, *, fits: tuple[str, ...] = ()) -> ExamplePhoto:
    return ExamplePhoto(
        title=title,
        author=author,
        licence="CC BY 2.0",
        licence_url=CC_BY,
        package="sklearn",
        distribution="scikit-learn",
        file=f"datasets/images/{file}",
        fits=fits,
    )


# Authors and licences as stated by the docstrings of `skimage.data` and by `sklearn/datasets/images/README.txt`
# (whose link, not its text, names the author of the flower).
PHOTOS = (
    _from_skimage("coffee.png", "Coffee cup", "Rachel Michetti", "CC0", CC0, fits=("espresso", "cup")),
    _from_skimage("rocket.jpg", "Rocket launch", "SpaceX", "public domain", fits=("projectile", "missile")),
    _from_skimage("chelsea.png", "Chelsea the cat", "Stefan van der Walt", "CC0", CC0, fits=("tabby cat",)),
    _from_sklearn("flower.jpg", "Dahlia", "vultilion"),
    _from_sklearn("china.jpg", "Summer palace", "danielbuechele", fits=("palace",)),
    _from_skimage("astronaut.png", "Astronaut", "NASA", "public domain"),
)


def available() -> tuple[ExamplePhoto, ...]:
    """The example photos that are installed on this machine."""
    return tuple(photo for photo in PHOTOS if photo.find() is not None)
