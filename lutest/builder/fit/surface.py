"""Conditional quantiles of latencies over keys and lengths, each key borrowing strength from the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lutest.builder.fit.location import KeyFunction, chosen_model, fit_location, shared_shape
from lutest.builder.fit.observations import FOLDS, Floats, Integers, Observations
from lutest.builder.fit.quantiles import own_shifts, quantile_regression, weighted_quantile

_LEAST_SCALE = 1e-5  # of log t: a hundred-thousandth of the latency
_LEAST_SHARE = 0.25  # of the typical deviation of runs out of fold: the least that a run's own deviation is taken for
_WIDEST, _WIDEST_AT_LEAST = 3.0, 2.0  # times the largest deviation of a run out of fold, and a factor of e²


@dataclass(frozen=True)
class Surface:
    """Fitted quantiles: ``surface.log_ms(key, place)`` has one row a place and one column a quantile.

    So has `error`, their standard errors; `n_eff` are the effective numbers of independent observations of each key.
    """

    location: KeyFunction
    spread: KeyFunction
    error: KeyFunction
    n_eff: Floats

    def log_ms(self, key: Integers, place: Floats) -> Floats:
        """Logarithms of the latency's quantiles, shape (n, quantiles), ascending in each row."""
        return self.location(key, place)[:, None] + self.spread(key, place)


def fit_location_alone(data: Observations) -> KeyFunction:
    """Fit the location of the logarithm of a latency alone, as a function of key and place.

    Parameters
    ----------
    data : Observations
        At least one observation of every key.

    Returns
    -------
    callable
        (key, place) → location of log t, shape (n,).
    """
    return fit_location(data, *chosen_model(data)).at


def fit_surface(data: Observations, more: Observations, quantiles: Sequence[float]) -> Surface:
    """Fit quantiles of a latency over places for every key.

    Parameters
    ----------
    data : Observations
        What the location and the shared quantiles are fitted to: at least one observation of every key.
    more : Observations
        What each key's own quantiles are told by: as many as there are.
    quantiles : sequence of float
        Levels in (0, 1), ascending.

    Returns
    -------
    Surface
    """
    model, start = chosen_model(data)
    location = fit_location(data, model, start)
    out_of_fold, posterior_variance, variance = (np.empty(len(data.place)) for _ in range(3))
    apart = []
    for fold in range(FOLDS):
        held = data.fold == fold
        partial = location
        if held.any() and not held.all():
            partial = fit_location(data.rows(~held), model, location.state, iterations=4)
        out_of_fold[held] = data.log_ms[held] - partial.at(data.key[held], data.place[held])
        posterior_variance[held] = partial.posterior_variance(data.key[held], data.place[held])
        variance[held] = partial.state.variance
        apart.append(more.log_ms - partial.at(more.key, more.place))
    # A fit with a coefficient for every run leaves no variance, and would make any doubt immense beside it.
    size = np.abs(out_of_fold)
    least_variance = (_LEAST_SHARE * weighted_quantile(size, data.weight, 0.5)) ** 2
    widening = np.sqrt(1 + posterior_variance / np.maximum(variance, least_variance))
    scale = _key_scales(data, out_of_fold)
    spread = _fit_residual_quantiles(data, out_of_fold / widening, scale, quantiles)
    own_variance = max(location.state.variance, least_variance)
    limit = max(_WIDEST * float(size.max()), _WIDEST_AT_LEAST)

    def shared(key: Integers, place: Floats) -> Floats:
        factor = np.sqrt(1 + location.posterior_variance(key, place) / own_variance)
        return np.asarray(np.clip(spread(key, place) * factor[:, None], -limit, limit))

    expected = shared(more.key, more.place)
    found = own_shifts(
        (more.log_ms - location.at(more.key, more.place))[:, None] - expected,
        np.stack(apart)[:, :, None] - expected,
        more.key,
        more.weight[None],
        np.ones(len(more.place)),
        more.fold,
        scale,
        quantiles,
    )
    shifts, errors = (held[:, 0] for held in found)

    def spread_of(key: Integers, place: Floats) -> Floats:
        return np.asarray(np.sort(shared(key, place) + shifts[key], axis=1))

    def error(key: Integers, place: Floats) -> Floats:
        return np.asarray(np.sqrt(errors[key] ** 2 + location.posterior_variance(key, place)[:, None]))

    n_eff = np.bincount(more.key, more.weight, len(more.key_ids)).astype(np.float64)
    return Surface(location.at, spread_of, error, n_eff)


def _fit_residual_quantiles(
    data: Observations, out_of_fold: Floats, scale: Floats, quantiles: Sequence[float]
) -> KeyFunction:
    scaled = out_of_fold / scale[data.key]
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


def _key_scales(data: Observations, out_of_fold: Floats) -> Floats:
    """Mean absolute residual of each key, shrunk towards that of all by empirical Bayes."""
    n_keys = len(data.key_ids)
    size = np.abs(out_of_fold)
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
