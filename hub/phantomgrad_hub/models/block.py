"""The multiscale block whose fixed point an MDEQ computes (Bai, Koltun, Kolter: Multiscale Deep Equilibrium Models).

It is evaluated many times per image, so temporaries are reused in place where no backward formula needs them; the
state and the injection are never written to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from phantomgrad_hub.config import MDEQConfig

State = tuple[Tensor, ...]
"""One feature map `(B, channels[i], H / 2**i, W / 2**i)` per branch, the finest first."""


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, weight_norm: bool) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return parametrizations.weight_norm(conv) if weight_norm else conv


class ResidualLayer(nn.Module):
    """`norm(relu(x + norm(conv(relu(norm(conv(x)))) * mask + injection)))` with 3x3 convolutions."""

    def __init__(self, config: MDEQConfig, branch: int) -> None:
        super().__init__()
        channels, groups, affine = config.channels[branch], config.groups, config.block_affine
        inner, weight_norm = channels * config.expansion_per_branch[branch], config.weight_norm_branches
        self.conv1 = _conv(channels, inner, 3, weight_norm=weight_norm)
        self.norm1 = nn.GroupNorm(groups, inner, affine=affine)
        self.conv2 = _conv(inner, channels, 3, weight_norm=weight_norm)
        self.norm2 = nn.GroupNorm(groups, channels, affine=affine)
        self.norm3 = nn.GroupNorm(groups, channels, affine=affine)

    def forward(self, x: Tensor, injection: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        out = self.conv2(self.norm1(self.conv1(x)).relu_())
        if mask is not None:
            out = out.mul_(mask)
        if injection is not None:
            out = out.add_(injection)
        return self.norm3(self.norm2(out).add_(x).relu_())


class FuseLayer(nn.Module):
    """One convolution without bias, with its GroupNorm, on the way from one branch to another."""

    def __init__(self, config: MDEQConfig, inputs: int, outputs: int, *, downwards: bool, last: bool) -> None:
        super().__init__()
        kernel, stride = (3, 2) if downwards else (1, 1)
        self.conv = _conv(inputs, outputs, kernel, stride=stride, weight_norm=config.weight_norm_fuse)
        self.norm = nn.GroupNorm(config.groups, outputs, affine=config.fuse_affine)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        return out if self.last else out.relu_()


class PostFuseLayer(nn.Module):
    """ReLU, 1x1 convolution and GroupNorm after the fusion; overwrites its input."""

    def __init__(self, config: MDEQConfig, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels, 1, weight_norm=config.weight_norm_post_fuse)
        self.norm = nn.GroupNorm(config.post_fuse_groups, channels, affine=config.post_fuse_affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.relu_()))


class MultiscaleBlock(nn.Module):
    """One evaluation of `f(z, injection)`: residual layers within each branch, then the fusion of all branches.

    `branches[i]` are branch i's residual layers; `fuse["1_to_0"]` leads from branch 1 to branch 0: upwards a 1x1
    convolution whose result is repeated to the finer resolution, downwards 3x3 convolutions of stride 2.
    """

    def __init__(self, config: MDEQConfig) -> None:
        super().__init__()
        self.channels = config.channels
        self.branches = nn.ModuleList(
            nn.ModuleList(ResidualLayer(config, branch) for _ in range(count))
            for branch, count in enumerate(config.blocks_per_branch)
        )
        self.fuse = nn.ModuleDict()
        for target in range(config.num_branches):
            for source in range(config.num_branches):
                if source != target:
                    self.fuse[f"{source}_to_{target}"] = _fuse_path(config, source, target)
        self.post_fuse = nn.ModuleList(PostFuseLayer(config, channels) for channels in config.channels)

    def forward(self, z: State, injection: Tensor, masks: Sequence[Sequence[Tensor]] | None = None) -> State:
        """The next state.

        `injection`: `(B, channels[0], H, W)`, added in the first residual layer of the finest branch.
        `masks`: dropout masks `(B, channels[i], 1, 1)` for every residual layer of every branch; an input, so that
        the block stays a function and one mask holds for a whole solve.
        """
        features = []
        for i, (x, layers) in enumerate(zip(z, self.branches, strict=True)):
            for j, layer in enumerate(layers.children()):
                x = layer(x, injection if i == j == 0 else None, None if masks is None else masks[i][j])
            features.append(x)
        return tuple(layer(self._fused(features, i)) for i, layer in enumerate(self.post_fuse))

    def _fused(self, features: list[Tensor], target: int) -> Tensor:
        """The sum over all branches at the resolution of `target`, in memory of its own."""
        terms = [self.fuse[f"{source}_to_{target}"](features[source]) for source in range(target)]
        coarser: Tensor | None = None
        # From the coarsest up, adding on the way: repeating twice by 2 is repeating by 4, on smaller maps.
        for source in range(len(features) - 1, target, -1):
            term = self.fuse[f"{source}_to_{target}"](features[source])
            term = term if coarser is None else term.add_(coarser)
            coarser = functional.interpolate(term, size=features[source - 1].shape[-2:], mode="nearest")
        total = terms.pop() if coarser is None else coarser
        for term in terms:
            total.add_(term)
        return total.add_(features[target])

    def initial_state(self, injection: Tensor) -> State:
        """The zero state that belongs to `injection`, with its device, dtype and memory format."""
        batch, _, height, width = injection.shape
        layout = torch.contiguous_format if injection.is_contiguous() else torch.channels_last
        state = []
        for channels in self.channels:
            zeros = injection.new_empty((batch, channels, height, width))
            state.append(torch.zeros_like(zeros, memory_format=layout))
            height, width = (height + 1) // 2, (width + 1) // 2
        return tuple(state)


def _fuse_path(config: MDEQConfig, source: int, target: int) -> nn.Sequential:
    """The layers from one branch to another: one upwards, one for each halving of the resolution downwards."""
    inputs, outputs = config.channels[source], config.channels[target]
    downwards = target > source
    between = [FuseLayer(config, inputs, inputs, downwards=downwards, last=False) for _ in range(target - source - 1)]
    return nn.Sequential(*between, FuseLayer(config, inputs, outputs, downwards=downwards, last=True))
