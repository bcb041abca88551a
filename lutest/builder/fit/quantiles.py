"""Quantiles: of weighted samples, near a place, by linear regression; and shrinkage of estimates of many keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize

from lutest.builder.fit.observations import Floats, Integers

_EXACT_ROWS = 200  # above, an LP costs more than it gains
_NEIGHBOURS = 150  # runs that a local quantile rests on, where there are as many
_TAIL_RUNS = 10  # runs that an exponential tail rests on
_MADE_UP = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # observations that what all groups share may count for in each
# Standard errors over groups by which they must lower the loss: at half of it calm groups follow their own chance, at
# twice as much the tail of ten runs a group is that of all.
_CLEAR = 0.5
_LEAST_OWN = 1e-9  # share of its own that is left where a group follows the shared quantile
_ATOMS = 200  # places that stand for the distribution of all


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
    excess: Floats,
    apart: Floats,
    group: Integers,
    weights: Floats,
    cost: Floats,
    fold: Integers,
    scale: Floats,
    levels: Sequence[float] | Floats,
) -> tuple[Floats, Floats]:
    """Shifts of each group's quantiles against those that all groups share, as far as its own sample earns them.

    Parameters
    ----------
    excess : ndarray, shape (n, levels)
        What each observation lies beyond the shared quantiles.
    apart : ndarray, shape (folds, n, levels)
        The same by fits without each fold.
    group, fold : ndarray of int, shape (n,)
        `group` ascends.
    weights : ndarray, shape (places, n)
        Weight of an observation at each place.
    cost : ndarray, shape (n,)
        What a unit of the excess is worth.
    scale : ndarray, shape (groups,)
        Size of the noise of each group.
    levels : sequence of float

    Returns
    -------
    shifts, errors : ndarray, shape (groups, places, levels)
        The shifts, and the standard errors of the quantiles; NaN where all observations are in one fold.

    Notes
    -----
    The noise of a group is a Dirichlet process round that of all, in units of `scale`: its quantile is that of its own
    observations and of n0 made-up ones, spread like those of all (Ferguson 1973). Distributions are mixed, not
    quantiles: noise may have several modes, and between two of them no run lies. A level's n0 has the least
    cross-validated pinball loss, relative to each group's loss by the shared quantile, which is one of the choices.
    The standard error is sqrt(q (1 - q) / n) times the slope of the quantile over the level (Siddiqui 1960), n the
    observations, own and made up.

    References
    ----------
    T. S. Ferguson (1973), A Bayesian analysis of some nonparametric problems, Annals of Statistics 1.
    M. M. Siddiqui (1960), Distribution of quantiles in samples from a bivariate population, J. Res. NBS 64B.
    """
    n_groups, folds = len(scale), np.unique(fold)
    shifts = np.zeros((n_groups, len(weights), len(levels)))
    errors = np.full_like(shifts, np.nan)
    if len(folds) < 2:
        return shifts, errors
    for column, q in enumerate(levels):
        beyond = np.empty(len(group))
        for number in folds:
            beyond[fold == number] = apart[number, fold == number, column]
        loss = np.zeros((len(_MADE_UP) + 1, n_groups))
        for number in folds:
            held = fold == number
            for weight in weights:
                own = _MixedQuantiles(apart[number, ~held, column], beyond[~held], group[~held], weight[~held], scale)
                for row, made_up in enumerate((*_MADE_UP, np.inf)):
                    left = beyond[held] - own.at(made_up, q)[group[held]]
                    worth = weight[held] * cost[held] * np.maximum(q * left, (q - 1) * left)
                    loss[row] += np.bincount(group[held], worth, n_groups)
        relative = loss / np.maximum(loss[-1], 1e-300)
        best = relative.sum(axis=1).argmin()
        gain = 1 - relative[best]
        clear = gain.mean() > _CLEAR * gain.std() / np.sqrt(n_groups)
        made_up = _MADE_UP[best] if clear and best < len(_MADE_UP) else np.inf
        for place, weight in enumerate(weights):
            own = _MixedQuantiles(excess[:, column], beyond, group, weight, scale)
            shifts[:, place, column] = own.at(made_up, q)
            errors[:, place, column] = own.error(made_up, q)
    return shifts, errors


class _MixedQuantiles:
    """Quantiles of each group's own sample and made-up observations together, sorted once for all their numbers."""

    def __init__(self, own: Floats, beyond: Floats, group: Integers, weight: Floats, scale: Floats) -> None:
        grid = (np.arange(_ATOMS) + 0.5) / _ATOMS
        scaled = beyond / scale[group]
        order = np.argsort(scaled, kind="stable")
        mass = weight[order]
        atoms = np.interp(grid, (np.cumsum(mass) - mass / 2) / mass.sum(), scaled[order])
        n_groups = len(scale)
        value = np.concatenate([own, (atoms * scale[:, None]).ravel()])
        of = np.concatenate([group, np.repeat(np.arange(n_groups), _ATOMS)])
        order = np.lexsort([value, of])
        self._value, self._group, self._n_groups = value[order], of[order], n_groups
        self._own = np.concatenate([weight, np.zeros(n_groups * _ATOMS)])[order]
        self._made_up = np.concatenate([np.zeros(len(own)), np.full(n_groups * _ATOMS, 1 / _ATOMS)])[order]

    def at(self, made_up: float, q: float) -> Floats:
        """Quantile of each group with that many made-up observations; zero with nothing else."""
        if made_up == np.inf:
            return np.zeros(self._n_groups)
        return self._quantile(made_up, q)

    def error(self, made_up: float, q: float) -> Floats:
        """Standard error of that quantile."""
        sizes = np.bincount(self._group, self._own, self._n_groups)
        # No more made-up ones than were tried: that a group is like all others is known to no more than that.
        n = sizes + np.minimum(min(made_up, _MADE_UP[-1]), sizes.sum() - sizes)
        half = min(q, 1 - q) / 2
        likes = min(made_up, 1 / _LEAST_OWN)
        slope = (self._quantile(likes, q + half) - self._quantile(likes, q - half)) / (2 * half)
        return np.asarray(slope * np.sqrt(q * (1 - q) / np.maximum(n, 1.0)))

    def _quantile(self, made_up: float, q: float) -> Floats:
        mass = self._own + made_up * self._made_up
        total = np.bincount(self._group, mass, self._n_groups)
        middle = np.cumsum(mass) - mass / 2 - (np.cumsum(total) - total)[self._group]
        # Groups side by side, each in its own unit of the axis.
        rank = np.clip(middle / total[self._group], 0.0, 1.0) * (1 - 1e-9) + self._group
        return np.asarray(np.interp(np.arange(self._n_groups) + q, rank, self._value))


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
