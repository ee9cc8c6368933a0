"""Training images: decoded once where they fit in memory, augmented by torchvision's v2 transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from phantomgrad_hub.checkpoint import summarise
from phantomgrad_hub.extras import require

from .errors import DataError
from .seeds import derive_seed
from .sources import ImageSplit

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How a training image is varied before it is normalised."""

    crop: Literal["pad", "resized", "none"] = "pad"
    """`pad`: a random window of the padded image (shift). `resized`: a random part, resized (shift, zoom, aspect).
    `none`: the middle, as in validation."""
    padding: float = 0.125
    """Width of the reflected border for `pad`, as a fraction of the image size."""
    scale: tuple[float, float] = (0.35, 1.0)
    """Range of the area of the part for `resized`."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of its aspect ratio."""
    flip: bool = True
    """Mirror half of the images."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation."""
    random_erasing: float = 0.0
    """Probability of blanking a random rectangle."""

    def __post_init__(self) -> None:
        if self.crop not in ("pad", "resized", "none"):
            raise ValueError(f"crop must be 'pad', 'resized' or 'none', not {self.crop!r}")
        if not 0 <= self.padding < 1:
            raise ValueError(f"padding must be at least 0 and below 1, not {self.padding}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be an increasing range within (0, 1], not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be an increasing range of positive numbers, not {self.ratio}")
        if not 0 <= self.color_jitter <= 1:
            raise ValueError(f"color_jitter must be between 0 and 1, not {self.color_jitter}")
        if not 0 <= self.random_erasing <= 1:
            raise ValueError(f"random_erasing must be between 0 and 1, not {self.random_erasing}")


def train_transform(augmentation: AugmentationConfig, size: int) -> Transform:
    """The v2 pipeline from a uint8 image `(3, H, W)` to a varied one `(3, size, size)`, drawing from torch's RNG."""
    v2 = require("torchvision.transforms.v2", "train")
    steps: list[torch.nn.Module] = []
    if augmentation.crop == "resized":
        steps.append(v2.RandomResizedCrop(size, scale=augmentation.scale, ratio=augmentation.ratio, antialias=True))
    else:
        steps.append(_MiddleSquare(size))
        border = round(augmentation.padding * size)
        if augmentation.crop == "pad" and border:
            steps.append(_Shift(border))
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.color_jitter:
        amount = augmentation.color_jitter
        steps.append(v2.ColorJitter(brightness=amount, contrast=amount, saturation=amount))
    if augmentation.random_erasing:
        steps.append(v2.RandomErasing(p=augmentation.random_erasing))
    return v2.Compose(steps)


class TrainingImages(Dataset[tuple[Tensor, Tensor]]):
    """The training split as augmented uint8 batches.

    `__getitems__(indices)` gives the whole batch, images `(B, 3, size, size)` uint8 and class indices `(B,)` int64, for
    a loader whose `collate_fn` is `keep_batch`. Every image is drawn from `(seed, epoch, index)` alone.
    """

    def __init__(self, split: ImageSplit, transform: Transform, *, seed: int, memory_gib: float = 4.0) -> None:
        self._split = split
        self._transform = transform
        self._seed = seed
        self._epoch = 0
        self._targets = torch.tensor(split.targets, dtype=torch.int64)
        self._decoded = decode_all(split, memory_gib=memory_gib)

    def __len__(self) -> int:
        return len(self._split)

    def set_epoch(self, epoch: int) -> None:
        """Vary the images anew: called before each epoch, in the main process."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, targets = self.__getitems__([index])
        return images[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        # The transforms draw from the global generator, which belongs to the model when no worker process is used.
        with torch.random.fork_rng(devices=[]):
            images = [self._augmented(index) for index in indices]
        return torch.stack(images), self._targets[torch.as_tensor(indices)]

    def _augmented(self, index: int) -> Tensor:
        torch.default_generator.manual_seed(derive_seed(self._seed, self._epoch, index))
        image = _to_uint8(self._split, index) if self._decoded is None else self._decoded[index]
        return self._transform(image)


def keep_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A `collate_fn` for datasets whose `__getitems__` returns whole batches."""
    return batch


def decode_all(split: ImageSplit, *, memory_gib: float) -> Tensor | None:
    """All images as uint8 `(N, 3, H, W)`, or None where their sizes differ or they exceed `memory_gib`.

    Raises `DataError` that counts and names the images found to be unreadable.
    """
    first = _to_uint8(split, 0)
    if len(split) * first.numel() > memory_gib * 2**30:
        return None
    decoded = torch.empty((len(split), *first.shape), dtype=torch.uint8)
    unreadable: dict[int, DataError] = {}

    def decode(indices: range) -> bool:
        for index in indices:
            try:
                image = _to_uint8(split, index)
            except DataError as error:
                unreadable[index] = error
                continue
            if image.shape != first.shape:
                return False
            decoded[index] = image
        return True

    # Pillow decodes outside the interpreter's lock, so threads do overlap.
    blocks = [range(start, min(start + 1024, len(split))) for start in range(0, len(split), 1024)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        same = all(pool.map(decode, blocks))
    if unreadable:
        found = sorted(unreadable)
        names = summarise((split.name(index) for index in found), 5)
        first_error = unreadable[found[0]]
        count = f"{len(found)} training images" if len(found) > 1 else "1 training image"
        raise DataError(f"{count} cannot be read: {names}. The first: {first_error}") from first_error
    return decoded if same else None


class _MiddleSquare(torch.nn.Module):
    """Resize the shorter side to `size` and keep the middle square; the image itself where it already fits."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        if tuple(image.shape[-2:]) == (self.size, self.size):
            return image
        functional = require("torchvision.transforms.v2.functional", "train")
        return functional.center_crop(functional.resize(image, [self.size], antialias=True), [self.size, self.size])


class _Shift(torch.nn.Module):
    """Move the image by up to `border` pixels each way, what is left open being its mirror image.

    The same as `v2.RandomCrop` on the image padded by reflection, without making the padded image.
    """

    def __init__(self, border: int) -> None:
        super().__init__()
        self.border = border

    def forward(self, image: Tensor) -> Tensor:
        down, right = torch.randint(-self.border, self.border + 1, (2,)).tolist()
        return image[:, _mirrored(image.shape[-2], down)][:, :, _mirrored(image.shape[-1], right)]


def _mirrored(length: int, start: int) -> Tensor:
    """The indices `start, start + 1, ...` of a line of `length` pixels that is mirrored beyond its ends."""
    index = torch.arange(start, start + length).abs_()
    return torch.minimum(index, 2 * (length - 1) - index)


def _to_uint8(split: ImageSplit, index: int) -> Tensor:
    image = split.image(index)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
