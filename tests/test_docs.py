"""The code of the learning pages runs as printed, in order, one namespace a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("tutorial.md", "not-converging.md")


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_as_printed(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": page}
    blocks = 0
    for found in re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        before = text.count("\n", 0, found.start(1))
        # Empty lines in front, so that a traceback shows the line of the page.
        exec(compile("\n" * before + found[1], str(DOCS / page), "exec"), namespace)
        blocks += 1
    assert blocks > 5
    assert text.count("```python") == blocks
