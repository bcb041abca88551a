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
    """What totals at one quantile are made of: arrays of NumPy, or tensors.

    Of every piece the coefficients over the length, from the constant one on: of the P50 of prefill, of how far the
    quantile is from it, of the sum of the P50 steps, of the median ratio of decode to that, and of how far its quantile
    is from it. Then for every key: its own P50 of prefill, how far its own quantile is from it, and twice the
    correlation of prefill and decode.
    """

    prefill_0: Any
    prefill_1: Any
    apart_0: Any
    apart_1: Any
    sum_0: Any
    sum_1: Any
    sum_2: Any
    ratio_0: Any
    ratio_1: Any
    spread_0: Any
    spread_1: Any
    own: Any
    own_apart: Any
    correlated: Any


_NOTHING = ((1, 0.0, 0.0, 0.0, 0.0),)  # stands for the ratio where nothing is known of decode


def flat_places(pieces: Sequence[KeyPieces], median: int) -> Places:
    """Where the pieces of all keys start."""
    curves = [by_length(held, median, median) for held in pieces]
    held = [SPAN * number + row[0] for number, curve in enumerate(curves) for row in curve.held]
    out = [SPAN * number + row[0] for number, curve in enumerate(curves) for row in curve.out or _NOTHING]
    return Places(np.array(held, dtype=np.int64), np.array(out, dtype=np.int64))


def flat_level(figures: Figures, pieces: Sequence[KeyPieces], i: int) -> Level:
    """The pieces of a table at its i-th quantile, as NumPy arrays."""
    median = figures.quantiles.index(0.5)
    curves = [by_length(held, median, i) for held in pieces]
    held = np.array([row[1:] for curve in curves for row in curve.held]).T
    out = np.array([row[1:] for curve in curves for row in curve.out or _NOTHING]).T
    own = np.array([held.prefill.quantiles_ms for held in figures.keys])
    correlated = np.array([2.0 * held.correlations[i] for held in figures.keys])
    columns = (*held, *out, own[:, median], abs(own[:, i] - own[:, median]), correlated)
    return Level(*map(np.ascontiguousarray, columns))


def prefill_at(level: Level, piece: Any, prompt: Any) -> tuple[Any, Any]:
    """P50 of prefill at prompt lengths, as floats, in their pieces; and how far its quantile is from it."""
    return _line(level.prefill_0, level.prefill_1, piece, prompt), _line(level.apart_0, level.apart_1, piece, prompt)


def decode_at(level: Level, pieces: tuple[Any, Any, Any], lengths: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """P50 of decode, and how far its quantile is from it; pieces and lengths of the prompt, of its end, of the output.

    Lengths are floats; an output that ends where its prompt does (one token) has no decode, exactly.
    """
    at_prompt, at_end, at_out = pieces
    prompt, end, out = lengths
    steps_ms = _sum(level, at_end, end)
    steps_ms -= _sum(level, at_prompt, prompt)
    middle, spread = (
        _line(level.ratio_0, level.ratio_1, at_out, out),
        _line(level.spread_0, level.spread_1, at_out, out),
    )
    middle *= steps_ms
    spread *= steps_ms
    return middle, spread


def total_at(prefill: tuple[Any, Any], decode: tuple[Any, Any], correlated: Any, side: float) -> Any:
    """Totals from P50 and distance of the quantile of prefill and decode, which are overwritten.

    `side` is 1 for quantiles above the median, -1 for those below, and 0 for the median itself.
    """
    middle, a = prefill
    decode_middle, d = decode
    middle += decode_middle
    if side:
        mixed = correlated * d
        mixed += a
        mixed *= a
        d *= d
        mixed += d  # a² + d² + 2cad
        mixed **= 0.5
        mixed *= side
        middle += mixed
    return middle


def _line(constant: Any, slope: Any, piece: Any, x: Any) -> Any:
    value = slope.take(piece)
    value *= x
    value += constant.take(piece)
    return value


def _sum(level: Level, piece: Any, x: Any) -> Any:
    value = level.sum_2.take(piece)
    value *= x
    value += level.sum_1.take(piece)
    value *= x
    value += level.sum_0.take(piece)
    return value
