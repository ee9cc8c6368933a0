"""Training images: decoded once where they fit in memory, augmented by torchvision's v2 transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from phantomgrad_hub.extras import require
from phantomgrad_hub.text import summarise
from phantomgrad_hub.typed_fields import check_types

from .errors import DataError
from .seeds import derive_seed
from .sources import ImageSplit

if TYPE_CHECKING:
    from PIL.Image import Image

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
    rand_augment: int = 0
    """Magnitude, of 30, of two operations drawn from RandAugment's list (Cubuk et al., 2020); 0 turns it off."""
    mixup: float = 0.0
    """Blend pairs of images and their classes, with shares from Beta(mixup, mixup); 0 turns it off."""
    cutmix: float = 0.0
    """Paste a rectangle of another image, and share the classes by area; with `mixup` too, each batch gets one of the two."""

    def __post_init__(self) -> None:
        check_types(self)
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
        if not 0 <= self.rand_augment <= 30:
            raise ValueError(f"rand_augment must be between 0 and 30, not {self.rand_augment}")
        for name in ("mixup", "cutmix"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be a finite number of at least 0, not {getattr(self, name)}")


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
    if augmentation.rand_augment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=augmentation.rand_augment))
    if augmentation.color_jitter:
        amount = augmentation.color_jitter
        steps.append(v2.ColorJitter(brightness=amount, contrast=amount, saturation=amount))
    if augmentation.random_erasing:
        steps.append(v2.RandomErasing(p=augmentation.random_erasing))
    return v2.Compose(steps)


def batch_transform(
    augmentation: AugmentationConfig, classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What mixes the images of a batch: `(B, 3, H, W)` and class indices `(B,)` become images and shares `(B, classes)`.

    Without `mixup` and `cutmix` both stay as they are. Draws from torch's RNG.
    """
    v2 = require("torchvision.transforms.v2", "train")
    mixers = []
    if augmentation.mixup:
        mixers.append(v2.MixUp(alpha=augmentation.mixup, num_classes=classes))
    if augmentation.cutmix:
        mixers.append(v2.CutMix(alpha=augmentation.cutmix, num_classes=classes))
    if not mixers:
        return lambda images, targets: (images, targets)
    return mixers[0] if len(mixers) == 1 else v2.RandomChoice(mixers)


class TrainingImages(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The training split as augmented uint8 batches.

    `__getitems__(indices)` gives the whole batch: images `(B, 3, size, size)` uint8, class indices `(B,)` int64, and which
    of them `(B,)` bool stand for an unreadable image, for a loader whose `collate_fn` is `keep_batch`. Every image is drawn
    from `(seed, epoch, index)` alone. In the place of an unreadable image comes the next readable one, with its class; more
    than 1 % of them raise a `DataError`, of `whole` images where that is given.
    """

    def __init__(
        self,
        split: ImageSplit,
        transform: Transform,
        *,
        seed: int,
        memory_gib: float = 4.0,
        whole: int | None = None,
    ) -> None:
        self._split = split
        self._whole = whole
        self._transform = transform
        self._seed = seed
        self._epoch = 0
        self._targets = torch.tensor(split.targets, dtype=torch.int64)
        self._decoded, self.unreadable = decode_all(split, memory_gib=memory_gib, whole=whole)
        """Why an image could not be read, by its index, as far as is known; workers have records of their own."""

    def __len__(self) -> int:
        return len(self._split)

    def set_epoch(self, epoch: int) -> None:
        """Vary the images anew: called before each epoch, in the main process."""
        self._epoch = epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        images, targets, replaced = self.__getitems__([index])
        return images[0], targets[0], replaced[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        images: list[Tensor] = []
        shown: list[int] = []
        # The transforms draw from the global generator, which belongs to the model when no worker process is used.
        with torch.random.fork_rng(devices=[]):
            for index in indices:
                torch.default_generator.manual_seed(derive_seed(self._seed, self._epoch, index))
                source, image = self._read(index)
                images.append(self._transform(image))
                shown.append(source)
        wanted, found = torch.as_tensor(indices), torch.as_tensor(shown)
        return torch.stack(images), self._targets[found], wanted != found

    def _read(self, index: int) -> tuple[int, Tensor]:
        """The image, or the next that can be read, and its index."""
        for step in range(len(self)):
            source = (index + step) % len(self)
            if source in self.unreadable:
                continue
            if self._decoded is not None:
                return source, self._decoded[source]
            try:
                return source, to_uint8(self._split.image(source))
            except DataError as error:
                self.unreadable[source] = error
                check_unreadable(self._split, self.unreadable, self._whole)
        raise DataError("no training image can be read")


def keep_batch(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A `collate_fn` for datasets whose `__getitems__` returns whole batches."""
    return batch


MOST_UNREADABLE = 0.01
"""The fraction of unreadable images above which a training or an evaluation stops."""


def check_unreadable(split: ImageSplit, unreadable: Mapping[int, DataError], whole: int | None = None) -> None:
    """Raise a `DataError` that counts and names them where more than `MOST_UNREADABLE` of `split` cannot be read.

    Of `whole` images where that is given: those of the dataset to which the split belongs.
    """
    whole = len(split) if whole is None else whole
    if len(unreadable) <= MOST_UNREADABLE * whole:
        return
    found = sorted(unreadable)
    names = summarise((split.name(index) for index in found), 5)
    first = unreadable[found[0]]
    count = f"{len(found)} training images" if len(found) > 1 else "1 training image"
    raise DataError(
        f"{count} of {len(split)} cannot be read, more than {most_unreadable(len(split), whole)}: {names}. The first: {first}"
    ) from first


def most_unreadable(count: int, whole: int) -> str:
    """The limit in words, for `count` images out of `whole`."""
    return f"{MOST_UNREADABLE:.0%}" + (f" of all {whole}" if whole != count else "")


def decode_all(
    split: ImageSplit, *, memory_gib: float, whole: int | None = None
) -> tuple[Tensor | None, dict[int, DataError]]:
    """All images as uint8 `(N, 3, H, W)`, or None where their sizes differ or they exceed `memory_gib`; and which of
    those that were tried could not be read.

    Raises `DataError` where these are too many, as `check_unreadable` has it.
    """
    unreadable: dict[int, DataError] = {}

    def read(index: int) -> Tensor | None:
        try:
            return to_uint8(split.image(index))
        except DataError as error:
            unreadable[index] = error
            return None

    first = next((image for index in range(len(split)) if (image := read(index)) is not None), None)
    check_unreadable(split, unreadable, whole)
    if first is None or len(split) * first.numel() > memory_gib * 2**30:
        return None, unreadable
    decoded = torch.empty((len(split), *first.shape), dtype=torch.uint8)

    def decode(indices: range) -> bool:
        for index in indices:
            image = read(index)
            if image is not None and image.shape != first.shape:
                return False
            if image is not None:
                decoded[index] = image
        return True

    # Pillow decodes outside the interpreter's lock, so threads do overlap.
    blocks = [range(start, min(start + 1024, len(split))) for start in range(0, len(split), 1024)]
    with ThreadPoolExecutor(max_workers=4) as pool:
        same = all(pool.map(decode, blocks))
    check_unreadable(split, unreadable, whole)
    return (decoded if same else None), unreadable


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


def to_uint8(image: Image) -> Tensor:
    """An RGB photo as uint8 `(3, H, W)`."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()
