"""Conversion of official checkpoint files: the variants met in the wild, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phantomgrad_hub import MDEQ, CheckpointError, CheckpointNotFoundError, convert_official, mdeq_cifar_tiny
from phantomgrad_hub.convert import convert_key

_CONV_NORM = {"conv": "0", "norm": "1"}


def official_key(key: str) -> str:
    """The key in the locuslab layout of one of ours, for MDEQ-Tiny."""
    parts = key.replace("parametrizations.weight.original0", "weight_g")
    parts = parts.replace("parametrizations.weight.original1", "weight_v").split(".")
    match parts:
        case ["stem", "layers", i, kind, tensor]:
            return f"downsample.{3 * int(i) + int(_CONV_NORM[kind])}.{tensor}"
        case ["block", "branches", i, j, layer, tensor]:
            return f"fullstage.branches.{i}.blocks.{j}.{layer.replace('norm', 'gn')}.{tensor}"
        case ["block", "fuse", path, step, kind, tensor]:
            source, target = path.split("_to_")
            step = f"{step}." if target > source else ""
            return f"fullstage.fuse_layers.{target}.{source}.net.{step}{kind.replace('norm', 'gnorm')}.{tensor}"
        case ["block", "post_fuse", i, kind, tensor]:
            return f"fullstage.post_fuse_layers.{i}.{kind.replace('norm', 'gnorm')}.{tensor}"
        case ["head", "widen", i, "shortcut", kind, tensor]:
            return f"incre_modules.{i}.0.downsample.{_CONV_NORM[kind]}.{tensor}"
        case ["head", "widen", i, layer, kind, tensor]:
            number = ("reduce", "middle", "expand").index(layer) + 1
            return f"incre_modules.{i}.0.{kind.replace('norm', 'bn')}{number}.{tensor}"
        case ["head", "merge", i, kind, tensor]:
            return f"downsamp_modules.{i}.{_CONV_NORM[kind]}.{tensor}"
        case ["head", "final", kind, tensor]:
            return f"final_layer.{_CONV_NORM[kind]}.{tensor}"
        case ["head", "classifier", tensor]:
            return f"classifier.{tensor}"
    raise AssertionError(key)


@pytest.fixture(scope="module")
def tiny() -> MDEQ:
    return mdeq_cifar_tiny()


@pytest.fixture(scope="module")
def official(tiny: MDEQ) -> dict[str, Tensor]:
    return {official_key(key): value for key, value in tiny.state_dict().items()}


def test_the_key_map_is_one_to_one(tiny: MDEQ, official: dict[str, Tensor]) -> None:
    assert [convert_key(key) for key in official] == list(tiny.state_dict())


@pytest.mark.parametrize(
    "variant", ["bare", "module", "model", "both", "copy", "training", "torchdeq names", "half", "double"]
)
def test_variants(tiny: MDEQ, official: dict[str, Tensor], variant: str, tmp_path: Path) -> None:
    prefixes = {"module": "module.", "model": "model.", "both": "module.model."}
    content: Any = {prefixes.get(variant, "") + key: value for key, value in official.items()}
    if variant == "copy":
        content |= {
            key.replace("fullstage", "fullstage_copy"): value for key, value in official.items() if "stage" in key
        }
    if variant == "torchdeq names":
        content = {key.replace("fullstage", "full_stage"): value for key, value in official.items()}
    if variant in ("half", "double"):
        dtype = {"half": torch.float16, "double": torch.float64}[variant]
        content = {key: value.to(dtype) if value.is_floating_point() else value for key, value in official.items()}
    if variant == "training":
        content = {"epoch": 3, "state_dict": content, "best_acc1": 75.0, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(content, tmp_path / "official.pkl")
    model = convert_official(tmp_path / "official.pkl")
    assert model.config == tiny.config
    assert model.preprocessing == tiny.preprocessing
    assert not model.training
    tolerance = 1e-3 if variant == "half" else 0
    for key, value in tiny.state_dict().items():
        assert model.state_dict()[key].dtype == value.dtype
        torch.testing.assert_close(model.state_dict()[key], value, rtol=tolerance, atol=tolerance)


def test_unknown_widths_are_inferred_with_a_warning(tmp_path: Path) -> None:
    from small import official_config

    # The official code's name for the third convolution of a stem.
    config = official_config(channels=(16, 16), head_channels=(4, 4), groups=8, input_downsamplings=3)
    model = MDEQ(config)
    content = {official_key(key): value for key, value in model.state_dict().items() if not key.startswith("stem.")}
    for key, value in model.state_dict().items():
        if key.startswith("stem.injection"):
            content[key.replace("stem.injection.conv", "stage0.0").replace("stem.injection.norm", "stage0.1")] = value
        elif key.startswith("stem.layers.2"):
            content[
                key.replace("stem.layers.2.conv", "downsample.DS3").replace("stem.layers.2.norm", "downsample.DS3-BN")
            ] = value
        elif key.startswith("stem."):
            content[official_key(key)] = value
    torch.save(content, tmp_path / "official.pkl")
    with pytest.warns(UserWarning, match="assuming 8 groups and 3 input downsamplings; pass config= if that is wrong"):
        inferred = convert_official(tmp_path / "official.pkl").config
    assert inferred.channels == (16, 16)
    assert inferred.expansion_per_branch == (2, 2)
    assert inferred.input_downsamplings == 3


@pytest.mark.filterwarnings("ignore:.*widths of no official model")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra.weight": torch.zeros(1)}, "holds keys of no official MDEQ classifier: extra.weight"),
        ({"downsample.2.weight": torch.zeros(1)}, "keys of no official MDEQ classifier: downsample.2.weight"),
        ({"classifier.bias": None}, "missing head.classifier.bias"),
        ({"stage0.1.bias": torch.zeros(24)}, "unknown stem.injection.norm.bias"),
        ({"classifier.bias": torch.zeros(3)}, "head.classifier.bias has shape (3,) instead of (10,)"),
        ({"classifier.bias": torch.full((10,), float("nan"))}, "head.classifier.bias is infinite or NaN"),
        ({"module.classifier.bias": torch.zeros(10)}, "holds classifier.bias twice, with different prefixes"),
        ({"full_stage.post_fuse_layers.0.conv.weight_g": torch.zeros(24)}, "twice, in two layouts"),
        ({"classifier.bias": "text"}, "holds entries that are no tensors: classifier.bias"),
        ({"final_layer.0.weight": None}, "is no complete MDEQ classifier: head.final.conv is missing"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    official: dict[str, Tensor], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = {key: value for key, value in {**official, **change}.items() if value is not None}
    torch.save(content, tmp_path / "official.pkl")
    with pytest.raises(CheckpointError) as caught:
        convert_official(tmp_path / "official.pkl")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


class _Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a pickle was executed",))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "official.pkl"
    with pytest.raises(CheckpointNotFoundError, match="there is no file"):
        convert_official(file)
    for content in (b"", b"some text", pickle.dumps(_Bomb()), pickle.dumps({"a": 1})[:-3]):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged, or holds more than tensors, which is never loaded"):
            convert_official(file)
    torch.save({"classifier.weight": _Bomb()}, file)
    with pytest.raises(CheckpointError, match="never loaded"):
        convert_official(file)
    for value in ([torch.zeros(1)], {}, torch.zeros(2)):
        torch.save(value, file)
        with pytest.raises(CheckpointError, match="holds no dictionary of tensors"):
            convert_official(file)
    torch.save({"state_dict": {"classifier.weight": torch.zeros(10, 200)}}, file)
    with pytest.raises(CheckpointError):
        convert_official(file)
