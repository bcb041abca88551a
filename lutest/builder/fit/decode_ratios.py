"""Quantiles of decode time over the sum of the median steps, by key and number of steps, and the noise round them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize

from lutest.builder.fit.observations import FOLDS, Flags, Floats, Integers
from lutest.builder.fit.quantiles import (
    local_quantiles,
    local_weights,
    own_shifts,
    shrink,
    variance_between,
)

LEAST_RATIO = 1e-3
PRIOR_KEYS = 2  # keys whose mean residual is taken to be 0 when the leverage is estimated: few keys say little
STEP_POWERS = (0.0, 0.5, 1.0)
LEAST_LEFT = 0.1  # of a variance, after the fit of a level
TINY = 1e-12


@dataclass(frozen=True)
class RunsOfKey:
    """Runs of two tokens or more of one key, and its curves at them."""

    key_id: int
    one_pass: bool  # decode is of the same pass as prefill: it has no offset, nor the noise of a prefill
    steps: Floats
    ratio: Floats  # decode_ms over D
    fixed: Floats  # what noise of a fixed size comes to in the ratio
    decode_ms: Floats  # D
    prefill_ms: Floats  # runs × levels
    seen_ms: tuple[Floats, Floats, Floats]  # prefill, decode and total as measured
    fixed_one: float  # `fixed` of a run of one step at the key's median prompt
    steadiness: float
    doubt: float  # standard error of the P50 steps, relative to them


def decode_ratios(keys: list[RunsOfKey], knots: Floats, levels: Floats) -> tuple[Floats, Floats, Floats]:
    """Ratios and their standard errors, keys × knots × levels, and what each run's deviation is to be multiplied by."""
    sizes = np.array([len(key.steps) for key in keys])
    owner = np.repeat(np.arange(len(keys)), sizes)
    steps = np.concatenate([key.steps for key in keys])
    ratio = np.concatenate([key.ratio for key in keys])
    fixed = np.concatenate([key.fixed for key in keys])
    place, at = np.log2(knots), np.log2(steps)
    parts = np.split(at, np.cumsum(sizes)[:-1])
    nearness = np.array([np.concatenate([local_weights(part, spot) for part in parts]) for spot in place])
    fold = np.concatenate([np.arange(size) % FOLDS for size in sizes])
    middle = np.array([0.5])

    cost = np.concatenate([key.decode_ms for key in keys])
    level = _levels(ratio, cost, at, place, owner, fold) if keys[0].one_pass else np.ones(len(keys))
    ratio = ratio / level[owner]
    center = local_quantiles(at, ratio, place, middle)[:, 0]
    residual = ratio - np.interp(at, place, center)
    at_knots = np.array([key.fixed_one / knots for key in keys])
    centers = np.tile(center, (len(keys), 1))
    if not keys[0].one_pass:
        spread = _noise_spread(_noise_components(residual, steps, fixed, owner, len(keys))[owner], steps, fixed)
        offset = _offsets(residual, fixed, spread, owner, len(keys))
        corrected = ratio - offset[owner] * fixed
        center = local_quantiles(at, corrected, place, middle)[:, 0]
        residual = corrected - np.interp(at, place, center)
        centers = center + offset[:, None] * at_knots
    components = _noise_components(residual, steps, fixed, owner, len(keys))
    spread = _noise_spread(components[owner], steps, fixed)
    u = residual / spread
    doubt, shrinkage = _fit_leverage(u, spread, steps, owner, len(keys))
    full = u / shrinkage
    shape = local_quantiles(at, full, place, levels)
    beyond = full[:, None] - np.stack([np.interp(at, place, column) for column in shape.T], axis=1)
    apart = np.broadcast_to(beyond, (FOLDS, *beyond.shape))
    cost = level[owner] * cost * spread
    shifts, errors = own_shifts(beyond, apart, owner, nearness, cost, fold, np.ones(len(keys)), levels)
    shapes = shape + shifts
    ahead = np.sqrt(_noise_spread(components[:, None], knots, at_knots) ** 2 + doubt[:, None])
    ratios = level[:, None, None] * (centers[:, :, None] + ahead[:, :, None] * shapes)
    ratios = np.maximum(np.sort(ratios, axis=2), LEAST_RATIO)
    errors = level[:, None, None] * ahead[:, :, None] * errors
    errors = np.hypot(errors, ratios * np.array([key.doubt for key in keys])[:, None, None])
    return ratios, errors, np.sqrt(1 + doubt[owner] / spread**2) / shrinkage


def _levels(ratio: Floats, cost: Floats, at: Floats, place: Floats, owner: Integers, fold: Integers) -> Floats:
    """Mean decode over D of each key, shrunk, where it says more of unseen runs than one level for all does.

    Steps that wait are no part of a sum of medians, and keys differ in how many of theirs do.
    """
    n_keys = int(owner[-1]) + 1

    def means(rows: Flags) -> Floats:
        mine, size = owner[rows], cost[rows]
        total, squares = (np.bincount(mine, size**power, n_keys) for power in (1, 2))
        mean = np.maximum(np.bincount(mine, size * ratio[rows], n_keys) / np.maximum(total, TINY), LEAST_RATIO)
        noise = np.sum((size * (ratio[rows] / mean[mine] - 1)) ** 2) / max(
            np.sum(squares * (1 - squares / np.maximum(total**2, TINY))), TINY
        )
        # one size of noise for all: that of a few runs is too much of a chance to weigh by
        variance = noise * squares / np.maximum(total, TINY) ** 2
        return np.exp(shrink(np.log(mean), np.where(total > 0, np.maximum(variance, TINY), 1 / TINY)))

    if n_keys < 2 or not fold.any():
        return np.ones(n_keys)
    loss = np.zeros((2, n_keys))
    for number in np.unique(fold):
        held = fold == number
        for row, level in enumerate((np.ones(n_keys), means(~held))):
            center = local_quantiles(at[~held], (ratio / level[owner])[~held], place, np.array([0.5]))[:, 0]
            left = ratio[held] - level[owner[held]] * np.interp(at[held], place, center)
            loss[row] += np.bincount(owner[held], cost[held] * np.abs(left), n_keys)
    known = loss[0] > 0
    better = known.any() and np.mean(loss[1, known] / loss[0, known]) < 1
    return means(fold >= 0) if better else np.ones(n_keys)


def _offsets(residual: Floats, fixed: Floats, spread: Floats, owner: Integers, n_keys: int) -> Floats:
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


def _noise_components(residual: Floats, steps: Floats, fixed: Floats, owner: Integers, n_keys: int) -> Floats:
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
    deviation = np.abs(residual) / _noise_spread(np.exp(logs[:1]), steps, fixed)
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


def _most_likely(absolute: Floats, design: Floats, start: Floats, precision: float) -> Floats:
    """Logarithms of components that maximise a Laplace likelihood, with a normal prior round `start`."""

    def loss(logs: Floats) -> tuple[float, Floats]:
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


def _noise_spread(components: Floats, steps: Floats, fixed: Floats) -> Floats:
    """Standard deviation of the ratio of a run, from its components (runs × 3, or to be broadcast)."""
    run, step, constant = np.moveaxis(components, -1, 0)
    return np.asarray(np.sqrt(run + step / steps + constant * fixed**2))


def _fit_leverage(u: Floats, spread: Floats, steps: Floats, owner: Integers, n_keys: int) -> tuple[Floats, Floats]:
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
