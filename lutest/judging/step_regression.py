"""Time per decode step against its number and KV length: what a run's decode_ms holds besides n - 1 equal steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray
from scipy import stats

__all__ = ["BANDS", "StepFit", "StepSample", "fit_steps", "group_median", "read_step_sample"]

BANDS = ("2", "3–5", "6–10", "11–20", "21+")
_BAND_ENDS = np.array([2, 5, 10, 20])
SAMPLE_RUNS_PER_KEY = 1000
LEAST_RUNS = 5
_ROUNDS = 12
_HUBER = 1.345  # 95 % efficiency for normal errors (Huber, 1981)
_RUNS_OF_PRIOR = 10
_LEAST_INDEPENDENT = 1e-4  # share of a regressor's variance that the other one leaves over

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepSample:
    """Runs of two tokens or more, a bounded number per configuration.

    Attributes
    ----------
    key : ndarray of int
        The `key_id` of each.
    output_tokens, prompt_tokens : ndarray of int
        Lengths.
    decode_ms : ndarray of float
        Everything after the first token.
    timed : ndarray of bool
        Whether the steps were timed one by one.
    """

    key: Ints
    output_tokens: Ints
    prompt_tokens: Ints
    decode_ms: Floats
    timed: NDArray[np.bool_]

    @property
    def band(self) -> Ints:
        """Place in `BANDS`."""
        return np.searchsorted(_BAND_ENDS, self.output_tokens)


@dataclass(frozen=True)
class StepFit:
    """Estimates with 95 % confidence intervals (low, high); NaN where the runs do not tell.

    Attributes
    ----------
    level_ms : ndarray of shape (keys,)
        The step of each configuration at its own mean KV length; NaN where no run of it has a time above zero.
    extra_steps : float
        Steps that a run holds beyond n - 1: 0 where decode_ms is the time of n - 1 steps, 1 where it is that of n.
    growth : float
        Relative growth of the step per token of KV length.
    offset_ms : ndarray of shape (keys,)
        The time behind `extra_steps`, each configuration by itself.
    """

    level_ms: Floats
    extra_steps: float
    extra_steps_interval: tuple[float, float]
    growth: float
    growth_interval: tuple[float, float]
    offset_ms: Floats


def read_step_sample(connection: duckdb.DuckDBPyConnection) -> StepSample:
    """Read a bounded number of ``accepted_runs`` of two tokens or more per configuration, picked by their hash."""
    columns: dict[str, NDArray[Any]] = connection.execute(
        f"""
        SELECT key_id, output_tokens, prompt_tokens, decode_ms, timed
        FROM accepted_runs
        WHERE output_tokens >= 2
        QUALIFY row_number() OVER (PARTITION BY key_id ORDER BY run_hash, source_id, "row") <= {SAMPLE_RUNS_PER_KEY}
        ORDER BY key_id, run_hash, source_id, "row"
        """
    ).fetchnumpy()
    return StepSample(
        np.asarray(columns["key_id"], dtype=np.int64),
        np.asarray(columns["output_tokens"], dtype=np.int64),
        np.asarray(columns["prompt_tokens"], dtype=np.int64),
        np.asarray(columns["decode_ms"], dtype=np.float64),
        np.asarray(columns["timed"], dtype=np.bool_),
    )


def fit_steps(sample: StepSample) -> StepFit | None:
    """Regress time per step on what a fencepost and a KV cache would make of it.

    Parameters
    ----------
    sample : StepSample
        Runs.

    Returns
    -------
    StepFit or None
        None with fewer than five runs, or where every run is at zero.

    Notes
    -----
    With m = n - 1 steps at a mean KV length kv, configuration k:
    decode_ms / m = level_k · (1 + extra_steps / m + growth · (kv - kv_k)), with kv_k the configuration's mean.
    The level is a factor, so that all configurations share the two coefficients. Weighted least squares within
    configurations (Frisch–Waugh), reweighted by Huber's function, and by the spread in each band of output lengths,
    since noise that does not grow with a run weighs most per step in short ones. Intervals come from the
    heteroscedasticity-consistent covariance (White, Econometrica 48, 1980) with Student's t.
    """
    if len(sample.key) < LEAST_RUNS:
        return None
    n_keys = int(sample.key.max()) + 1
    steps = (sample.output_tokens - 1).astype(np.float64)
    per_step = sample.decode_ms / steps
    level = _weighted_median_by_key(per_step, steps, sample.key, n_keys)
    used = level[sample.key] > 0
    if used.sum() < LEAST_RUNS:
        return None
    key, band, per_step = sample.key[used], sample.band[used], per_step[used]
    inverse = 1.0 / steps[used]
    kv_len = sample.prompt_tokens[used] + sample.output_tokens[used] / 2.0
    regressors = np.column_stack([inverse, kv_len])
    weight = np.ones(len(key))
    coefficients, covariance = np.full(2, np.nan), np.full((2, 2), np.nan)
    for _ in range(_ROUNDS):
        relative = per_step / level[key]
        centred = regressors - _means(regressors, weight, key, n_keys)[key]
        response = relative - _means(relative[:, None], weight, key, n_keys)[key, 0]
        coefficients, covariance = _least_squares(centred, response, weight, len(key) - len(np.unique(key)))
        explained = np.nan_to_num(coefficients)
        residual = response - centred @ explained
        weight = _weights(residual, band)
        base = relative - inverse * explained[0]
        base -= (kv_len - _means(regressors, weight, key, n_keys)[key, 1]) * explained[1]
        level = level * _means(base[:, None], weight, key, n_keys)[:, 0]
        level[~(level > 0)] = np.nan
        alive = np.isfinite(level[key])
        if not alive.all():
            key, band = key[alive], band[alive]
            per_step, inverse, kv_len = per_step[alive], inverse[alive], kv_len[alive]
            regressors, weight = regressors[alive], weight[alive]
            if len(key) < LEAST_RUNS:
                return None
    freedom = len(key) - len(np.unique(key)) - int(np.isfinite(coefficients).sum())
    quantile = float(stats.t.ppf(0.975, freedom)) if freedom > 0 else np.nan
    reach = quantile * np.sqrt(np.diag(covariance))
    extra, growth = map(float, coefficients)
    return StepFit(
        level,
        extra,
        (extra - float(reach[0]), extra + float(reach[0])),
        growth,
        (growth - float(reach[1]), growth + float(reach[1])),
        _offsets(per_step, inverse, kv_len * np.nan_to_num(growth), level, key, weight),
    )


def group_median(values: Floats, groups: Ints, n_groups: int) -> Floats:
    """Median of each group; NaN for an empty one."""
    medians = np.full(n_groups, np.nan)
    order = np.lexsort((values, groups))
    starts = np.searchsorted(groups[order], np.arange(n_groups + 1))
    sizes = np.diff(starts)
    held = sizes > 0
    low = starts[:-1][held] + (sizes[held] - 1) // 2
    high = starts[:-1][held] + sizes[held] // 2
    medians[held] = (values[order][low] + values[order][high]) / 2.0
    return medians


def _weighted_median_by_key(values: Floats, weights: Floats, key: Ints, n_keys: int) -> Floats:
    # The step that half of all steps lie under: long runs, which know their step best, decide.
    medians = np.full(n_keys, np.nan)
    order = np.lexsort((values, key))
    for number, rows in enumerate(np.split(order, np.searchsorted(key[order], np.arange(1, n_keys)))):
        if len(rows):
            upto = np.cumsum(weights[rows])
            medians[number] = values[rows[np.searchsorted(upto, upto[-1] / 2.0)]]
    return medians


def _means(columns: Floats, weight: Floats, key: Ints, n_keys: int) -> Floats:
    total = np.bincount(key, weight, minlength=n_keys)
    sums = np.column_stack([np.bincount(key, weight * column, minlength=n_keys) for column in columns.T])
    means: Floats = np.divide(sums, total[:, None], out=np.full(sums.shape, np.nan), where=total[:, None] > 0)
    return means


def _least_squares(x: Floats, y: Floats, weight: Floats, freedom: int) -> tuple[Floats, Floats]:
    """Coefficients and their covariance; NaN for a column that does not vary, or that the other one explains."""
    coefficients, covariance = np.full(2, np.nan), np.full((2, 2), np.nan)
    spread = (weight[:, None] * x**2).sum(axis=0)
    kept = [j for j in range(2) if spread[j] > 1e-12 * len(y) * weight.mean() and freedom > 1]
    if len(kept) == 2:
        shared = (weight * x[:, 0] * x[:, 1]).sum() ** 2 / (spread[0] * spread[1])
        if 1.0 - shared < _LEAST_INDEPENDENT or freedom <= 2:
            kept = [0]  # two lengths only: a growth would explain the fencepost away
    if not kept:
        return coefficients, covariance
    part = x[:, kept]
    inverse = np.linalg.inv((part * weight[:, None]).T @ part)
    found = inverse @ (part * weight[:, None]).T @ y
    scores = part * (weight * (y - part @ found))[:, None]
    correction = freedom / max(freedom - len(kept), 1)
    for i, j in enumerate(kept):
        coefficients[j] = found[i]
    covariance[np.ix_(kept, kept)] = correction * inverse @ (scores.T @ scores) @ inverse
    return coefficients, covariance


def _weights(residual: Floats, band: Ints) -> Floats:
    overall = float(np.median(np.abs(residual)))
    sizes = np.bincount(band, minlength=len(BANDS))
    spread = np.nan_to_num(group_median(np.abs(residual), band, len(BANDS)))
    # A few runs may happen to lie on the line, and would then hold it there: their band's spread leans on that of all.
    spread = (sizes * spread + _RUNS_OF_PRIOR * overall) / (sizes + _RUNS_OF_PRIOR)
    scale = np.maximum(spread, 1e-9)[band] * 1.4826
    return np.minimum(1.0, _HUBER * scale / np.maximum(np.abs(residual), 1e-300)) / scale**2


def _offsets(per_step: Floats, inverse: Floats, grown: Floats, level: Floats, key: Ints, weight: Floats) -> Floats:
    """Intercept of decode_ms of each configuration by itself, in ms, with the growth that all share."""
    n_keys = len(level)
    grown = grown - _means(grown[:, None], weight, key, n_keys)[key, 0]
    response = per_step / level[key] - grown
    x = inverse - _means(inverse[:, None], weight, key, n_keys)[key, 0]
    y = response - _means(response[:, None], weight, key, n_keys)[key, 0]
    below = np.bincount(key, weight * x * x, minlength=n_keys)
    above = np.bincount(key, weight * x * y, minlength=n_keys)
    varied = below > 1e-12 * np.bincount(key, weight, minlength=n_keys)
    slope = np.divide(above, below, out=np.full(n_keys, np.nan), where=varied)
    return np.asarray(slope * level, dtype=np.float64)
