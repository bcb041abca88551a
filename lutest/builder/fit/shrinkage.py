"""Estimates of many keys drawn to their mean, as far as chance explains how they differ."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["shrink", "variance_between"]

Array = npt.NDArray[np.float64]


def shrink(estimate: Array, variance: Array) -> Array:
    """Empirical Bayes: estimates drawn to their mean as far as chance explains how they differ."""
    if len(estimate) < 2 or not np.all(variance > 0):
        return estimate
    between = variance_between(estimate, variance)
    mean = np.average(estimate, weights=1 / variance)
    return np.asarray(mean + (estimate - mean) * between / (between + variance))


def variance_between(estimate: Array, variance: Array, doubt: float = 0.0) -> float:
    """Variance between estimates beyond their own, by moments, `doubt` taken off the chi-squared statistic."""
    weight = 1 / variance
    mean = np.average(estimate, weights=weight)
    excess = np.sum(weight * (estimate - mean) ** 2) - (len(estimate) - 1) - doubt
    room = weight.sum() - np.sum(weight**2) / weight.sum()
    # One weight that dwarfs the others leaves no room: nothing can be told of a variance between them.
    return max(0.0, float(excess / room)) if room > 1e-9 * weight.sum() else 0.0
