"""Checks of the arguments that tables take, each error naming the argument, its value and what is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex, TypeVar, cast

from lutest.reader.errors import ArgumentError, UnknownKeyError
from lutest.reader.figures import Figures, Key, KeyColumn, described_key

MAX_TOKENS = 10**12

_Value = TypeVar("_Value")


def key_values(columns: Sequence[KeyColumn], values: Sequence[_Value], named: Mapping[str, _Value]) -> list[_Value]:
    """Values of all key columns, in their order, from those given by place and by name.

    Raises
    ------
    ArgumentError
        Too few, too many, or of other columns: naming those of the table.
    """
    names = [column.name for column in columns]
    held = dict(zip(names, values, strict=False))
    if len(values) > len(names) or held.keys() & named.keys() or {*held, *named} != set(names):
        given = ", ".join([*map(repr, values), *(f"{name}={value!r}" for name, value in named.items())])
        raise ArgumentError(f"the key is ({given}); allowed: a value for each of {', '.join(names)}")
    held.update(named)
    return [held[name] for name in names]


def real_number(value: object) -> float:
    """The value as a float, NaN where it is no number."""
    try:
        return math.nan if isinstance(value, (str, bytes)) else float(cast(SupportsFloat, value))
    except (TypeError, ValueError, OverflowError):
        return math.nan


def whole_number(name: str, value: object, least: int, most: int = MAX_TOKENS) -> int:
    """The argument as an int; ArgumentError unless it is a whole number from `least` to `most`."""
    try:
        number = operator.index(cast(SupportsIndex, value))
    except TypeError:
        real = real_number(value)
        number = int(real) if real.is_integer() else -1
    if not least <= number <= most:
        raise ArgumentError(f"{name} is {value!r}; allowed: a whole number from {least} to {most}")
    return number


def positive_ms(name: str, value: object) -> float:
    """The argument as a float; ArgumentError unless it is finite and above 0."""
    number = real_number(value)
    if not 0.0 < number < math.inf:
        raise ArgumentError(f"{name} is {value!r}; allowed: a finite number of milliseconds above 0")
    return number


def quantile_index(quantiles: Sequence[float], q: object) -> int:
    """Place of `q` among the quantiles of the table; ArgumentError where it is not one of them."""
    for i, held in enumerate(quantiles):
        if held == q:
            return i
    raise ArgumentError(f"q is {q!r}; allowed: the quantiles that the table holds, {', '.join(map(str, quantiles))}")


def named_key(figures: Figures, values: Sequence[Any], named: Mapping[str, Any]) -> Key:
    """The key that is asked for, measured or not: categories by their names, numbers as numbers.

    Parameters
    ----------
    figures : Figures
        The table.
    values, named : sequence and mapping
        One for each key column, in their order or by their names, as a caller gave them.

    Raises
    ------
    ArgumentError
        Too few or too many values.
    UnknownKeyError
        A category that the table does not hold, or something else than a finite number.
    """
    columns = figures.key_columns
    try:
        given = key_values(columns, values, named)
    except ArgumentError as error:
        raise ArgumentError(f"{error}, such as {', '.join(map(repr, figures.keys[0].key))}") from None
    return tuple(_key_value(figures, place, column, given[place]) for place, column in enumerate(columns))


def _key_value(figures: Figures, place: int, column: KeyColumn, value: Any) -> str | int | float:
    if column.kind == "category":
        levels = dict.fromkeys(held.key[place] for held in figures.keys)
        if isinstance(value, str) and value in levels:
            return str(value)
        raise UnknownKeyError(
            f"{column.name} {value!r} is not in the table, which holds {', '.join(map(repr, levels))}"
        )
    number = real_number(value)
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
