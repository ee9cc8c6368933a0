"""Training configurations and how `--set` edits them."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from small import pooled_config

from phantomgrad import FixedPointIteration, NeumannPhantom, OneStep
from phantomgrad_hub import ConfigError
from phantomgrad_hub.data import AugmentationConfig
from phantomgrad_hub.train import (
    RECIPES,
    OptimizerConfig,
    ScheduleConfig,
    SettingError,
    SolverPhase,
    TrainConfig,
    TrainingError,
    apply_settings,
    tiny_imagenet,
    train,
)
from phantomgrad_hub.train.settings import differing_keys, to_json


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_recipes_are_complete_and_can_be_stored(recipe: Any) -> None:
    config = recipe()
    assert isinstance(config, TrainConfig)
    assert json.loads(json.dumps(to_json(config))) == to_json(config)


@pytest.mark.parametrize(
    ("setting", "read", "expected"),
    [
        ("epochs=3", lambda c: c.epochs, 3),
        ("optimizer.lr=1e-3", lambda c: c.optimizer.lr, 1e-3),
        ("optimizer.lr=1", lambda c: c.optimizer.lr, 1.0),
        ("optimizer.name=sgd", lambda c: c.optimizer.name, "sgd"),
        ("optimizer.betas=(0.9,0.95)", lambda c: c.optimizer.betas, (0.9, 0.95)),
        ("clip=None", lambda c: c.clip, None),
        ("clip=2", lambda c: c.clip, 2.0),
        ("channels_last=true", lambda c: c.channels_last, True),
        ("compile=False", lambda c: c.compile, False),
        ("mixed_precision=no", lambda c: c.mixed_precision, "no"),
        ("model.channels=(16,32,64)", lambda c: c.model.channels, (16, 32, 64)),
        ("model.expansion=2", lambda c: c.model.expansion, 2),
        ("model.expansion=(2,3,4)", lambda c: c.model.expansion, (2, 3, 4)),
        ("model.gradient.steps=4", lambda c: c.model.gradient.steps, 4),
        ("model.gradient=NeumannPhantom(steps=2)", lambda c: c.model.gradient, NeumannPhantom(steps=2)),
        ("model.eval_solver=None", lambda c: c.model.eval_solver, None),
        ("model.solver=FixedPointIteration", lambda c: c.model.solver, FixedPointIteration()),
        (
            "solver_schedule=((0.5,2),(1,6,4))",
            lambda c: c.solver_schedule,
            (SolverPhase(until=0.5, solver_steps=2), SolverPhase(until=1.0, solver_steps=6, phantom_steps=4)),
        ),
        ("trackers=tensorboard", lambda c: c.trackers, ("tensorboard",)),
        ("trackers=tensorboard, wandb", lambda c: c.trackers, ("tensorboard", "wandb")),
        ("trackers=()", lambda c: c.trackers, ()),
        ("trackers=('tensorboard',)", lambda c: c.trackers, ("tensorboard",)),
        ("augmentation.scale=(0.2,0.9)", lambda c: c.augmentation.scale, (0.2, 0.9)),
    ],
)
def test_a_setting_replaces_one_field(setting: str, read: Any, expected: object) -> None:
    found = read(apply_settings(tiny_imagenet(), [setting]))
    assert found == expected
    assert type(found) is type(expected)


def test_settings_that_need_each_other_are_applied_together() -> None:
    settings = ["model.channels=(8,16)", "model.blocks=1", "model.head_channels=(4,8)", "model.groups=4"]
    assert apply_settings(tiny_imagenet(), settings).model.channels == (8, 16)
    both = ["model.gradient=NeumannPhantom", "model.gradient.steps=7"]
    assert apply_settings(tiny_imagenet(), both).model.gradient == NeumannPhantom(steps=7)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr=0.1", r"lr: no such field; did you mean optimizer\.lr\?"),
        ("optimizer.rate=0.1", "no such field"),
        ("optimiser.lr=0.1", r"no such field; did you mean optimizer"),
        ("model.gradient.step=3", r"did you mean model\.gradient\.steps"),
        ("zzz=1", "no such field; fields are model, augmentation, optimizer"),
        ("epochs", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("epochs=many", "epochs: expected an integer, not 'many'"),
        ("epochs=2.5", "epochs: expected an integer, not 2.5"),
        ("epochs=True", "expected an integer, not True"),
        ("compile=1", "expected True or False, not 1"),
        ("optimizer.lr=fast", "expected a number, not 'fast'"),
        ("optimizer.name=adam", "expected 'sgd' or 'adamw' or 'lamb', not 'adam'"),
        ("optimizer.betas=0.9", r"expected \(a number, a number\)|expected \(a number\)"),
        ("model.channels=wide", "channels: expected"),
        ("model.gradient=Magic()", "gradient: expected"),
        ("model.gradient=NeumannPhantom(step=2)", "unexpected keyword argument 'step'"),
        ("model.gradient=NeumannPhantom(2)", "takes NAME=VALUE options"),
        ("epochs.steps=2", "epochs is [0-9]+; it has no fields"),
        ("epochs=0", "epochs must be at least 1, not 0"),
        ("optimizer.lr=-1", "lr must be a finite number above 0"),
        ("optimizer.lr=1e38", r"lr must be a finite number above 0 and at most 1e\+30, not 1e\+38"),
        (
            "optimizer.weight_decay=1e38",
            r"weight_decay must be a finite number of at least 0 and at most 1e\+06, not 1e\+38",
        ),
        ("model.groups=7", "channels must be multiples of groups"),
        ("solver_schedule=((0.5,3),)", "the last at 1"),
        ("solver_schedule=((1.0,0),)", "solver_steps must be at least 1"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(setting: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        apply_settings(tiny_imagenet(), [setting])
    assert "\n" not in str(caught.value)


def test_fields_of_an_option_that_is_none_ask_for_the_option_first() -> None:
    config = replace(tiny_imagenet(), model=pooled_config(eval_solver=None))
    with pytest.raises(SettingError, match=r"eval_solver to one of FixedPointIteration, Anderson.* first"):
        apply_settings(config, ["model.eval_solver.max_steps=9"])


def test_of_several_settings_the_one_that_is_wrong_is_named() -> None:
    with pytest.raises(SettingError, match=r"^--set batch_size: batch_size must be at least 1, not 0$"):
        apply_settings(tiny_imagenet(), ["epochs=1", "batch_size=0"])
    with pytest.raises(SettingError, match=r"^--set optimizer\.lr: lr must be a finite number above 0"):
        apply_settings(tiny_imagenet(), ["optimizer.momentum=0.5", "optimizer.lr=0"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1"),
        ({"clip": 0.0}, "clip must be a finite number above 0"),
        ({"mixed_precision": "int8"}, "mixed_precision must be"),
        ({"checkpoint_minutes": 0.0}, "checkpoint_minutes must be"),
        ({"validation_images": 0}, "validation_images must be at least 1"),
        (
            {"solver_schedule": (SolverPhase(until=1.0, solver_steps=2), SolverPhase(until=0.5, solver_steps=2))},
            "end at",
        ),
    ],
)
def test_values_out_of_range_fail_at_construction(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(model=pooled_config(), **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"epochs": 2.5}, "epochs must be an integer, not 2.5"),
        (lambda: {"epochs": "3"}, "epochs must be an integer, not '3'"),
        (lambda: {"epochs": True}, "epochs must be an integer, not True"),
        (lambda: {"seed": None}, "seed must be an integer, not None"),
        (lambda: {"ema_decay": True}, "ema_decay must be a number, not True"),
        (lambda: {"clip": "1"}, "clip must be a number or None, not '1'"),
        (lambda: {"compile": "no"}, "compile must be True or False, not 'no'"),
        (lambda: {"mixed_precision": None}, "mixed_precision must be 'no' or 'bf16' or 'fp16', not None"),
        (lambda: {"optimizer": "sgd"}, "optimizer must be OptimizerConfig, not 'sgd'"),
        (lambda: {"model": {}}, "model must be MDEQConfig, not dict {}"),
        (lambda: {"augmentation": None}, "augmentation must be AugmentationConfig, not None"),
        (lambda: {"trackers": "tensorboard"}, "trackers must be (a text, ...), not 'tensorboard'"),
        (lambda: {"solver_schedule": [SolverPhase(until=1, solver_steps=3)]}, "solver_schedule must be (SolverPhase, ...), not list"),
        (lambda: {"optimizer": OptimizerConfig(betas=[0.9])}, "betas must be (a number, a number), not list [0.9]"),  # type: ignore[arg-type]
        (lambda: {"optimizer": OptimizerConfig(lr="0.1")}, "lr must be a number, not '0.1'"),  # type: ignore[arg-type]
        (lambda: {"schedule": ScheduleConfig(warmup=None)}, "warmup must be a number, not None"),  # type: ignore[arg-type]
        (lambda: {"solver_schedule": (SolverPhase(until=1, solver_steps=3.5),)}, "solver_steps must be an integer, not 3.5"),  # type: ignore[arg-type]
        (lambda: {"augmentation": AugmentationConfig(scale=0.5)}, "scale must be (a number, a number), not 0.5"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_a_value_of_another_type_names_its_field(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{"model": pooled_config(), **make()})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_whole_numbers_stand_for_fractions() -> None:
    assert TrainConfig(model=pooled_config(), clip=1, memory_gib=2, optimizer=OptimizerConfig(lr=1)).optimizer.lr == 1


def test_training_asks_for_a_config_and_a_source() -> None:
    with pytest.raises(TrainingError, match=r"^config must be a TrainConfig, such as finetune\(\), not dict$"):
        train({}, "photos", "run")  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"^source must be a Source, such as open_source\(FOLDER\), not str$"):
        train(tiny_imagenet(), "photos", "run")  # type: ignore[arg-type]


def test_phantom_steps_need_a_gradient_that_has_them() -> None:
    phases = (SolverPhase(until=1.0, solver_steps=2, phantom_steps=2),)
    with pytest.raises(ValueError, match="OneStep has no steps"):
        TrainConfig(model=pooled_config(gradient=OneStep()), solver_schedule=phases)


def test_optimizers_are_checked() -> None:
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        OptimizerConfig(momentum=0.0)
    with pytest.raises(ValueError, match="name must be"):
        OptimizerConfig(name="lion")  # type: ignore[arg-type]


def test_configs_are_frozen_and_take_known_names_only() -> None:
    with pytest.raises(FrozenInstanceError):
        tiny_imagenet().epochs = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="epoch"):
        TrainConfig(model=pooled_config(), epoch=3)  # type: ignore[call-arg]


def test_the_rate_rises_then_follows_half_a_cosine() -> None:
    schedule = ScheduleConfig(warmup=0.2, final=0.1)
    rates = [schedule.factor(step, 100) for step in range(101)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert ScheduleConfig(warmup=0.0).factor(0, 100) == 1.0


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.3, 0.99])
def test_every_step_has_a_rate_above_zero_and_at_most_the_top(total: int, warmup: float) -> None:
    rates = [ScheduleConfig(warmup=warmup).factor(step, total) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == pytest.approx(1.0, abs=0.02 if total > 1 else 0)


def test_the_phase_is_that_of_the_progress() -> None:
    phases = (SolverPhase(until=0.5, solver_steps=2), SolverPhase(until=1.0, solver_steps=9))
    config = TrainConfig(model=pooled_config(), solver_schedule=phases)
    assert [config.phase(at).solver_steps for at in (0.0, 0.49, 0.5, 0.99, 1.0)] == [2, 2, 9, 9, 9]  # type: ignore[union-attr]
    assert TrainConfig(model=pooled_config()).phase(0.3) is None


def test_differing_keys_are_dotted() -> None:
    old = to_json(tiny_imagenet())
    new = to_json(apply_settings(tiny_imagenet(), ["optimizer.lr=0.5", "model.gradient=UnrolledPhantom"]))
    assert differing_keys(old, old) == []
    assert {"optimizer.lr", "model.gradient.type"} <= set(differing_keys(old, new))
