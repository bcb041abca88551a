"""Curves as linear pieces: the one place that knows what a curve is between and beyond its knots."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from lutest.reader.figures import KeyFigures

__all__ = ["KeyPieces", "Pieces", "key_pieces", "sum_to", "value_at"]


class Pieces(NamedTuple):
    """A piecewise-linear curve from 0 on; beyond the knots it follows the rules of the file.

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
    starts = (0, *at)
    all_slopes = []
    for curve in values:
        inner = [(curve[j + 1] - curve[j]) / (at[j + 1] - at[j]) for j in range(len(at) - 1)]
        last = max(0.0, inner[-1]) if carries_on and inner else 0.0
        all_slopes.append((0.0, *inner, last))
    return Pieces(starts, tuple((curve[0], *curve) for curve in values), tuple(all_slopes), ())


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
    return _sum_in_piece(pieces, median, bisect_right(pieces.starts, x) - 1, x)


def value_at(pieces: Pieces, i: int, x: int) -> float:
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
