"""Plain-text tables for people: aligned columns, numbers with sensible digits."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal

__all__ = ["format_table", "one_line", "to_json", "unique_names"]

_NONE = "–"
_SIGNIFICANT_DIGITS = 4
_MOST_DECIMALS = 6


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out a table with aligned columns.

    Parameters
    ----------
    headers : sequence of str
        Column titles.
    rows : sequence of sequence
        Cells, as long as `headers`: None is shown as a dash; floats get as many decimals as their column needs;
        columns of numbers are aligned to the right.

    Returns
    -------
    str
        Lines without a newline at the end.
    """
    columns = [_column(header, [row[index] for row in rows]) for index, header in enumerate(headers)]
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(lines)


def one_line(text: object) -> str:
    """Text with line breaks and other control characters replaced, so that it stays on its line."""
    return "".join(
        " " if character in "\r\n\t" else "�" if unicodedata.category(character) in ("Cc", "Cs") else character
        for character in str(text)
    )


def to_json(value: object) -> str:
    """Indented JSON; NaN and infinities are null, values of types that JSON has not are text."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str)


def unique_names(names: Sequence[str]) -> list[str]:
    """Column names with a number added where a name occurs again."""
    unique: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in unique:
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return unique


def _finite(value: object) -> object:
    """The value in numbers that JSON has, null for those that it has not."""
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _column(header: str, values: Sequence[object]) -> list[str]:
    present = [value for value in values if value is not None]
    numeric = bool(present) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present)
    if numeric and any(isinstance(value, float) for value in present):
        cells = _decimals([float(value) if isinstance(value, int | float) else None for value in values])
    else:
        cells = [_NONE if value is None else one_line(value) for value in values]
    cells = [one_line(header), *cells]
    width = max(map(_width, cells))
    return [_pad(cell, width, right=numeric) for cell in cells]


def _decimals(values: Sequence[float | None]) -> list[str]:
    """Write numbers of one column with the same number of decimals, four digits for the middle one."""
    sizes = sorted(abs(value) for value in values if value is not None and math.isfinite(value) and value != 0)
    decimals = 0
    if sizes:
        magnitude = math.floor(math.log10(sizes[len(sizes) // 2]))
        decimals = min(max(_SIGNIFICANT_DIGITS - 1 - magnitude, 0), _MOST_DECIMALS)
    return [_NONE if value is None else f"{value:.{decimals}f}" for value in values]


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _pad(text: str, width: int, *, right: bool) -> str:
    gap = " " * (width - _width(text))
    return gap + text if right else text + gap
