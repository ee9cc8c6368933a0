"""From a photo to the tensor a model was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from phantomgrad_hub.errors import ConfigError
from phantomgrad_hub.extras import require
from phantomgrad_hub.photos import ImageSource, read_photo
from phantomgrad_hub.text import summarise

if TYPE_CHECKING:
    from PIL import Image

FORMAT_VERSION = 1

Interpolation = Literal["box", "bilinear", "hamming", "bicubic", "lanczos"]
_INTERPOLATIONS = ("box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize with antialiasing, crop the middle, scale to [0, 1], subtract `mean` and divide by `std`.

    Calling it with a photo gives `(1, 3, size, size)`, float32. Resizing and cropping agree with torchvision's
    `Resize` and `CenterCrop` on PIL images. Raises `ConfigError`, a `ValueError`, for values out of range.
    """

    size: int
    """Side of the result in pixels."""
    resize: int | None = None
    """Length of the shorter side before the crop; None takes `size`."""
    fit: Literal["crop", "squash"] = "crop"
    """`crop`: keep the aspect ratio and cut the middle square. `squash`: resize to a square whatever the ratio."""
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of red, green and blue, in [0, 1]; the default is ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("size", "resize"):
            value = getattr(self, name)
            if not (name == "resize" and value is None) and not (type(value) is int and 8 <= value <= 4096):
                raise ConfigError(f"{name} must be an integer between 8 and 4096, got {value!r:.60}")
        if self.resize is not None and self.resize < self.size:
            raise ConfigError(f"resize must be at least size, {self.size}, got {self.resize}")
        if self.fit not in ("crop", "squash"):
            raise ConfigError(f"fit must be 'crop' or 'squash', got {self.fit!r:.60}")
        if self.fit == "squash" and self.resize is not None:
            raise ConfigError(f"resize must be None where fit is 'squash', got {self.resize}")
        if self.interpolation not in _INTERPOLATIONS:
            names = ", ".join(_INTERPOLATIONS)
            raise ConfigError(f"interpolation must be one of {names}, got {self.interpolation!r:.60}")
        for name, low in (("mean", -10.0), ("std", 1e-4)):
            value = getattr(self, name)
            if not _is_colour(value) or not all(low <= entry <= 10.0 for entry in value):
                raise ConfigError(f"{name} must be three numbers between {low} and 10, got {value!r:.60}")
            object.__setattr__(self, name, tuple(map(float, value)))

    def __call__(self, source: ImageSource) -> Tensor:
        """The photo as `(1, 3, size, size)`; raises `ImageError` where it cannot be read."""
        image = self.window(read_photo(source))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        chw = pixels.view(1, self.size, self.size, 3).permute(0, 3, 1, 2).contiguous()
        return self.normalise(chw)

    def window(self, image: Image.Image) -> Image.Image:
        """The part of an RGB image that the model sees, `size` x `size` pixels."""
        require("PIL")
        from PIL.Image import Resampling

        resampling = Resampling[self.interpolation.upper()]
        target = (self.size, self.size)
        if self.fit == "squash":
            return image.resize(target, resampling)
        shorter, scale = min(image.size), self.size if self.resize is None else self.resize
        resized = [scale if side == shorter else int(scale * side / shorter) for side in image.size]
        start = [round((side - self.size) / 2) for side in resized]
        # One resampling of the cropped part alone: a panorama never exists at full length.
        step = [side / length for side, length in zip(image.size, resized, strict=True)]
        box = (
            start[0] * step[0],
            start[1] * step[1],
            min((start[0] + self.size) * step[0], image.width),
            min((start[1] + self.size) * step[1], image.height),
        )
        return image.resize(target, resampling, box=box)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` with bytes 0 to 255 as float32, normalised."""
        mean = torch.tensor(self.mean, device=pixels.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(1, 3, 1, 1)
        return (pixels.to(torch.float32) / 255 - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """These options as plain JSON values; `from_dict` reads them back."""
        values: dict[str, Any] = {"format_version": FORMAT_VERSION}
        for option in fields(self):
            value = getattr(self, option.name)
            values[option.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The options that `to_dict` wrote; unknown or missing keys raise `ConfigError`."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"preprocessing options are a JSON object, not {type(values).__name__}")
        options = dict(values)
        version = options.pop("format_version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version of the preprocessing is {version!r:.60}, this release reads {FORMAT_VERSION}"
            )
        if unknown := sorted(set(map(str, options)) - {option.name for option in fields(cls)}):
            raise ConfigError(f"unknown preprocessing options: {summarise(unknown)}")
        if "size" not in options:
            raise ConfigError("missing preprocessing option: size")
        return cls(**options)


def _is_colour(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    return all(type(entry) in (int, float) and math.isfinite(entry) for entry in value)
