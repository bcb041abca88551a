"""Quantiles of weighted samples, isotonic sequences and linear quantile regression."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

__all__ = ["isotonic", "quantile_regression", "weighted_quantile"]

Floats = NDArray[np.float64]

_EXACT_ROWS = 200  # above, an LP costs more than it gains


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


def isotonic(values: Floats, weights: Floats) -> Floats:
    """Non-decreasing sequence nearest to `values` in weighted least squares (pool adjacent violators).

    Parameters
    ----------
    values, weights : ndarray, shape (n,)
        Sequence and positive weights.

    Returns
    -------
    ndarray, shape (n,)
    """
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            level, mass, count = blocks.pop()
            total = mass + block[1]
            block = ((level * mass + block[0] * block[1]) / total, total, count + block[2])
        blocks.append(block)
    return np.repeat([level for level, _, _ in blocks], [count for _, _, count in blocks])


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
