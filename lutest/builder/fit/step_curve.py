"""Latency of a decode step over KV length, per key, from timed steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lutest.builder.fit.curve_knots import curve_knots
from lutest.builder.fit.latency_surface import fit_centre, fit_surface
from lutest.builder.fit.observations import read_observations
from lutest.reader.names import KEY_COLUMNS, quantile_column

__all__ = ["fit_step_curve"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_KEYS = list(KEY_COLUMNS)
_FIT_STEPS_PER_KEY = 500


def fit_step_curve(step_sample: pd.DataFrame, run_sample: pd.DataFrame, quantiles: Sequence[float]) -> pd.DataFrame:
    """Quantiles of the decode step as piecewise-linear curves of the KV length.

    Parameters
    ----------
    step_sample : DataFrame
        Columns tier, top_k, num_blocks, run_hash, position (from 1), kv_len (≥ 1), step_ms (> 0). One row a step.
    run_sample : DataFrame
        Columns tier, top_k, num_blocks, run_hash, timed. Steps of runs that are not timed are left out.
    quantiles : sequence of float
        Levels in (0, 1), ascending.

    Returns
    -------
    DataFrame
        Knots per key that has timed steps: tier, top_k, num_blocks, kv_len, n (steps nearest to the knot), one
        ``pXX_ms`` a level, and source, as in `lutest.fit.prefill_curve.fit_prefill_curve`. Curves may fall within the
        measured lengths.

    Notes
    -----
    See `lutest.fit.latency_surface` for the estimator. Steps of a run resemble each other: with an intraclass
    correlation r, estimated from the residuals of a first fit by the analysis of variance, the m steps of a run are
    worth m / (1 + r (m - 1)) steps (Kish's design effect), which they share equally.

    References
    ----------
    L. Kish (1965), Survey Sampling, section 8.2.
    """
    timed = run_sample.loc[run_sample["timed"].astype(bool), "run_hash"]
    steps = step_sample[step_sample["run_hash"].isin(timed)]
    steps = steps.sort_values([*_KEYS, "run_hash", "position", "step_ms"], ignore_index=True)
    if steps.empty:
        columns = [*_KEYS, "kv_len", "n", *map(quantile_column, quantiles), "source"]
        return pd.DataFrame(columns=columns)
    data, keys = read_observations(steps, "kv_len", "step_ms")
    run = np.cumsum((steps[[*_KEYS, "run_hash"]] != steps[[*_KEYS, "run_hash"]].shift()).any(axis=1).to_numpy()) - 1
    picked = _thinned(data.key, run)
    thin = data.rows(picked)
    length = np.bincount(run)[run[picked]]
    _, run = np.unique(run[picked], return_inverse=True)
    taken = np.bincount(run)[run]
    centre = fit_centre(replace(thin, weight=1.0 / taken))
    correlation = _intraclass_correlation(thin.log_ms - centre(thin.key, thin.place), run)
    worth = length / (1 + correlation * (length - 1))
    surface = fit_surface(replace(thin, weight=worth / taken), quantiles)
    return curve_knots(surface, data, keys, "kv_len", quantiles, rising=False)


def _thinned(key: Integers, run: Integers) -> NDArray[np.bool_]:
    """Steps to fit: runs in order of their hash, the same number spread evenly over each run, up to a number a key."""
    starts = np.flatnonzero(np.r_[True, np.diff(run) > 0])
    length = np.diff(np.r_[starts, len(run)])
    step = np.arange(len(run)) - starts[run]
    run_key = key[starts]
    most = np.ones(len(starts), dtype=np.int64)
    for limit in (2, 4, 8, 16, 32, 64):
        total = np.bincount(run_key, np.minimum(length, limit))
        most = np.where(total[run_key] <= _FIT_STEPS_PER_KEY, limit, most)
    taken = np.minimum(length, most)[run]
    # Step i is the one that opens the next of `taken` equal parts.
    return np.asarray((step + 1) * taken // length[run] > step * taken // length[run])


def _intraclass_correlation(residual: Floats, run: Integers) -> float:
    count = np.bincount(run)
    mean = np.bincount(run, residual) / count
    freedom = len(run) - len(count)
    if freedom == 0 or len(count) < 2:
        return 1.0
    within = float(((residual - mean[run]) ** 2).sum() / freedom)
    between = float(np.mean((mean - mean.mean()) ** 2 - within / count))
    return min(max(between, 0.0) / max(between + within, 1e-300), 1.0)
