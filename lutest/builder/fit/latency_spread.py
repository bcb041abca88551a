"""Quantiles of the logarithm of a latency around its centre, from residuals of runs that the centre has not seen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lutest.builder.fit.curve_shapes import KeyFunction, shared_shape
from lutest.builder.fit.observations import FOLDS, Observations
from lutest.builder.fit.quantile_regression import quantile_regression, weighted_quantile

__all__ = ["fit_spread"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_LEAST_SCALE = 1e-5  # of log t: a hundred-thousandth of the latency


def fit_spread(data: Observations, unseen: Floats, quantiles: Sequence[float]) -> KeyFunction:
    scale = _key_scales(data, unseen)
    scaled = unseen / scale[data.key]
    design = {name: shared_shape(data, name) for name in ("level", "linear")}
    effective = data.weight.sum()
    fits: list[tuple[str, Floats, float]] = []
    for q in quantiles:
        options: list[tuple[float, str, Floats]] = []
        for name, columns in design.items():
            x = columns(data.key, data.place)
            beyond = np.empty(len(scaled))
            for fold in range(FOLDS):
                held = data.fold == fold
                if held.any() and not held.all():
                    beyond[held] = scaled[held] - x[held] @ _pooled(x[~held], scaled[~held], q, data.weight[~held])
                elif held.any():
                    beyond[held] = scaled[held] - x[held] @ _pooled(x[held], scaled[held], q, data.weight[held])
            loss = float(data.weight @ (scale[data.key] * np.maximum(q * beyond, (q - 1) * beyond)))
            options.append((loss, name, beyond))
        _, name, beyond = min(options, key=lambda option: option[0])
        coefficients = _pooled(design[name](data.key, data.place), scaled, q, data.weight)
        # The rank that a further observation exceeds with probability 1 - q, on the side of the tail.
        level = 0.5 + (q - 0.5) * (effective + 1) / effective
        shift = weighted_quantile(beyond, data.weight, min(max(level, 0.0), 1.0))
        fits.append((name, coefficients, shift))
    reach = [_least_reach(effective, q) for q in quantiles]
    least, largest = float(data.place.min()), float(data.place.max())

    def spread(key: Integers, place: Floats) -> Floats:
        inside = np.clip(place, least, largest)
        levels = np.stack([design[name](key, inside) @ beta + shift for name, beta, shift in fits], axis=1)
        for column, bound in enumerate(reach):
            if bound is not None:
                further = np.maximum if bound > 0 else np.minimum
                levels[:, column] = further(levels[:, column], bound)
        return np.asarray(np.sort(levels, axis=1) * scale[key][:, None])

    return spread


def _pooled(x: Floats, y: Floats, q: float, weights: Floats) -> Floats:
    if x.shape[1] == 1:
        return np.array([weighted_quantile(y, weights, q)])
    return quantile_regression(x, y, q, weights)


def _least_reach(effective: float, q: float) -> float | None:
    """Normal-theory prediction bound, in mean absolute deviations, where a sample is too small to hold the quantile."""
    tail = min(q, 1 - q)
    if effective * tail >= 1 or q == 0.5:
        return None
    return float(stats.t.ppf(q, max(effective - 1, 1)) * np.sqrt(np.pi / 2) * np.sqrt(1 + 1 / max(effective, 1)))


def _key_scales(data: Observations, unseen: Floats) -> Floats:
    """Mean absolute residual of each key, shrunk towards that of all by empirical Bayes."""
    n_keys = len(data.tiers)
    size = np.abs(unseen)
    middle = weighted_quantile(size, data.weight, 0.5)
    size = np.minimum(size, 5 * middle)
    pooled = max(float(np.average(size, weights=data.weight)), _LEAST_SCALE)
    count = np.bincount(data.key, data.weight, n_keys)
    mean = np.bincount(data.key, data.weight * size, n_keys) / np.maximum(count, 1e-300)
    within = float(np.average((size - pooled) ** 2, weights=data.weight))
    between = float(np.average((mean - pooled) ** 2 - within / np.maximum(count, 1e-300), weights=count))
    prior = np.inf if between <= 0 else within / between
    share = count / (count + max(prior, 10.0)) if np.isfinite(prior) else np.zeros(n_keys)
    return np.asarray(np.maximum(pooled + share * (mean - pooled), _LEAST_SCALE))
