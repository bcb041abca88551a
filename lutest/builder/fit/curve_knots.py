"""Knots of piecewise-linear curves through fitted quantiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lutest.builder.fit.latency_surface import Surface
from lutest.builder.fit.observations import Observations
from lutest.builder.fit.quantile_regression import isotonic
from lutest.reader.names import KEY_COLUMNS, quantile_column

__all__ = ["curve_knots"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_KEYS = list(KEY_COLUMNS)
_GRID_PLACES = 65
_LEAST_KNOTS = 5
_MOST_KNOTS = 15
_TOLERANCE = 5e-4  # of the latency, by which a line between knots may miss the curve


def curve_knots(
    surface: Surface, data: Observations, keys: pd.DataFrame, place: str, quantiles: Sequence[float], *, rising: bool
) -> pd.DataFrame:
    """Knots of piecewise-linear curves through a fitted surface.

    Parameters
    ----------
    surface : Surface
        Fitted quantiles.
    data : Observations
        Where the keys were measured.
    keys : DataFrame
        tier, top_k, num_blocks of each key.
    place : str
        Name of the length's column.
    quantiles : sequence of float
        Levels of the surface.
    rising : bool
        Whether the curves must not fall.

    Returns
    -------
    DataFrame
        Columns tier, top_k, num_blocks, `place`, n, one a quantile, source; sorted by key and place.
    """
    least, largest = float(data.place.min()), float(data.place.max())
    bounds = np.searchsorted(data.key, np.arange(len(keys) + 1))
    grids = [_grid(data.place[bounds[key] : bounds[key + 1]]) for key in range(len(keys))]
    grid_key = np.repeat(np.arange(len(keys)), [len(grid) for grid in grids])
    levels = np.split(np.exp(surface.log_ms(grid_key, np.concatenate(grids))), np.cumsum([len(g) for g in grids])[:-1])
    parts = []
    for key, (grid, curves) in enumerate(zip(grids, levels, strict=True)):
        if rising:
            curves = np.stack([isotonic(curve, np.ones(len(grid))) for curve in curves.T], axis=1)
        places = data.place[bounds[key] : bounds[key + 1]]
        chosen = _chosen_knots(grid, curves, places)
        knots, values = grid[chosen].astype(np.int64), curves[chosen]
        n = np.bincount(_nearest(knots, places), minlength=len(knots))
        source = np.where(n > 0, "measured", "interpolated").astype(object)
        inside = max(grid[-1] - grid[0], 0.0) / 4
        first, last = int(knots[0]), int(knots[-1])
        if first > 1:
            # Never steeper than in proportion to the length: a latency has a part that no token causes.
            slope = min(_relative_slope(surface, key, first, max(first / 2, least), first + inside), 1 / first)
            knots, n, source = np.r_[1, knots], np.r_[0, n], np.r_[["extrapolated"], source]
            values = np.vstack([values[:1] * (1 - slope * (first - 1)), values])
        slope = _relative_slope(surface, key, last, min(2 * last, largest), last - inside)
        knots, n, source = np.r_[knots, 2 * last], np.r_[n, 0], np.r_[source, ["extrapolated"]]
        values = np.vstack([values, values[-1:] * (1 + slope * last)])
        part = pd.DataFrame({column: keys[column].iloc[[key] * len(knots)].to_numpy() for column in _KEYS})
        part[place] = knots
        part["n"] = n
        for column, q in enumerate(quantiles):
            part[quantile_column(q)] = values[:, column]
        part["source"] = source
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _grid(places: Floats) -> Floats:
    """Whole lengths from the least to the largest, dense enough to show the curve's shape; the measured ones if few."""
    spread = np.round(np.geomspace(places.min(), places.max(), _GRID_PLACES))
    measured = np.unique(places)
    return np.union1d(spread, measured) if len(measured) <= _MOST_KNOTS else np.unique(spread)


def _nearest(knots: Integers, places: Floats) -> Integers:
    return np.searchsorted((knots[1:] + knots[:-1]) / 2, places)


def _chosen_knots(grid: Floats, curves: Floats, places: Floats) -> Integers:
    """Knots added one by one where the line between those chosen misses the curves most."""
    if len(grid) <= _LEAST_KNOTS:
        return np.arange(len(grid))
    measured = np.unique(places)
    even = np.linspace(grid[0], grid[-1], _LEAST_KNOTS)
    chosen = np.unique(np.searchsorted(grid, measured if _LEAST_KNOTS <= len(measured) <= _MOST_KNOTS else even))
    while len(chosen) < _MOST_KNOTS:
        lines = np.stack([np.interp(grid, grid[chosen], curve[chosen]) for curve in curves.T], axis=1)
        miss = np.abs(lines / curves - 1).max(axis=1)
        worst = int(miss.argmax())
        if miss[worst] < _TOLERANCE:
            break
        chosen = np.sort(np.append(chosen, worst))
    return chosen


def _relative_slope(surface: Surface, key: int, edge: float, beyond: float, inside: float) -> float:
    """Growth of the centre per unit of length at the edge of a key's lengths, as a share of its value there.

    Taken from other keys' lengths beyond the edge where there are any, else from the key's own. Quantiles that all go
    on with this share keep their ratios, so they never cross.
    """
    place = beyond if beyond != edge else inside
    if place == edge:
        return 0.0
    location = surface.location(np.array([key, key]), np.array([place, edge], dtype=np.float64))
    return max(float(np.expm1(location[0] - location[1]) / (place - edge)), 0.0)
