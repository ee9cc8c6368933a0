"""How results are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

_ALWAYS = ("steps", "damping", "memory")


def short(option: Any) -> str:
    """A solver or gradient as one would write it: what matters and what differs from the default."""
    parts = [
        f"{each.name}={_value(getattr(option, each.name))}"
        for each in fields(option)
        if each.name in _ALWAYS or getattr(option, each.name) != _default(each)
    ]
    return f"{type(option).__name__}({', '.join(parts)})"


def _value(value: Any) -> str:
    return short(value) if is_dataclass(value) else repr(value)


def _default(each: Field[Any]) -> Any:
    return each.default_factory() if each.default_factory is not MISSING else each.default


def milliseconds(seconds: float | None) -> str:
    """A duration with three figures."""
    if seconds is None:
        return "-"
    value = 1000 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column flush left, the others flush right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  "
        + "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]


def eigenvalue(value: complex) -> str:
    """A real eigenvalue, or a pair of conjugate ones."""
    if abs(value.imag) <= 1e-6 * abs(value):
        return f"{value.real:.3g}"
    return f"{value.real:.3g} +- {abs(value.imag):.3g}i"
