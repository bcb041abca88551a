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

from lutest.builder.fit.curve_shapes import KeyFunction
from lutest.builder.fit.latency_centre import chosen_model, fit_location
from lutest.builder.fit.latency_spread import fit_spread
from lutest.builder.fit.observations import FOLDS, Observations
from lutest.builder.fit.quantile_regression import weighted_quantile

__all__ = ["Surface", "fit_centre", "fit_surface"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_LEAST_SHARE = 0.25  # of the typical deviation of unseen runs: the least that a run's own deviation is taken for
_WIDEST, _WIDEST_AT_LEAST = 3.0, 2.0  # times the largest deviation of an unseen run, and a factor of e²


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
    unseen, doubt, variance = (np.empty(len(data.place)) for _ in range(3))
    for fold in range(FOLDS):
        held = data.fold == fold
        if held.any():
            partial = location if held.all() else fit_location(data.rows(~held), model, location.state, iterations=4)
            unseen[held] = data.log_ms[held] - partial.centre(data.key[held], data.place[held])
            doubt[held] = partial.doubt(data.key[held], data.place[held])
            variance[held] = partial.state.variance
    # A fit with a coefficient for every run leaves no variance, and would make any doubt immense beside it.
    size = np.abs(unseen)
    least_variance = (_LEAST_SHARE * weighted_quantile(size, data.weight, 0.5)) ** 2
    widening = np.sqrt(1 + doubt / np.maximum(variance, least_variance))
    spread = fit_spread(data, unseen / widening, quantiles)
    own_variance = max(location.state.variance, least_variance)
    limit = max(_WIDEST * float(size.max()), _WIDEST_AT_LEAST)

    def widened(key: Integers, place: Floats) -> Floats:
        factor = np.sqrt(1 + location.doubt(key, place) / own_variance)
        return np.asarray(np.clip(spread(key, place) * factor[:, None], -limit, limit))

    return Surface(location.centre, widened)
