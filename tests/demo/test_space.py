"""The Space's files fit the distribution and the installed Gradio."""

from __future__ import annotations

import importlib.metadata
import runpy
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import phantomgrad_demo

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "demo/space"


def test_the_front_matter_pins_the_gradio_it_is_tested_with() -> None:
    _, front_matter, body = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(front_matter)
    assert settings["sdk"] == "gradio"
    assert settings["sdk_version"] == importlib.metadata.version("gradio")
    assert (SPACE / settings["app_file"]).is_file()
    assert body.strip()


def test_the_requirements_are_the_distributions_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {line for line in project["dependencies"] + extras["hub"] + extras["demo"] if "[" not in line}
    allowed = {Requirement(line).name: Requirement(line).specifier for line in wanted if not line.startswith("gradio")}
    listed = [Requirement(line) for line in (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    assert {each.name for each in listed} == set(allowed)
    for each in listed:
        [pin] = each.specifier
        assert pin.operator == "=="
        assert pin.version in allowed[each.name]


def test_the_app_builds_and_launches_the_embedded_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Built:
        def launch(self) -> None:
            calls.append("launch")

    def build_app(checkpoint: str) -> Built:
        calls.append(checkpoint)
        return Built()

    monkeypatch.setattr(phantomgrad_demo, "build_app", build_app, raising=False)
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert calls == ["embedded", "launch"]
