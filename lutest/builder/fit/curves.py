"""Curves of prefill over prompt length and of the decode step over KV length, as knots per key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import optimize

from lutest.builder.fit.observations import Floats, Integers, KeyAxes, Observations, read_observations
from lutest.builder.fit.surface import Surface, fit_location_alone, fit_surface
from lutest.reader.names import error_column, quantile_column

_FIT_RUNS_PER_KEY = 400
_FIT_STEPS_PER_KEY = 500
_SHIFT_STEPS_PER_KEY = 4000
_GOLDEN = 0.6180339887498949
_GRID_PLACES = 65
_LEAST_KNOTS = 5
_MOST_KNOTS = 15
_TOLERANCE = 5e-4  # of the latency, by which a line between knots may miss the curve


def fit_prefill_curve(run_sample: pd.DataFrame, axes: KeyAxes, quantiles: Sequence[float]) -> pd.DataFrame:
    """Quantiles of the prefill latency as piecewise-linear curves of the prompt length.

    Parameters
    ----------
    run_sample : DataFrame
        Columns key_id, run_hash, prompt_tokens (≥ 0), prefill_ms (> 0). One row a run, any order.
    axes : KeyAxes
        Of all keys, by key_id.
    quantiles : sequence of float
        Levels in (0, 1), ascending.

    Returns
    -------
    DataFrame
        Knots per key: key_id, prompt_tokens, n (runs nearest to the knot), one ``pXX_ms`` a level and its standard
        error ``pXX_se_ms``, n_eff (effective number of independent runs of the key), and source: ``measured``,
        ``interpolated`` (no run is nearest to the knot) or ``extrapolated`` (one knot at twice the largest prompt
        length, that carries the curve on; none below the least, whose value the reader holds there). Curves do not
        fall, and at every prompt length the quantiles are in order.
    """
    runs = run_sample.sort_values(["key_id", "run_hash", "prompt_tokens", "prefill_ms"], ignore_index=True)
    data = read_observations(runs, axes, "prompt_tokens", "prefill_ms")
    position = runs.groupby("key_id").cumcount().to_numpy()
    surface = fit_surface(data.rows(position < _FIT_RUNS_PER_KEY), data, quantiles)
    return _curve_knots(surface, data, "prompt_tokens", quantiles, rising=True)


def fit_step_curve(
    step_sample: pd.DataFrame, run_sample: pd.DataFrame, axes: KeyAxes, quantiles: Sequence[float]
) -> pd.DataFrame:
    """Quantiles of the decode step as piecewise-linear curves of the KV length.

    Parameters
    ----------
    step_sample : DataFrame
        Columns key_id, run_hash, position (from 1), kv_len (≥ 1), step_ms (> 0). One row a step.
    run_sample : DataFrame
        Columns key_id, run_hash, timed. Steps of runs that are not timed are left out.
    axes : KeyAxes
        Of all keys, by key_id.
    quantiles : sequence of float
        Levels in (0, 1), ascending.

    Returns
    -------
    DataFrame
        Knots per key that has timed steps: key_id, kv_len, n (steps nearest to the knot), and the rest as in
        `fit_prefill_curve`. Curves may fall within the
        measured lengths.

    Notes
    -----
    Steps of a run resemble each other: with an intraclass
    correlation r, estimated from the residuals of a first fit by the analysis of variance, the m steps of a run are
    worth m / (1 + r (m - 1)) steps (Kish's design effect), which they share equally.

    References
    ----------
    L. Kish (1965), Survey Sampling, section 8.2.
    """
    timed = run_sample.loc[run_sample["timed"].astype(bool), "run_hash"]
    steps = step_sample[step_sample["run_hash"].isin(timed)]
    steps = steps.sort_values(["key_id", "run_hash", "position", "step_ms"], ignore_index=True)
    if steps.empty:
        figures = (column(q) for column in (quantile_column, error_column) for q in quantiles)
        return pd.DataFrame(columns=["key_id", "kv_len", "n", *figures, "n_eff", "source"])
    data = read_observations(steps, axes, "kv_len", "step_ms")
    names = steps[["key_id", "run_hash"]]
    run = np.cumsum((names != names.shift()).any(axis=1).to_numpy()) - 1
    picked = _thinned(data.key, run, _FIT_STEPS_PER_KEY)
    thin = data.rows(picked)
    length = np.bincount(run)
    _, thin_run = np.unique(run[picked], return_inverse=True)
    taken = np.bincount(thin_run)[thin_run]
    typical = fit_location_alone(replace(thin, weight=1.0 / taken))
    correlation = _intraclass_correlation(thin.log_ms - typical(thin.key, thin.place), thin_run)
    effective = (length / (1 + correlation * (length - 1)))[run]
    many = _thinned(data.key, run, _SHIFT_STEPS_PER_KEY, _GOLDEN)
    kept = np.bincount(run[many], minlength=len(length))[run]
    # Each step alike where there are many: a step of a long run is no less one that will come again.
    by_key = np.bincount(data.key, effective / length[run]) / np.bincount(data.key)
    alike = by_key[data.key] * length[run] / kept
    surface = fit_surface(
        replace(thin, weight=effective[picked] / taken), replace(data, weight=alike).rows(many), quantiles
    )
    return _curve_knots(surface, data, "kv_len", quantiles, rising=False)


def _thinned(key: Integers, run: Integers, most_steps: int, phase: float = 0.0) -> NDArray[np.bool_]:
    """Steps to fit: runs in order of their hash, the same number spread evenly over each run, up to a number a key."""
    starts = np.flatnonzero(np.r_[True, np.diff(run) > 0])
    length = np.diff(np.r_[starts, len(run)])
    step = np.arange(len(run)) - starts[run]
    run_key = key[starts]
    most = np.ones(len(starts), dtype=np.int64)
    for limit in (2, 4, 8, 16, 32, 64):
        total = np.bincount(run_key, np.minimum(length, limit))
        most = np.where(total[run_key] <= most_steps, limit, most)
    taken = np.minimum(length, most)[run]
    # Step i is the one that opens the next of `taken` equal parts, which start elsewhere in each run.
    start = phase * np.arange(len(starts))[run] % 1.0
    return np.asarray(np.floor((step + 1) * taken / length[run] + start) > np.floor(step * taken / length[run] + start))


def _intraclass_correlation(residual: Floats, run: Integers) -> float:
    count = np.bincount(run)
    mean = np.bincount(run, residual) / count
    freedom = len(run) - len(count)
    if freedom == 0 or len(count) < 2:
        return 1.0
    within = float(((residual - mean[run]) ** 2).sum() / freedom)
    between = float(np.mean((mean - mean.mean()) ** 2 - within / count))
    return min(max(between, 0.0) / max(between + within, 1e-300), 1.0)


def _curve_knots(
    surface: Surface, data: Observations, place: str, quantiles: Sequence[float], *, rising: bool
) -> pd.DataFrame:
    """Knots of piecewise-linear curves through a fitted surface.

    Parameters
    ----------
    surface : Surface
        Fitted quantiles.
    data : Observations
        Where the keys were measured.
    place : str
        Name of the length's column.
    quantiles : sequence of float
        Levels of the surface.
    rising : bool
        Whether the curves must not fall.

    Returns
    -------
    DataFrame
        Columns key_id, `place`, n, one a quantile, source; sorted by key and place.
    """
    largest = float(data.place.max())
    bounds = np.searchsorted(data.key, np.arange(len(data.key_ids) + 1))
    grids = [_grid(data.place[bounds[key] : bounds[key + 1]]) for key in range(len(data.key_ids))]
    grid_key = np.repeat(np.arange(len(data.key_ids)), [len(grid) for grid in grids])
    levels = np.split(np.exp(surface.log_ms(grid_key, np.concatenate(grids))), np.cumsum([len(g) for g in grids])[:-1])
    parts = []
    for key, (grid, curves) in enumerate(zip(grids, levels, strict=True)):
        if rising:
            curves = np.stack([optimize.isotonic_regression(curve).x for curve in curves.T], axis=1)
        places = data.place[bounds[key] : bounds[key + 1]]
        chosen = _chosen_knots(grid, curves, places)
        knots, values = grid[chosen].astype(np.int64), curves[chosen]
        n = np.bincount(_nearest(knots, places), minlength=len(knots))
        source = np.where(n > 0, "measured", "interpolated").astype(object)
        inside = max(grid[-1] - grid[0], 0.0) / 4
        last = int(knots[-1])
        slope = _relative_slope(surface, key, last, min(2 * last, largest), last - inside)
        knots, n, source = np.r_[knots, 2 * last], np.r_[n, 0], np.r_[source, ["extrapolated"]]
        values = np.vstack([values, values[-1:] * (1 + slope * last)])
        part = pd.DataFrame({"key_id": data.key_ids[key], place: knots})
        part["n"] = n
        errors_ms = values * surface.error(np.full(len(knots), key), np.maximum(knots, 1).astype(np.float64))
        for column, q in enumerate(quantiles):
            part[quantile_column(q)] = values[:, column]
            part[error_column(q)] = errors_ms[:, column]
        part["n_eff"] = surface.n_eff[key]
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
