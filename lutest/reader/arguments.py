"""Checks of the arguments that estimates take, each error naming the argument, its value and what is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import SupportsFloat, SupportsIndex, TypeVar, cast

from lutest.reader.errors import ArgumentError
from lutest.reader.figures import KeyColumn

__all__ = ["MAX_TOKENS", "key_values", "positive_ms", "quantile_index", "whole_number"]

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


def whole_number(name: str, value: object, least: int) -> int:
    """The argument as an int; ArgumentError unless it is a whole number from `least` to MAX_TOKENS."""
    number: int | None = None
    try:
        number = operator.index(cast(SupportsIndex, value))
    except TypeError:
        if not isinstance(value, (str, bytes)):
            try:
                real = float(cast(SupportsFloat, value))
            except (TypeError, ValueError, OverflowError):
                real = math.nan
            number = int(real) if real.is_integer() else None
    if number is None or not least <= number <= MAX_TOKENS:
        raise ArgumentError(f"{name} is {value!r}; allowed: a whole number from {least} to {MAX_TOKENS}")
    return number


def positive_ms(name: str, value: object) -> float:
    """The argument as a float; ArgumentError unless it is finite and above 0."""
    number = math.nan
    if not isinstance(value, (str, bytes)):
        try:
            number = float(cast(SupportsFloat, value))
        except (TypeError, ValueError, OverflowError):
            number = math.nan
    if not (0.0 < number < math.inf):
        raise ArgumentError(f"{name} is {value!r}; allowed: a finite number of milliseconds above 0")
    return number


def quantile_index(quantiles: Sequence[float], q: object) -> int:
    """Place of `q` among the quantiles of the table; ArgumentError where it is not one of them."""
    for i, held in enumerate(quantiles):
        if held == q:
            return i
    raise ArgumentError(f"q is {q!r}; allowed: the quantiles that the table holds, {', '.join(map(str, quantiles))}")
