"""Settings build the solver they name, start from the checkpoint's own, and refuse everything else in a line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from phantomgrad import Anderson, Broyden, FixedPointIteration
from phantomgrad_demo.settings import MOST_STEPS, Settings, SettingsError, solver_of, tolerances_for
from phantomgrad_hub import MDEQ

SETTINGS = Settings(solver="Anderson", max_steps=12, tolerance=1e-3)


def test_the_checkpoints_own_settings_build_its_own_solver(model: MDEQ) -> None:
    settings = Settings.of_model(model)
    assert settings == Settings(solver="fixed point", max_steps=24, tolerance=0.01, damping=0.7)
    assert settings.build(solver_of(model)) == solver_of(model)


def test_the_embedded_checkpoints_too() -> None:
    model = MDEQ.from_pretrained("embedded")
    settings = Settings.of_model(model)
    assert settings.build(solver_of(model)) == solver_of(model)


def test_other_settings_build_other_solvers() -> None:
    like = Anderson(memory=3, max_steps=5, trace="state")
    assert SETTINGS.build(like) == Anderson(memory=3, max_steps=12, rtol=1e-3)
    assert replace(SETTINGS, solver="Broyden").build(like) == Broyden(max_steps=12, rtol=1e-3)
    damped = replace(SETTINGS, solver="fixed point", damping=0.4)
    assert damped.build(like) == FixedPointIteration(max_steps=12, rtol=1e-3, damping=0.4)


def test_the_tolerances_to_choose_from_hold_the_settings_own() -> None:
    assert tolerances_for(SETTINGS) == (1e-1, 1e-2, 1e-3, 1e-4)
    assert tolerances_for(replace(SETTINGS, tolerance=0.05)) == (1e-1, 0.05, 1e-2, 1e-3, 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "newton"}, "the solver is one of fixed point, Anderson, Broyden, not 'newton'"),
        ({"max_steps": 0}, f"the most steps are a whole number from 1 to {MOST_STEPS}, not 0"),
        ({"max_steps": MOST_STEPS + 1}, "the most steps are a whole number"),
        ({"max_steps": 2.5}, "the most steps are a whole number"),
        ({"max_steps": True}, "the most steps are a whole number"),
        ({"tolerance": 0.0}, "the tolerance is from 1e-05 to 1, not 0.0"),
        ({"tolerance": float("nan")}, "the tolerance is from"),
        ({"tolerance": "1e-3"}, "the tolerance is from"),
        ({"damping": 0.0}, "the damping is from 0.05 to 1, not 0.0"),
        ({"damping": 1.5}, "the damping is from"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{message}"):
        replace(SETTINGS, **changes)
