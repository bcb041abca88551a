"""Quantiles: of weighted samples, near a place, by linear regression; and shrinkage of estimates of many keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize

from lutest.builder.fit.observations import Floats, Integers

_EXACT_ROWS = 200  # above, an LP costs more than it gains
_NEIGHBOURS = 150  # runs that a local quantile rests on, where there are as many
_TAIL_RUNS = 10  # runs that an exponential tail rests on
_CLEAR = 2.0  # standard errors over groups by which what is their own must lower the loss


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
        weight = local_weights(at, place)
        used = weight > 0
        quantiles[number] = weighted_quantiles(values[used], weight[used], levels)
    return quantiles


def local_weights(at: Floats, place: float) -> Floats:
    """Tricube weights over the distance from a place, as far as its neighbours reach and an octave at least."""
    distance = np.abs(at - place)
    count = min(_NEIGHBOURS, len(at)) - 1
    reach = max(1.0, 1.5 * float(np.partition(distance, count)[count]))
    return np.asarray(np.clip(1 - (distance / reach) ** 3, 0, None) ** 3)


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
    excess: Floats, group: Integers, weights: Floats, fold: Integers, n_groups: int, levels: Sequence[float] | Floats
) -> Floats:
    """Shifts of each group's quantiles against those that all groups share, where the groups differ.

    Parameters
    ----------
    excess : ndarray, shape (n, levels)
        What each observation lies beyond the shared quantiles.
    group : ndarray of int, shape (n,)
    weights : ndarray, shape (places, n)
        Weight of an observation at each place.
    fold : ndarray of int, shape (n,)
        Part of the cross-validation.
    n_groups : int
    levels : sequence of float

    Returns
    -------
    ndarray, shape (groups, places, levels)
        Zero where they do not clearly lower the cross-validated pinball loss of all levels together.

    Notes
    -----
    Noise may have several modes, and a mean of two quantiles may then lie where no run does. So it is the rank that is
    shrunk: where a share c of a group lies under the shared quantile of level q, the group's own quantile of level
    q + (c - q) · v / (b + v) is taken, v the sampling variance of c and b the variance of c between groups.
    """
    shifts = np.zeros((n_groups, len(weights), len(levels)))
    saved = np.zeros(n_groups)
    for column, q in enumerate(levels):
        order = np.lexsort([excess[:, column], group])
        beyond, owner, part, mass = excess[order, column], group[order], fold[order], weights[:, order]
        fall = np.zeros(n_groups)
        for held in (part == number for number in np.unique(fold)):
            for weight in mass:
                shift = _shrunk_by_rank(beyond[~held], owner[~held], weight[~held], n_groups, q)
                change = _pinball(beyond[held], q) - _pinball(beyond[held] - shift[owner[held]], q)
                fall += np.bincount(owner[held], weight[held] * change, n_groups)
        # Relative to its mean loss, so that a calm group says as much as a noisy one of as many observations.
        total = mass.sum(axis=0)
        mean = np.bincount(owner, total * _pinball(beyond, q), n_groups) / np.maximum(
            np.bincount(owner, total, n_groups), 1e-300
        )
        saved += fall / np.maximum(mean, 1e-300)
        for place, weight in enumerate(mass):
            shifts[:, place, column] = _shrunk_by_rank(beyond, owner, weight, n_groups, q)
    clear = saved.sum() > _CLEAR * np.sqrt(np.sum(saved**2))
    return shifts if clear else np.zeros_like(shifts)


def _pinball(residual: Floats, q: float) -> Floats:
    return np.maximum(q * residual, (q - 1) * residual)


def _shrunk_by_rank(excess: Floats, group: Integers, weight: Floats, n_groups: int, q: float) -> Floats:
    """Shift of each group, of observations sorted by group and excess."""
    shifts = np.zeros(n_groups)
    total = np.bincount(group, weight, n_groups)
    seen = np.flatnonzero(total > 1e-9)
    if len(seen) < 2:
        return shifts
    below = np.bincount(group, weight * (excess <= 0), n_groups)[seen] / total[seen]
    chance = q * (1 - q) / total[seen]
    between = variance_between(below, chance)
    if between == 0.0:
        return shifts
    bounds = np.searchsorted(group, np.arange(n_groups + 1))
    for k, rank in zip(seen, q + (below - q) * chance / (between + chance), strict=True):
        rows = np.arange(bounds[k], bounds[k + 1])
        rows = rows[weight[rows] > 0]
        own, drawn = weighted_quantiles(excess[rows], weight[rows], np.array([q, rank]))
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
