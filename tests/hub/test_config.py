"""MDEQConfig: what it accepts, what it refuses, and its JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from small import official_config, pooled_config

from phantomgrad import Anderson, FixedPointIteration, Implicit, NeumannPhantom, OneStep, UnrolledPhantom
from phantomgrad_hub import MDEQ, ConfigError, MDEQConfig
from phantomgrad_hub.config import MAX_PARAMETERS
from phantomgrad_hub.models.builders import CIFAR_LARGE, CIFAR_TINY, IMAGENET_SMALL, IMAGENET_XL
from phantomgrad_hub.options import encode_options

CONFIGS = [
    pooled_config(),
    official_config(),
    pooled_config(blocks=(1, 2, 1), expansion=(1, 5, 3), stem_channels=32, input_downsamplings=3, dropout=0.1),
    pooled_config(gradient=NeumannPhantom(steps=2), solver=Anderson(memory=3), eval_solver=FixedPointIteration()),
    pooled_config(gradient=OneStep(), eval_solver=Anderson(max_steps=24, rtol=1e-2)),
    pooled_config(gradient=Implicit(solver=Anderson(memory=2), rtol=1e-5)),
    CIFAR_TINY,
    CIFAR_LARGE,
    IMAGENET_SMALL,
    IMAGENET_XL,
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config: MDEQConfig) -> None:
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert MDEQConfig.from_dict(json.loads(text)) == config
    assert hash(MDEQConfig.from_dict(json.loads(text))) == hash(config)


def test_configs_of_the_same_model_are_equal() -> None:
    assert pooled_config(blocks=(1, 1, 1), expansion=[2, 2, 2]) == pooled_config(blocks=1, expansion=2)
    assert pooled_config(channels=[8, 16, 16]) == pooled_config()
    assert pooled_config(expansion=(2, 2, 3)).expansion_per_branch == (2, 2, 3)


def test_gradient_and_solver_are_named_in_json() -> None:
    values = pooled_config().to_dict()
    assert values["gradient"]["type"] == "UnrolledPhantom"
    assert values["gradient"]["steps"] == 3
    assert values["solver"]["type"] == "FixedPointIteration"
    assert values["eval_solver"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (8,)}, "channels must have one entry for each of 2 to 8 branches, got 1"),
        ({"channels": 8}, "channels must be a list"),
        ({"channels": (8, 12.0, 16)}, "channels must be an integer"),
        ({"channels": (8, 9000, 16)}, "channels must be an integer between 1 and 8192, got 9000"),
        ({"channels": (8, 18, 16)}, "channels must be multiples of groups"),
        ({"blocks": (1, 1)}, "blocks must have one entry per branch, 3, got 2"),
        ({"blocks": 0}, "blocks must be an integer between 1 and 16, got 0"),
        ({"expansion": 2.5}, "expansion must be an integer between 1 and 32, got 2.5"),
        ({"expansion": True}, "expansion must be an integer"),
        ({"groups": 0}, "groups must be an integer between 1 and 1024, got 0"),
        ({"num_classes": 0}, "num_classes must be an integer between 1 and 1000000, got 0"),
        ({"num_classes": None}, "num_classes must be an integer"),
        ({"image_size": "32"}, "image_size must be an integer between 8 and 4096, got '32'"),
        ({"dropout": 1.0}, "dropout must be a number of at least 0 and below 1, got 1.0"),
        ({"dropout": float("nan")}, "dropout must be a number"),
        ({"head_dropout": -0.1}, "head_dropout must be a number"),
        ({"block_affine": 1}, "block_affine must be True or False, got 1"),
        ({"head": "wide"}, "head must be 'official' or 'pooled', got 'wide'"),
        ({"head": "official"}, "head_channels must be given for the official head"),
        ({"final_channels": 32}, "final_channels must be None for the pooled head, got 32"),
        ({"conv_init_std": 0.0}, "conv_init_std must be None or a number above 0"),
        ({"input_downsamplings": 7}, "input_downsamplings must be an integer between 0 and 6, got 7"),
        (
            {"gradient": "UnrolledPhantom"},
            "gradient must be one of UnrolledPhantom, NeumannPhantom, KrylovPhantom, OneStep, Implicit",
        ),
        ({"solver": UnrolledPhantom()}, "solver must be one of FixedPointIteration, Anderson, Broyden"),
        ({"solver": FixedPointIteration(max_steps=10**6)}, "solver: max_steps must be at most 10000, got 1000000"),
        ({"solver": FixedPointIteration(max_steps=0)}, "solver: max_steps must be at least 1, got 0"),
        ({"eval_solver": Anderson(max_steps=0)}, "eval_solver: max_steps must be at least 1, got 0"),
        ({"gradient": UnrolledPhantom(steps=10**6)}, "gradient: steps must be at most 10000"),
        ({"solver": Anderson(memory=10**4)}, "solver: memory must be at most 100"),
        ({"gradient": Implicit(solver=FixedPointIteration(max_steps=10**9))}, "gradient.solver: max_steps"),
    ],
)
def test_a_value_out_of_range_names_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pooled_config(**changes)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": (8192, 8192, 8192), "expansion": 32},
        {"channels": (8192, 8192, 8192), "blocks": 16},
        {"num_classes": 1_000_000, "channels": (8192, 8192, 8192), "expansion": 1},
        {"image_size": 4096, "channels": (256, 256, 256), "input_downsamplings": 0},
        {"image_size": 4096, "stem_channels": 8192},
    ],
)
def test_a_config_cannot_ask_for_more_than_a_machine_has(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the bound is"):
        pooled_config(**changes)


@pytest.mark.parametrize("config", [*CONFIGS[:3], CIFAR_TINY, replace(CIFAR_TINY, input_downsamplings=3)])
def test_the_estimate_of_parameters_is_close(config: MDEQConfig) -> None:
    model = MDEQ(config)
    convolutions = sum(p.numel() for p in model.parameters() if p.dim() > 1 and p.numel() != p.shape[0])
    assert convolutions <= config._estimate_parameters() <= 1.1 * convolutions
    assert convolutions < MAX_PARAMETERS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": 3},
            "format_version of the model config is 3, this release reads up to 2; update phantomgrad",
        ),
        ({"format_version": None}, "format_version of the model config is None"),
        ({"format_version": True}, "format_version of the model config is True"),
        ({"width": 3, "colour": 1}, "unknown keys in the model config: colour, width"),
        ({"gradient": "UnrolledPhantom"}, "gradient must be an object with a 'type', got 'UnrolledPhantom'"),
        ({"gradient": {"type": "os.system"}}, "gradient: unknown type 'os.system'; known are UnrolledPhantom"),
        ({"gradient": {"type": ["x"]}}, "gradient: unknown type ['x']"),
        ({"gradient": {"type": "OneStep", "steps": 2}}, "gradient: OneStep has no option 'steps'"),
        ({"solver": {**encode_options(Anderson()), "max_steps": -1}}, "solver: max_steps of Anderson must be"),
        ({"solver": {"type": "Broyden", "max_steps": 4}}, "solver: Broyden lacks atol, check_every"),
        ({"solver": {"type": "UnrolledPhantom"}}, "solver: unknown type 'UnrolledPhantom'"),
        ({"gradient": {"type": "Implicit", "solver": {"type": "?"}}}, "gradient.solver: unknown type '?'"),
        ({"solver": None}, "solver must be one of"),
    ],
)
def test_foreign_json_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MDEQConfig.from_dict({**pooled_config().to_dict(), **changes})
    assert str(caught.value).startswith(message)


def test_missing_keys_are_listed() -> None:
    with pytest.raises(ConfigError, match="missing keys in the model config: channels, num_classes"):
        MDEQConfig.from_dict({"format_version": 1, "image_size": 32})
    values = pooled_config().to_dict()
    del values["groups"], values["solver"]
    with pytest.raises(ConfigError, match="missing keys in the model config: groups, solver"):
        MDEQConfig.from_dict(values)
    with pytest.raises(ConfigError, match="JSON object, not list"):
        MDEQConfig.from_dict([])  # pyright: ignore[reportArgumentType]


def test_a_misspelt_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="chanels"):
        MDEQConfig(chanels=(8, 8), num_classes=2, image_size=32)  # pyright: ignore[reportCallIssue]
