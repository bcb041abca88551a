"""The maps of all configurations of a table: all stages together, and how far runs lie from the mapped P50."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lutest.calibration.key_similarity import key_places
from lutest.calibration.maps import KeyMaps, StageMap
from lutest.calibration.paired_runs import PairedRuns, PairedSteps
from lutest.calibration.stage_fit import StageFit, fit_stage, share_level
from lutest.reader.figures import Figures, Key

__all__ = ["StageCalibration", "fit_maps"]

Floats = NDArray[np.float64]

_LEAST_SPREAD = 1e-5  # of a log: a hundred-thousandth of the latency
_PRIOR_RUNS = 5.0  # what the parent's spread counts as, where a quantile cannot be read off the runs
_LARGEST_STRETCH = 100.0


@dataclass(frozen=True)
class StageCalibration:
    """What became of one stage.

    Attributes
    ----------
    n : int
        Runs that the map rests on.
    scale : tuple of float
        Least, median and largest scale over the configurations.
    offset_ms : float
        Median offset.
    least_ms : float
        What no P50 gets below, median over the configurations.
    shared : dict
        What the configurations share their scales by → its variance, in units of a run's; chosen by cross-validation.
    error : float
        Mean absolute log(observed / P50) of runs by the map fitted to all the others.
    stretch : dict
        Quantile → what log(quantile / P50) was multiplied by.
    """

    n: int
    scale: tuple[float, float, float]
    offset_ms: float
    least_ms: float
    shared: dict[str, float]
    error: float
    stretch: dict[float, float]


def fit_maps(
    figures: Figures, prefill: PairedRuns, decode: PairedRuns, steps: PairedSteps
) -> tuple[dict[Key, KeyMaps], StageCalibration, StageCalibration | None]:
    """The maps of all configurations, and what they come to.

    Parameters
    ----------
    figures : Figures
        The table.
    prefill, decode, steps
        Runs of the new device beside what the table says of them; one run or more, perhaps none for decode.
    """
    quantiles = figures.quantiles
    places = key_places(figures.key_columns, [held.key for held in figures.keys])
    prefill_fit = fit_stage(prefill, places, _least_p50_ms(figures, decode=False))
    if not len(decode.key_id):
        prefill_stretch = _stretches(prefill, prefill_fit, quantiles)
        maps = {
            held.key: KeyMaps(prefill=_stage_map(prefill_fit, number, prefill_stretch, quantiles))
            for number, held in enumerate(figures.keys)
        }
        return maps, _summary(prefill, prefill_fit, prefill_stretch), None
    decode_fit = fit_stage(decode, places, _least_p50_ms(figures, decode=True))
    prefill_fit, decode_fit = share_level(prefill_fit, decode_fit)
    prefill_stretch = _stretches(prefill, prefill_fit, quantiles)
    decode_stretch = _stretches(decode, decode_fit, quantiles)
    step_stretch, correlations = {}, []
    for i, q in enumerate(quantiles):
        if q == 0.5:
            correlations.append([held.correlations[i] for held in figures.keys])
            continue
        step_stretch[q] = _step_stretch(decode, decode_fit, steps, q) or decode_stretch[q]
        both = _deviations(prefill, prefill_fit, prefill_stretch[q], decode, decode_fit, decode_stretch[q], q)
        correlations.append([_fit_correlation(*both, q, held.correlations[i]) for held in figures.keys])
    maps = {}
    for number, held in enumerate(figures.keys):
        step = _stage_map(decode_fit, number, step_stretch, quantiles)
        maps[held.key] = KeyMaps(
            prefill=_stage_map(prefill_fit, number, prefill_stretch, quantiles),
            decode_step=step,
            decode_total=_stage_map(decode_fit, number, decode_stretch, quantiles),
            correlations=tuple(column[number] for column in correlations),
        )
    return maps, _summary(prefill, prefill_fit, prefill_stretch), _summary(decode, decode_fit, decode_stretch)


def _least_p50_ms(figures: Figures, *, decode: bool) -> float:
    median = figures.quantiles.index(0.5)
    curves = [held.decode_curve if decode else held.prefill_curve for held in figures.keys]
    return min(min(curve.values_ms[median]) for curve in curves if curve is not None)


def _stretches(runs: PairedRuns, fit: StageFit, quantiles: Sequence[float]) -> dict[float, float]:
    n = len(runs.key_id)
    return {q: _fit_stretch(fit.left_out, _spread(runs, fit, q), q, n) for q in quantiles if q != 0.5}


def _spread(runs: PairedRuns, fit: StageFit, q: float) -> Floats:
    return _log_spread(runs.predicted_ms, q, fit.deviation[runs.key_id])


def _mapped(fit: StageFit, key_id: NDArray[np.int64], predicted_ms: Floats) -> Floats:
    return np.asarray(fit.scale[key_id] * np.maximum(predicted_ms + fit.shift_ms, fit.least_ms))


def _step_stretch(runs: PairedRuns, fit: StageFit, steps: PairedSteps, q: float) -> float | None:
    """The stretch of single steps, by maps that did not see their run; None where no step was timed."""
    n_runs = len(np.unique(steps.place))
    if not n_runs:
        return None
    # what leaving its run out moves the P50 of a run's steps by
    seen = np.log(runs.observed_ms) - np.log(_mapped(fit, runs.key_id, runs.predicted_ms[0.5]))
    at = np.searchsorted(runs.place, steps.place)
    moved = (fit.left_out - seen)[at]
    left_out = np.log(steps.observed_ms) - np.log(_mapped(fit, steps.key_id, steps.predicted_ms[0.5])) + moved
    return _fit_stretch(left_out, _log_spread(steps.predicted_ms, q, fit.deviation[steps.key_id]), q, n_runs)


def _deviations(
    prefill: PairedRuns,
    prefill_fit: StageFit,
    prefill_stretch: float,
    decode: PairedRuns,
    decode_fit: StageFit,
    decode_stretch: float,
    q: float,
) -> tuple[Floats, Floats, Floats]:
    """Totals less their P50, and the sizes of both stages' deviations, of runs with decode."""
    at = np.searchsorted(prefill.place, decode.place)
    beyond_ms = np.zeros(len(at))
    sizes = []
    side = 1.0 if q > 0.5 else -1.0
    for runs, fit, stretch, rows, times in (
        (prefill, prefill_fit, prefill_stretch, at, np.ones(len(at))),
        (decode, decode_fit, decode_stretch, np.arange(len(at)), decode.n_steps),
    ):
        observed_ms = runs.observed_ms[rows] * times
        p50_ms = observed_ms * np.exp(-fit.left_out[rows])
        beyond_ms += observed_ms - p50_ms
        sizes.append(p50_ms * np.abs(np.expm1(side * stretch * _spread(runs, fit, q)[rows])))
    return beyond_ms, sizes[0], sizes[1]


def _stage_map(fit: StageFit, number: int, stretch: Mapping[float, float], quantiles: Sequence[float]) -> StageMap:
    scale = float(fit.scale[number])
    deviation = float(fit.deviation[number])
    return StageMap(
        scale=scale,
        offset_ms=scale * fit.shift_ms,
        least_ms=scale * fit.least_ms,
        stretch=tuple(stretch.get(q, 1.0) for q in quantiles),
        widening=tuple(abs(_normal_score(q)) * deviation for q in quantiles),
    )


def _summary(runs: PairedRuns, fit: StageFit, stretch: dict[float, float]) -> StageCalibration:
    middle = float(np.median(fit.scale))
    return StageCalibration(
        n=len(runs.key_id),
        scale=(float(fit.scale.min()), middle, float(fit.scale.max())),
        offset_ms=middle * fit.shift_ms,
        least_ms=middle * fit.least_ms,
        shared={name: strength for name, strength in fit.strengths.items() if strength > 0.0},
        error=fit.error,
        stretch=stretch,
    )


def _normal_score(q: float) -> float:
    """The standard normal quantile."""
    return float(stats.norm.ppf(q))


def _log_spread(predicted_ms: Mapping[float, Floats], q: float, deviation: Floats) -> Floats:
    """Size of log(quantile / P50): what the table says, and how uncertain the scale is, as independent deviations."""
    own = np.log(predicted_ms[q] / predicted_ms[0.5])
    return np.asarray(np.maximum(np.hypot(own, _normal_score(q) * deviation), _LEAST_SPREAD))


def _fit_stretch(left_out: Floats, spread: Floats, q: float, n_runs: int) -> float:
    """What the spread has to be multiplied by for the share q of the runs to lie below the quantile.

    Where the runs allow it, the conformal quantile of left_out / spread: a further run stays below it with
    probability q whatever the distribution is. Where they are too few, a robust scale of the same, drawn towards 1,
    with the factor by which a normal sample of that size underrates its quantile.

    Parameters
    ----------
    left_out : ndarray, shape (n,)
        log(observed / P50) of runs, or steps, by maps that did not see them.
    spread : ndarray, shape (n,)
        `_log_spread` of each.
    q : float
        The quantile; not 0.5.
    n_runs : int
        How many runs stand behind them: steps of one run go together.

    References
    ----------
    J. Lei, M. G'Sell, A. Rinaldo, R. J. Tibshirani and L. Wasserman (2018), Distribution-free predictive inference for
    regression, J. Am. Stat. Assoc. 113, section 5.2 (locally weighted split conformal).
    """
    if not n_runs:
        return 1.0
    scores = np.sort(left_out / spread) if q > 0.5 else np.sort(-left_out / spread)
    level = max(q, 1.0 - q) * (n_runs + 1) / n_runs
    if level <= 1.0:
        stretch = _order_statistic(scores, level)
    else:
        score = abs(_normal_score(q))
        scale = float(np.median(np.abs(scores))) * score / 0.6745
        shrunk = (n_runs * scale + _PRIOR_RUNS) / (n_runs + _PRIOR_RUNS)
        few = float(stats.t.ppf(max(q, 1.0 - q), n_runs + _PRIOR_RUNS - 1)) * math.sqrt(1 + 1 / n_runs) / score
        stretch = shrunk * few
    return min(max(stretch, 0.0), _LARGEST_STRETCH)


def _fit_correlation(beyond_ms: Floats, prefill_ms: Floats, decode_ms: Floats, q: float, otherwise: float) -> float:
    """How far the deviations of prefill and decode go together, so that the share q of the totals lies below theirs.

    Parameters
    ----------
    beyond_ms : ndarray, shape (n,)
        Observed totals less their P50.
    prefill_ms, decode_ms : ndarray, shape (n,)
        Sizes of the deviations of the quantile q from the P50 in both stages.
    q : float
        The quantile; not 0.5.
    otherwise : float
        The answer where the runs are too few.
    """
    n = len(beyond_ms)
    level = max(q, 1.0 - q) * (n + 1) / n if n else 2.0
    if level > 1.0:
        return otherwise
    side = 1.0 if q > 0.5 else -1.0
    size = side * beyond_ms
    both = np.maximum(2 * prefill_ms * decode_ms, 1e-300)
    # the least c at which sqrt(a² + d² + 2 c a d) reaches the run
    needed = (size**2 - prefill_ms**2 - decode_ms**2) / both
    needed = np.where(size <= 0.0, -np.inf, needed)
    return min(max(_order_statistic(np.sort(np.clip(needed, -2.0, 2.0)), level), 0.0), 1.0)


def _order_statistic(ordered: Floats, level: float) -> float:
    """Value at the rank level · n, linear between ranks."""
    return float(np.interp(level * len(ordered), np.arange(1, len(ordered) + 1), ordered))
