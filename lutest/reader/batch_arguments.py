"""Arguments of the batch verbs: checked, broadcast against each other and laid out flat."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lutest.reader.arguments import MAX_TOKENS
from lutest.reader.errors import ArgumentError
from lutest.reader.grid import Floats, Ints

__all__ = ["broadcast_arguments", "checked_extent", "flat_in_shape", "positive_budgets"]

_Number = TypeVar("_Number", np.float64, np.int64)


def broadcast_arguments(
    ids: ArrayLike, tokens: dict[str, ArrayLike | None], like: tuple[int, ...] = ()
) -> tuple[tuple[int, ...], Ints, list[Ints | None]]:
    """The broadcast shape, and ids and tokens in it: flat, contiguous, int64; None stays None."""
    keys = np.asarray(ids)
    if keys.dtype.kind not in "iu":
        raise ArgumentError(f"ids has dtype {keys.dtype}; allowed: the integers that key_ids gives")
    given = [None if value is None else _whole_numbers(name, value) for name, value in tokens.items()]
    shapes = [keys.shape, *(array.shape for array in given if array is not None), like]
    try:
        shape = np.broadcast_shapes(*shapes)
    except ValueError as error:
        listed = ", ".join(map(str, shapes))
        raise ArgumentError(f"the arguments have shapes that do not broadcast: {listed}") from error
    flat = [array if array is None else flat_in_shape(array, shape) for array in given]
    return shape, flat_in_shape(keys.astype(np.int64, copy=False), shape), flat


def flat_in_shape(array: NDArray[_Number], shape: tuple[int, ...]) -> NDArray[_Number]:
    """An array broadcast to a shape: flat and contiguous."""
    return np.ascontiguousarray(np.broadcast_to(array, shape)).reshape(-1)


def _whole_numbers(name: str, value: ArrayLike) -> Ints:
    array = np.asarray(value)
    if array.dtype.kind in "iub" or array.size == 0:
        return array.astype(np.int64, copy=False)
    if array.dtype.kind != "f":
        raise ArgumentError(f"{name} has dtype {array.dtype}; allowed: whole numbers")
    wrong = ~((np.abs(array) <= MAX_TOKENS) & (array == np.floor(array)))
    if wrong.any():
        raise ArgumentError(f"{name} holds {array[wrong].flat[0]}; allowed: whole numbers up to {MAX_TOKENS}")
    return array.astype(np.int64)


def positive_budgets(budget_ms: ArrayLike) -> Floats:
    """Budgets as floats; ArgumentError unless all are finite milliseconds above 0."""
    budgets = np.asarray(budget_ms)
    if budgets.dtype.kind not in "iuf":
        raise ArgumentError(f"budget_ms has dtype {budgets.dtype}; allowed: numbers")
    budgets = budgets.astype(np.float64)
    wrong = ~((budgets > 0.0) & (budgets < np.inf))
    if wrong.any():
        raise ArgumentError(f"budget_ms holds {budgets[wrong].flat[0]}; allowed: finite milliseconds above 0")
    return budgets


def checked_extent(name: str, x: Ints, least: int) -> tuple[int, int]:
    """Least and largest element of tokens, checked."""
    # as unsigned, negative numbers are large: where 0 is allowed, one pass finds both ends
    low, high = int(np.minimum.reduce(x)) if least else 0, int(np.maximum.reduce(x.view(np.uint64)))
    if low < least or high > MAX_TOKENS:
        wrong = x[(x < least) | (x > MAX_TOKENS)]
        raise ArgumentError(f"{name} holds {wrong[0]}; allowed: whole numbers from {least} to {MAX_TOKENS}")
    return low, high
