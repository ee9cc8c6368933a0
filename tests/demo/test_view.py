"""What the page's script gets: growing lists, fixed colour limits, and the code and link of the same settings."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from samples import LABELS, RUNNING, SETTINGS, SETTLED

from phantomgrad_demo.snippet import python_code
from phantomgrad_demo.trajectory import Trajectory
from phantomgrad_demo.view import message, view


def test_a_row_for_every_step() -> None:
    shown = view(SETTLED, LABELS)
    assert [row["step"] for row in shown["rows"]] == [1, 2, 3, 4]
    assert shown["rows"][1]["sentence"].startswith("Step 2: ")
    assert shown["rows"][-1]["sentence"].startswith("Settled after 4 steps")
    assert shown["rows"][0]["classes"][0] == ["Bits & <b>pieces</b>", "30 %", 30.0]
    assert len(shown["rows"][0]["classes"]) == 5
    assert not shown["running"]
    json.dumps(shown, allow_nan=False)


def test_while_it_runs_rows_are_only_appended() -> None:
    shorter = view(replace(RUNNING, steps=RUNNING.steps[:2]), LABELS)
    longer = view(RUNNING, LABELS)
    assert shorter["running"]
    assert longer["rows"][:2] == shorter["rows"]


def test_maps_are_floats_with_the_same_limits_at_every_step() -> None:
    shown = view(SETTLED, LABELS)
    assert shown["grids"] == [[4, 4], [2, 2]]
    assert shown["limits"]["maps"] == [[2.0, 5.0], [2.0, 2.0]]
    low, high = shown["limits"]["changes"][0]
    assert (low, high) == pytest.approx((1e-4, 1.0))
    decoded = torch.frombuffer(bytearray(base64.b64decode(shown["rows"][2]["maps"][0])), dtype=torch.float32)
    torch.testing.assert_close(decoded.view(4, 4), SETTLED.steps[2].maps[0])


def test_a_link_needs_an_example() -> None:
    assert view(SETTLED, LABELS)["link"] == {}
    assert view(SETTLED, LABELS, example="coffee")["link"] == {
        "example": "coffee",
        "solver": "Anderson",
        "steps": "12",
        "tolerance": "0.01",
        "damping": "1",
    }


def test_without_a_step_there_is_a_message() -> None:
    nothing = view(Trajectory(settings=SETTINGS, steps=(), reason="diverged"), LABELS)
    assert nothing == message("The network gave no finite state for this photo.")


@pytest.mark.parametrize("solver", ["fixed point", "Anderson", "Broyden"])
def test_the_python_does_the_same(
    solver: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SETTINGS, solver=solver, max_steps=40, damping=0.7)  # pyright: ignore
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").save("photo.jpg")
    exec(compile(python_code(settings, str(checkpoint)), "snippet", "exec"), {})
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("[('")
    assert told[1].startswith("Solution(1 of 1 samples converged")
