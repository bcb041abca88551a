"""The mixed model of decode steps: a part that all keys share, each key's own, and Student's noise, solved by EM."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from lutest.builder.fit.observations import Flags, Floats, Integers

FREEDOM = 4.0  # of Student's t: subtraction has heavy tails, and normal noise costs it little efficiency
ITERATIONS = 100
TOLERANCE = 1e-3  # of a step's standard error
SETTLED = 0.01  # relative change of the noise between iterations
LEAST_NOISE = 1e-5  # of a step: below the resolution of a clock, and it keeps the equations well conditioned
LEAST_SHARE = 0.1  # of the step pooled over keys: no step falls below
# Spreads between keys to start from; the data move them, as PRIOR_KEYS keys of this spread stand beside the measured
# ones. Relative to the step: its level, its tilt and its bend over the key's KV lengths; offset as a share of prefill.
SPREADS = np.array([0.03, 0.01, 0.01, 0.02])
PRIOR_KEYS = 1.0
PRIOR_RUNS = 10.0  # runs that the noise pooled over keys counts for in the noise of a key
# Standard deviations of the prior of the pooled part: level (next to none), its change with each column of the
# structure, with KV length (if it were proportional: 1), and the mean offset as a share of prefill.
LEVEL_DEVIATION, STRUCTURE_DEVIATION, SLOPE_DEVIATION, OFFSET_DEVIATION = 10.0, 1.0, 0.5, 0.1


@dataclass(frozen=True)
class RunTotals:
    """Runs sorted by key, their times in units of `level_ms`."""

    key_ids: Integers
    level_ms: float
    starts: Integers  # first run of each key
    code: Integers  # key of each run
    prompt: Integers
    steps: Floats
    mean_kv: Floats
    value: Floats
    censored: Flags
    subtracted: Floats  # median prefill of the key where decode was left by subtraction; 0 where it is of one pass
    centre: Floats  # of the key's KV lengths
    reach: Floats  # their standard deviation
    middle: float  # of all KV lengths
    structure: Floats  # per key: 1, its last number, the others, their products with the last; see _structure

    @property
    def slices(self) -> list[slice]:
        """Where the runs of each key stand."""
        ends = np.append(self.starts[1:], len(self.steps))
        return [slice(int(start), int(end)) for start, end in zip(self.starts, ends, strict=True)]


@dataclass(frozen=True)
class StepFit:
    """The mixed model: pooled part and each key's own, with their covariances, and the noise."""

    pooled: Floats
    own: Floats
    base: Floats
    covariance: Floats
    inverses: Floats
    gains: Floats
    scale: Floats
    spread: float


def fit_steps(runs: RunTotals) -> StepFit:
    """Fit the model by expectation–maximisation; see `lutest.builder.fit`."""
    slices, code, steps = runs.slices, runs.code, runs.steps
    pooled_columns = shared_columns(runs, code, runs.mean_kv) * steps[:, None]
    pooled_columns[:, -1] = runs.subtracted
    shape = _own_columns(runs)
    n_keys, n_own, n_pooled = len(slices), shape.shape[1], pooled_columns.shape[1]
    at_centre = shared_columns(runs, np.arange(n_keys), runs.centre)
    counts = np.bincount(code)
    floor = (LEAST_NOISE * (1 + steps)) ** 2
    structures = [STRUCTURE_DEVIATION] * (n_pooled - 3)
    prior = np.array([LEVEL_DEVIATION, *structures, SLOPE_DEVIATION, OFFSET_DEVIATION]) ** 2
    spreads = SPREADS**2
    pooled, own, base = np.eye(n_pooled)[0], np.zeros((n_keys, n_own)), np.ones(n_keys)
    parts, key_noise = np.full(3, 0.1**2), np.ones(n_keys)
    inverses, gains = np.empty((n_keys, n_own, n_own)), np.empty((n_keys, n_own, n_pooled))
    loads = np.empty((n_keys, n_own))
    columns = np.column_stack([shape, pooled_columns])
    mean, doubt = steps.copy(), np.zeros(len(steps))
    previous = np.zeros(n_keys)
    for _ in range(ITERATIONS):
        tau = base[code]
        columns[:, :3] = shape[:, :3] * tau[:, None]
        terms = np.column_stack([runs.subtracted**2, tau**2 * steps, (tau * steps) ** 2])
        noise = terms @ parts + floor
        variance = noise * key_noise[code]
        weight, target, square = _expect(runs.value, mean, np.sqrt(variance), runs.censored)
        precision = weight / variance
        left, right = np.diag(1 / prior), np.zeros(n_pooled)
        # Solved for what departs from one step of `level_ms`, so that rounding is small beside that.
        departure = target - steps
        for k, rows in enumerate(slices):
            weighted = columns[rows].T * precision[rows]
            gram, load = weighted @ columns[rows], weighted @ departure[rows]
            inverses[k] = np.linalg.inv(gram[:n_own, :n_own] + np.diag(1 / spreads))
            gains[k] = inverses[k] @ gram[:n_own, n_own:]
            loads[k] = inverses[k] @ load[:n_own]
            left += gram[n_own:, n_own:] - gram[n_own:, :n_own] @ gains[k]
            right += load[n_own:] - gram[n_own:, :n_own] @ loads[k]
        covariance = np.asarray(np.linalg.inv(left), dtype=np.float64)
        pooled = covariance @ right
        own = loads - gains @ pooled
        pooled[0] += 1.0
        for k, rows in enumerate(slices):
            mean[rows] = columns[rows] @ np.concatenate([own[k], pooled])
            apart = columns[rows, n_own:] - columns[rows, :n_own] @ gains[k]
            doubt[rows] = quadratic(columns[rows, :n_own], inverses[k]) + quadratic(apart, covariance)
        own_variance = np.einsum("kii->ki", inverses) + np.einsum("kij,jl,kil->ki", gains, covariance, gains)
        spreads = ((own**2 + own_variance).sum(axis=0) + PRIOR_KEYS * SPREADS**2) / (n_keys + PRIOR_KEYS)
        prior[-2] = min(pooled[-2] ** 2 + covariance[-2, -2], SLOPE_DEVIATION**2)
        squares = square * variance + weight * doubt
        parts_before = parts
        parts = _parts(terms / noise[:, None], squares / key_noise[code] / noise)
        key_noise = np.add.reduceat(squares / (terms @ parts + floor), runs.starts)
        key_noise = (key_noise + PRIOR_RUNS) / (counts + PRIOR_RUNS)
        apart = at_centre - base[:, None] * gains[:, 0]
        error = np.sqrt(base**2 * inverses[:, 0, 0] + quadratic(apart, covariance))
        level = at_centre @ pooled + base * own[:, 0]
        settled = abs(parts.sum() - parts_before.sum()) <= SETTLED * parts.sum() + LEAST_NOISE**2
        if settled and np.all(np.abs(level - previous) < TOLERANCE * error):
            break
        previous = level
        base = np.maximum(at_centre @ pooled, LEAST_SHARE)
    spread = _spread(terms, parts, squares / key_noise[code])
    return StepFit(pooled, own, base, covariance, inverses, gains, np.sqrt(variance), spread)


def shared_columns(runs: RunTotals, code: Integers, kv_len: Floats) -> Floats:
    """Coefficients of the pooled part for one step of keys `code` at `kv_len`; none of the offset."""
    structure = runs.structure[code]
    # KV cache is read once per block: the slope goes with what repeats the work.
    slope = (1 + structure[:, 1]) * (kv_len / runs.middle - 1)
    return np.column_stack([structure, slope, np.zeros(len(code))])


def _own_columns(runs: RunTotals) -> Floats:
    """Coefficients per run of a key's own level, tilt and bend, all relative to its base, and offset."""
    centre, reach = runs.centre[runs.code], runs.reach[runs.code]
    first = np.maximum(runs.prompt + 1, centre)
    last = runs.prompt + runs.steps
    beyond = np.maximum(last - first + 1, 0) * ((first + last) / 2 - centre)
    tilt = runs.steps * (runs.mean_kv - centre)
    return np.column_stack([runs.steps, tilt / reach, beyond / reach, runs.subtracted])


def quadratic(rows: Floats, matrix: Floats) -> Floats:
    """Row by row, ``r·M·r``; not below zero, where rounding would leave it."""
    product: Floats = np.maximum(np.einsum("ij,ij->i", rows @ matrix, rows), 0.0)
    return product


def _parts(shares: Floats, squares: Floats) -> Floats:
    """Non-negative least squares by the normal equations, of which there are only as many as columns."""
    gram = shares.T @ shares
    size = np.sqrt(np.diag(gram))
    size[size == 0] = 1.0
    root = np.linalg.cholesky(gram / np.outer(size, size) + 1e-9 * np.eye(len(size)))
    found, _ = optimize.nnls(root.T, np.linalg.solve(root, shares.T @ squares / size))
    parts: Floats = found / size
    return parts


def _expect(value: Floats, mean: Floats, scale: Floats, censored: Flags) -> tuple[Floats, Floats, Floats]:
    """Weight, stand-in for the value, and weighted squared deviation of each run under Student's t, given what is seen.

    With u = (ν + 1) / (ν + z²), those of a censored run are expectations of u, u·z and u·z² over z below the limit.
    """
    z = (value - mean) / scale
    weight = (FREEDOM + 1) / (FREEDOM + z**2)
    square = weight * z**2
    target = value.copy()
    limit = z[censored]
    if limit.size:
        below = special.stdtr(FREEDOM, limit)
        norm = np.exp(special.gammaln((FREEDOM + 1) / 2) - special.gammaln(FREEDOM / 2)) / np.sqrt(FREEDOM * np.pi)
        density = norm * (1 + limit**2 / FREEDOM) ** (-(FREEDOM + 1) / 2)
        weight[censored] = special.stdtr(FREEDOM + 2, limit * np.sqrt((FREEDOM + 2) / FREEDOM)) / below
        target[censored] = mean[censored] - scale[censored] * density / below / weight[censored]
        square[censored] = FREEDOM + 1 - FREEDOM * weight[censored]
    return weight, target, square


def _spread(terms: Floats, parts: Floats, squares: Floats) -> float:
    """Scale of a single step on the log scale, from the variance of runs in terms of prefill, steps and run.

    `squares` has the squared deviation of each run, weighted against outliers.
    """
    noise = terms @ parts + LEAST_NOISE**2
    short = terms[:, 2] <= np.median(terms[:, 2])
    if np.median(parts[0] * terms[short, 0] / noise[short]) < 0.5:
        return float(np.sqrt(parts[1] + parts[2]))
    shared = np.column_stack([terms[:, 0], (terms[:, 1] + terms[:, 2]) / 2])
    return float(np.sqrt(_parts(shared / noise[:, None], squares / noise)[1]))
