"""Which configuration of a table is asked for, and what to say where the table holds none such."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lutest.reader.errors import UnknownKeyError
from lutest.reader.figures import Figures, Key, KeyColumn, described_key

__all__ = ["named_key", "not_measured", "number_axis"]


def named_key(figures: Figures, values: Sequence[Any]) -> Key:
    """The key that is asked for, measured or not: categories by their names, numbers as numbers.

    Parameters
    ----------
    figures : Figures
        The table.
    values : sequence
        One for each key column, as a caller gave them.

    Raises
    ------
    UnknownKeyError
        A category that the table does not hold, or something else than a finite number.
    """
    return tuple(_value(figures, place, column, values[place]) for place, column in enumerate(figures.key_columns))


def _value(figures: Figures, place: int, column: KeyColumn, value: Any) -> str | int | float:
    if column.kind == "category":
        levels = dict.fromkeys(held.key[place] for held in figures.keys)
        if isinstance(value, str) and value in levels:
            return str(value)
        raise UnknownKeyError(
            f"{column.name} {value!r} is not in the table, which holds {', '.join(map(repr, levels))}"
        )
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UnknownKeyError(f"{column.name} is {value!r}; allowed: a number")
    return int(number) if number.is_integer() else number


def not_measured(figures: Figures, key: Key) -> UnknownKeyError:
    """Error for a key of which a table has no runs; it names the nearest ones that have."""
    columns = figures.key_columns
    near = "; ".join(", ".join(map(repr, held)) for held in _nearest(figures, key))
    return UnknownKeyError(
        f"{described_key(columns, key)} was not measured; nearest measured "
        f"({', '.join(column.name for column in columns)}): {near}; load(path, missing='interpolate') fills it in"
    )


def _nearest(figures: Figures, key: Key) -> list[Key]:
    """The three keys of the fewest other categories, and of these the nearest in numbers, each over its range."""
    keys = [held.key for held in figures.keys]
    categories = [place for place, column in enumerate(figures.key_columns) if column.kind == "category"]
    numbers = [place for place in range(len(key)) if place not in categories]
    axes = {place: number_axis([held[place] for held in keys], key[place]) for place in numbers}

    def distance(number: int) -> tuple[int, float]:
        held, apart = keys[number], 0.0
        for at in axes.values():
            span = (max(at[:-1]) - min(at[:-1])) or 1.0
            apart += ((at[number] - at[-1]) / span) ** 2
        return sum(held[place] != key[place] for place in categories), apart

    return [keys[number] for number in sorted(range(len(keys)), key=distance)[:3]]


def number_axis(held: Sequence[Any], wanted: Any) -> list[float]:
    """Places of measured numbers and of one more on their axis: logarithmic where all of them are positive."""
    values = [*map(float, held), float(wanted)]
    if min(values[:-1]) <= 0.0:
        return values
    return [math.log(value) if value > 0.0 else -math.inf for value in values]
