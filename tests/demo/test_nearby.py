"""A changed photo is what it says, and its old neighbour's equilibrium is a start that saves steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image
from samples import LABELS, SETTINGS, trajectory

from phantomgrad_demo.nearby import CHANGES, Change, Nearby, changed_photo, solve_nearby
from phantomgrad_demo.panels import compared, nearby_curves
from phantomgrad_demo.settings import Settings, SettingsError
from phantomgrad_hub import MDEQ


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    pixels = torch.randint(0, 200, (10, 20, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_what_each_change_does(photo: Image.Image) -> None:
    brighter = changed_photo(photo, "brightness", 20)
    assert brighter.getpixel((3, 4)) == tuple(int(1.2 * value) for value in photo.getpixel((3, 4)))  # pyright: ignore
    moved = changed_photo(photo, "shift", 10)
    assert moved.getpixel((7, 5)) == photo.getpixel((5, 5))
    assert moved.getpixel((1, 5)) == photo.getpixel((0, 5))  # the edge, mirrored
    assert moved.getpixel((0, 5)) == photo.getpixel((1, 5))
    assert changed_photo(photo, "crop", 10).size == photo.size


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_no_change_and_needs_one_step(model: MDEQ, photo: Image.Image, change: Change) -> None:
    assert changed_photo(photo, change, 0).tobytes() == photo.tobytes()
    found = solve_nearby(model, photo, Settings.of_model(model), change=change, percent=0)
    assert len(found.warm.steps) == 1
    assert [step.residual for step in found.cold.steps] == pytest.approx([step.residual for step in found.before.steps])


def test_a_small_change_is_solved_sooner_from_nearby(model: MDEQ, photo: Image.Image) -> None:
    found = solve_nearby(model, photo, Settings.of_model(model), change="brightness", percent=3)
    assert found.cold.reason == found.warm.reason == "settled"
    assert len(found.warm.steps) < len(found.cold.steps)
    torch.testing.assert_close(found.warm.probabilities, found.cold.probabilities, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("change", "percent", "message"),
    [
        ("rotation", 5, "the change is one of brightness, shift, crop, not 'rotation'"),
        ("shift", 31, "the change is by 0 to 30 percent, not 31"),
        ("shift", -1, "the change is by 0 to 30 percent"),
        ("shift", float("nan"), "the change is by 0 to 30 percent"),
        ("shift", True, "the change is by 0 to 30 percent"),
    ],
)
def test_other_changes_are_refused(photo: Image.Image, change: Any, percent: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        changed_photo(photo, change, percent)


def test_the_panel_says_what_the_start_saved(photo: Image.Image) -> None:
    long, short = trajectory([1.0, 0.2, 0.05, 8e-3]), trajectory([0.1, 8e-3])
    unsettled = trajectory([1.0, 0.5], "steps")

    def says(cold: Any, warm: Any) -> str:
        found = Nearby(photo=photo, before=long, cold=cold, warm=warm)
        return nearby_curves(found, [photo, photo], LABELS).takeaway

    assert "The old equilibrium is a good start: 2 steps from there, 4 steps from zero." in says(long, short)
    assert "This start saves nothing: 4 steps from the old equilibrium, 2 steps from zero." in says(short, long)
    assert "Not both solves settled" in says(long, unsettled)


def test_the_comparison_puts_the_checkpoint_s_own_solver_on_the_accuracy_curve() -> None:
    settled, unsettled = trajectory([1.0, 0.2, 8e-3]), trajectory([1.0], "steps")
    panel = compared(settled, unsettled, LABELS, {1: 0.02, 4: 0.4}, SETTINGS)
    assert "Different answers: A settled in 3 steps, B did not settle in 1 step." in panel.takeaway
    assert "A: Anderson, at most 12 steps, tolerance 1e-2" in panel.result
    assert "250 ms for 3 steps" in panel.result
    assert "<b>" not in panel.result
    assert 'data-name="accuracy"' in panel.result
    assert 'data-name="accuracy"' not in compared(settled, settled, LABELS, {}, SETTINGS).result
    assert panel.result.count('class="pg-mark"') == 2
    # The curve is of the checkpoint's own solver: another one has no place on it.
    for other in (replace(SETTINGS, solver="Broyden"), replace(SETTINGS, solver="fixed point", damping=0.5)):
        beside = trajectory([1.0, 0.2], settings=other)
        assert compared(settled, beside, LABELS, {1: 0.02}, SETTINGS).result.count('class="pg-mark"') == 1
    assert "B: fixed point, damping 0.5, at most 12 steps" in compared(settled, beside, LABELS, {}, SETTINGS).result
