"""Quantiles: of weighted samples, near a place, by linear regression; and shrinkage of estimates of many keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize

from lutest.builder.fit.observations import Floats, Integers

__all__ = [
    "local_quantiles",
    "own_shifts",
    "quantile_regression",
    "shrink",
    "variance_between",
    "weighted_quantile",
    "weighted_quantiles",
]


_EXACT_ROWS = 200  # above, an LP costs more than it gains
_NEIGHBOURS = 150  # runs that a local quantile rests on, where there are as many
_TAIL_RUNS = 10  # runs that an exponential tail rests on


def weighted_quantile(values: Floats, weights: Floats, q: float) -> float:
    """Quantile of a weighted sample, linear between the middles of the weights.

    Parameters
    ----------
    values, weights : ndarray, shape (n,)
        Observations and their weights, not negative and not all zero.
    q : float
        Level in [0, 1].

    Returns
    -------
    float
        The quantile; the least or largest value where `q` lies outside the middles of the outermost weights.
    """
    order = np.argsort(values, kind="stable")
    mass = weights[order]
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    return float(np.interp(q, middle, values[order]))


def quantile_regression(design: Floats, response: Floats, q: float, weights: Floats | None = None) -> Floats:
    """Linear quantile regression.

    Parameters
    ----------
    design : ndarray, shape (n, p)
        Regressors, a column of ones among them if there is to be an intercept. Its rank may be less than p.
    response : ndarray, shape (n,)
        Observations.
    q : float
        Quantile level in (0, 1).
    weights : ndarray, shape (n,), optional
        Weight of each observation's pinball loss; 1 each if left out.

    Returns
    -------
    ndarray, shape (p,)
        Coefficients that minimise the weighted pinball loss: exactly, by linear programming (HiGHS), for few rows; to
        about a thousandth of the residuals' spread, by majorisation (Hunter and Lange 2000), for many.

    References
    ----------
    R. Koenker and G. Bassett (1978), Regression quantiles, Econometrica 46.
    D. R. Hunter and K. Lange (2000), Quantile regression via an MM algorithm, J. Comput. Graph. Stat. 9.
    """
    mass = np.ones(len(response)) if weights is None else weights
    if len(response) <= _EXACT_ROWS:
        exact = _linear_programme(design, response, q, mass)
        if exact is not None:
            return exact
    return _majorised(design, response, q, mass)


def _linear_programme(design: Floats, response: Floats, q: float, weights: Floats) -> Floats | None:
    n, p = design.shape
    cost = np.concatenate([np.zeros(p), q * weights, (1 - q) * weights])
    bounds = [(None, None)] * p + [(0, None)] * (2 * n)
    constraints = np.hstack([design, np.eye(n), -np.eye(n)])
    solution = optimize.linprog(cost, A_eq=constraints, b_eq=response, bounds=bounds, method="highs")
    return np.asarray(solution.x[:p], dtype=np.float64) if solution.status == 0 else None


def _majorised(design: Floats, response: Floats, q: float, weights: Floats) -> Floats:
    coefficients = np.linalg.lstsq(design, np.full(len(response), weighted_quantile(response, weights, q)), rcond=None)[
        0
    ]
    spread = weighted_quantile(np.abs(response - design @ coefficients), weights, 0.5)
    if spread <= 0:
        spread = float(np.average(np.abs(response - design @ coefficients), weights=weights))
    if spread <= 0:
        return np.asarray(coefficients)
    pull = (2 * q - 1) * (design.T @ weights)
    for _ in range(200):
        residual = response - design @ coefficients
        curved = design * (weights / (1e-3 * spread + np.abs(residual)))[:, None]
        step = np.linalg.lstsq(curved.T @ design, curved.T @ residual + pull, rcond=1e-12)[0]
        coefficients = coefficients + step
        if np.abs(design @ step).max() < 1e-4 * spread:
            break
    return np.asarray(coefficients)


def local_quantiles(at: Floats, values: Floats, places: Floats, levels: Floats) -> Floats:
    """Quantiles of `values` near each place (places × levels), tricube weights over the distance."""
    order = np.argsort(values, kind="stable")
    at, values = at[order], values[order]
    quantiles = np.empty((len(places), len(levels)))
    for number, place in enumerate(places):
        distance = np.abs(at - place)
        near = np.partition(distance, min(_NEIGHBOURS, len(at)) - 1)[min(_NEIGHBOURS, len(at)) - 1]
        reach = max(1.0, 1.5 * float(near))
        weight = np.clip(1 - (distance / reach) ** 3, 0, None) ** 3
        used = weight > 0
        quantiles[number] = weighted_quantiles(values[used], weight[used], levels)
    return quantiles


def weighted_quantiles(values: Floats, weight: Floats, levels: Floats) -> Floats:
    """Quantiles of weighted ascending values at ranks (n + 1) · q, an exponential tail beyond the sample."""
    total = weight.sum()
    effective = total**2 / np.sum(weight**2)
    rank = ((np.cumsum(weight) - weight / 2) / total * effective + 0.5) / (effective + 1)
    found = np.interp(levels, rank, values)
    for number, q in enumerate(levels):
        if q > rank[-1]:
            found[number] = max(values[-1], _tail(values, weight, rank, effective, q))
        elif q < rank[0]:
            found[number] = min(values[0], -_tail(-values[::-1], weight[::-1], 1 - rank[::-1], effective, 1 - q))
    return found


def _tail(values: Floats, weight: Floats, rank: Floats, effective: float, q: float) -> float:
    anchor = max(0.5, 1 - _TAIL_RUNS / (effective + 1))
    threshold = float(np.interp(anchor, rank, values))
    beyond = rank > anchor
    if not beyond.any():
        return threshold
    excess = float(np.sum(weight[beyond] * (values[beyond] - threshold)) / weight[beyond].sum())
    return threshold + excess * float(np.log((1 - anchor) / (1 - q)))


def own_shifts(
    excess: Floats, group: Integers, weight: Floats, fold: Integers, n_groups: int, levels: Sequence[float]
) -> Floats:
    """Shift of each group's quantiles (groups × levels) against those that all groups share.

    `excess` (n × levels) is what observations lie beyond the shared quantiles.
    """
    shifts = np.zeros((n_groups, len(levels)))
    for column, q in enumerate(levels):
        beyond, gain = excess[:, column], np.zeros(n_groups)
        for held in (fold == number for number in np.unique(fold)):
            if held.all():
                continue
            shift = _rank_shifts(beyond[~held], group[~held], weight[~held], n_groups, float(q))
            rest = beyond[held] - shift[group[held]]
            saved = np.maximum(q * beyond[held], (q - 1) * beyond[held]) - np.maximum(q * rest, (q - 1) * rest)
            gain += np.bincount(group[held], weight[held] * saved, n_groups)
        import os
        if os.environ.get("DBG"):
            print("gain", q, gain.sum(), np.sqrt(n_groups) * gain.std(), "rel", gain.sum() / (weight @ np.maximum(q * beyond, (q - 1) * beyond)))
        if gain.sum() > np.sqrt(n_groups) * gain.std():
            shifts[:, column] = _rank_shifts(beyond, group, weight, n_groups, float(q))
    return shifts


def _rank_shifts(excess: Floats, group: Integers, weight: Floats, n_groups: int, q: float) -> Floats:
    total = np.maximum(np.bincount(group, weight, n_groups), 1e-300)
    seen = total > 1e-200
    below = np.bincount(group, weight * (excess <= 0), n_groups) / total
    chance = q * (1 - q) / total
    between = variance_between(below[seen], chance[seen]) if seen.sum() > 1 else 0.0
    shifts = np.zeros(n_groups)
    if between == 0.0:
        return shifts
    order = np.lexsort([excess, group])
    parts = np.split(order, np.cumsum(np.bincount(group, minlength=n_groups))[:-1])
    sought = q + (below - q) * chance / (between + chance)
    for k in np.flatnonzero(seen):
        own, drawn = weighted_quantiles(excess[parts[k]], weight[parts[k]], np.array([q, sought[k]]))
        shifts[k] = np.clip(drawn, min(own, 0.0), max(own, 0.0))
    return shifts


def shrink(estimate: Floats, variance: Floats) -> Floats:
    """Empirical Bayes: estimates drawn to their mean as far as chance explains how they differ."""
    if len(estimate) < 2 or not np.all(variance > 0):
        return estimate
    between = variance_between(estimate, variance)
    mean = np.average(estimate, weights=1 / variance)
    return np.asarray(mean + (estimate - mean) * between / (between + variance))


def variance_between(estimate: Floats, variance: Floats, doubt: float = 0.0) -> float:
    """Variance between estimates beyond their own, by moments, `doubt` taken off the chi-squared statistic."""
    weight = 1 / variance
    mean = np.average(estimate, weights=weight)
    excess = np.sum(weight * (estimate - mean) ** 2) - (len(estimate) - 1) - doubt
    room = weight.sum() - np.sum(weight**2) / weight.sum()
    # One weight that dwarfs the others leaves no room: nothing can be told of a variance between them.
    return max(0.0, float(excess / room)) if room > 1e-9 * weight.sum() else 0.0
