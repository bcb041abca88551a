"""Decode step over KV length, recovered from runs of which only the sum of the steps is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from lutest.builder.fit.step_model import FREEDOM, LEAST_SHARE, StepFit, fit_steps, quadratic, shared_columns
from lutest.builder.fit.subtracted_runs import SubtractedRuns, read_subtracted_runs, slices_of_keys
from lutest.reader.names import KEY_COLUMNS, quantile_column

__all__ = ["identify", "recover_step_curve"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

KEYS = list(KEY_COLUMNS)
FEW_RUNS, LARGEST_SPREAD = 10, 0.15  # with fewer informative runs in all, the spread of a step is hardly known
INFORMATIVE = 2.0  # a run says something of its key's step when its decode is this many times its noise


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
    runs = read_subtracted_runs(run_sample)
    if runs is None:
        empty = pd.DataFrame({column: np.empty(0) for column in columns})
        places = pd.DataFrame({"kv_len": np.empty(0, dtype=np.int64), "n": np.empty(0, dtype=np.int64)})
        return pd.concat([run_sample[KEYS].iloc[:0], places, empty], axis=1).assign(source=pd.Series(dtype=object))
    fit = fit_steps(runs)
    informative = _informative(runs, fit)
    spread = fit.spread if informative.sum() >= FEW_RUNS else min(fit.spread, LARGEST_SPREAD)
    factors = np.exp(special.stdtrit(FREEDOM, np.asarray(quantiles, dtype=float)) * spread)
    curves = []
    for k, rows in enumerate(slices_of_keys(runs)):
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
    runs = read_subtracted_runs(run_sample)
    columns = ["base_ms", "base_error_ms", "slope_ms", "slope_error_ms", "offset_ms"]
    if runs is None:
        return run_sample[KEYS].iloc[:0].assign(**dict.fromkeys(["n", "n_clamped", "n_informative", *columns], 0.0))
    fit = fit_steps(runs)
    figures = []
    for k in range(len(runs.starts)):
        lean = fit.base[k] / runs.reach[k]
        at_centre = shared_columns(runs, np.array([k]), runs.centre[[k]])[0]
        per_token = shared_columns(runs, np.array([k]), runs.centre[[k]] + 1.0)[0] - at_centre
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


def _curve_ms(runs: SubtractedRuns, fit: StepFit, k: int, kv_len: Floats) -> Floats:
    away = (kv_len - runs.centre[k]) / runs.reach[k]
    own = fit.own[k, 0] + fit.own[k, 1] * away + fit.own[k, 2] * np.maximum(away, 0)
    step = shared_columns(runs, np.full(len(kv_len), k), kv_len) @ fit.pooled + fit.base[k] * own
    curve: Floats = np.maximum(step, LEAST_SHARE * fit.base[k]) * runs.level_ms
    return curve


def _combine(fit: StepFit, k: int, pooled: Floats, own: Floats) -> tuple[float, float]:
    """Value and standard error of a linear combination of the pooled part and the own part of key `k`."""
    left_over = pooled - own @ fit.gains[k]
    variance = quadratic(own[None], fit.inverses[k]) + quadratic(left_over[None], fit.covariance)
    return float(pooled @ fit.pooled + own @ fit.own[k]), float(np.sqrt(variance[0]))


def _informative(runs: SubtractedRuns, fit: StepFit) -> Integers:
    """Runs per key whose decode stands out of their noise."""
    decode = runs.steps * fit.base[runs.code]
    clear = ~runs.censored & (runs.steps > 0) & (decode >= INFORMATIVE * fit.scale)
    return np.add.reduceat(clear.astype(np.int64), runs.starts)


def _steps_near(knots: Integers, first: Integers, last: Integers) -> Integers:
    """Number of steps, of runs that cover KV lengths `first` to `last`, whose nearest knot is each."""
    edges = (knots[1:] + knots[:-1]) // 2
    upto = [int(np.clip(edge - first + 1, 0, last - first + 1).sum()) for edge in edges]
    return np.diff([0, *upto, int((last - first + 1).sum())]).astype(np.int64)
