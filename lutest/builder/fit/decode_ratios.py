"""Quantiles of decode time over the sum of the median steps, by key and number of steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lutest.builder.fit.calibration_runs import CalibrationKey
from lutest.builder.fit.local_quantiles import local_quantiles, weighted_quantiles
from lutest.builder.fit.ratio_noise import fit_leverage, noise_components, noise_spread
from lutest.builder.fit.shrinkage import shrink, variance_between

__all__ = ["decode_ratios"]

LEAST_RATIO = 1e-3

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def decode_ratios(keys: list[CalibrationKey], knots: Array, levels: Array, cross_fitted: bool) -> tuple[Array, Array]:
    """Ratios, keys × knots × levels, and what the deviation of each run is to be multiplied by."""
    sizes = np.array([len(key.steps) for key in keys])
    owner = np.repeat(np.arange(len(keys)), sizes)
    steps = np.concatenate([key.steps for key in keys])
    ratio = np.concatenate([key.ratio for key in keys])
    fixed = np.concatenate([key.fixed for key in keys])
    place, at = np.log2(knots), np.log2(steps)

    center = local_quantiles(at, ratio, place, np.array([0.5]))[:, 0]
    offset = np.zeros(len(keys))
    residual = ratio - np.interp(at, place, center)
    spread = noise_spread(noise_components(residual, steps, fixed, owner, len(keys))[owner], steps, fixed)
    if not keys[0].timed:
        offset = _offsets(residual, fixed, spread, owner, len(keys))
        corrected = ratio - offset[owner] * fixed
        center = local_quantiles(at, corrected, place, np.array([0.5]))[:, 0]
        residual = corrected - np.interp(at, place, center)
    components = noise_components(residual, steps, fixed, owner, len(keys))
    spread = noise_spread(components[owner], steps, fixed)
    u = residual / spread

    level, shrinkage = np.zeros(len(keys)), np.ones_like(u)
    if not cross_fitted:
        level, shrinkage = fit_leverage(u, spread, steps, owner, len(keys))
    full = u / shrinkage
    shape = local_quantiles(at, full, place, levels)
    shifts = np.empty((len(keys), len(levels)))
    for number, q in enumerate(levels):
        shifts[:, number] = _key_shifts(full - np.interp(at, place, shape[:, number]), owner, sizes, float(q))
    ratios = np.empty((len(keys), len(knots), len(levels)))
    for number, key in enumerate(keys):
        at_knots = key.fixed_one / knots
        ahead = np.sqrt(noise_spread(components[[number]], knots, at_knots) ** 2 + level[number])
        ratios[number] = (center + offset[number] * at_knots)[:, None] + ahead[:, None] * (shape + shifts[number])
    ratios = np.maximum(np.sort(ratios, axis=2), LEAST_RATIO)
    return ratios, np.sqrt(1 + level[owner] / spread**2) / shrinkage


def _offsets(residual: Array, fixed: Array, spread: Array, owner: Indices, n_keys: int) -> Array:
    """Offset of each key in units of `fixed`: least absolute deviations, shrunk to their mean."""
    estimate, error = np.zeros(n_keys), np.ones(n_keys)
    for key in range(n_keys):
        mine = owner == key
        x, weight = fixed[mine], fixed[mine] / spread[mine]
        values = residual[mine] / x
        order = np.argsort(values, kind="stable")
        total = np.cumsum(weight[order])
        estimate[key] = np.interp(total[-1] / 2, total - weight[order] / 2, values[order])
        deviation = (residual[mine] - estimate[key] * x) / spread[mine]
        # Sandwich error with a Laplace density at the median, 1 / (2 E|u|).
        error[key] = np.mean(np.abs(deviation)) / np.sqrt(np.sum(weight**2))
    return shrink(estimate, error**2)


def _key_shifts(excess: Array, owner: Indices, sizes: Indices, q: float) -> Array:
    """Shift of each key's quantile against the pooled one, as far as coverages differ by more than chance."""
    if len(sizes) < 2:
        return np.zeros(len(sizes))
    below = np.bincount(owner, (excess <= 0).astype(float), len(sizes)) / sizes
    chance = q * (1 - q) / sizes
    between = variance_between(below, chance)
    if between == 0.0:
        return np.zeros(len(sizes))
    level = np.array([q])
    own = np.array(
        [weighted_quantiles(np.sort(excess[owner == key]), np.ones(sizes[key]), level)[0] for key in range(len(sizes))]
    )
    return np.asarray(own * between / (between + chance))
