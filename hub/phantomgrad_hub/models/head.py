"""From the equilibrium of all branches to class scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.models.block import State
from phantomgrad_hub.models.layers import ConvNorm

BOTTLENECK_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, widening one branch to four times `inner` channels."""

    def __init__(self, inputs: int, inner: int) -> None:
        super().__init__()
        outputs = BOTTLENECK_EXPANSION * inner
        self.reduce = ConvNorm(inputs, inner, 1, affine=False)
        self.middle = ConvNorm(inner, inner, 3, affine=False)
        self.expand = ConvNorm(inner, outputs, 1, affine=False)
        self.shortcut = ConvNorm(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.expand(self.middle(self.reduce(x).relu_()).relu_())
        return out.add_(self.shortcut(x)).relu_()


class OfficialHead(nn.Module):
    """The head of the official MDEQ: widen each branch, merge from fine to coarse, one wide layer, pool, classify."""

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        assert config.head_channels is not None
        assert config.final_channels is not None
        widths = [BOTTLENECK_EXPANSION * inner for inner in config.head_channels]
        self.widen = nn.ModuleList(
            Bottleneck(channels, inner) for channels, inner in zip(config.channels, config.head_channels, strict=True)
        )
        self.merge = nn.ModuleList(
            ConvNorm(widths[i], widths[i + 1], 3, stride=2, bias=True) for i in range(len(widths) - 1)
        )
        self.final = ConvNorm(widths[-1], config.final_channels, 1, bias=True)
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(config.final_channels, config.num_classes)

    def forward(self, z: State) -> Tensor:
        y = self.widen[0](z[0])
        for branch, merge in enumerate(self.merge, start=1):
            y = self.widen[branch](z[branch]) + merge(y).relu_()
        features = self.final(y).relu_().mean((2, 3))
        return self.classifier(self.dropout(features))


class PooledHead(nn.Module):
    """The spatial means of all branches, side by side, through LayerNorm where configured, into a linear classifier."""

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        features = sum(config.channels)
        self.norm = nn.LayerNorm(features) if config.head_norm else nn.Identity()
        self.dropout = nn.Dropout(config.head_dropout)
        self.classifier = nn.Linear(features, config.num_classes)

    def forward(self, z: State) -> Tensor:
        features = torch.cat([functional.adaptive_avg_pool2d(x, 1).flatten(1) for x in z], dim=1)
        return self.classifier(self.dropout(self.norm(features)))


def build_head(config: MDEQConfig) -> OfficialHead | PooledHead:
    """The head that `config.head` names."""
    return OfficialHead(config) if config.head == "official" else PooledHead(config)
