"""The papers' models: parameter counts, as the builders' docstrings state them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from phantomgrad import is_attached
from phantomgrad_hub import MDEQ, MDEQConfig, mdeq_cifar_large, mdeq_cifar_tiny, mdeq_imagenet_small, mdeq_imagenet_xl
from phantomgrad_hub.models.builders import CIFAR_LARGE, CIFAR_TINY, IMAGENET_SMALL, IMAGENET_XL

COUNTS = {
    mdeq_cifar_tiny: 158_890,
    mdeq_cifar_large: 11_097_438,
    mdeq_imagenet_small: 16_808_936,
    mdeq_imagenet_xl: 78_608_360,
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("builder", COUNTS)
def test_parameter_counts(builder: Callable[[], MDEQ]) -> None:
    model = builder()
    assert count(model) == COUNTS[builder]
    assert f"{COUNTS[builder]:,} parameters" in str(builder.__doc__)
    assert is_attached(model.block)


@pytest.mark.parametrize(
    ("config", "size"), [(CIFAR_TINY, 32), (CIFAR_LARGE, 32), (IMAGENET_SMALL, 224), (IMAGENET_XL, 224)]
)
def test_image_sizes(config: MDEQConfig, size: int) -> None:
    assert config.image_size == size


def test_another_number_of_classes() -> None:
    model = mdeq_cifar_tiny(num_classes=3)
    assert model.config.num_classes == 3
    assert len(model.labels) == 3


def test_preprocessing_is_the_official_one() -> None:
    cifar, imagenet = mdeq_cifar_tiny().preprocessing, mdeq_imagenet_small().preprocessing
    assert (cifar.size, cifar.resize, cifar.mean[0]) == (32, None, 0.4914)
    assert (imagenet.size, imagenet.resize, imagenet.mean[0]) == (224, 256, 0.485)
