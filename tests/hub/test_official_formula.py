"""MDEQ against the official code, with weights given by a formula over the official keys: runs without any other file.

A weight with official key `key` and flat index `i` follows `w = sin(0.7 i + crc32(key) % 1000)`; `formula` says how
each kind of tensor is made of it. The expected numbers in `data/formula.json` come from the official code in float64.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phantomgrad import attachments
from phantomgrad_hub import MDEQ, MDEQConfig, convert_official
from phantomgrad_hub.convert import convert_key

CASES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "formula.json").read_text())
TOLERANCE = 1e-9


def formula(key: str, shape: list[int]) -> Tensor:
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    w = torch.sin(0.7 * index + zlib.crc32(key.encode()) % 1000).reshape(shape)
    kind = key.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    if kind in ("running_var", "weight_g"):
        return 1 + 0.3 * w
    if kind in ("running_mean", "weight_v", "bias"):
        return 0.1 * w
    if len(shape) == 1:
        return 0.6 + 0.2 * w
    return w * math.sqrt(3 / math.prod(shape[1:]))


def config_of(case: dict[str, Any]) -> MDEQConfig:
    return MDEQConfig(
        channels=tuple(case["channels"]),
        head_channels=tuple(case["head_channels"]),
        final_channels=case["final_channels"],
        num_classes=case["classes"],
        image_size=case["image_size"],
        input_downsamplings=case["input_downsamplings"],
        injection_layer="stage0.0.weight" in case["shapes"],
        groups=case["groups"],
        expansion=case["expansion"],
        post_fuse_affine=case["post_fuse_affine"],
    )


@pytest.mark.parametrize("name", CASES)
def test_states_and_logits_are_those_of_the_official_code(name: str, record_testsuite_property: Any) -> None:
    case = CASES[name]
    config = config_of(case)
    model = MDEQ(config).double().eval()
    model.load_state_dict({convert_key(key): formula(key, shape) for key, shape in case["shapes"].items()}, strict=True)
    shape = (2, 3, config.image_size, config.image_size)
    images = torch.sin(0.011 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)
    [attachment] = attachments(model)

    errors = []
    with torch.no_grad():
        injection = model.inject(images)
        errors.append(abs(injection.norm().item() - case["injection_norm"]))
        z = model.initial_state(injection)
        for expected in case["state_norms"]:
            z = attachment.step(z, injection)
            errors += [abs(x.norm().item() - norm) for x, norm in zip(z, expected, strict=True)]
        errors.append((model.head(z) - torch.tensor(case["logits"], dtype=torch.float64)).abs().max().item())

    record_testsuite_property(f"largest error, official formula, {name}", max(errors))
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_every_official_key_has_a_name_of_its_own_here(name: str) -> None:
    shapes = CASES[name]["shapes"]
    ours = {convert_key(key): tuple(shape) for key, shape in shapes.items()}
    assert len(ours) == len(shapes)
    assert ours == {key: tuple(value.shape) for key, value in MDEQ(config_of(CASES[name])).state_dict().items()}


def test_a_checkpoint_file_made_by_the_formula_converts(tmp_path: Path) -> None:
    case = CASES["imagenet"]
    file = tmp_path / "official.pkl"
    torch.save({f"module.{key}": formula(key, shape) for key, shape in case["shapes"].items()}, file)
    with pytest.warns(UserWarning, match="assuming 8 groups and 2 input downsamplings"):
        model = convert_official(file)
    config = config_of(case)
    assert model.config.channels == config.channels
    assert model.config.expansion_per_branch == config.expansion_per_branch
    assert convert_official(file, config).config == config
