"""Decode step over KV length, recovered from runs of which only the sum of the steps is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special

from lutest.builder.fit.observations import Flags, Floats, Integers, KeyAxes
from lutest.builder.fit.step_model import FREEDOM, LEAST_SHARE, RunTotals, StepFit, fit_steps, quadratic, shared_columns
from lutest.reader.names import error_column, quantile_column

FEW_RUNS, LARGEST_SPREAD = 10, 0.15  # with fewer informative runs in all, the spread of a step is hardly known
INFORMATIVE = 2.0  # a run says something of its key's step when its decode is this many times its noise


def recover_step_curve(run_sample: pd.DataFrame, axes: KeyAxes, quantiles: Sequence[float]) -> pd.DataFrame:
    """Fit the decode step over KV length to run totals.

    Parameters
    ----------
    run_sample : DataFrame
        Runs as the aggregation writes them; those with ``timed`` set are not read.
    axes : KeyAxes
        Of all keys, by key_id.
    quantiles : sequence of float
        Levels, ascending, each in (0, 1).

    Returns
    -------
    DataFrame
        ``key_id, kv_len, n, pXX_ms …, pXX_se_ms …, n_eff, source``: two or three knots per key that has untimed runs of
        two tokens or more, from the least to the largest KV length that its runs covered. ``source`` is
        ``interpolated``, or ``extrapolated`` for a key whose own runs say next to nothing, so that its curve is that
        of the other keys.
    """
    columns, errors = [quantile_column(q) for q in quantiles], [error_column(q) for q in quantiles]
    runs = _read_run_totals(run_sample, axes)
    if runs is None:
        return pd.DataFrame(columns=["key_id", "kv_len", "n", *columns, *errors, "n_eff", "source"])
    fit = fit_steps(runs)
    informative = _informative(runs, fit)
    spread = fit.spread if informative.sum() >= FEW_RUNS else min(fit.spread, LARGEST_SPREAD)
    factors = np.exp(special.stdtrit(FREEDOM, np.asarray(quantiles, dtype=float)) * spread)
    curves = []
    for k, rows in enumerate(runs.slices):
        several = runs.steps[rows] > 0
        first = runs.prompt[rows][several] + 1
        last = first + runs.steps[rows][several].astype(np.int64) - 1
        least, largest = int(first.min()), int(last.max())
        knots = np.unique(np.array([least, runs.centre[k], largest], dtype=np.int64))
        curve = pd.DataFrame({"key_id": runs.key_ids[k], "kv_len": knots, "n": _steps_near(knots, first, last)})
        curve[columns] = np.outer(_curve_ms(runs, fit, k, knots.astype(float)), factors)
        curve[errors] = np.outer(_error_ms(runs, fit, k, knots.astype(float)), factors)
        curve["n_eff"] = float(informative[k])
        curve["source"] = "interpolated" if informative[k] else "extrapolated"
        curves.append(curve)
    return pd.concat(curves, ignore_index=True)


def _curve_ms(runs: RunTotals, fit: StepFit, k: int, kv_len: Floats) -> Floats:
    away = (kv_len - runs.centre[k]) / runs.reach[k]
    own = fit.own[k, 0] + fit.own[k, 1] * away + fit.own[k, 2] * np.maximum(away, 0)
    step = shared_columns(runs, np.full(len(kv_len), k), kv_len) @ fit.pooled + fit.base[k] * own
    curve: Floats = np.maximum(step, LEAST_SHARE * fit.base[k]) * runs.level_ms
    return curve


def _error_ms(runs: RunTotals, fit: StepFit, k: int, kv_len: Floats) -> Floats:
    """Standard error of the curve: of the key's own part, and of the pooled part as far as it does not follow that."""
    away = (kv_len - runs.centre[k]) / runs.reach[k]
    none = np.zeros_like(away)
    own = np.column_stack([none + fit.base[k], fit.base[k] * away, fit.base[k] * np.maximum(away, 0), none])
    pooled = shared_columns(runs, np.full(len(kv_len), k), kv_len) - own @ fit.gains[k]
    return np.asarray(np.sqrt(quadratic(own, fit.inverses[k]) + quadratic(pooled, fit.covariance)) * runs.level_ms)


def _informative(runs: RunTotals, fit: StepFit) -> Integers:
    """Runs per key whose decode stands out of their noise."""
    decode = runs.steps * fit.base[runs.code]
    clear = ~runs.censored & (runs.steps > 0) & (decode >= INFORMATIVE * fit.scale)
    return np.add.reduceat(clear.astype(np.int64), runs.starts)


def _steps_near(knots: Integers, first: Integers, last: Integers) -> Integers:
    """Number of steps, of runs that cover KV lengths `first` to `last`, whose nearest knot is each."""
    edges = (knots[1:] + knots[:-1]) // 2
    upto = [int(np.clip(edge - first + 1, 0, last - first + 1).sum()) for edge in edges]
    return np.diff([0, *upto, int((last - first + 1).sum())]).astype(np.int64)


def _read_run_totals(run_sample: pd.DataFrame, axes: KeyAxes) -> RunTotals | None:
    """Runs that were not timed step by step, of keys that have decode; None where no decode is above zero."""
    table = run_sample[~run_sample["timed"].to_numpy(dtype=bool)]
    table = table[(table["output_tokens"] >= 2).groupby(table["key_id"]).transform("any").astype(bool)]
    order = ["key_id", "prompt_tokens", "output_tokens", "decode_ms", "total_ms", "prefill_ms"]
    table = table.sort_values(order, kind="mergesort", ignore_index=True)
    value, censored, usable = _values(table)
    table, value, censored = table[usable], value[usable], censored[usable]
    steps = table["output_tokens"].to_numpy(dtype=float) - 1.0
    several = steps > 0
    level = _level(value[several], steps[several])
    if level is None:
        return None
    code = table.groupby("key_id", sort=False).ngroup().to_numpy(dtype=np.int64)
    starts = np.flatnonzero(np.diff(code, prepend=-1)).astype(np.int64)
    key_ids = table["key_id"].to_numpy(dtype=np.int64)[starts]
    prompt = table["prompt_tokens"].to_numpy(dtype=np.int64)
    mean_kv = prompt + (steps + 1) / 2
    weight = np.add.reduceat(steps, starts)
    centre = np.rint(np.add.reduceat(steps * mean_kv, starts) / weight)
    within = np.maximum(steps**2 - 1, 0) / 12  # variance of the KV lengths of one run
    reach = np.sqrt(np.add.reduceat(steps * ((mean_kv - centre[code]) ** 2 + within), starts) / weight)
    prefill = table.groupby(code)["prefill_ms"].median().to_numpy(dtype=float)
    return RunTotals(
        key_ids=key_ids,
        level_ms=level,
        starts=starts,
        code=code,
        prompt=prompt,
        steps=steps,
        mean_kv=mean_kv,
        value=value / level,
        censored=censored,
        subtracted=np.where(table["one_pass"], 0.0, prefill[code]) / level,
        centre=centre,
        reach=np.maximum(reach, 1.0),
        middle=float(np.average(mean_kv, weights=steps)),
        structure=_structure(axes.of(key_ids).numbers),
    )


def _values(table: pd.DataFrame) -> tuple[Floats, Flags, Flags]:
    """Decode before clamping as far as it is known, where it is cut off at zero, and which runs are of use."""
    decode = table["decode_ms"].to_numpy(dtype=float)
    prefill = table["prefill_ms"].to_numpy(dtype=float)
    total = table["total_ms"].to_numpy(dtype=float)
    difference = total - prefill
    subtracted = ~table["one_pass"].to_numpy(dtype=bool)
    zero = decode <= 0
    # A total tells a clamped value only if it is what decode was taken from: then both agree wherever none was clamped.
    agree = np.abs(difference - decode)[subtracted & ~zero] <= 0.01 * total[subtracted & ~zero]
    told = table["total_given"].to_numpy(dtype=bool) & (len(agree) == 0 or bool(np.mean(agree) > 0.9))
    below = subtracted & zero & told & (difference < -1e-6 * prefill)
    # One-token runs show the offset if decode is what subtraction left; zeros all over are zeros by definition.
    single = table["output_tokens"].to_numpy() < 2
    bare = bool(np.any(subtracted & single & (~zero | below)))
    return np.where(below, difference, decode), zero & ~below, ~single | (subtracted & bare)


def _level(value: Floats, steps: Floats) -> float | None:
    """Typical step, in milliseconds, as the unit of all times; None where all runs are clamped."""
    if not np.any(value > 0):
        return None
    order = np.argsort(value / steps, kind="stable")
    reached = np.cumsum(steps[order])
    median = float((value / steps)[order][np.searchsorted(reached, reached[-1] / 2)])
    return median if median > 0 else float(value[value > 0].sum() / steps.sum())


def _structure(numbers: Floats) -> Floats:
    """What keys share of a step: linear in their numbers, relative to the middle of their ranges.

    As for prefill the last number repeats the work, and with it what the others do.
    """
    one = np.ones(numbers.shape[1])
    middles = [(column.min() + column.max()) / 2 for column in numbers]
    relative = [n / middle - 1.0 if middle > 0 else 0 * n for n, middle in zip(numbers, middles, strict=True)]
    *others, last = relative or [0 * one]
    return np.column_stack([one, last, *others, *(last * other for other in others)])
