"""Prefill latency over prompt length, per key."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lutest.builder.fit.curve_knots import curve_knots
from lutest.builder.fit.latency_surface import fit_surface
from lutest.builder.fit.observations import read_observations
from lutest.reader.names import KEY_COLUMNS

__all__ = ["fit_prefill_curve"]

_KEYS = list(KEY_COLUMNS)
_FIT_RUNS_PER_KEY = 400


def fit_prefill_curve(run_sample: pd.DataFrame, quantiles: Sequence[float]) -> pd.DataFrame:
    """Quantiles of the prefill latency as piecewise-linear curves of the prompt length.

    Parameters
    ----------
    run_sample : DataFrame
        Columns tier, top_k, num_blocks, run_hash, prompt_tokens (≥ 0), prefill_ms (> 0). One row a run, any order.
    quantiles : sequence of float
        Levels in (0, 1), ascending.

    Returns
    -------
    DataFrame
        Knots per key: tier, top_k, num_blocks, prompt_tokens, n (runs nearest to the knot), one ``pXX_ms`` a level,
        and source: ``measured``, ``interpolated`` (no run is nearest to the knot) or ``extrapolated`` (one knot before
        the least and one beyond the largest prompt length, that carry the curve on). Curves do not fall, and at every
        prompt length the quantiles are in order.

    Notes
    -----
    See `lutest.fit.latency_surface` for the estimator and its sources. Curves are made non-decreasing by isotonic
    regression. Beyond all prompt lengths of a key they follow what all keys share, and beyond those of all keys a line.
    """
    runs = run_sample.sort_values([*_KEYS, "run_hash", "prompt_tokens", "prefill_ms"], ignore_index=True)
    data, keys = read_observations(runs, "prompt_tokens", "prefill_ms")
    position = runs.groupby(_KEYS).cumcount().to_numpy()
    surface = fit_surface(data.rows(position < _FIT_RUNS_PER_KEY), quantiles)
    return curve_knots(surface, data, keys, "prompt_tokens", quantiles, rising=True)
