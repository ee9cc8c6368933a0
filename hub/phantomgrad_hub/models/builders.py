"""The models of the papers with random weights, in the configurations of the official code.

Each carries the unrolled phantom gradient of "On Training Implicit Models" (Geng et al., 2021) and as many solver steps
as the official code takes. Counts include the gains of weight norm and are exact for the default number of classes.
"""

from __future__ import annotations

from dataclasses import replace

from phantomgrad import FixedPointIteration, UnrolledPhantom
from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.models.mdeq import MDEQ
from phantomgrad_hub.preprocessing import Preprocessing

CIFAR_TINY = MDEQConfig(
    channels=(24, 24),
    head_channels=(8, 16),
    final_channels=200,
    num_classes=10,
    image_size=32,
    input_downsamplings=0,
    injection_layer=False,
    post_fuse_affine=False,
    dropout=0.25,
    gradient=UnrolledPhantom(steps=5, damping=0.5),
    solver=FixedPointIteration(damping=0.5, max_steps=18),
)
CIFAR_LARGE = replace(
    CIFAR_TINY,
    channels=(32, 64, 128, 256),
    head_channels=(14, 28, 56, 112),
    final_channels=1680,
    injection_layer=True,
    dropout=0.3,
)
IMAGENET_SMALL = MDEQConfig(
    channels=(32, 64, 128, 256),
    head_channels=(24, 48, 96, 192),
    final_channels=2048,
    num_classes=1000,
    image_size=224,
    gradient=UnrolledPhantom(steps=5, damping=0.6),
    solver=FixedPointIteration(damping=0.6, max_steps=26),
)
IMAGENET_XL = replace(
    IMAGENET_SMALL, channels=(88, 176, 352, 704), head_channels=(32, 64, 128, 256), post_fuse_affine=False
)


def mdeq_cifar_tiny(num_classes: int = 10) -> MDEQ:
    """MDEQ-Tiny for 32x32 images: two branches, 158,890 parameters (0.17M in the papers)."""
    return _build(CIFAR_TINY, num_classes)


def mdeq_cifar_large(num_classes: int = 10) -> MDEQ:
    """MDEQ-Large for 32x32 images: four branches, 11,097,438 parameters (10M in the papers)."""
    return _build(CIFAR_LARGE, num_classes)


def mdeq_imagenet_small(num_classes: int = 1000) -> MDEQ:
    """MDEQ-Small for 224x224 images: four branches, 16,808,936 parameters (18M in the papers)."""
    return _build(IMAGENET_SMALL, num_classes)


def mdeq_imagenet_xl(num_classes: int = 1000) -> MDEQ:
    """MDEQ-XL for 224x224 images: four wide branches, 78,608,360 parameters (81M in the papers)."""
    return _build(IMAGENET_XL, num_classes)


def official_preprocessing(config: MDEQConfig) -> Preprocessing:
    """What the official code does to validation images: normalise CIFAR-10's, resize, crop and normalise ImageNet's."""
    if config.input_downsamplings == 0:
        cifar_mean, cifar_std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
        return Preprocessing(size=config.image_size, mean=cifar_mean, std=cifar_std)
    return Preprocessing(size=config.image_size, resize=int(config.image_size / 0.875))


def _build(config: MDEQConfig, num_classes: int) -> MDEQ:
    return MDEQ(replace(config, num_classes=num_classes), preprocessing=official_preprocessing(config))
