"""Conditional quantiles of latencies over keys and lengths, each key borrowing strength from the others.

The estimator is a location-scale model of the logarithm of a latency, which makes it indifferent to units::

    log t = f(length, key) + u_key(length) + scale_key · e

``f`` is a smooth function that all keys share (log-polynomials and their interactions, or splines), ``u_key`` a
smooth deviation of the key, shrunk towards zero by empirical Bayes (Robinson 1991; Laird and Ware 1982), both fitted
with Student-t weights, so that outliers count little (Lange, Little and Taylor 1989). Which ``f`` and how supple a
``u_key`` is decided by cross-validation over runs. The quantiles are those of residuals of runs that the fit has not
seen: per key a shrunk scale, then quantile regression (Koenker and Bassett 1978) of the scaled residuals on length and
key, then a shift that makes the cross-validated coverage right (conformalised quantile regression, Romano, Patterson
and Candès 2019).

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

__all__ = [
    "Observations",
    "Surface",
    "fit_centre",
    "fit_surface",
    "isotonic",
    "quantile_regression",
    "weighted_quantile",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_EXACT_ROWS = 200  # above, an LP costs more than it gains
_FOLDS = 5
_DEGREES_OF_FREEDOM = 4.0
_SELECTION_ROWS = 4000
_LEAST_SCALE = 1e-5  # of log t: a hundred-thousandth of the latency
_MOST_VARIANCE = 100.0  # of log t: latencies that differ by a factor of e to the tenth


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


_Function = Callable[[Integers, Floats], Floats]


@dataclass(frozen=True)
class Observations:
    """Latencies at places, by key and run.

    Attributes
    ----------
    place : ndarray of float, shape (n,)
        prompt_tokens or kv_len, at least 1.
    log_ms : ndarray of float, shape (n,)
        Logarithm of the latency in milliseconds.
    key : ndarray of int, shape (n,)
        Row of `keys`; ascending.
    fold : ndarray of int, shape (n,)
        Part of the cross-validation; all observations of a run are in one.
    weight : ndarray of float, shape (n,)
        Worth of an observation; a run whose steps tell the same thing weighs less than their number.
    tiers : ndarray of int, shape (g,)
        Number of each key's tier.
    sizes : ndarray of float, shape (g, 2)
        Logarithms of each key's top_k and num_blocks.
    """

    place: Floats
    log_ms: Floats
    key: Integers
    fold: Integers
    weight: Floats
    tiers: Integers
    sizes: Floats

    def rows(self, chosen: NDArray[np.bool_]) -> Observations:
        """Those of the chosen rows."""
        parts = {name: getattr(self, name)[chosen] for name in ("place", "log_ms", "key", "fold", "weight")}
        return replace(self, **parts)


@dataclass(frozen=True)
class Surface:
    """Fitted quantiles: ``surface.log_ms(key, place)`` has one row a place and one column a quantile."""

    location: _Function
    spread: Callable[[Integers, Floats], Floats]

    def log_ms(self, key: Integers, place: Floats) -> Floats:
        """Logarithms of the latency's quantiles, shape (n, quantiles), ascending in each row."""
        return self.location(key, place)[:, None] + self.spread(key, place)


def fit_centre(data: Observations) -> Callable[[Integers, Floats], Floats]:
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
    return _fit_location(data, *_chosen_model(data)).centre


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
    model, start = _chosen_model(data)
    location = _fit_location(data, model, start)
    unseen, doubt = np.empty(len(data.place)), np.empty(len(data.place))
    for fold in range(_FOLDS):
        held = data.fold == fold
        if held.any():
            partial = location if held.all() else _fit_location(data.rows(~held), model, location.state, iterations=4)
            unseen[held] = data.log_ms[held] - partial.centre(data.key[held], data.place[held])
            doubt[held] = partial.doubt(data.key[held], data.place[held])
    spread = _fit_spread(data, unseen / doubt, quantiles)

    def widened(key: Integers, place: Floats) -> Floats:
        return np.asarray(spread(key, place) * location.doubt(key, place)[:, None])

    return Surface(location.centre, widened)


# --- location ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    shared: str
    own: int


@dataclass(frozen=True)
class _State:
    """Where a fit ended, and another one can start from."""

    variance: float
    own_variance: Floats


@dataclass(frozen=True)
class _Location:
    """Centre of log t; the factor by which not knowing a key's own deviation widens its spread; the state."""

    centre: _Function
    doubt: _Function
    state: _State


# From the simplest on: at equal losses the simpler one is taken.
_MODELS = (
    _Model("level", 1),
    _Model("level", 3),
    _Model("linear", 1),
    _Model("additive", 1),
    _Model("cost", 1),
    _Model("cost", 3),
    _Model("quadratic", 2),
    _Model("tiered", 3),
    _Model("spline", 3),
    _Model("spline", 6),
)


def _chosen_model(data: Observations) -> tuple[_Model, _State | None]:
    limit = max(30, _SELECTION_ROWS // len(data.tiers))
    sample = data.rows(_rank(data.key) < limit)
    if len(np.unique(sample.fold)) < 2:
        return _MODELS[0], None
    best: tuple[float, _Model, _State | None] = (np.inf, _MODELS[0], None)
    for model in _MODELS:
        columns = _shared_design(sample, model.shared)(sample.key, sample.place)
        slopes = int((np.ptp(columns, axis=0) > 0).sum()) + model.own - 1
        if slopes and len(sample.place) < 2 * slopes + 3:
            continue
        state = _fit_location(sample, model, None).state
        loss = 0.0
        for fold in range(_FOLDS):
            held = sample.fold == fold
            if held.any():
                partial = _fit_location(sample.rows(~held), model, state, iterations=4).centre
                residual = sample.log_ms[held] - partial(sample.key[held], sample.place[held])
                loss += float(sample.weight[held] @ np.abs(residual))
        if loss < best[0] * (1 - 1e-9):
            best = (loss, model, state)
    return best[1], best[2]


def _rank(group: Integers) -> Integers:
    """Place of each row within its group, from 0; `group` ascends."""
    starts = np.flatnonzero(np.r_[True, np.diff(group) > 0])
    return np.arange(len(group)) - np.repeat(starts, np.diff(np.r_[starts, len(group)]))


def _hinges(values: Floats, count: int) -> Floats:
    return np.unique(np.quantile(values, (np.arange(count) + 1) / (count + 1)))


def _shared_design(data: Observations, name: str) -> _Function:
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


def _cost_model(data: Observations) -> _Function:
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


def _own_design(data: Observations, count: int) -> _Function:
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


def _fit_location(data: Observations, model: _Model, start: _State | None, iterations: int = 20) -> _Location:
    """Centre of log t by the EM algorithm for a mixed model with t-distributed errors."""
    shared, own = _shared_design(data, model.shared), _own_design(data, model.own)
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
        return np.asarray(np.sqrt(1 + doubtful * (_DEGREES_OF_FREEDOM - 2) / (_DEGREES_OF_FREEDOM * variance)))

    return _Location(location, doubt, _State(variance, own_variance))


# --- spread -----------------------------------------------------------------------------------------------------------


def _fit_spread(data: Observations, unseen: Floats, quantiles: Sequence[float]) -> Callable[[Integers, Floats], Floats]:
    scale = _key_scales(data, unseen)
    scaled = unseen / scale[data.key]
    design = {name: _shared_design(data, name) for name in ("level", "linear")}
    effective = data.weight.sum()
    fits: list[tuple[str, Floats, float]] = []
    for q in quantiles:
        options: list[tuple[float, str, Floats]] = []
        for name, columns in design.items():
            x = columns(data.key, data.place)
            beyond = np.empty(len(scaled))
            for fold in range(_FOLDS):
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


def _key_scales(data: Observations, unseen: Floats) -> Floats:
    """Mean absolute residual of each key, shrunk towards that of all by empirical Bayes."""
    n_keys = len(data.tiers)
    size = np.abs(unseen)
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
