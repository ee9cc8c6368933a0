"""The one layer that the stem and the head are made of."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNorm(nn.Module):
    """A square convolution that keeps the resolution, or divides it by `stride`, followed by BatchNorm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = False, affine: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)
        self.norm = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
