"""What an MDEQ is made of: one frozen, validated, JSON-serialisable record of every width and option."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from phantomgrad import FixedPointIteration, UnrolledPhantom
from phantomgrad_hub.errors import ConfigError
from phantomgrad_hub.options import GRADIENTS, SOLVERS, Gradient, Solver, check_options, decode_options, encode_options
from phantomgrad_hub.text import summarise

FORMAT_VERSION = 2
"""What `to_dict` writes. The first version left out what had its default."""
READ_VERSIONS = (1, 2)

# A config comes with a downloaded checkpoint, so it may not ask for more than a machine has.
MAX_PARAMETERS = 1_000_000_000
MAX_ACTIVATIONS = 2**28

_INTEGERS = {
    "num_classes": (1, 1_000_000),
    "image_size": (8, 4096),
    "groups": (1, 1024),
    "input_downsamplings": (0, 6),
    "stem_channels": (1, 8192),
    "final_channels": (1, 65536),
}
_PER_BRANCH = {"channels": (1, 8192), "blocks": (1, 16), "expansion": (1, 32), "head_channels": (1, 8192)}
_OPTIONAL = {"stem_channels", "final_channels", "head_channels", "conv_init_std"}
_FLAGS = (
    "block_affine",
    "fuse_affine",
    "post_fuse_affine",
    "weight_norm_branches",
    "weight_norm_fuse",
    "weight_norm_post_fuse",
    "injection_layer",
    "head_norm",
)


@dataclass(frozen=True, kw_only=True)
class MDEQConfig:
    """Widths and options of a Multiscale Deep Equilibrium image classifier.

    Branch `i` holds features of `channels[i]` channels at `1 / 2**i` of the finest resolution, which is the image's
    divided by `2**input_downsamplings`. Options of branches may be given once for all of them.
    Raises `ConfigError`, a `ValueError`, that names the field and its bound.
    """

    channels: tuple[int, ...]
    """Channels of each branch, the finest first: two to eight branches."""
    num_classes: int
    image_size: int
    """Side, in pixels, of the square images the model is made for; it accepts others."""
    blocks: int | tuple[int, ...] = 1
    """Residual layers in each branch."""
    expansion: int | tuple[int, ...] = 5
    """Inner width of each branch's residual layers, as a multiple of its channels."""
    groups: int = 8
    """Groups of every GroupNorm; the post-fuse ones take half of them."""
    block_affine: bool = True
    fuse_affine: bool = True
    post_fuse_affine: bool = True
    weight_norm_branches: bool = True
    weight_norm_fuse: bool = False
    weight_norm_post_fuse: bool = True
    dropout: float = 0.0
    """Probability of dropping a channel inside the residual layers; one mask holds for a whole solve."""
    input_downsamplings: int = 2
    """How many of the stem's convolutions, which are at least two, have stride 2."""
    stem_channels: int | None = None
    """Channels between the stem's convolutions; None takes `channels[0]`."""
    injection_layer: bool = True
    """Whether a 1x1 convolution with BatchNorm and ReLU ends the stem (the official `stage0`)."""
    head: Literal["official", "pooled"] = "official"
    """`official`: bottlenecks, strided convolutions and a wide final layer. `pooled`: the mean of every branch."""
    head_channels: tuple[int, ...] | None = None
    """Inner width of each branch's bottleneck (its output is four times as wide); the official head only."""
    final_channels: int | None = None
    """Width before the classifier; the official head only."""
    head_norm: bool = True
    """Whether a LayerNorm precedes the classifier; the pooled head only."""
    head_dropout: float = 0.0
    """Probability of dropping a feature before the classifier."""
    conv_init_std: float | None = 0.01
    """Standard deviation of the initial weights of convolutions without weight norm; None keeps PyTorch's."""
    gradient: Gradient = field(default_factory=UnrolledPhantom)
    solver: Solver = field(default_factory=FixedPointIteration)
    eval_solver: Solver | None = None
    """The solver where no gradient is recorded; None takes `solver`."""

    def __post_init__(self) -> None:
        for name in _PER_BRANCH:
            self._check_per_branch(name)
        for name, bounds in _INTEGERS.items():
            if not self._is_absent(name):
                _check_integer(name, getattr(self, name), *bounds)
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r:.60}")
        for name in ("dropout", "head_dropout"):
            if not (_is_number(getattr(self, name)) and 0.0 <= getattr(self, name) < 1.0):
                raise ConfigError(f"{name} must be a number of at least 0 and below 1, got {getattr(self, name)!r:.60}")
        std = self.conv_init_std
        if std is not None and not (_is_number(std) and 0.0 < std <= 1.0):
            raise ConfigError(f"conv_init_std must be None or a number above 0 and at most 1, got {std!r:.60}")
        check_options(self.gradient, GRADIENTS, "gradient")
        check_options(self.solver, SOLVERS, "solver")
        if self.eval_solver is not None:
            check_options(self.eval_solver, SOLVERS, "eval_solver")
        for name in ("solver", "eval_solver"):
            solver = getattr(self, name)
            if solver is not None and solver.max_steps < 1:
                # The state starts at zero, whatever the image: without a step there is nothing to classify.
                raise ConfigError(f"{name}: max_steps must be at least 1, got {solver.max_steps}")
        self._check_groups()
        self._check_head()
        self._check_size()

    @property
    def num_branches(self) -> int:
        return len(self.channels)

    @property
    def blocks_per_branch(self) -> tuple[int, ...]:
        return self._spread(self.blocks)

    @property
    def expansion_per_branch(self) -> tuple[int, ...]:
        return self._spread(self.expansion)

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Output channels of each 3x3 convolution of the stem."""
        inner = self.channels[0] if self.stem_channels is None else self.stem_channels
        return (inner,) * (max(2, self.input_downsamplings) - 1) + (self.channels[0],)

    @property
    def post_fuse_groups(self) -> int:
        return max(1, self.groups // 2)

    @property
    def largest_file(self) -> int:
        """Bytes that no file with the weights of such a model exceeds: float32, with norms, statistics and header."""
        return 5 * self._estimate_parameters() + 2**24

    @property
    def smallest_file(self) -> int:
        """Bytes that every file with the weights of such a model has: half of what they take in 16 bits."""
        return self._estimate_parameters()

    def to_dict(self) -> dict[str, Any]:
        """This config as plain JSON values; `from_dict` reads it back."""
        values: dict[str, Any] = {"format_version": FORMAT_VERSION}
        for option in fields(self):
            value = getattr(self, option.name)
            if type(value) in (*GRADIENTS.values(), *SOLVERS.values()):
                value = encode_options(value)
            values[option.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, complete: bool | None = None) -> MDEQConfig:
        """The config that `to_dict` wrote, now or in an earlier release; unknown, missing or ill-typed keys raise
        `ConfigError`.

        `complete` says whether every option must be there, or may be left to its default; None asks for what the version
        that is named writes.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a model config is a JSON object, not {type(values).__name__}")
        options = dict(values)
        version = options.pop("format_version", None)
        if type(version) is not int or version not in READ_VERSIONS:
            newer = type(version) is int and version > FORMAT_VERSION
            raise ConfigError(
                f"format_version of the model config is {version!r:.60}, this release reads up to {FORMAT_VERSION}; "
                + ("update phantomgrad: pip install -U phantomgrad" if newer else "it is no config of phantomgrad")
            )
        if unknown := sorted(set(map(str, options)) - {option.name for option in fields(cls)}):
            raise ConfigError(f"unknown keys in the model config: {summarise(unknown)}")
        complete = version > 1 if complete is None else complete
        needed = {option.name for option in fields(cls)} if complete else {"channels", "num_classes", "image_size"}
        if missing := sorted(needed - set(options)):
            raise ConfigError(f"missing keys in the model config: {', '.join(missing)}")
        for name, registry in (("gradient", GRADIENTS), ("solver", SOLVERS), ("eval_solver", SOLVERS)):
            if options.get(name) is not None:
                options[name] = decode_options(options[name], registry, name, complete=complete)
        return cls(**options)

    def _spread(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return (value,) * self.num_branches if isinstance(value, int) else value

    def _is_absent(self, name: str) -> bool:
        return name in _OPTIONAL and getattr(self, name) is None

    def _check_per_branch(self, name: str) -> None:
        value = getattr(self, name)
        if self._is_absent(name):
            return
        if name in ("blocks", "expansion") and not isinstance(value, list | tuple):
            _check_integer(name, value, *_PER_BRANCH[name])
            return
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list with one integer per branch, got {value!r:.60}")
        if not 2 <= len(value) <= 8:
            raise ConfigError(f"{name} must have one entry for each of 2 to 8 branches, got {len(value)}")
        if len(value) != len(self.channels):
            raise ConfigError(f"{name} must have one entry per branch, {len(self.channels)}, got {len(value)}")
        for entry in value:
            _check_integer(name, entry, *_PER_BRANCH[name])
        # One form for one meaning: configs that build the same model are equal, also after JSON, which has no tuples.
        uniform = name in ("blocks", "expansion") and len(set(value)) == 1
        object.__setattr__(self, name, value[0] if uniform else tuple(value))

    def _check_groups(self) -> None:
        for channels in self.channels:
            if channels % self.groups or channels % self.post_fuse_groups:
                raise ConfigError(
                    f"channels must be multiples of groups ({self.groups}, post-fuse {self.post_fuse_groups}), "
                    f"got {channels}"
                )

    def _check_head(self) -> None:
        if self.head not in ("official", "pooled"):
            raise ConfigError(f"head must be 'official' or 'pooled', got {self.head!r:.60}")
        for name in ("head_channels", "final_channels"):
            value = getattr(self, name)
            if self.head == "official" and value is None:
                raise ConfigError(f"{name} must be given for the official head")
            if self.head == "pooled" and value is not None:
                raise ConfigError(f"{name} must be None for the pooled head, got {value}")

    def _check_size(self) -> None:
        parameters = self._estimate_parameters()
        if parameters > MAX_PARAMETERS:
            raise ConfigError(
                f"the widths ask for about {parameters:.0e} parameters, the bound is {MAX_PARAMETERS:.0e}"
            )
        pixels = (self.image_size >> self.input_downsamplings) ** 2
        pairs = zip(self.channels, self.expansion_per_branch, strict=True)
        widest = max(*(channels * expansion for channels, expansion in pairs), *self.stem_widths)
        # Without a downsampling the stem's first layers see the whole image, otherwise half of it.
        stem_pixels = (self.image_size // 2 if self.input_downsamplings else self.image_size) ** 2
        activations = max(pixels * widest, stem_pixels * self.stem_widths[0])
        if activations > MAX_ACTIVATIONS:
            raise ConfigError(
                f"image_size and channels ask for {activations:.0e} values in one layer, the bound is "
                f"{MAX_ACTIVATIONS:.0e}"
            )

    def _estimate_parameters(self) -> int:
        """The parameters of all convolutions and of the classifier, from above."""
        layers = zip(self.channels, self.expansion_per_branch, self.blocks_per_branch, strict=True)
        count = sum(18 * blocks * expansion * channels**2 for channels, expansion, blocks in layers)
        # Downwards, one convolution for each level crossed; all but the last keep the source's width.
        for i, source in enumerate(self.channels):
            for j, target in enumerate(self.channels):
                count += source * target if j <= i else 9 * source * ((j - i - 1) * source + target)
        widths = (3, *self.stem_widths)
        count += sum(9 * a * b for a, b in pairwise(widths)) + self.channels[0] ** 2
        if self.head_channels is None or self.final_channels is None:
            return count + sum(self.channels) * self.num_classes
        for channels, inner in zip(self.channels, self.head_channels, strict=True):
            count += inner * (5 * channels + 13 * inner)
        for inner, following in pairwise(self.head_channels):
            count += 144 * inner * following
        return count + self.final_channels * (4 * self.head_channels[-1] + self.num_classes)


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer between {low} and {high}, got {value!r:.60}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
