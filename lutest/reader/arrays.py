"""All curves of a table in flat form, and the arithmetic on them that NumPy and torch share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lutest.reader.curves import KeyPieces, by_length
from lutest.reader.figures import Figures

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SPAN = 2**42  # above any two lengths together: keeps the keys apart in one sorted array of starts


class Places(NamedTuple):
    """Starts of the pieces of all keys, one key after the other, shifted by SPAN per key: arrays, or tensors.

    `held` are those of curves over the tokens that are held, `out` those over the tokens that come out.
    """

    held: Any
    out: Any


class Level(NamedTuple):
    """What totals at one quantile are made of: arrays of NumPy, or tensors, of rows of coefficients over the length.

    One row is taken at once, which costs no more than one number. Rows of pieces: `prefill` has constant and slope of
    the P50 of prefill, and of how far the quantile is from it; `steps` the three coefficients of the sum of the P50
    steps, and twice the correlation of prefill and decode; `ratio` constant and slope of the median ratio of decode to
    that sum, and of how far its quantile is from it. Rows of keys: `own` has the key's own P50 of prefill, and how far
    its own quantile is from it.
    """

    prefill: Any
    steps: Any
    ratio: Any
    own: Any


NOTHING = ((1, 0.0, 0.0, 0.0, 0.0),)  # stands for the ratio where nothing is known of decode


def flat_places(pieces: Sequence[KeyPieces], median: int) -> Places:
    """Where the pieces of all keys start."""
    curves = [by_length(held, median, median) for held in pieces]
    held = [SPAN * number + row[0] for number, curve in enumerate(curves) for row in curve.held]
    out = [SPAN * number + row[0] for number, curve in enumerate(curves) for row in curve.out or NOTHING]
    return Places(np.array(held, dtype=np.int64), np.array(out, dtype=np.int64))


def flat_level(figures: Figures, pieces: Sequence[KeyPieces], i: int) -> Level:
    """The pieces of a table at its i-th quantile, as NumPy arrays."""
    median = figures.quantiles.index(0.5)
    curves = [by_length(held, median, i) for held in pieces]
    held = np.array([row[1:] for curve in curves for row in curve.held])
    correlated = [
        2.0 * key.correlations[i] for key, curve in zip(figures.keys, curves, strict=True) for _ in curve.held
    ]
    ratio = np.array([row[1:] for curve in curves for row in curve.out or NOTHING])
    own = np.array([held.prefill.quantiles_ms for held in figures.keys])
    own_rows = np.stack([own[:, median], abs(own[:, i] - own[:, median])], axis=1)
    return Level(np.ascontiguousarray(held[:, :4]), np.column_stack([held[:, 4:], correlated]), ratio, own_rows)


def prefill_at(rows: Any, prompt: Any) -> tuple[Any, Any]:
    """P50 of prefill at prompt lengths, as floats, from their rows; and how far its quantile is from it."""
    return _line(rows, 0, prompt), _line(rows, 2, prompt)


def steps_at(at_prompt: Any, at_end: Any, prompt: Any, end: Any) -> Any:
    """Sum of the P50 steps from a prompt to where the output ends, both floats, from their rows."""
    steps_ms = _sum(at_end, end)
    steps_ms -= _sum(at_prompt, prompt)
    return steps_ms


def decode_at(at_out: Any, out: Any, steps_ms: Any) -> tuple[Any, Any]:
    """P50 of decode, and how far its quantile is from it, from the rows of output lengths, which are floats.

    An output that ends where its prompt does (one token) has no decode, exactly.
    """
    middle, spread = _line(at_out, 0, out), _line(at_out, 2, out)
    middle *= steps_ms
    spread *= steps_ms
    return middle, spread


def deviation(a: Any, d: Any, correlated: Any) -> Any:
    """√(a² + d² + 2cad): how far a quantile of a total is from the sum of the P50s; a of prefill, d of decode."""
    mixed = d + correlated * a
    mixed *= d
    mixed += a * a
    mixed **= 0.5
    return mixed


def total_at(prefill: tuple[Any, Any], decode: tuple[Any, Any], correlated: Any, side: float) -> Any:
    """Totals from P50 and distance of the quantile of prefill and decode.

    `side` is 1 for quantiles above the median, -1 for those below, and 0 for the median itself.
    """
    middle: Any = prefill[0] + decode[0]
    if side:
        apart = deviation(prefill[1], decode[1], correlated)
        apart *= side
        middle += apart
    return middle


def _line(rows: Any, first: int, x: Any) -> Any:
    value = rows[..., first + 1] * x
    value += rows[..., first]
    return value


def _sum(rows: Any, x: Any) -> Any:
    value = rows[..., 2] * x
    value += rows[..., 1]
    value *= x
    value += rows[..., 0]
    return value
