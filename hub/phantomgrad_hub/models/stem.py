"""From the image to the injection of the finest branch."""

from __future__ import annotations

from torch import Tensor, nn

from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.models.layers import ConvNorm


class Stem(nn.Module):
    """Compute the injection `(B, channels[0], H', W')` of images `(B, 3, H, W)`.

    3x3 convolutions, the first `input_downsamplings` of them with stride 2, then a 1x1 one where the config has an
    injection layer; BatchNorm and ReLU follow each. It runs once per image, outside of the solve.
    """

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        widths = (3, *config.stem_widths)
        self.layers = nn.ModuleList(
            ConvNorm(widths[i], widths[i + 1], 3, stride=2 if i < config.input_downsamplings else 1)
            for i in range(len(widths) - 1)
        )
        self.injection = ConvNorm(widths[-1], widths[-1], 1) if config.injection_layer else None

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = layer(images).relu_()
        return images if self.injection is None else self.injection(images).relu_()
