"""Arrays that the batch verbs and the views of entries rest on: all curves in flat form, and tabulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from lutest.reader.curves import KeyPieces, Pieces
from lutest.reader.figures import Figures

__all__ = [
    "SPAN",
    "Flat",
    "Flats",
    "Floats",
    "Ints",
    "build_grid",
    "deviation_rows",
    "deviation_terms",
    "entry_views",
    "flatten",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Places = NDArray[np.int64] | NDArray[np.int32]

GRID_BYTES = 5 * 2**20  # all views of a table together; lengths beyond them are computed instead of looked up
_KEYS_AT_ONCE = 8  # what is built at a time: its scratch arrays stay small
SPAN = 2**42  # above any two lengths together: keeps the keys apart in one sorted array of starts
_NO_DECODE = Pieces((0,), ((0.0,),), ((0.0,),), (0.0,))


class Flat(NamedTuple):
    """The pieces of all keys one after the other; `places` are their starts, shifted by SPAN per key."""

    places: Ints
    starts: Ints
    values: Floats
    slopes: Floats
    sums: Floats

    def pieces_at(self, ids: Ints, x: Ints) -> Ints:
        return np.searchsorted(self.places, ids * SPAN + x, side="right") - 1

    def value(self, i: int, j: Places, x: Ints) -> Floats:
        distance = (x - self.starts[j]).astype(np.float64)
        value: Floats = self.values[i][j] + self.slopes[i][j] * distance
        return value

    def sum_to(self, median: int, j: Places, x: Ints) -> Floats:
        distance = (x - self.starts[j]).astype(np.float64)
        rise = self.slopes[median][j] * (distance * (distance + 1.0) * 0.5)
        total: Floats = self.sums[j] + distance * self.values[median][j] + rise
        return total

    def grid_pieces(self, width: int) -> NDArray[np.int32]:
        """Piece of every (key, x < width), flat."""
        inside = np.minimum(self.starts, width)
        ends = np.append(inside[1:], 0)
        ends[np.append(np.diff(self.places // SPAN) > 0, True)] = width
        return np.repeat(np.arange(len(inside), dtype=np.int32), ends - inside)


def _flat(pieces: Sequence[Pieces | None], quantile_count: int) -> Flat:
    held = [p if p is not None else _NO_DECODE for p in pieces]
    starts = np.concatenate([np.array(p.starts, dtype=np.int64) for p in held])
    ids = np.repeat(np.arange(len(held), dtype=np.int64), [len(p.starts) for p in held])

    def rows(name: Literal["values", "slopes"]) -> Floats:
        return np.array(
            [
                [x for p in held for x in (getattr(p, name)[i] if p is not _NO_DECODE else getattr(p, name)[0])]
                for i in range(quantile_count)
            ],
            dtype=np.float64,
        )

    sums = np.array([x for p in held for x in p.sums], dtype=np.float64)
    return Flat(ids * SPAN + starts, starts, rows("values"), rows("slopes"), sums)


class Flats(NamedTuple):
    prefill: Flat
    step: Flat
    ratio: Flat


def flatten(pieces: Sequence[KeyPieces], quantile_count: int) -> Flats:
    return Flats(
        _flat([p.prefill for p in pieces], quantile_count),
        _flat([p.step for p in pieces], quantile_count),
        _flat([p.ratio for p in pieces], quantile_count),
    )


def build_grid(figures: Figures, pieces: Sequence[KeyPieces]) -> Floats:
    """Tabulate what totals are made of at every whole length, as far as `GRID_BYTES` goes.

    Parameters
    ----------
    figures : Figures
        The table.
    pieces : sequence of KeyPieces
        The pieces of its keys, in their order.

    Returns
    -------
    ndarray of shape (rows, keys, width)
        Rows: prefill at x for each quantile; sum of the median steps to x; median ratio at x steps; then, for each
        quantile but the median, c·a and (1 - c²)·a² at x (a: deviation of prefill, c: correlation) and the
        deviation of its ratio. Read-only.
    """
    quantiles = figures.quantiles
    median, count = quantiles.index(0.5), len(figures.keys)
    row_count = 2 + len(quantiles) + 3 * (len(quantiles) - 1)
    longest = max(p.starts[-1] for key in pieces for p in key if p is not None)
    # half as much again: a little beyond the last knot is asked for often
    width = max(1, min(longest * 3 // 2 + 1, GRID_BYTES // (8 * row_count * count)))
    flats = flatten(pieces, len(quantiles))
    correlations = np.array([key.correlations for key in figures.keys]).T
    grid = np.empty((row_count, count * width))
    all_pieces = [flat.grid_pieces(width) for flat in flats]
    for first in range(0, count, _KEYS_AT_ONCE):
        last = min(first + _KEYS_AT_ONCE, count)
        part = grid[:, first * width : last * width]
        at_prefill, at_step, at_ratio = (at[first * width : last * width] for at in all_pieces)
        x = np.tile(np.arange(width, dtype=np.int64), last - first)
        for i in range(len(quantiles)):
            part[i] = flats.prefill.value(i, at_prefill, x)
        sums, ratio = part[len(quantiles)], part[len(quantiles) + 1]
        sums[:] = flats.step.sum_to(median, at_step, x)
        ratio[:] = flats.ratio.value(median, at_ratio, x)
        for i, row in deviation_rows(quantiles).items():
            correlation = np.repeat(correlations[i, first:last], width)
            part[row], part[row + 1] = deviation_terms(part[i], part[median], correlation)
            part[row + 2] = np.abs(flats.ratio.value(i, at_ratio, x) - ratio)
    grid.flags.writeable = False
    return grid.reshape(row_count, count, width)


def deviation_rows(quantiles: Sequence[float]) -> dict[int, int]:
    """Place of each quantile but the median → first of its three rows in the grid."""
    others = [i for i, q in enumerate(quantiles) if q != 0.5]
    return {i: len(quantiles) + 2 + 3 * j for j, i in enumerate(others)}


def deviation_terms(prefill: Floats, median: Floats, correlation: Floats) -> tuple[Floats, Floats]:
    deviation = np.abs(prefill - median)
    return correlation * deviation, (1.0 - correlation * correlation) * deviation * deviation


def entry_views(grid: Floats, quantile_count: int, number: int) -> tuple[memoryview[float], ...]:
    """Rows of the `number`-th key, as an entry takes them: the prefill rows; sums, then the same, ratio and deviations.

    All but prefill, the first sums and the terms of prefill's deviation start one element early: at n tokens they
    give the figure of n - 1 steps. What stands at 0 belongs to another row and is never asked for.
    """
    flat, (row_count, key_count, width) = grid.reshape(-1), grid.shape

    def view(row: int, shift: int = 0) -> memoryview[float]:
        start = (row * key_count + number) * width - shift
        return cast("memoryview[float]", flat[start : start + width].data)

    views = [view(row) for row in range(quantile_count + 1)]
    views += [view(quantile_count, 1), view(quantile_count + 1, 1)]
    for row in range(quantile_count + 2, row_count, 3):
        views += [view(row), view(row + 1), view(row + 2, 1)]
    return tuple(views)
