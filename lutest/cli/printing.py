"""What goes to the terminal: text tables with aligned columns, JSON, and progress bars."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from lutest.judging.finding import plain

_NONE = "–"
_SIGNIFICANT_DIGITS = 4
_MOST_DECIMALS = 6
_GAP = "  "
_LEAST_WIDTH = 8  # of a column that is cut


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, figures: bool = False) -> str:
    """Lay out a table with aligned columns.

    Parameters
    ----------
    headers : sequence of str
        Column titles.
    rows : sequence of sequence
        Cells, as long as `headers`: None is shown as a dash; floats get as many decimals as their column needs;
        columns of numbers are aligned to the right.
    figures : bool
        Align texts to the right too, but for the first column.

    Returns
    -------
    str
        Lines without a newline at the end.
    """
    return fitted_table(headers, rows, None, figures=figures)[0]


def fitted_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], width: int | None, *, figures: bool = False
) -> tuple[str, bool]:
    """The table with columns of text cut so that its lines are at most as wide, if they can be; whether any was cut."""
    columns, whole, right = [], [], []
    for place, header in enumerate(headers):
        cells, is_numeric = _column([row[place] for row in rows])
        columns.append([one_line(header), *cells])
        whole.append(max(map(_width, columns[-1])))
        right.append(is_numeric or (figures and place > 0))
    most = max(whole) if width is None else _most_width(whole, right, width)
    widths = [held if is_right else min(held, most) for held, is_right in zip(whole, right, strict=True)]
    padded = [
        [_padded(cell, held, right=is_right) for cell in cells]
        for cells, held, is_right in zip(columns, widths, right, strict=True)
    ]
    return "\n".join(_GAP.join(cells).rstrip() for cells in zip(*padded, strict=True)), widths != whole


def one_line(text: object) -> str:
    """Text with line breaks and other control characters replaced, so that it stays on its line."""
    return "".join(
        " " if character in "\r\n\t" else "�" if unicodedata.category(character) in ("Cc", "Cs") else character
        for character in str(text)
    )


def print_json(value: object) -> None:
    """Print a value as JSON; NaN and infinities are null, values of types that JSON has not are text."""
    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False, default=str))


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
def working() -> Iterator[Callable[[str, int, int], None]]:
    """Around work in a database: what DuckDB raises is one line; on a terminal, a bar of bytes."""
    from tqdm import tqdm

    from lutest.tablefile.sql import database_errors

    # `disable=None`: a bar on a terminal alone
    with database_errors(), tqdm(unit="B", unit_scale=True, leave=False, disable=None, file=sys.stderr) as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            name = one_line(what)[-40:]
            bar.set_description(name, refresh=getattr(bar, "desc", None) != f"{name}: ")

        yield show


@contextlib.contextmanager
def run_bar(minutes: float | None) -> Iterator[Callable[[int, int], None]]:
    """A bar of runs with the time left on a terminal; in a pipe, nothing."""
    from tqdm import tqdm

    limit = "" if minutes is None else f"at most {minutes:g} min"
    with tqdm(unit="run", desc=limit, leave=False, dynamic_ncols=True, disable=None, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:  # what earlier sessions did says nothing of the time left
                bar.total = total
                bar.initial = bar.n = done - 1
            bar.update(done - bar.n)

        yield show


def _column(values: Sequence[object]) -> tuple[list[str], bool]:
    """The cells of a column, floats with the same number of decimals, and whether they are numbers."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if not numbers or len(numbers) < sum(value is not None for value in values):
        return [_NONE if value is None else one_line(value) for value in values], False
    if all(isinstance(number, int) for number in numbers):
        return [_NONE if value is None else str(value) for value in values], True
    sizes = sorted(abs(number) for number in numbers if math.isfinite(number) and number != 0)
    decimals = 0
    if sizes:  # four digits for the middle one
        magnitude = math.floor(math.log10(sizes[len(sizes) // 2]))
        decimals = min(max(_SIGNIFICANT_DIGITS - 1 - magnitude, 0), _MOST_DECIMALS)
    return [_NONE if value is None else f"{value:.{decimals}f}" for value in values], True


def _most_width(widths: Sequence[int], numeric: Sequence[bool], width: int) -> int:
    """The most that a column of text may take for a line to fit."""
    texts = [held for held, is_numeric in zip(widths, numeric, strict=True) if not is_numeric]
    left = width - len(_GAP) * (len(widths) - 1) - sum(widths) + sum(texts)
    widest = range(min(max(texts, default=0), left), _LEAST_WIDTH, -1)
    return next((most for most in widest if sum(min(held, most) for held in texts) <= left), _LEAST_WIDTH)


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _padded(text: str, width: int, *, right: bool) -> str:
    """The text in as many columns, cut where it takes more."""
    if _width(text) > width:
        text = text[: width - 1]
        while _width(text) > width - 1:
            text = text[:-1]
        text = f"{text}…"
    gap = " " * (width - _width(text))
    return gap + text if right else text + gap
