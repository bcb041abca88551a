"""What goes to the terminal: text tables with aligned columns, JSON, and progress bars."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal

__all__ = ["fitted_table", "format_table", "one_line", "print_json", "run_bar", "unique_names", "working"]

_NONE = "–"
_SIGNIFICANT_DIGITS = 4
_MOST_DECIMALS = 6
_GAP = "  "
_LEAST_WIDTH = 8  # of a column that is cut


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
    return fitted_table(headers, rows, None)[0]


def fitted_table(headers: Sequence[str], rows: Sequence[Sequence[object]], width: int | None) -> tuple[str, bool]:
    """The table with columns of text cut so that its lines are at most as wide, if they can be; whether any was cut."""
    columns, numeric = [], []
    for index, header in enumerate(headers):
        cells, is_numeric = _column(header, [row[index] for row in rows])
        columns.append(cells)
        numeric.append(is_numeric)
    widths = [max(map(_width, cells)) for cells in columns]
    most = _most_width(widths, numeric, width) if width is not None else max(widths)
    is_cut = [not is_numeric and held > most for held, is_numeric in zip(widths, numeric, strict=True)]
    columns = [
        [_padded(_cut(cell, most) if cut else cell, most if cut else held, right=is_numeric) for cell in cells]
        for cells, held, is_numeric, cut in zip(columns, widths, numeric, is_cut, strict=True)
    ]
    return "\n".join(_GAP.join(cells).rstrip() for cells in zip(*columns, strict=True)), any(is_cut)


def one_line(text: object) -> str:
    """Text with line breaks and other control characters replaced, so that it stays on its line."""
    return "".join(
        " " if character in "\r\n\t" else "�" if unicodedata.category(character) in ("Cc", "Cs") else character
        for character in str(text)
    )


def print_json(value: object) -> None:
    """Print a value as JSON; NaN and infinities are null, values of types that JSON has not are text."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=str))


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


@contextlib.contextmanager
def working() -> Iterator[Callable[[str, int, int], None] | None]:
    """Around work in a database: what DuckDB raises is one line; on a terminal, a bar of bytes."""
    from lutest.tablefile.sql import database_errors

    with database_errors():
        if not sys.stderr.isatty():
            yield None
            return
        from tqdm import tqdm

        with tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:

            def show(what: str, done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)
                name = one_line(what)[-40:]
                if bar.desc != f"{name}: ":
                    bar.set_description(name)

            yield show


@contextlib.contextmanager
def run_bar(minutes: float | None) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of runs with the time left on a terminal; in a pipe, nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    limit = "" if minutes is None else f"at most {minutes:g} min"
    with tqdm(unit="run", desc=limit, leave=False, dynamic_ncols=True, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:  # what earlier sessions did says nothing of the time left
                bar.total = total
                bar.initial = bar.n = done - 1
            bar.update(done - bar.n)

        yield show


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


def _column(header: str, values: Sequence[object]) -> tuple[list[str], bool]:
    """The cells of a column, and whether they are numbers."""
    present = [value for value in values if value is not None]
    numeric = bool(present) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present)
    if numeric and any(isinstance(value, float) for value in present):
        cells = _decimals([float(value) if isinstance(value, int | float) else None for value in values])
    else:
        cells = [_NONE if value is None else one_line(value) for value in values]
    return [one_line(header), *cells], numeric


def _decimals(values: Sequence[float | None]) -> list[str]:
    """Write numbers of one column with the same number of decimals, four digits for the middle one."""
    sizes = sorted(abs(value) for value in values if value is not None and math.isfinite(value) and value != 0)
    decimals = 0
    if sizes:
        magnitude = math.floor(math.log10(sizes[len(sizes) // 2]))
        decimals = min(max(_SIGNIFICANT_DIGITS - 1 - magnitude, 0), _MOST_DECIMALS)
    return [_NONE if value is None else f"{value:.{decimals}f}" for value in values]


def _most_width(widths: Sequence[int], numeric: Sequence[bool], width: int) -> int:
    """The most that a column of text may take for a line to fit."""
    texts = [held for held, is_numeric in zip(widths, numeric, strict=True) if not is_numeric]
    left = width - len(_GAP) * (len(widths) - 1) - sum(widths) + sum(texts)
    widest = range(min(max(texts, default=0), left), _LEAST_WIDTH, -1)
    return next((most for most in widest if sum(min(held, most) for held in texts) <= left), _LEAST_WIDTH)


def _cut(text: str, most: int) -> str:
    if _width(text) <= most:
        return text
    kept = text[: most - 1]
    while _width(kept) > most - 1:
        kept = kept[:-1]
    return f"{kept}…"


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _padded(text: str, width: int, *, right: bool) -> str:
    gap = " " * (width - _width(text))
    return gap + text if right else text + gap
