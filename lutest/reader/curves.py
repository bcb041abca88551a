"""Curves as linear pieces: the one place that knows what a curve is at, between and beyond its knots.

A curve holds the value of its first knot before it, is linear between knots and exact at them. Beyond the last knot a
latency carries on the last slope, never falling and never crossing a lower quantile; a ratio holds its last value.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from lutest.reader.figures import KeyFigures


class Pieces(NamedTuple):
    """A piecewise-linear curve from 0 on.

    Attributes
    ----------
    starts : tuple of int
        Where each piece starts; the first one at 0.
    values, slopes : tuple of tuple of float
        ``values[i][j]``, ``slopes[i][j]``: those of the i-th quantile at the start of the j-th piece.
    sums : tuple of float
        Sum of the median curve over 1 … start of each piece; empty where nobody asks for sums.
    """

    starts: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    slopes: tuple[tuple[float, ...], ...]
    sums: tuple[float, ...]


class KeyPieces(NamedTuple):
    """The curves of one configuration as pieces; no decode, no `step` and `ratio`."""

    prefill: Pieces
    step: Pieces | None
    ratio: Pieces | None


def _pieces(at: tuple[int, ...], values: tuple[tuple[float, ...], ...], carries_on: bool) -> Pieces:
    slopes, last = [], 0.0
    for curve in values:
        inner = [(curve[j + 1] - curve[j]) / (at[j + 1] - at[j]) for j in range(len(at) - 1)]
        if carries_on and inner:
            last = max(last, inner[-1])  # of the quantiles below it at least, so that they never cross
        slopes.append((0.0, *inner, last))
    return Pieces((0, *at), tuple((curve[0], *curve) for curve in values), tuple(slopes), ())


def _with_sums(pieces: Pieces, median: int) -> Pieces:
    sums = [0.0]
    for j, start in enumerate(pieces.starts[1:]):
        sums.append(_sum_in_piece(pieces._replace(sums=tuple(sums)), median, j, start))
    return pieces._replace(sums=tuple(sums))


def _sum_in_piece(pieces: Pieces, median: int, j: int, x: int) -> float:
    distance = float(x - pieces.starts[j])
    rise = pieces.slopes[median][j] * (distance * (distance + 1.0) * 0.5)
    return pieces.sums[j] + distance * pieces.values[median][j] + rise


def sum_to(pieces: Pieces, median: int, x: int) -> float:
    """Sum of the median curve over 1 … x."""
    return _sum_in_piece(pieces, median, bisect_right(pieces.starts, x) - 1, x)


def value_at(pieces: Pieces, i: int, x: int) -> float:
    """The i-th quantile at x."""
    j = bisect_right(pieces.starts, x) - 1
    return pieces.values[i][j] + pieces.slopes[i][j] * float(x - pieces.starts[j])


def key_pieces(figures: KeyFigures, median: int) -> KeyPieces:
    """Pieces of the curves of one configuration; `median` is the place of 0.5 among the quantiles."""
    prefill = _pieces(figures.prefill_curve.at, figures.prefill_curve.values_ms, carries_on=True)
    if figures.decode_curve is None or figures.decode_total is None:
        return KeyPieces(prefill, None, None)
    step = _pieces(figures.decode_curve.at, figures.decode_curve.values_ms, carries_on=True)
    ratio = _pieces(figures.decode_total.decode_steps, figures.decode_total.ratios, carries_on=False)
    return KeyPieces(prefill, _with_sums(step, median), ratio)


class ByLength(NamedTuple):
    """What totals at one quantile are made of, piece by piece over the tokens that are held and those that come out.

    A row has the start of its piece, and then the coefficients over the length, from the constant one on. Of `held`: of
    the P50 of prefill, of how far its quantile is from that, of the sum of the P50 steps up to there. Of `out`: of the
    median ratio of decode to the sum of its steps, and of how far its quantile is from that; it counts tokens, one more
    than steps, and is empty where nothing is known of decode.
    """

    held: tuple[tuple[int, float, float, float, float, float, float, float], ...]
    out: tuple[tuple[int, float, float, float, float], ...]


def by_length(pieces: KeyPieces, median: int, i: int) -> ByLength:
    """The pieces of a configuration side by side, for the i-th quantile."""
    (prefill, step, ratio), side = pieces, float((i > median) - (i < median))
    held, out = [], []
    for start in sorted({*prefill.starts, *(step.starts if step else ())}):
        j = bisect_right(prefill.starts, start) - 1
        p50, at_q = (_line(prefill, level, j) for level in (median, i))
        sums = (0.0, 0.0, 0.0)
        if step is not None:
            j = bisect_right(step.starts, start) - 1
            at, value, half = step.starts[j], step.values[median][j], 0.5 * step.slopes[median][j]
            # sum + d · value + half · d · (d + 1), d being the distance from the start of the piece
            sums = (step.sums[j] - at * (value + half - half * at), value + half - 2.0 * half * at, half)
        held.append((start, *p50, side * (at_q[0] - p50[0]), side * (at_q[1] - p50[1]), *sums))
    for j, start in enumerate(ratio.starts if ratio else ()):
        assert ratio is not None
        middle, at_q = (_line(ratio, level, j, start + 1) for level in (median, i))
        out.append((start + 1, *middle, side * (at_q[0] - middle[0]), side * (at_q[1] - middle[1])))
    return ByLength(tuple(held), tuple(out))


def _line(pieces: Pieces, i: int, j: int, start: int | None = None) -> tuple[float, float]:
    """Constant and slope of the j-th piece, which starts where it does or at `start`."""
    slope = pieces.slopes[i][j]
    return pieces.values[i][j] - slope * (pieces.starts[j] if start is None else start), slope
