"""How far runs lie from the mapped P50: quantiles beside it, re-calibrated on what the map did not see."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["fit_correlation", "fit_stretch", "log_spread", "normal_score"]

Floats = NDArray[np.float64]

_LEAST_SPREAD = 1e-5  # of a log: a hundred-thousandth of the latency
_PRIOR_RUNS = 5.0  # what the parent's spread counts as, where a quantile cannot be read off the runs
_LARGEST_STRETCH = 100.0


def normal_score(q: float) -> float:
    """The standard normal quantile."""
    return float(stats.norm.ppf(q))


def log_spread(predicted_ms: Mapping[float, Floats], q: float, deviation: Floats) -> Floats:
    """Size of log(quantile / P50): what the table says, and how uncertain the scale is, as independent deviations."""
    own = np.log(predicted_ms[q] / predicted_ms[0.5])
    return np.asarray(np.maximum(np.hypot(own, normal_score(q) * deviation), _LEAST_SPREAD))


def fit_stretch(left_out: Floats, spread: Floats, q: float, n_runs: int) -> float:
    """What the spread has to be multiplied by for the share q of the runs to lie below the quantile.

    Where the runs allow it, the conformal quantile of left_out / spread: a further run stays below it with
    probability q whatever the distribution is. Where they are too few, a robust scale of the same, drawn towards 1,
    with the factor by which a normal sample of that size underrates its quantile.

    Parameters
    ----------
    left_out : ndarray, shape (n,)
        log(observed / P50) of runs, or steps, by maps that did not see them.
    spread : ndarray, shape (n,)
        `log_spread` of each.
    q : float
        The quantile; not 0.5.
    n_runs : int
        How many runs stand behind them: steps of one run go together.

    References
    ----------
    J. Lei, M. G'Sell, A. Rinaldo, R. J. Tibshirani and L. Wasserman (2018), Distribution-free predictive inference for
    regression, J. Am. Stat. Assoc. 113, section 5.2 (locally weighted split conformal).
    """
    if not n_runs:
        return 1.0
    scores = np.sort(left_out / spread) if q > 0.5 else np.sort(-left_out / spread)
    level = max(q, 1.0 - q) * (n_runs + 1) / n_runs
    if level <= 1.0:
        stretch = _order_statistic(scores, level)
    else:
        score = abs(normal_score(q))
        scale = float(np.median(np.abs(scores))) * score / 0.6745
        shrunk = (n_runs * scale + _PRIOR_RUNS) / (n_runs + _PRIOR_RUNS)
        few = float(stats.t.ppf(max(q, 1.0 - q), n_runs + _PRIOR_RUNS - 1)) * math.sqrt(1 + 1 / n_runs) / score
        stretch = shrunk * few
    return min(max(stretch, 0.0), _LARGEST_STRETCH)


def fit_correlation(beyond_ms: Floats, prefill_ms: Floats, decode_ms: Floats, q: float, otherwise: float) -> float:
    """How far the deviations of prefill and decode go together, so that the share q of the totals lies below theirs.

    Parameters
    ----------
    beyond_ms : ndarray, shape (n,)
        Observed totals less their P50.
    prefill_ms, decode_ms : ndarray, shape (n,)
        Sizes of the deviations of the quantile q from the P50 in both stages.
    q : float
        The quantile; not 0.5.
    otherwise : float
        The answer where the runs are too few.
    """
    n = len(beyond_ms)
    level = max(q, 1.0 - q) * (n + 1) / n if n else 2.0
    if level > 1.0:
        return otherwise
    side = 1.0 if q > 0.5 else -1.0
    size = side * beyond_ms
    both = np.maximum(2 * prefill_ms * decode_ms, 1e-300)
    # the least c at which sqrt(a² + d² + 2 c a d) reaches the run
    needed = (size**2 - prefill_ms**2 - decode_ms**2) / both
    needed = np.where(size <= 0.0, -np.inf, needed)
    return min(max(_order_statistic(np.sort(np.clip(needed, -2.0, 2.0)), level), 0.0), 1.0)


def _order_statistic(ordered: Floats, level: float) -> float:
    """Value at the rank level · n, linear between ranks."""
    return float(np.interp(level * len(ordered), np.arange(1, len(ordered) + 1), ordered))
