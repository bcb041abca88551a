"""Measures of how well predicted quantiles agree with observed latencies."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def pinball_loss(observed: ArrayLike, predicted: ArrayLike, q: float) -> float:
    """Mean pinball loss of a predicted quantile.

    Parameters
    ----------
    observed, predicted : array_like of shape (n,)
        Milliseconds.
    q : float
        Level of the quantile, in (0, 1).

    Returns
    -------
    float
        Milliseconds; NaN without observations. At q = 0.5 it is half the mean absolute error.

    References
    ----------
    R. Koenker and G. Bassett, Regression Quantiles, Econometrica 46 (1978).
    """
    value, estimate = _paired(observed, predicted)
    error = value - estimate
    return _mean(np.maximum(q * error, (q - 1.0) * error))


def coverage(observed: ArrayLike, predicted: ArrayLike) -> float:
    """Share of observations at or below the prediction; NaN without observations."""
    value, estimate = _paired(observed, predicted)
    return _mean((value <= estimate).astype(np.float64))


def coverage_interval(share: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[Floats, Floats]:
    """Confidence interval of a share of `n` independent observations; it never falls short of its level.

    References
    ----------
    C. Clopper and E. Pearson, The Use of Confidence or Fiducial Limits, Biometrika 26 (1934).
    """
    from scipy.special import betaincinv

    n = np.asarray(n, dtype=np.float64)
    k, outside = np.round(np.asarray(share) * n), 0.5 * (1.0 - level)
    lower = np.where(k > 0, betaincinv(np.maximum(k, 1.0), n - k + 1.0, outside), 0.0)
    upper = np.where(k < n, betaincinv(k + 1.0, np.maximum(n - k, 1.0), 1.0 - outside), 1.0)
    return lower, upper


def r_squared(observed: ArrayLike, predicted: ArrayLike) -> float:
    """Share of the variance explained; NaN where the observations are all equal."""
    value, estimate = _paired(observed, predicted)
    spread = float(np.sum((value - _mean(value)) ** 2))
    return 1.0 - float(np.sum((value - estimate) ** 2)) / spread if spread > 0 else float("nan")


def mean_absolute_error(observed: ArrayLike, predicted: ArrayLike) -> float:
    """Mean absolute error in the unit of the observations; NaN without observations."""
    value, estimate = _paired(observed, predicted)
    return _mean(np.abs(estimate - value))


def mape(observed: ArrayLike, predicted: ArrayLike) -> float:
    """Mean absolute error relative to the observation, as a fraction.

    Observations of zero (clamped runs) have no relative error and are left out; NaN where nothing is left.
    """
    value, estimate = _paired(observed, predicted)
    positive = value > 0
    return _mean(np.abs(estimate[positive] / value[positive] - 1.0))


def median_ape(observed: ArrayLike, predicted: ArrayLike) -> float:
    """Median absolute error relative to the observation, as a fraction.

    An observation of zero ranks above all others, so that clamped runs count without a division by zero; NaN where
    they are half of all, or without observations.
    """
    return _finite_median(np.abs(_relative_errors(observed, predicted)))


def median_bias(observed: ArrayLike, predicted: ArrayLike) -> float:
    """Median of (predicted - observed) / observed, as a fraction: above zero, predictions are too high.

    Observations of zero rank as in `median_ape`: leaving out clamped runs, which are low, would bias the bias.
    """
    return _finite_median(_relative_errors(observed, predicted))


def _relative_errors(observed: ArrayLike, predicted: ArrayLike) -> Floats:
    value, estimate = _paired(observed, predicted)
    errors = np.full(value.shape, np.inf)
    np.divide(estimate - value, value, out=errors, where=value > 0)
    errors[(value == 0) & (estimate == 0)] = 0.0
    return errors


def _finite_median(values: Floats) -> float:
    if values.size == 0:
        return float("nan")
    middle = np.sort(values)[[(values.size - 1) // 2, values.size // 2]]
    return float(middle.mean()) if np.isfinite(middle).all() else float("nan")


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")


def _paired(observed: ArrayLike, predicted: ArrayLike) -> tuple[Floats, Floats]:
    value, estimate = np.asarray(observed, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if value.shape != estimate.shape:
        raise ValueError(f"observed has shape {value.shape}, predicted {estimate.shape}; they must be equal")
    return value, estimate
