"""A photo changed a little: is the old equilibrium a good start for the new one?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image, ImageEnhance, ImageOps

from phantomgrad_hub import MDEQ

from .saliency import UnsolvedError
from .settings import Settings, SettingsError
from .trajectory import Settling, Trajectory

Change = Literal["brightness", "shift", "crop"]
CHANGES: tuple[Change, ...] = get_args(Change)
MOST_PERCENT = 30


@dataclass(frozen=True, kw_only=True)
class Nearby:
    """Three solves with the same settings."""

    photo: Image.Image
    """The changed photo."""
    before: Trajectory
    """The original photo's, from zero."""
    cold: Trajectory
    """The changed photo's, from zero."""
    warm: Trajectory
    """The changed photo's, from the original's equilibrium."""


def solve_nearby(model: MDEQ, photo: Image.Image, settings: Settings, *, change: Change, percent: float) -> Nearby:
    """Change an RGB `photo` by `percent` and solve for it from zero and from the original's equilibrium.

    Raises `SettingsError` for a change that there is not, and `UnsolvedError` where the original was not solved in time.
    """
    changed = changed_photo(photo, change, percent)
    before = Settling(model, photo, settings).run()
    if before.state is None or not before.steps:
        raise UnsolvedError("the network found no equilibrium of this photo to start from; try another photo")
    cold = Settling(model, changed, settings).run()
    warm = Settling(model, changed, settings, start=before.state).run()
    if not cold.steps or not warm.steps:
        raise UnsolvedError("the network found no equilibrium of the changed photo; change it less")
    return Nearby(photo=changed, before=before, cold=cold, warm=warm)


def changed_photo(photo: Image.Image, change: Change, percent: float) -> Image.Image:
    """The photo brighter by `percent`, moved right by it (mirrored at the edge), or without so much of its margins."""
    if change not in CHANGES:
        raise SettingsError(f"the change is one of {', '.join(CHANGES)}, not {change!r:.40}")
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent <= MOST_PERCENT:
        raise SettingsError(f"the change is by 0 to {MOST_PERCENT} percent, not {percent!r:.40}")
    share = percent / 100
    width, height = photo.size
    if change == "brightness":
        return ImageEnhance.Brightness(photo).enhance(1 + share)
    if change == "shift":
        moved, distance = photo.copy(), round(share * width)
        moved.paste(ImageOps.mirror(photo), (distance - width, 0))
        moved.paste(photo, (distance, 0))
        return moved
    margin = (share * width / 2, share * height / 2)
    return photo.resize(photo.size, box=(*margin, width - margin[0], height - margin[1]))
