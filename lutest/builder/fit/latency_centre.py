"""Centre of the logarithm of a latency: a shape that all keys share plus each key's own deviation, shrunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lutest.builder.fit.curve_shapes import KeyFunction, own_shape, shared_shape
from lutest.builder.fit.observations import FOLDS, Observations
from lutest.builder.fit.quantile_regression import weighted_quantile

__all__ = ["FitState", "Location", "Model", "chosen_model", "fit_location"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

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
    """Centre of log t; the variance that not knowing a key's own deviation leaves, beside that of a run; the state."""

    centre: KeyFunction
    doubt: KeyFunction
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
    Model("tiered", 3),
    Model("spline", 3),
    Model("spline", 6),
)


def chosen_model(data: Observations) -> tuple[Model, FitState | None]:
    limit = max(30, _SELECTION_ROWS // len(data.tiers))
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
                partial = fit_location(sample.rows(~held), model, state, iterations=4).centre
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
    """Centre of log t by the EM algorithm for a mixed model with t-distributed errors."""
    shared, own = shared_shape(data, model.shared), own_shape(data, model.own)
    x, z = shared(data.key, data.place), own(data.key, data.place)
    n_keys, n_shared, n_own = len(data.tiers), x.shape[1], z.shape[1]
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
    worth = data.weight.sum()
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
        variance = max(float((mass * factor * residual**2).sum() / worth), _LEAST_SCALE**2)
    common = common / np.where(length > 0, length, 1)

    def location(key: Integers, place: Floats) -> Floats:
        centre = shift + shared(key, place) @ common
        return np.asarray(centre + np.einsum("nd,nd->n", own(key, place), deviation[key]))

    def doubt(key: Integers, place: Floats) -> Floats:
        z = own(key, place)
        doubtful = np.einsum("nd,nde,ne->n", z, posterior[key], z)
        # A t-distributed error has more variance than its squared scale.
        return np.asarray(doubtful * (_DEGREES_OF_FREEDOM - 2) / _DEGREES_OF_FREEDOM)

    return Location(location, doubt, FitState(variance, own_variance))
