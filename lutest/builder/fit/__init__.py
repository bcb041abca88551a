"""Curves and calibrated totals from the aggregates and the samples: the parts of the fit, composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from lutest.builder.fit.curves import fit_prefill_curve, fit_step_curve
from lutest.builder.fit.observations import KeyAxes, read_key_axes
from lutest.builder.fit.step_recovery import recover_step_curve
from lutest.builder.fit.totals import calibrate_totals
from lutest.reader.figures import KeyColumn
from lutest.reader.names import quantile_column

_LEAST_STEP = 1e-9  # of the median prefill: steps are fitted on the log scale, and a coarse clock reads 0


@dataclass(frozen=True)
class FitInput:
    """What fitting reads: figures per key, and a bounded sample of runs and steps per key.

    Attributes
    ----------
    quantiles : sequence of float
        Levels, ascending.
    key_columns : sequence of KeyColumn
        What a key is made of.
    keys : DataFrame
        The key of each ``key_id``: row i is that of i, one column a key column. All other frames have ``key_id``.
    prefill, decode : DataFrame
        Rows of the tables of the same names; quantiles of `decode` are null for keys without timed steps.
    run_sample, step_sample : DataFrame
        Runs, and timed steps of whole runs.
    outlier_share : float
        Share of the sound runs that were left out as outliers.
    """

    quantiles: Sequence[float]
    key_columns: Sequence[KeyColumn]
    keys: pd.DataFrame
    prefill: pd.DataFrame
    decode: pd.DataFrame
    run_sample: pd.DataFrame
    step_sample: pd.DataFrame
    outlier_share: float


@dataclass(frozen=True)
class Fitted:
    """Rows of the tables that fitting writes, named as in the file, with ``key_id`` for the key columns."""

    decode: pd.DataFrame
    prefill_curve: pd.DataFrame
    decode_curve: pd.DataFrame
    decode_total: pd.DataFrame
    total: pd.DataFrame


def upper_rank(n: int, level: float = 0.95, confidence: float = 0.95) -> int | None:
    """Rank of the order statistic that is a distribution-free upper confidence bound of a quantile.

    Parameters
    ----------
    n : int
        Sample size.
    level : float
        The quantile, 0.95 for P95.
    confidence : float
        Probability that the bound lies at or above the quantile.

    Returns
    -------
    int or None
        The least rank k (from 1) with P(Binomial(n, level) < k) >= confidence; None when no rank reaches it
        (for P95 and 95 %: n < 59).

    References
    ----------
    H. A. David and H. N. Nagaraja, Order Statistics, 3rd ed. (2003), section 7.1.
    """
    rank = int(stats.binom.ppf(confidence, n, level)) + 1
    return rank if rank <= n else None


def fit(data: FitInput) -> Fitted:
    """Fit the curves of prefill and decode step, and calibrate totals on whole runs.

    Steps are taken from timed steps where a key has any, and recovered from its run totals where it has none. All of
    it happens in units of the median prefill: iterative solvers stop a little elsewhere on another scale, and
    latencies in other units shall give the same table.
    """
    unit_ms = float(data.run_sample["prefill_ms"].median())
    runs = _divided(data.run_sample, ["prefill_ms", "decode_ms", "total_ms"], unit_ms)
    steps = _divided(data.step_sample, ["step_ms"], unit_ms)
    steps["step_ms"] = steps["step_ms"].clip(lower=_LEAST_STEP)
    columns = [quantile_column(q) for q in data.quantiles]
    axes = read_key_axes(data.keys, data.key_columns)
    prefill_curve = fit_prefill_curve(runs, axes, data.quantiles)
    decode_curve = _decode_curve(runs, steps, axes, data.quantiles)
    decode_total, total = calibrate_totals(
        runs, prefill_curve, decode_curve, data.quantiles, outlier_share=data.outlier_share
    )
    prefill_curve = _divided(prefill_curve, columns, 1 / unit_ms)
    decode_curve = _with_sums(_divided(decode_curve, columns, 1 / unit_ms))
    decode = _with_recovered_quantiles(data.decode, decode_curve, data.quantiles)
    return Fitted(decode, prefill_curve, decode_curve, decode_total, total)


def _divided(frame: pd.DataFrame, columns: list[str], unit_ms: float) -> pd.DataFrame:
    return frame.assign(**{column: frame[column] / unit_ms for column in columns})


def _decode_curve(runs: pd.DataFrame, steps: pd.DataFrame, axes: KeyAxes, quantiles: Sequence[float]) -> pd.DataFrame:
    totals = runs[~runs["key_id"].isin(runs.loc[runs["timed"], "key_id"])]
    curves = []
    if len(steps):
        curves.append(fit_step_curve(steps, runs, axes, quantiles))
    if (totals["output_tokens"] >= 2).any():
        curves.append(recover_step_curve(totals, axes, quantiles))
    if not curves:
        names = ["key_id", "kv_len", "n", *map(quantile_column, quantiles), "source"]
        return pd.DataFrame({name: pd.Series(dtype="float64") for name in names})
    return pd.concat(curves, ignore_index=True).sort_values(["key_id", "kv_len"], ignore_index=True)


def _with_sums(decode_curve: pd.DataFrame) -> pd.DataFrame:
    groups = decode_curve.groupby("key_id", sort=False)
    sums = [_sums(group["kv_len"].to_numpy(), group["p50_ms"].to_numpy()) for _, group in groups]
    return decode_curve.assign(p50_sum_ms=np.concatenate(sums) if sums else 0.0)


def _sums(kv_len: NDArray[np.int64], p50_ms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of the piecewise-linear P50 curve over KV lengths 1 to each knot."""
    gaps = np.diff(kv_len)
    inside = gaps * p50_ms[:-1] + np.diff(p50_ms) * (gaps + 1) / 2
    sums: NDArray[np.float64] = np.cumsum(np.concatenate([[p50_ms[0] * kv_len[0]], inside]))
    return sums


def _with_recovered_quantiles(
    decode: pd.DataFrame, decode_curve: pd.DataFrame, quantiles: Sequence[float]
) -> pd.DataFrame:
    """Fill the figures of keys without timed steps from their curve: the mean over its knots, by steps nearest."""
    columns = [quantile_column(q) for q in quantiles]
    weights = decode_curve["n"].astype(float).clip(lower=1e-9)
    weighted = decode_curve[columns].multiply(weights, axis=0).assign(weight=weights)
    sums = weighted.groupby(decode_curve["key_id"]).sum()
    means = sums[columns].div(sums["weight"], axis=0)
    filled = decode.set_index("key_id")
    filled[columns] = filled[columns].astype(float).fillna(means)
    # A key whose totals say nothing at all (each one clamped) has no curve, and so no figures.
    return filled.dropna(subset=columns).reset_index()
