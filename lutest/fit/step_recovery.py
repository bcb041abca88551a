"""Decode step over KV length, recovered from runs of which only the sum of the steps is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize, special

from ..schema import KEY_COLUMNS, quantile_column

__all__ = ["identify", "recover_step_curve"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

KEYS = list(KEY_COLUMNS)
FREEDOM = 4.0  # of Student's t: subtraction has heavy tails, and normal noise costs it little efficiency
ITERATIONS = 100
TOLERANCE = 1e-3  # of a step's standard error
SETTLED = 0.01  # relative change of the noise between iterations
LEAST_NOISE = 1e-5  # of a step: below the resolution of a clock, and it keeps the equations well conditioned
LEAST_SHARE = 0.1  # of the step pooled over keys: no step falls below
FEW_RUNS, LARGEST_SPREAD = 10, 0.15  # with fewer informative runs in all, the spread of a step is hardly known
INFORMATIVE = 2.0  # a run says something of its key's step when its decode is this many times its noise
# Spreads between keys to start from; the data move them, as PRIOR_KEYS keys of this spread stand beside the measured
# ones. Relative to the step: its level, its tilt and its bend over the key's KV lengths; offset as a share of prefill.
SPREADS = np.array([0.03, 0.01, 0.01, 0.02])
PRIOR_KEYS = 1.0
PRIOR_RUNS = 10.0  # runs that the noise pooled over keys counts for in the noise of a key
# Standard deviations of the prior of the pooled part: level (next to none), its change with blocks, experts and both,
# with KV length (if it were proportional: 1), and the mean offset as a share of prefill.
POOLED_DEVIATIONS = np.array([10.0, 1.0, 1.0, 1.0, 0.5, 0.1])
SLOPE = 4


@dataclass(frozen=True)
class _Runs:
    """Runs sorted by key, their times in units of `level_ms`."""

    keys: pd.DataFrame
    level_ms: float
    starts: Integers  # first run of each key
    code: Integers  # key of each run
    prompt: Integers
    steps: Floats
    mean_kv: Floats
    value: Floats
    censored: Flags
    prefill: Floats  # median of the key
    centre: Floats  # of the key's KV lengths
    reach: Floats  # their standard deviation
    middle: float  # of all KV lengths
    structure: Floats  # per key: 1, blocks, experts, both; relative to the middle of their ranges


@dataclass(frozen=True)
class _Fit:
    """The mixed model: pooled part and each key's own, with their covariances, and the noise."""

    pooled: Floats
    own: Floats
    base: Floats
    covariance: Floats
    inverses: Floats
    gains: Floats
    scale: Floats
    spread: float


def recover_step_curve(run_sample: pd.DataFrame, quantiles: Sequence[float]) -> pd.DataFrame:
    """Fit the decode step over KV length to run totals.

    Parameters
    ----------
    run_sample : DataFrame
        Runs as the aggregation writes them; those with ``timed`` set are not read.
    quantiles : sequence of float
        Levels, ascending, each in (0, 1).

    Returns
    -------
    DataFrame
        ``tier, top_k, num_blocks, kv_len, n, pXX_ms …, source``: two or three knots per key that has untimed runs of
        two tokens or more, from the least to the largest KV length that its runs covered. ``source`` is
        ``interpolated``, or ``extrapolated`` for a key whose own runs say next to nothing, so that its curve is that
        of the other keys.

    Notes
    -----
    A run of ``n`` tokens after a prompt of ``p`` is modelled as ``decode_ms = offset + Σ τ(p + i) + noise``, i from 1
    to n − 1. τ is a straight line over KV length that all keys share, its level linear in blocks, experts and their
    product and its slope in blocks, plus each key's own deviation in level, tilt and bend. The offset is a share of
    prefill with a deviation per key. It is told from τ by the one-token runs and by the intercept over n. Deviations
    are shrunken as far as the data say that keys are alike (mixed-model equations, Henderson 1975; variances by
    expectation–maximisation, Dempster, Laird and Rubin 1977), and so is the slope itself, so that a slope that cannot
    be told from zero becomes zero (MacKay 1992).

    Noise is Student's t (Lange, Little and Taylor 1989), its variance a sum of the subtraction's (∝ prefill²), the
    steps' (∝ n − 1) and the run's (∝ (n − 1)²), times a factor per key. A clamped zero stands for "anything below
    zero" (Tobit 1958), unless a total of its own measurement tells the difference before clamping.

    A total says nothing of the skewness of its steps: the P50 step is the location of symmetric noise, which for a
    run is its total's median per step. The spread of a step is that of the run and the steps together on the log
    scale. Where the subtraction's noise hides the steps' part, a step is taken to share half of its variance with its
    run.

    References
    ----------
    J. Tobin (1958), Econometrica 26, 24-36. C. R. Henderson (1975), Biometrics 31, 423-447. A. P. Dempster, N. M. Laird
    and D. B. Rubin (1977), J. R. Stat. Soc. B 39, 1-38. K. L. Lange, R. J. A. Little and J. M. G. Taylor (1989), J. Am.
    Stat. Assoc. 84, 881-896. D. J. C. MacKay (1992), Neural Computation 4, 415-447.
    """
    columns = [quantile_column(q) for q in quantiles]
    runs = _read(run_sample)
    if runs is None:
        empty = pd.DataFrame({column: np.empty(0) for column in columns})
        places = pd.DataFrame({"kv_len": np.empty(0, dtype=np.int64), "n": np.empty(0, dtype=np.int64)})
        return pd.concat([run_sample[KEYS].iloc[:0], places, empty], axis=1).assign(source=pd.Series(dtype=object))
    fit = _fit(runs)
    informative = _informative(runs, fit)
    spread = fit.spread if informative.sum() >= FEW_RUNS else min(fit.spread, LARGEST_SPREAD)
    factors = np.exp(special.stdtrit(FREEDOM, np.asarray(quantiles, dtype=float)) * spread)
    curves = []
    for k, rows in enumerate(_slices(runs)):
        several = runs.steps[rows] > 0
        first = runs.prompt[rows][several] + 1
        last = first + runs.steps[rows][several].astype(np.int64) - 1
        least, largest = int(first.min()), int(last.max())
        knots = np.unique(np.array([least, runs.centre[k], largest], dtype=np.int64))
        curve = pd.DataFrame({"kv_len": knots, "n": _steps_near(knots, first, last)})
        curve[columns] = np.outer(_curve_ms(runs, fit, k, knots.astype(float)), factors)
        curve["source"] = "interpolated" if informative[k] else "extrapolated"
        for place, column in enumerate(KEYS):
            curve.insert(place, column, runs.keys[column].iloc[k])
        curves.append(curve)
    return pd.concat(curves, ignore_index=True)


def identify(run_sample: pd.DataFrame) -> pd.DataFrame:
    """Tell how much of a key's decode step its run totals determine.

    Parameters
    ----------
    run_sample : DataFrame
        As for `recover_step_curve`.

    Returns
    -------
    DataFrame
        One row per key: ``n`` runs of two tokens or more, ``n_clamped`` among them with no value before clamping,
        ``n_informative`` with a decode of at least twice their noise, ``base_ms`` (the P50 step at the mean KV length)
        and ``slope_ms`` per token of KV length, each with its standard error ``…_error_ms`` (other keys' runs
        counted), and ``offset_ms``, the part of decode_ms that belongs to no step.
    """
    runs = _read(run_sample)
    columns = ["base_ms", "base_error_ms", "slope_ms", "slope_error_ms", "offset_ms"]
    if runs is None:
        return run_sample[KEYS].iloc[:0].assign(**dict.fromkeys(["n", "n_clamped", "n_informative", *columns], 0.0))
    fit = _fit(runs)
    figures = []
    for k in range(len(runs.starts)):
        lean = fit.base[k] / runs.reach[k]
        at_centre = _pooled_columns(runs, np.array([k]), runs.centre[[k]])[0]
        per_token = _pooled_columns(runs, np.array([k]), runs.centre[[k]] + 1.0)[0] - at_centre
        base, base_error = _combine(fit, k, at_centre, np.array([fit.base[k], 0.0, 0.0, 0.0]))
        # Half of the bend: the mean of the slopes on both sides of the centre.
        slope, slope_error = _combine(fit, k, per_token, np.array([0.0, lean, lean / 2, 0.0]))
        offset = (fit.pooled[-1] + fit.own[k, -1]) * runs.prefill[runs.starts[k]]
        figures.append(np.array([base, base_error, slope, slope_error, offset]) * runs.level_ms)
    several = runs.steps > 0
    found = runs.keys.copy()
    found["n"] = np.add.reduceat(several.astype(np.int64), runs.starts)
    found["n_clamped"] = np.add.reduceat((several & runs.censored).astype(np.int64), runs.starts)
    found["n_informative"] = _informative(runs, fit)
    found[columns] = np.array(figures)
    return found


def _read(run_sample: pd.DataFrame) -> _Runs | None:
    table = run_sample[~run_sample["timed"].to_numpy(dtype=bool)]
    table = table[(table["output_tokens"] >= 2).groupby([table[key] for key in KEYS]).transform("any").astype(bool)]
    order = [*KEYS, "prompt_tokens", "output_tokens", "decode_ms", "total_ms", "prefill_ms"]
    table = table.sort_values(order, kind="mergesort", ignore_index=True)
    value, censored, usable = _values(table)
    table, value, censored = table[usable], value[usable], censored[usable]
    steps = table["output_tokens"].to_numpy(dtype=float) - 1.0
    several = steps > 0
    level = _level(value[several], steps[several])
    if level is None:
        return None
    code = table.groupby(KEYS, sort=False, observed=True).ngroup().to_numpy(dtype=np.int64)
    starts = np.flatnonzero(np.diff(code, prepend=-1)).astype(np.int64)
    keys = table[KEYS].iloc[starts].reset_index(drop=True)
    prompt = table["prompt_tokens"].to_numpy(dtype=np.int64)
    mean_kv = prompt + (steps + 1) / 2
    weight = np.add.reduceat(steps, starts)
    centre = np.rint(np.add.reduceat(steps * mean_kv, starts) / weight)
    within = np.maximum(steps**2 - 1, 0) / 12  # variance of the KV lengths of one run
    reach = np.sqrt(np.add.reduceat(steps * ((mean_kv - centre[code]) ** 2 + within), starts) / weight)
    blocks, experts = _relative(keys["num_blocks"]), _relative(keys["top_k"])
    return _Runs(
        keys=keys,
        level_ms=level,
        starts=starts,
        code=code,
        prompt=prompt,
        steps=steps,
        mean_kv=mean_kv,
        value=value / level,
        censored=censored,
        prefill=table.groupby(code)["prefill_ms"].median().to_numpy(dtype=float)[code] / level,
        centre=centre,
        reach=np.maximum(reach, 1.0),
        middle=float(np.average(mean_kv, weights=steps)),
        structure=np.column_stack([np.ones(len(keys)), blocks, experts, blocks * experts]),
    )


def _values(table: pd.DataFrame) -> tuple[Floats, Flags, Flags]:
    """Decode before clamping as far as it is known, where it is cut off at zero, and which runs are of use."""
    decode = table["decode_ms"].to_numpy(dtype=float)
    prefill = table["prefill_ms"].to_numpy(dtype=float)
    total = table["total_ms"].to_numpy(dtype=float)
    difference = total - prefill
    zero = decode <= 0
    # A total tells a clamped value only if it is what decode was taken from: then both agree wherever none was clamped.
    agree = np.abs(difference - decode) <= 0.01 * total
    told = table["total_given"].to_numpy(dtype=bool) & bool(np.all(zero) or np.mean(agree[~zero]) > 0.9)
    below = zero & told & (difference < -1e-6 * prefill)
    # One-token runs show the offset if decode is what subtraction left; zeros all over are zeros by definition.
    single = table["output_tokens"].to_numpy() < 2
    bare = bool(np.any(single & (~zero | below)))
    return np.where(below, difference, decode), zero & ~below, ~single | bare


def _level(value: Floats, steps: Floats) -> float | None:
    """Typical step, in milliseconds, as the unit of all times; None where all runs are clamped."""
    if not np.any(value > 0):
        return None
    order = np.argsort(value / steps, kind="stable")
    reached = np.cumsum(steps[order])
    median = float((value / steps)[order][np.searchsorted(reached, reached[-1] / 2)])
    return median if median > 0 else float(value[value > 0].sum() / steps.sum())


def _relative(values: pd.Series) -> Floats:
    numbers = values.to_numpy(dtype=float)
    relative: Floats = numbers / ((numbers.min() + numbers.max()) / 2) - 1.0
    return relative


def _slices(runs: _Runs) -> list[slice]:
    ends = np.append(runs.starts[1:], len(runs.steps))
    return [slice(int(start), int(end)) for start, end in zip(runs.starts, ends, strict=True)]


def _pooled_columns(runs: _Runs, code: Integers, kv_len: Floats) -> Floats:
    """Coefficients of the pooled part for one step of keys `code` at `kv_len`; none of the offset."""
    structure = runs.structure[code]
    # KV cache is read once per block: the slope goes with the number of blocks.
    slope = (1 + structure[:, 1]) * (kv_len / runs.middle - 1)
    return np.column_stack([structure, slope, np.zeros(len(code))])


def _own_columns(runs: _Runs) -> Floats:
    """Coefficients per run of a key's own level, tilt and bend, all relative to its base, and offset."""
    centre, reach = runs.centre[runs.code], runs.reach[runs.code]
    first = np.maximum(runs.prompt + 1, centre)
    last = runs.prompt + runs.steps
    beyond = np.maximum(last - first + 1, 0) * ((first + last) / 2 - centre)
    tilt = runs.steps * (runs.mean_kv - centre)
    return np.column_stack([runs.steps, tilt / reach, beyond / reach, runs.prefill])


def _fit(runs: _Runs) -> _Fit:
    slices, code, steps = _slices(runs), runs.code, runs.steps
    pooled_columns = _pooled_columns(runs, code, runs.mean_kv) * steps[:, None]
    pooled_columns[:, -1] = runs.prefill
    shape = _own_columns(runs)
    n_keys, n_own, n_pooled = len(slices), shape.shape[1], pooled_columns.shape[1]
    at_centre = _pooled_columns(runs, np.arange(n_keys), runs.centre)
    counts = np.bincount(code)
    floor = (LEAST_NOISE * (1 + steps)) ** 2
    prior, spreads = POOLED_DEVIATIONS**2, SPREADS**2
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
        terms = np.column_stack([runs.prefill**2, tau**2 * steps, (tau * steps) ** 2])
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
            doubt[rows] = _quadratic(columns[rows, :n_own], inverses[k]) + _quadratic(apart, covariance)
        own_variance = np.einsum("kii->ki", inverses) + np.einsum("kij,jl,kil->ki", gains, covariance, gains)
        spreads = ((own**2 + own_variance).sum(axis=0) + PRIOR_KEYS * SPREADS**2) / (n_keys + PRIOR_KEYS)
        prior[SLOPE] = min(pooled[SLOPE] ** 2 + covariance[SLOPE, SLOPE], POOLED_DEVIATIONS[SLOPE] ** 2)
        squares = square * variance + weight * doubt
        parts_before = parts
        parts = _parts(terms / noise[:, None], squares / key_noise[code] / noise)
        key_noise = np.add.reduceat(squares / (terms @ parts + floor), runs.starts)
        key_noise = (key_noise + PRIOR_RUNS) / (counts + PRIOR_RUNS)
        apart = at_centre - base[:, None] * gains[:, 0]
        error = np.sqrt(base**2 * inverses[:, 0, 0] + _quadratic(apart, covariance))
        level = at_centre @ pooled + base * own[:, 0]
        settled = abs(parts.sum() - parts_before.sum()) <= SETTLED * parts.sum() + LEAST_NOISE**2
        if settled and np.all(np.abs(level - previous) < TOLERANCE * error):
            break
        previous = level
        base = np.maximum(at_centre @ pooled, LEAST_SHARE)
    spread = _spread(terms, parts, squares / key_noise[code])
    return _Fit(pooled, own, base, covariance, inverses, gains, np.sqrt(variance), spread)


def _quadratic(rows: Floats, matrix: Floats) -> Floats:
    """Row by row, ``r·M·r``; not below zero, where rounding would leave it."""
    product: Floats = np.maximum(np.einsum("ij,ij->i", rows @ matrix, rows), 0.0)
    return product


def _parts(shares: Floats, squares: Floats) -> Floats:
    """Non-negative least squares by the normal equations, of which there are only as many as columns."""
    gram = shares.T @ shares
    size = np.sqrt(np.diag(gram))
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


def _curve_ms(runs: _Runs, fit: _Fit, k: int, kv_len: Floats) -> Floats:
    away = (kv_len - runs.centre[k]) / runs.reach[k]
    own = fit.own[k, 0] + fit.own[k, 1] * away + fit.own[k, 2] * np.maximum(away, 0)
    step = _pooled_columns(runs, np.full(len(kv_len), k), kv_len) @ fit.pooled + fit.base[k] * own
    curve: Floats = np.maximum(step, LEAST_SHARE * fit.base[k]) * runs.level_ms
    return curve


def _combine(fit: _Fit, k: int, pooled: Floats, own: Floats) -> tuple[float, float]:
    """Value and standard error of a linear combination of the pooled part and the own part of key `k`."""
    left_over = pooled - own @ fit.gains[k]
    variance = _quadratic(own[None], fit.inverses[k]) + _quadratic(left_over[None], fit.covariance)
    return float(pooled @ fit.pooled + own @ fit.own[k]), float(np.sqrt(variance[0]))


def _informative(runs: _Runs, fit: _Fit) -> Integers:
    """Runs per key whose decode stands out of their noise."""
    decode = runs.steps * fit.base[runs.code]
    clear = ~runs.censored & (runs.steps > 0) & (decode >= INFORMATIVE * fit.scale)
    return np.add.reduceat(clear.astype(np.int64), runs.starts)


def _steps_near(knots: Integers, first: Integers, last: Integers) -> Integers:
    """Number of steps, of runs that cover KV lengths `first` to `last`, whose nearest knot is each."""
    edges = (knots[1:] + knots[:-1]) // 2
    upto = [int(np.clip(edge - first + 1, 0, last - first + 1).sum()) for edge in edges]
    return np.diff([0, *upto, int((last - first + 1).sum())]).astype(np.int64)
