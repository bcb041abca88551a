"""Regressors over length and key: shapes that all keys share, and a key's own deviation from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from lutest.builder.fit.observations import Observations
from lutest.builder.fit.quantile_regression import weighted_quantile

__all__ = ["KeyFunction", "own_shape", "shared_shape"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
KeyFunction = Callable[[Integers, Floats], Floats]


def _hinges(values: Floats, count: int) -> Floats:
    return np.unique(np.quantile(values, (np.arange(count) + 1) / (count + 1)))


def shared_shape(data: Observations, name: str) -> KeyFunction:
    """Columns of a shape that all keys share, by its name: (key, place) → shape (n, p), the first column of ones."""
    log_place = np.log(data.place)
    centre, width = log_place.mean(), max(float(log_place.std()), 1e-9)
    sizes = data.sizes - data.sizes.mean(axis=0)
    tiers = (data.tiers[:, None] == np.unique(data.tiers)[1:]).astype(np.float64)
    hinges = (_hinges(log_place, 6) - centre) / width
    cost = _cost_model(data) if name == "cost" else None

    def columns(key: Integers, place: Floats) -> Floats:
        a = (np.log(place) - centre) / width
        k, b = sizes[key].T
        parts: list[Floats] = [np.ones_like(a)]
        if name != "level":
            parts += [a if cost is None else cost(key, place), k, b]
        if name in ("additive", "tiered", "spline"):
            parts += list(tiers[key].T)
        if name in ("quadratic", "tiered", "spline"):
            parts += [a * a, a * k, a * b, k * k, k * b, b * b]
        if name == "tiered":
            parts += [part for tier in tiers[key].T for part in (tier * a, tier * k, tier * b)]
        if name == "spline":
            parts += [np.maximum(a - hinge, 0) for hinge in hinges] + [a * a * k, a * a * b]
        return np.stack(parts, axis=1)

    return columns


def _cost_model(data: Observations) -> KeyFunction:
    """Logarithm of what a transformer's work says: vision, blocks and experts, each over the length and its square.

    The rates are not negative (non-negative least squares of relative errors, in which slow outliers count little).
    """
    top = float(data.place.max())
    top_k, blocks = np.exp(data.sizes - data.sizes.max(axis=0)).T
    tiers = (data.tiers[:, None] == np.unique(data.tiers)).astype(np.float64)

    def work(key: Integers, place: Floats) -> Floats:
        p, k, b = place / top, top_k[key], blocks[key]
        base = [np.ones_like(p), p, p * p]
        parts = [base[2], *(b * part for part in base), *(b * k * part for part in base[:2])]
        parts += [tier * part for tier in tiers[key].T for part in base[:2]]
        return np.stack(parts, axis=1)

    middle = weighted_quantile(data.log_ms, data.weight, 0.5)
    root = np.sqrt(data.weight)
    relative = work(data.key, data.place) * (root * np.exp(middle - data.log_ms))[:, None]
    triangle = np.asarray(np.linalg.qr(np.column_stack([relative, root]), mode="r"))
    rates = optimize.nnls(triangle[:, :-1], triangle[:, -1])[0]

    def log_cost(key: Integers, place: Floats) -> Floats:
        return np.asarray(np.log(np.maximum(work(key, place) @ rates, 1e-9)))

    return log_cost


def own_shape(data: Observations, count: int) -> KeyFunction:
    """Columns of a key's own deviation: a level, a slope, a bend, then finer ones, up to `count`."""
    log_place = np.log(data.place)
    n_keys = len(data.tiers)
    least, largest = np.full(n_keys, np.inf), np.full(n_keys, -np.inf)
    np.minimum.at(least, data.key, log_place)
    np.maximum.at(largest, data.key, log_place)
    absent = ~np.isfinite(least)
    least[absent] = largest[absent] = log_place.mean()
    half = float(np.median((largest - least) / 2))
    half = half if half > 1e-9 else 1.0
    centre = (least + largest) / 2
    reach = (largest - least) / 2 / half
    spots = np.linspace(-1, 1, max(count - 1, 2))[1:-1] if count > 3 else np.empty(0)

    def columns(key: Integers, place: Floats) -> Floats:
        # Frozen beyond the key's own range: nothing is known of its deviation there.
        z = np.clip((np.log(place) - centre[key]) / half, -reach[key], reach[key])
        parts = [np.ones_like(z), z, z * z][: min(count, 3)]
        parts += [np.abs(z - spot * reach[key]) for spot in spots]
        return np.stack(parts[:count], axis=1)

    return columns
