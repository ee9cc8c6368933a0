"""The page that check prints, and the documentation that shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from checked_cells import diagonal
from problems import DTYPE
from torch import Tensor, nn

from phantomgrad import attach
from phantomgrad.diagnostics import check


def test_the_page_is_printed_once_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    cell = diagonal(-1.3, 0.2, 0.1)
    x = torch.ones(2, 3, dtype=DTYPE)
    report = check(cell, torch.zeros_like(x), x)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    lines = printed.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 125
    assert lines[0] == "phantomgrad check of Linear, not attached"
    assert lines[1] == "state (2, 3) float64 on cpu: 2 samples of 3 entries; gradients for 9 numbers in 1 tensor"
    for heading in ("DOES IT SETTLE?", "THE JACOBIAN at the solution", "GRADIENTS of a random cotangent", "ADVICE"):
        assert sum(line.startswith(heading) for line in lines) == 1
    row = next(line for line in lines if line.startswith("  FixedPointIteration(damping=1.0)"))
    assert ">50" in row
    assert "0/2" in row
    check(cell, torch.zeros_like(x), x, show=False)
    assert capsys.readouterr().out == ""


def test_the_whole_path_of_the_module_is_shown() -> None:
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"cell": diagonal(0.5, 0.1)})})
    report = check(model["backbone"]["cell"], torch.zeros(1, 2, dtype=DTYPE), torch.ones(1, 2, dtype=DTYPE), show=False)
    assert report.where == "ModuleDict.backbone.cell (Linear)"


def test_states_outputs_and_keywords() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor, h: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
            a, b = h[0], h[1]["b"]
            return {"aux": 1, "state": (self.w * b + x, {"b": 0.5 * a})}

    cell, x = Cell(), torch.ones(2, 3)
    start = (torch.zeros(2, 3), {"b": torch.zeros(2, 3)})
    reports = [
        check(cell, x, start, state="h", output="state", show=False),
        check(cell, x, state="h", output="state", kwargs={"h": start}, show=False),
    ]
    with attach(cell, state=1, output="state"):
        reports.append(check(cell, x, start, show=False))
    for report in reports:
        assert report.settles
        assert float(report.radius) == pytest.approx(0.5, rel=1e-3)  # the square root of 0.5 * 0.5
        assert report.entries == 6
    assert not reports[0].gradient


def test_the_documentation_runs_as_printed_and_shows_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "diagnostics.md", "exec"), namespace)
    printed = capsys.readouterr().out
    [shown] = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)

    def rows(page: str) -> list[str]:  # headings and the first column: numbers depend on the machine
        return [re.split(r"\s{2,}", line.strip())[0] for line in page.split("ADVICE")[0].splitlines()]

    assert rows(str(namespace["report"])) == rows(shown)
    assert printed.startswith(str(namespace["report"]))
    assert [step for step, _ in namespace["history"]] == [10, 20]
    for key in re.findall(
        r"`(\w+)`", "".join(re.findall(r"^\| (`.*?`.*?) \|", text.split("when to act")[1], re.MULTILINE))
    ):
        logged = f"cell/{key}" in namespace["history"][1][1]
        assert logged or key == "adjoint_steps", key
