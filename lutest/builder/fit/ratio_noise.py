"""Noise of the ratios of runs: its components over run length, and what the fit has hidden of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import optimize

from lutest.builder.fit.shrinkage import variance_between

__all__ = ["fit_leverage", "noise_components", "noise_spread"]

PRIOR_KEYS = 2  # keys whose mean residual is taken to be 0 when the leverage is estimated: few keys say little
STEP_POWERS = (0.0, 0.5, 1.0)
LEAST_LEFT = 0.1  # of a variance, after the fit of a level
TINY = 1e-12

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def noise_components(residual: Array, steps: Array, fixed: Array, owner: Indices, n_keys: int) -> Array:
    """Components of the variance of a ratio, keys × 3: of a run, of a step, of noise of a fixed size.

    Those of all keys together, and round them each key's own, as far as the keys' sizes differ by more than chance.
    """
    size = float(np.mean(np.abs(residual)))
    if size <= TINY:
        return np.tile([TINY**2, 0.0, 0.0], (n_keys, 1))
    design = np.stack([np.ones_like(steps), 1 / steps, fixed**2])
    start = 2 * np.log(size) - np.log(3 * design.mean(axis=1))
    pooled = _most_likely(np.abs(residual), design, start, 0.0)
    logs = np.tile(pooled, (n_keys, 1))
    deviation = np.abs(residual) / noise_spread(np.exp(logs[:1]), steps, fixed)
    sizes = np.bincount(owner)
    own = np.bincount(owner, deviation) / sizes
    chance = (np.mean(deviation**2) / np.mean(deviation) ** 2 - 1) / sizes
    # Less one standard error: a key's own components are worth their noise only where keys clearly differ.
    doubt = np.sqrt(2 * (n_keys - 1))
    between = variance_between(own / np.mean(own), chance, doubt) if n_keys > 1 and chance.min() > 0 else 0.0
    if between > 0:
        for key in range(n_keys):
            mine = owner == key
            # A variance goes with the square of a size, hence 4: the prior variance of its logarithm.
            logs[key] = _most_likely(np.abs(residual[mine]), design[:, mine], pooled, 1 / (4 * between))
    return np.exp(logs)


def _most_likely(absolute: Array, design: Array, start: Array, precision: float) -> Array:
    """Logarithms of components that maximise a Laplace likelihood, with a normal prior round `start`."""

    def loss(logs: Array) -> tuple[float, Array]:
        parts = np.exp(logs)[:, None] * design
        variance = parts.sum(axis=0)
        deviation = absolute / np.sqrt(variance)
        slope = (parts * ((1 - deviation) / variance)).sum(axis=1) / 2
        away = logs - start
        value = np.sum(np.log(variance) / 2 + deviation) + precision * np.sum(away**2) / 2
        return float(value) / len(absolute), (slope + precision * away) / len(absolute)

    bounds = [(value - 25, value + 10) for value in start]
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return np.asarray(found.x, dtype=float)


def noise_spread(components: Array, steps: Array, fixed: Array) -> Array:
    """Standard deviation of the ratio of a run, from its components (runs × 3, or 1 × 3 for all)."""
    run, step, constant = components.T
    return np.asarray(np.sqrt(run + step / steps + constant * fixed**2))


def fit_leverage(u: Array, spread: Array, steps: Array, owner: Indices, n_keys: int) -> tuple[Array, Array]:
    """Variance of each key's fitted level, and what its fit has shrunk the deviation of each run by.

    A level fitted with weights ω, proportional to a power of the number of steps, leaves weighted mean residuals near 0
    in every key. So the power whose means spread least, against what the residuals would have them, is the one used.
    """
    bound = 2 * float(np.mean(np.abs(u)))
    if bound <= TINY:
        return np.zeros(n_keys), np.ones_like(u)
    score = np.clip(u, -bound, bound)
    score = score - score.mean()
    least, weight, held = np.inf, u, u
    for power in STEP_POWERS:
        shares = steps**power
        shares = shares / np.bincount(owner, shares, n_keys)[owner]
        variance = np.asarray(np.bincount(owner, (shares * spread) ** 2, n_keys), dtype=float)
        means = np.bincount(owner, shares * spread * score, n_keys)
        ratio = float(np.sum(means**2 / variance) / np.mean(score**2)) / (n_keys + PRIOR_KEYS)
        if ratio < least:
            least, weight, held = ratio, shares, variance
    share = max(0.0, 1 - least)
    left = 1 - share * (2 * weight - held[owner] / spread**2)
    return share * held, np.sqrt(np.maximum(left, LEAST_LEFT))
