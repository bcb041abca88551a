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
    """What totals at one quantile are made of, by the tokens that are held and by the tokens that come out.

    Columns, each a value at the start of a piece, and its slope: of `held` start, P50 of prefill, its quantile, the sum
    of the P50 steps up to there, and the P50 step with half its slope; of `out` start, the median ratio of decode to
    the sum of its steps, and the distance of its quantile. `out` counts tokens, one more than steps, and is empty
    where nothing is known of decode.
    """

    held: tuple[tuple[int, float, float, float, float, float, float, float], ...]
    out: tuple[tuple[int, float, float, float, float], ...]


def by_length(pieces: KeyPieces, median: int, i: int) -> ByLength:
    """The pieces of a configuration side by side, for the i-th quantile."""
    prefill, step, ratio = pieces
    held = []
    for x in sorted({*prefill.starts, *(step.starts if step else ())}):
        j = bisect_right(prefill.starts, x) - 1
        p50, at_q = (value_at(prefill, level, x) for level in (median, i))
        before = after = half_slope = 0.0
        if step is not None:
            before, after = sum_to(step, median, x), value_at(step, median, x)
            half_slope = 0.5 * step.slopes[median][bisect_right(step.starts, x) - 1]
        slopes = prefill.slopes[median][j], prefill.slopes[i][j]
        held.append((x, p50, slopes[0], at_q, slopes[1], before, after, half_slope))
    if ratio is None:
        return ByLength(tuple(held), ())
    out, side = [], 1.0 if i > median else -1.0
    for start, middle, slope, value, value_slope in zip(
        ratio.starts, ratio.values[median], ratio.slopes[median], ratio.values[i], ratio.slopes[i], strict=True
    ):
        out.append((start + 1, middle, slope, side * (value - middle), side * (value_slope - slope)))
    return ByLength(tuple(held), tuple(out))
