"""Curves and calibrated totals from the aggregates and the sample of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from .schema import KEY_COLUMNS, quantile_column, quantile_suffix

__all__ = ["FitInput", "Fitted", "fit", "upper_rank"]

KEYS = list(KEY_COLUMNS)


@dataclass(frozen=True)
class FitInput:
    """What fitting reads: aggregates per key and bin, and a bounded sample of runs and steps per key."""

    quantiles: Sequence[float]
    prefill: pd.DataFrame
    prefill_bins: pd.DataFrame
    decode: pd.DataFrame
    decode_bins: pd.DataFrame
    run_sample: pd.DataFrame
    step_sample: pd.DataFrame


@dataclass(frozen=True)
class Fitted:
    """Rows of the tables that fitting writes, named as in the file."""

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
    """Fit the curves and the calibration of totals."""
    columns = [quantile_column(q) for q in data.quantiles]
    prefill_curve = _curve(data.prefill_bins, "prompt_tokens", columns, rising=True)
    bins = data.decode_bins
    totals = data.run_sample[(~data.run_sample["timed"]) & (data.run_sample["output_tokens"] >= 2)]
    if len(totals):
        step = totals["decode_ms"] / (totals["output_tokens"] - 1)
        rows = []
        for key, group in totals.assign(step=step).groupby(KEYS):
            level = np.quantile(group["step"], data.quantiles)
            rows.append((*key, len(group), float(group["prompt_tokens"].mean() + 1), *level))
        fallback = pd.DataFrame(rows, columns=[*KEYS, "n", "kv_len", *columns])
        timed = set(map(tuple, bins[KEYS].itertuples(index=False)))
        fallback = fallback[[tuple(k) not in timed for k in fallback[KEYS].itertuples(index=False)]]
        bins = pd.concat([bins, fallback], ignore_index=True)
    decode_curve = _curve(bins, "kv_len", columns, rising=False)
    decode_curve["p50_sum_ms"] = np.nan
    for _, group in decode_curve.groupby(KEYS):
        decode_curve.loc[group.index, "p50_sum_ms"] = _sums(group["kv_len"].to_numpy(), group["p50_ms"].to_numpy())
    decode = data.decode.copy()
    means = decode_curve.groupby(KEYS)[columns].mean()
    for column in columns:
        decode[column] = decode[column].fillna(
            pd.Series([means[column].get(tuple(k), np.nan) for k in decode[KEYS].itertuples(index=False)], decode.index)
        )
    ratio = decode[KEYS].assign(decode_steps=1, n=decode["n"], source="measured")
    total = data.prefill[KEYS].assign(n=data.prefill["n"])
    for q, column in zip(data.quantiles, columns, strict=True):
        ratio[f"{quantile_suffix(q)}_ratio"] = decode[column] / decode["p50_ms"]
        total[f"{quantile_suffix(q)}_correlation"] = 1.0
    return Fitted(decode, prefill_curve, decode_curve, ratio, total)


def _curve(bins: pd.DataFrame, place: str, columns: list[str], rising: bool) -> pd.DataFrame:
    curve = bins[[*KEYS, place, "n", *columns]].copy()
    curve[place] = curve[place].round().astype("int64")
    curve = curve.sort_values([*KEYS, place]).drop_duplicates([*KEYS, place]).reset_index(drop=True)
    for column in columns:
        curve[column] = curve[column].clip(lower=1e-6)
        if rising:
            curve[column] = curve.groupby(KEYS)[column].cummax()
    curve["source"] = "measured"
    return curve


def _sums(kv_len: np.ndarray, p50_ms: np.ndarray) -> np.ndarray:
    """Sum of the piecewise-linear P50 curve over KV lengths 1 to each knot."""
    sums = [p50_ms[0] * kv_len[0]]
    for left, right, low, high in zip(kv_len, kv_len[1:], p50_ms, p50_ms[1:], strict=False):
        steps = right - left
        sums.append(sums[-1] + steps * low + (high - low) * (steps + 1) / 2)
    return np.array(sums)
