"""Location of the logarithm of a latency: a shape that all keys share plus a random effect of each key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

import numpy as np
from scipy import optimize

from lutest.builder.fit.observations import FOLDS, Floats, Integers, Observations
from lutest.builder.fit.quantiles import weighted_quantile

KeyFunction = Callable[[Integers, Floats], Floats]

_DEGREES_OF_FREEDOM = 4.0
_SELECTION_ROWS = 4000
_LEAST_SCALE = 1e-5  # of log t: a hundred-thousandth of the latency
_MOST_VARIANCE = 100.0  # of log t: latencies that differ by a factor of e to the tenth


@dataclass(frozen=True)
class Model:
    shared: str
    own: int


@dataclass(frozen=True)
class FitState:
    """Where a fit ended, and another one can start from."""

    variance: float
    own_variance: Floats


@dataclass(frozen=True)
class Location:
    """Location of log t; posterior variance of a key's random effect, beside the variance of a run; the state."""

    at: KeyFunction
    posterior_variance: KeyFunction
    state: FitState


# From the simplest on: at equal losses the simpler one is taken.
_MODELS = (
    Model("level", 1),
    Model("level", 3),
    Model("linear", 1),
    Model("additive", 1),
    Model("cost", 1),
    Model("cost", 3),
    Model("quadratic", 2),
    Model("crossed", 3),
    Model("spline", 3),
    Model("spline", 6),
)


def chosen_model(data: Observations) -> tuple[Model, FitState | None]:
    limit = max(30, _SELECTION_ROWS // len(data.key_ids))
    sample = data.rows(_rank(data.key) < limit)
    if len(np.unique(sample.fold)) < 2:
        return _MODELS[0], None
    best: tuple[float, Model, FitState | None] = (np.inf, _MODELS[0], None)
    for model in _MODELS:
        columns = shared_shape(sample, model.shared)(sample.key, sample.place)
        slopes = int((np.ptp(columns, axis=0) > 0).sum()) + model.own - 1
        if slopes and len(sample.place) < 2 * slopes + 3:
            continue
        state = fit_location(sample, model, None).state
        loss = 0.0
        for fold in range(FOLDS):
            held = sample.fold == fold
            if held.any():
                partial = fit_location(sample.rows(~held), model, state, iterations=4).at
                residual = sample.log_ms[held] - partial(sample.key[held], sample.place[held])
                loss += float(sample.weight[held] @ np.abs(residual))
        if loss < best[0] * (1 - 1e-9):
            best = (loss, model, state)
    return best[1], best[2]


def _rank(group: Integers) -> Integers:
    """Place of each row within its group, from 0; `group` ascends."""
    starts = np.flatnonzero(np.r_[True, np.diff(group) > 0])
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))


def fit_location(data: Observations, model: Model, start: FitState | None, iterations: int = 20) -> Location:
    """Location of log t by the EM algorithm for a mixed model with t-distributed errors."""
    shared, own = shared_shape(data, model.shared), own_shape(data, model.own)
    x, z = shared(data.key, data.place), own(data.key, data.place)
    n_keys, n_shared, n_own = len(data.key_ids), x.shape[1], z.shape[1]
    shift = weighted_quantile(data.log_ms, data.weight, 0.5)
    y = data.log_ms - shift
    total = max(float(np.average(y * y, weights=data.weight)), _LEAST_SCALE**2)
    # Columns of no length (a constant feature) would not be identified; the others get a prior as wide as the data.
    length = np.sqrt(np.mean(x * x, axis=0))
    x = x / np.where(length > 0, length, 1)
    prior = np.diag(np.r_[0.0, np.full(n_shared - 1, 1 / (9 * total))])
    # Keys padded to one length, so that their cross products are one batched product.
    rank = _rank(data.key)
    longest = int(rank.max()) + 1
    padded = np.zeros((n_keys, longest, n_shared + n_own + 1))
    mass = np.zeros((n_keys, longest))
    padded[data.key, rank] = np.column_stack([x, z, y])
    mass[data.key, rank] = data.weight
    variance = start.variance if start else total / 4
    own_variance = start.own_variance if start else np.full(n_own, total / 4)
    factor = np.ones_like(mass)
    common = np.zeros(n_shared)
    deviation = np.zeros((n_keys, n_own))
    total_weight = data.weight.sum()
    for _ in range(iterations):
        product = np.matmul(padded.transpose(0, 2, 1), padded * (factor * mass / variance)[:, :, None])
        xx, xz, xy = product[:, :n_shared, :n_shared], product[:, :n_shared, n_shared:-1], product[:, :n_shared, -1]
        zz, zy = product[:, n_shared:-1, n_shared:-1], product[:, n_shared:-1, -1]
        # Scaled by the prior, so that places without any spread leave a matrix that can be inverted.
        prior_scale = np.sqrt(np.minimum(own_variance, _MOST_VARIANCE))
        inverse = np.linalg.inv(np.eye(n_own) + prior_scale[:, None] * zz * prior_scale)
        posterior = prior_scale[:, None] * inverse * prior_scale
        projected = np.matmul(xz, posterior)
        left = xx.sum(axis=0) - np.einsum("gpd,gqd->pq", projected, xz) + prior
        right = xy.sum(axis=0) - np.einsum("gpd,gd->p", projected, zy)
        common = np.linalg.lstsq(left, right, rcond=1e-10)[0]
        deviation = np.einsum("gde,ge->gd", posterior, zy - np.einsum("gpd,p->gd", xz, common))
        residual = padded[:, :, -1] - padded[:, :, :n_shared] @ common
        residual -= np.einsum("grd,gd->gr", padded[:, :, n_shared:-1], deviation)
        second = deviation**2 + np.einsum("gdd->gd", posterior)
        own_variance = second.sum(axis=0) / (n_keys + 1)
        factor = (_DEGREES_OF_FREEDOM + 1) / (_DEGREES_OF_FREEDOM + residual**2 / variance)
        variance = max(float((mass * factor * residual**2).sum() / total_weight), _LEAST_SCALE**2)
    common = common / np.where(length > 0, length, 1)

    def location(key: Integers, place: Floats) -> Floats:
        common_part = shift + shared(key, place) @ common
        return np.asarray(common_part + np.einsum("nd,nd->n", own(key, place), deviation[key]))

    def posterior_variance(key: Integers, place: Floats) -> Floats:
        z = own(key, place)
        variances = np.einsum("nd,nde,ne->n", z, posterior[key], z)
        # A t-distributed error has more variance than its squared scale.
        return np.asarray(variances * (_DEGREES_OF_FREEDOM - 2) / _DEGREES_OF_FREEDOM)

    return Location(location, posterior_variance, FitState(variance, own_variance))


def _hinges(values: Floats, count: int) -> Floats:
    return np.unique(np.quantile(values, (np.arange(count) + 1) / (count + 1)))


def shared_shape(data: Observations, name: str) -> KeyFunction:
    """Columns of a shape that all keys share, by its name: (key, place) → shape (n, p), the first column of ones."""
    log_place = np.log(data.place)
    centre, width = log_place.mean(), max(float(log_place.std()), 1e-9)
    numbers = data.axes.scaled()
    numbers = numbers - numbers.mean(axis=1, keepdims=True)
    levels = data.axes.indicators(1)
    crossed = [pair for pair in (one * other for one, other in combinations(levels, 2)) if pair.any()]
    hinges = (_hinges(log_place, 6) - centre) / width
    cost = _cost_model(data) if name == "cost" else None

    def columns(key: Integers, place: Floats) -> Floats:
        a = (np.log(place) - centre) / width
        sizes = list(numbers[:, key])
        parts: list[Floats] = [np.ones_like(a)]
        if name != "level":
            parts += [a if cost is None else cost(key, place), *sizes]
        if name in ("additive", "crossed", "spline"):
            parts += list(levels[:, key])
        if name in ("quadratic", "crossed", "spline"):
            parts += [a * a, *(a * size for size in sizes)]
            parts += [one * other for one, other in combinations_with_replacement(sizes, 2)]
        if name == "crossed":
            parts += [part for level in levels[:, key] for part in (level * a, *(level * size for size in sizes))]
            parts += [pair[key] for pair in crossed]
        if name == "spline":
            parts += [np.maximum(a - hinge, 0) for hinge in hinges] + [a * a * size for size in sizes]
        return np.stack(parts, axis=1)

    return columns


def _cost_model(data: Observations) -> KeyFunction:
    """Logarithm of what a transformer's work says, over the length and its square.

    The last number of a key is what repeats the work (its blocks), the others scale a part of it (its experts), and
    each level of a category adds some of its own (its vision).
    The rates are not negative (non-negative least squares of relative errors, in which slow outliers count little).
    """
    top = float(data.place.max())
    scaled = data.axes.scaled()
    *factors, repeats = np.exp(scaled - scaled.max(axis=1, keepdims=True)) if len(scaled) else [np.ones(len(data.axes))]
    levels = data.axes.indicators(0)

    def work(key: Integers, place: Floats) -> Floats:
        p, b = place / top, repeats[key]
        base = [np.ones_like(p), p, p * p]
        parts = [base[2], *(b * part for part in base)]
        parts += [b * factor[key] * part for factor in factors for part in base[:2]]
        parts += [level * part for level in levels[:, key] for part in base[:2]]
        return np.stack(parts, axis=1)

    middle = weighted_quantile(data.log_ms, data.weight, 0.5)
    root = np.sqrt(data.weight)
    relative = work(data.key, data.place) * (root * np.exp(middle - data.log_ms))[:, None]
    triangle = np.asarray(np.linalg.qr(np.column_stack([relative, root]), mode="r"))
    try:
        rates = optimize.nnls(triangle[:, :-1], triangle[:, -1])[0]
    except RuntimeError:  # SciPy before 1.13 does not come to an end where columns are nearly the same
        rates = optimize.lsq_linear(triangle[:, :-1], triangle[:, -1], bounds=(0.0, np.inf)).x

    def log_cost(key: Integers, place: Floats) -> Floats:
        return np.asarray(np.log(np.maximum(work(key, place) @ rates, 1e-9)))

    return log_cost


def own_shape(data: Observations, count: int) -> KeyFunction:
    """Columns of a key's own deviation: a level, a slope, a bend, then finer ones, up to `count`."""
    log_place = np.log(data.place)
    n_keys = len(data.key_ids)
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
