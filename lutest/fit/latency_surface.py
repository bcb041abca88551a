"""Conditional quantiles of latencies over keys and lengths, each key borrowing strength from the others.

The estimator is a location-scale model of the logarithm of a latency, which makes it indifferent to units::

    log t = f(length, key) + u_key(length) + scale_key · e

``f`` is a smooth function that all keys share (log-polynomials and their interactions, or splines), ``u_key`` a
smooth deviation of the key, shrunk towards zero by empirical Bayes (Robinson 1991; Laird and Ware 1982), both fitted
with Student-t weights, so that outliers count little (Lange, Little and Taylor 1989). Which ``f`` and how supple a
``u_key`` is decided by cross-validation over runs. The quantiles are those of residuals of runs that the fit has not
seen: per key a shrunk scale, then quantile regression (Koenker and Bassett 1978) of the scaled residuals on length and
key, then a shift that makes the cross-validated coverage right (conformalised quantile regression, Romano, Patterson
and Candès 2019). A key of few runs has its spread widened by what is not known of its own deviation.

References
----------
R. Koenker and G. Bassett (1978), Regression quantiles, Econometrica 46.
D. R. Hunter and K. Lange (2000), Quantile regression via an MM algorithm, J. Comput. Graph. Stat. 9.
N. M. Laird and J. H. Ware (1982), Random-effects models for longitudinal data, Biometrics 38.
K. L. Lange, R. J. A. Little and J. M. G. Taylor (1989), Robust statistical modeling using the t distribution, JASA 84.
G. K. Robinson (1991), That BLUP is a good thing, Statistical Science 6.
Y. Romano, E. Patterson and E. Candès (2019), Conformalized quantile regression, NeurIPS 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .curve_shapes import KeyFunction
from .latency_centre import chosen_model, fit_location
from .latency_spread import fit_spread
from .observations import FOLDS, Observations

__all__ = ["Surface", "fit_centre", "fit_surface"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Surface:
    """Fitted quantiles: ``surface.log_ms(key, place)`` has one row a place and one column a quantile."""

    location: KeyFunction
    spread: KeyFunction

    def log_ms(self, key: Integers, place: Floats) -> Floats:
        """Logarithms of the latency's quantiles, shape (n, quantiles), ascending in each row."""
        return self.location(key, place)[:, None] + self.spread(key, place)


def fit_centre(data: Observations) -> KeyFunction:
    """Fit the centre of the logarithm of a latency alone, as a function of key and place.

    Parameters
    ----------
    data : Observations
        At least one observation of every key.

    Returns
    -------
    callable
        (key, place) → centre of log t, shape (n,).
    """
    return fit_location(data, *chosen_model(data)).centre


def fit_surface(data: Observations, quantiles: Sequence[float]) -> Surface:
    """Fit quantiles of a latency over places for every key.

    Parameters
    ----------
    data : Observations
        At least one observation of every key.
    quantiles : sequence of float
        Levels in (0, 1), ascending.

    Returns
    -------
    Surface
    """
    model, start = chosen_model(data)
    location = fit_location(data, model, start)
    unseen, doubt = np.empty(len(data.place)), np.empty(len(data.place))
    for fold in range(FOLDS):
        held = data.fold == fold
        if held.any():
            partial = location if held.all() else fit_location(data.rows(~held), model, location.state, iterations=4)
            unseen[held] = data.log_ms[held] - partial.centre(data.key[held], data.place[held])
            doubt[held] = partial.doubt(data.key[held], data.place[held])
    spread = fit_spread(data, unseen / doubt, quantiles)

    def widened(key: Integers, place: Floats) -> Floats:
        return np.asarray(spread(key, place) * location.doubt(key, place)[:, None])

    return Surface(location.centre, widened)
