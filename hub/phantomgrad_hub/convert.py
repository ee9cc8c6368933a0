"""Checkpoints of the official MDEQ codes, locuslab/deq and the torchdeq zoo, as an `MDEQ`."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phantomgrad_hub.checkpoint import compare_keys
from phantomgrad_hub.config import MDEQConfig
from phantomgrad_hub.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from phantomgrad_hub.labels import LabelLike, cifar10_labels, imagenet_labels
from phantomgrad_hub.models.builders import (
    CIFAR_LARGE,
    CIFAR_TINY,
    IMAGENET_SMALL,
    IMAGENET_XL,
    official_preprocessing,
)
from phantomgrad_hub.models.mdeq import MDEQ
from phantomgrad_hub.text import summarise

_WRAPPERS = ("module.", "model.")
"""Prefixes that DataParallel and training scripts put before every key."""
_COPIES = ("fullstage_copy.", "full_stage_copy.")
"""Duplicates of the block that some training scripts saved along with it."""

_PARTS = ("conv", "norm")
_NAMES = {"conv": "conv", "gn": "norm", "bn": "norm", "gnorm": "norm"}
_BOTTLENECK = ("reduce", "middle", "expand")
_WEIGHT_NORM = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}

# Official module -> ours; a tensor's own name is kept, but for weight norm's.
_RULES: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"downsample\.0", lambda: "stem.layers.0.conv"),
    (r"downsample\.1", lambda: "stem.layers.0.norm"),
    (r"downsample\.3", lambda: "stem.layers.1.conv"),
    (r"downsample\.4", lambda: "stem.layers.1.norm"),
    (r"downsample\.DS([3-9])", lambda i: f"stem.layers.{int(i) - 1}.conv"),
    (r"downsample\.DS([3-9])-BN", lambda i: f"stem.layers.{int(i) - 1}.norm"),
    (r"stage0\.([01])", lambda k: f"stem.injection.{_PARTS[int(k)]}"),
    (
        r"full_?stage\.branches\.(\d)\.blocks\.(\d+)\.(conv|gn)([123])",
        lambda i, j, kind, k: f"block.branches.{i}.{j}.{_NAMES[kind]}{k}",
    ),
    (
        r"full_?stage\.fuse_layers\.(\d)\.(\d)\.net\.(?:(\d)\.)?(conv|gnorm)",
        lambda target, source, k, kind: f"block.fuse.{source}_to_{target}.{k or 0}.{_NAMES[kind]}",
    ),
    (r"full_?stage\.post_fuse_layers\.(\d)\.(conv|gnorm)", lambda i, kind: f"block.post_fuse.{i}.{_NAMES[kind]}"),
    (
        r"incre_modules\.(\d)\.0\.(conv|bn)([123])",
        lambda i, kind, k: f"head.widen.{i}.{_BOTTLENECK[int(k) - 1]}.{_NAMES[kind]}",
    ),
    (r"incre_modules\.(\d)\.0\.downsample\.([01])", lambda i, k: f"head.widen.{i}.shortcut.{_PARTS[int(k)]}"),
    (r"downsamp_modules\.(\d)\.([01])", lambda i, k: f"head.merge.{i}.{_PARTS[int(k)]}"),
    (r"final_layer\.([01])", lambda k: f"head.final.{_PARTS[int(k)]}"),
    (r"classifier", lambda: "head.classifier"),
)


def convert_official(
    path: str | os.PathLike[str],
    config: MDEQConfig | Mapping[str, Any] | None = None,
    *,
    labels: Sequence[LabelLike] | None = None,
) -> MDEQ:
    """The model in an official checkpoint file, in eval mode; nothing in the file is executed.

    Both layouts are read, bare or inside a training dictionary, with wrapper prefixes and duplicated blocks. Every width is
    inferred from the tensors' shapes, but for what `config` says: a whole one, or some of its fields by name. The number of
    GroupNorm groups and the strides of the stem leave no trace in the shapes: they are taken from the official model of these
    widths, else assumed with a warning. `labels` names the classes; without, 1000 are ImageNet-1k's, and the 10 of an
    official CIFAR-10 model are CIFAR-10's. Raises `CheckpointError` that lists missing, unknown and misshapen keys.
    """
    name = os.fspath(path)
    official = _strip(_read(name), name)
    weights = _rename(official, name)
    if not isinstance(config, MDEQConfig):
        config = _infer_config(weights, name, config or {})
    classes = _known_labels(config) if labels is None else labels
    model = MDEQ(config, labels=classes, preprocessing=official_preprocessing(config))
    expected = model.state_dict()
    problems = compare_keys(weights, expected)
    for key in sorted(set(weights) & set(expected)):
        if weights[key].shape != expected[key].shape:
            problems.append(f"{key} has shape {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}")
    problems += [f"{key} is infinite or NaN" for key, value in weights.items() if not torch.isfinite(value).all()]
    if problems:
        raise CheckpointError(f"{name} does not fit its config: {summarise(problems)}")
    model.load_state_dict(weights, strict=True)
    return model.eval()


def convert_key(key: str) -> str | None:
    """Our name of an official tensor, without wrapper prefixes; None where the official classifiers have none such."""
    module, _, tensor = key.rpartition(".")
    for pattern, rename in _RULES:
        if match := re.fullmatch(pattern, module):
            return f"{rename(*match.groups())}.{_WEIGHT_NORM.get(tensor, tensor)}"
    return None


def _read(name: str) -> Mapping[Any, Any]:
    if name.endswith(".safetensors"):
        raise CheckpointError(
            f"{name} is no file of torch.save, as official checkpoints are; a checkpoint folder needs no conversion"
        )
    try:
        content = torch.load(name, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"there is no file {name}") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{name} is a folder; give the file that torch.save wrote") from error
    except Exception as error:  # a damaged pickle raises whatever the damage leads to
        raise CheckpointError(f"{name} {_why_unreadable(name, error)}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{name} holds no dictionary of tensors")
    if foreign := [str(key) for key, value in content.items() if not (isinstance(key, str) and torch.is_tensor(value))]:
        raise CheckpointError(f"{name} holds entries that are no tensors: {summarise(foreign)}")
    return content


def _why_unreadable(name: str, error: Exception) -> str:
    """What the file is instead, where that can be told."""
    with Path(name).open("rb") as file:
        start = file.read(64).lstrip()
    if start.startswith(b"<"):
        return "is a web page: download the file that it links to"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS: fetch the file itself with git lfs pull"
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"holds more than tensors, {found[1]}, which is never loaded; have its author save the state_dict alone"
    return "is damaged, or holds more than tensors, which is never loaded; download it again"


def _known_labels(config: MDEQConfig) -> Sequence[LabelLike] | None:
    """The classes of the datasets that the official models were trained on."""
    if config.num_classes == len(imagenet_labels()):
        return imagenet_labels()
    trained_on_cifar10 = any(_has_widths_of(config.to_dict(), known) for known in (CIFAR_TINY, CIFAR_LARGE))
    return cifar10_labels() if trained_on_cifar10 and config.num_classes == 10 else None


def _strip(official: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors without wrapper prefixes and duplicated blocks."""
    stripped: dict[str, Tensor] = {}
    for key, value in official.items():
        while prefix := next((wrapper for wrapper in _WRAPPERS if key.startswith(wrapper)), None):
            key = key.removeprefix(prefix)
        if key in stripped:
            raise CheckpointError(f"{name} holds {key} twice, with different prefixes")
        if not key.startswith(_COPIES):
            stripped[key] = value
    return stripped


def _rename(official: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under our names, floating-point ones as float32."""
    names = {key: convert_key(key) for key in official}
    if unknown := sorted(key for key, ours in names.items() if ours is None):
        raise CheckpointError(f"{name} holds keys of no official MDEQ classifier: {summarise(unknown)}")
    weights: dict[str, Tensor] = {}
    for key, value in official.items():
        ours = names[key]
        assert ours is not None
        if ours in weights:
            raise CheckpointError(f"{name} holds {ours} twice, in two layouts")
        if wrong := _wrong_kind(key, value):
            raise CheckpointError(f"{name} holds {key} as {wrong} expected")
        weights[ours] = value.float() if value.is_floating_point() else value
    return weights


def _wrong_kind(key: str, value: Tensor) -> str | None:
    """What an official tensor is, and what it should be; None where it is."""
    if value.layout != torch.strided:
        return "a sparse tensor, and a dense one is"
    dtype = str(value.dtype).removeprefix("torch.")
    if key.endswith("num_batches_tracked"):
        return None if value.dtype == torch.int64 else f"{dtype}, and an integer is"
    return None if value.is_floating_point() else f"{dtype}, and floating-point numbers are"


def _infer_config(weights: Mapping[str, Tensor], name: str, given: Mapping[str, Any]) -> MDEQConfig:
    def conv(module: str) -> Tensor:
        for tensor in (_WEIGHT_NORM["weight_v"], "weight"):
            if f"{module}.{tensor}" in weights:
                return weights[f"{module}.{tensor}"]
        raise CheckpointError(f"{name} is no complete MDEQ classifier: {module} is missing")

    def count(pattern: str) -> int:
        indices = {match[1] for key in weights if (match := re.match(pattern, key))}
        return len(indices)

    def has(key: str) -> bool:
        return key in weights

    branches = range(count(r"block\.branches\.(\d)\."))
    channels = tuple(conv(f"block.branches.{i}.0.conv2").shape[0] for i in branches)
    gain = _WEIGHT_NORM["weight_g"]
    widths = {
        "channels": channels,
        "blocks": tuple(count(rf"block\.branches\.{i}\.(\d+)\.") for i in branches),
        "expansion": tuple(conv(f"block.branches.{i}.0.conv1").shape[0] // channels[i] for i in branches),
        "head_channels": tuple(conv(f"head.widen.{i}.reduce.conv").shape[0] for i in branches),
        "final_channels": conv("head.final.conv").shape[0],
        "num_classes": conv("head.classifier").shape[0],
        "block_affine": has("block.branches.0.0.norm1.weight"),
        "fuse_affine": has("block.fuse.1_to_0.0.norm.weight"),
        "post_fuse_affine": has("block.post_fuse.0.norm.weight"),
        "weight_norm_branches": has(f"block.branches.0.0.conv1.{gain}"),
        "weight_norm_fuse": has(f"block.fuse.1_to_0.0.conv.{gain}"),
        "weight_norm_post_fuse": has(f"block.post_fuse.0.conv.{gain}"),
        "injection_layer": has("stem.injection.conv.weight"),
    }
    official = _official_config(widths, count(r"stem\.layers\.(\d)\."), name, given)
    try:
        return MDEQConfig.from_dict({**official, **widths, **given}, complete=False)
    except ConfigError as error:
        raise CheckpointError(f"{name} is no MDEQ classifier that can be built: {error}") from error


def _official_config(
    widths: Mapping[str, Any], stem_layers: int, name: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The official config that supplies what shapes do not show, for these widths; warns where that is a guess."""
    for known in (CIFAR_TINY, CIFAR_LARGE, IMAGENET_SMALL, IMAGENET_XL):
        if _has_widths_of(widths, known):
            return known.to_dict()
    assumed = (IMAGENET_SMALL if widths["injection_layer"] else CIFAR_TINY).to_dict()
    if widths["injection_layer"]:
        assumed["input_downsamplings"] = stem_layers if stem_layers > 2 else 2
    hidden = {"groups": "groups", "input_downsamplings": "input downsamplings"}
    if guessed := [f"{assumed[key]} {words}" for key, words in hidden.items() if key not in given]:
        warnings.warn(
            f"{name} has the widths of no official model: assuming {' and '.join(guessed)}; "
            f"give a config with {' and '.join(key for key in hidden if key not in given)} if that is wrong",
            stacklevel=4,
        )
    return assumed


def _has_widths_of(widths: Mapping[str, Any], known: MDEQConfig) -> bool:
    names = ("channels", "head_channels")
    return all(tuple(widths[name] or ()) == getattr(known, name) for name in names) and (
        widths["final_channels"] == known.final_channels
    )
