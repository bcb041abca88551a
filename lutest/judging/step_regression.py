"""Time per decode step against its number and KV length: what a run's decode_ms holds besides n - 1 equal steps."""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

BANDS = ("2", "3–5", "6–10", "11–20", "21+")
_BAND_ENDS = (1, 2, 5, 10, 20, np.inf)
SAMPLE_RUNS_PER_KEY = 1000
LEAST_RUNS = 5
_ROUNDS = 12
_HUBER = 1.345  # 95 % efficiency for normal errors (Huber, 1981)
_RUNS_OF_PRIOR = 10
_LEAST_INDEPENDENT = 1e-4  # share of a regressor's variance that the other one leaves over
_REGRESSORS = ["inverse", "kv_len"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StepFit:
    """Estimates with 95 % confidence intervals (low, high); NaN where the runs do not tell.

    Attributes
    ----------
    level_ms : Series by key_id
        The step of each configuration at its own mean KV length; without those of which no run has a time above zero.
    extra_steps : float
        Steps that a run holds beyond n - 1: 0 where decode_ms is the time of n - 1 steps, 1 where it is that of n.
    growth : float
        Relative growth of the step per token of KV length.
    offset_ms : Series by key_id
        The time behind `extra_steps`, each configuration by itself.
    """

    level_ms: pd.Series
    extra_steps: float
    extra_steps_interval: tuple[float, float]
    growth: float
    growth_interval: tuple[float, float]
    offset_ms: pd.Series

    @property
    def step_ms(self) -> float:
        """The step of the middle configuration."""
        return float(self.level_ms.median())


def read_step_sample(connection: duckdb.DuckDBPyConnection) -> pd.DataFrame:
    """Read a bounded number of ``accepted_runs`` of two tokens or more per configuration, picked by their hash.

    Returns
    -------
    DataFrame
        ``key_id``, ``output_tokens`` and its ``band``, ``prompt_tokens``, ``decode_ms``, and whether steps were
        ``timed`` one by one.
    """
    sample = connection.execute(
        f"""
        SELECT key_id, output_tokens, prompt_tokens, decode_ms, timed
        FROM accepted_runs
        WHERE output_tokens >= 2
        QUALIFY row_number() OVER (PARTITION BY key_id ORDER BY run_hash, source_id, "row") <= {SAMPLE_RUNS_PER_KEY}
        ORDER BY key_id, run_hash, source_id, "row"
        """
    ).df()
    return sample.assign(band=pd.cut(sample["output_tokens"], _BAND_ENDS, labels=BANDS))


def fit_steps(sample: pd.DataFrame) -> StepFit | None:
    """Regress time per step on what a fencepost and a KV cache would make of it.

    Parameters
    ----------
    sample : DataFrame
        As `read_step_sample` gives it.

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
    steps = sample["output_tokens"] - 1
    runs = sample.assign(
        per_step=sample["decode_ms"] / steps,
        inverse=1.0 / steps,
        kv_len=sample["prompt_tokens"] + sample["output_tokens"] / 2.0,
        weight=1.0,
    )
    level = _step_of_half(runs, steps)
    for _ in range(_ROUNDS):
        level = level[level > 0]
        runs = runs[runs["key_id"].isin(level.index)]
        if len(runs) < LEAST_RUNS:
            return None
        runs = runs.assign(relative=runs["per_step"] / runs["key_id"].map(level))
        centred = _centred(runs)
        freedom = len(runs) - len(level)
        coefficients, covariance = _least_squares(centred, runs["weight"].to_numpy(), freedom)
        explained = np.nan_to_num(coefficients)
        runs["weight"] = _weights(centred["relative"] - centred[_REGRESSORS] @ explained, runs["band"])
        means = _means(runs)
        level = level * (means["relative"] - means["inverse"] * explained[0])
    freedom -= int(np.isfinite(coefficients).sum())
    quantile = float(stats.t.ppf(0.975, freedom)) if freedom > 0 else np.nan
    extra_reach, growth_reach = map(float, quantile * np.sqrt(np.diag(covariance)))
    extra, growth = map(float, coefficients)
    return StepFit(
        level[level > 0],
        extra,
        (extra - extra_reach, extra + extra_reach),
        growth,
        (growth - growth_reach, growth + growth_reach),
        _offsets(runs, level[level > 0], float(np.nan_to_num(growth))),
    )


def _step_of_half(runs: pd.DataFrame, steps: pd.Series) -> pd.Series:
    """The step of each configuration that half of its steps lie under: long runs, which know it best, decide."""
    ordered = runs.assign(steps=steps).sort_values("per_step", kind="stable")
    by_key = ordered.groupby("key_id")["steps"]
    return ordered[by_key.cumsum() >= by_key.transform("sum") / 2.0].groupby("key_id")["per_step"].first()


def _means(runs: pd.DataFrame) -> pd.DataFrame:
    """Weighted means of the regressors and the response, by configuration."""
    weighted = runs[[*_REGRESSORS, "relative"]].mul(runs["weight"], axis=0)
    return weighted.groupby(runs["key_id"]).sum().div(runs.groupby("key_id")["weight"].sum(), axis=0)


def _centred(runs: pd.DataFrame) -> pd.DataFrame:
    """The regressors and the response, less their means within the configuration."""
    return runs[[*_REGRESSORS, "relative"]] - _means(runs).loc[runs["key_id"]].to_numpy()


def _least_squares(centred: pd.DataFrame, weight: Floats, freedom: int) -> tuple[Floats, Floats]:
    """Coefficients and their covariance; NaN for a column that does not vary, or that the other one explains."""
    x, y = centred[_REGRESSORS].to_numpy(), centred["relative"].to_numpy()
    coefficients, covariance = np.full(2, np.nan), np.full((2, 2), np.nan)
    spread = (weight[:, None] * x**2).sum(axis=0)
    kept = [j for j in range(2) if spread[j] > 1e-12 * weight.sum() and freedom > 1]
    if len(kept) == 2:
        shared = (weight * x[:, 0] * x[:, 1]).sum() ** 2 / (spread[0] * spread[1])
        if 1.0 - shared < _LEAST_INDEPENDENT or freedom <= 2:
            kept = [0]  # two lengths only: a growth would explain the fencepost away
    if not kept:
        return coefficients, covariance
    part = x[:, kept]
    inverse = np.linalg.inv((part * weight[:, None]).T @ part)
    coefficients[kept] = inverse @ (part * weight[:, None]).T @ y
    scores = part * (weight * (y - part @ coefficients[kept]))[:, None]
    correction = freedom / max(freedom - len(kept), 1)
    covariance[np.ix_(kept, kept)] = correction * inverse @ (scores.T @ scores) @ inverse
    return coefficients, covariance


def _weights(residual: pd.Series, band: pd.Series) -> pd.Series:
    size = residual.abs()
    by_band = size.groupby(band, observed=True)
    n, spread = by_band.transform("size"), by_band.transform("median")
    # A few runs may happen to lie on the line, and would then hold it there: their band's spread leans on that of all.
    spread = (n * spread + _RUNS_OF_PRIOR * size.median()) / (n + _RUNS_OF_PRIOR)
    scale = spread.clip(lower=1e-9) * 1.4826
    return (_HUBER * scale / size.clip(lower=1e-300)).clip(upper=1.0) / scale**2


def _offsets(runs: pd.DataFrame, level: pd.Series, growth: float) -> pd.Series:
    """Intercept of decode_ms of each configuration by itself, in ms, with the growth that all share."""
    runs = runs[runs["key_id"].isin(level.index)]
    runs = runs.assign(relative=runs["per_step"] / runs["key_id"].map(level))
    centred, weight = _centred(runs), runs["weight"]
    response = centred["relative"] - growth * centred["kv_len"]
    sums = pd.DataFrame(
        {
            "above": weight * centred["inverse"] * response,
            "below": weight * centred["inverse"] ** 2,
            "weight": weight,
        }
    )
    sums = sums.groupby(runs["key_id"]).sum()
    return (sums["above"] / sums["below"] * level)[sums["below"] > 1e-12 * sums["weight"]]
