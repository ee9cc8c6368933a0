"""The table of docs/compatibility.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parents[1] / "docs" / "compatibility.md"


def test_every_row_names_its_tests_and_they_exist() -> None:
    defined = {
        name for file in TESTS.glob("test_*.py") for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)
    }
    text = TABLE.read_text()
    rows = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| what |", "| --- |"))
    ]
    assert len(rows) > 40
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.rstrip(" |").rpartition(" | ")[2])
        assert names, row
        assert set(names) <= defined, row
    assert set(re.findall(r"`(test_\w+)`", text)) <= defined
