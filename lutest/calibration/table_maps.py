"""The maps of all configurations of a table: all stages together, and how far runs lie from the mapped P50."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lutest.calibration.key_similarity import similarities
from lutest.calibration.maps import KeyMaps, StageMap
from lutest.calibration.paired_runs import PairedRuns, PairedSteps
from lutest.calibration.stage_fit import StageFit, fit_stage, share_level
from lutest.reader.figures import Figures, Key

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
    parts = similarities(figures.key_columns, [held.key for held in figures.keys])
    fits = [fit_stage(prefill, parts, _least_p50_ms(figures, decode=False))]
    if len(decode.key_id):
        fits = [*share_level(fits[0], fit_stage(decode, parts, _least_p50_ms(figures, decode=True)))]
    one, *others = (_Stage(*stage) for stage in zip((prefill, decode), fits, strict=False))
    if not others:
        maps = {held.key: KeyMaps(one.map_of(number, one.stretch)) for number, held in enumerate(figures.keys)}
        return maps, one.summary(), None
    (other,) = others
    step_stretch, correlations = {}, []
    for q, held in zip(figures.quantiles, zip(*(key.correlations for key in figures.keys), strict=True), strict=True):
        fitted = None
        if q != 0.5:
            step_stretch[q] = _step_stretch(other, steps, q) or other.stretch[q]
            fitted = _fit_correlation(*_deviations(one, other, q), q)
        correlations.append(held if fitted is None else (fitted,) * len(held))
    maps = {}
    for number, (key, together) in enumerate(zip(figures.keys, zip(*correlations, strict=True), strict=True)):
        step, total = other.map_of(number, step_stretch), other.map_of(number, other.stretch)
        maps[key.key] = KeyMaps(one.map_of(number, one.stretch), step, total, together)
    return maps, one.summary(), other.summary()


class _Stage:
    """Runs of one stage, the map fitted to them, and by quantile what stretches its distance to the P50."""

    def __init__(self, runs: PairedRuns, fit: StageFit) -> None:
        self.runs, self.fit = runs, fit
        n = len(runs.key_id)
        self.stretch = {
            q: _fit_stretch(fit.left_out, self.spread(runs, q), q, n) for q in runs.predicted_ms if q != 0.5
        }

    def spread(self, runs: PairedSteps, q: float) -> Floats:
        """Size of log(quantile / P50): the table's, and how uncertain the scale is, as independent deviations."""
        own = np.log(runs.predicted_ms[q] / runs.predicted_ms[0.5])
        uncertain = _normal_score(q) * self.fit.deviation[runs.key_id]
        return np.asarray(np.maximum(np.hypot(own, uncertain), _LEAST_SPREAD))

    def seen(self, runs: PairedSteps) -> Floats:
        """log(observed / P50) by the map."""
        mapped = np.maximum(runs.predicted_ms[0.5] + self.fit.shift_ms, self.fit.least_ms)
        return np.asarray(np.log(runs.observed_ms) - np.log(self.fit.scale[runs.key_id] * mapped))

    def map_of(self, number: int, stretch: Mapping[float, float]) -> StageMap:
        scale, deviation = float(self.fit.scale[number]), float(self.fit.deviation[number])
        return StageMap(
            scale=scale,
            offset_ms=scale * self.fit.shift_ms,
            least_ms=scale * self.fit.least_ms,
            stretch=tuple(stretch.get(q, 1.0) for q in self.runs.predicted_ms),
            widening=tuple(abs(_normal_score(q)) * deviation for q in self.runs.predicted_ms),
        )

    def summary(self) -> StageCalibration:
        fit, middle = self.fit, float(np.median(self.fit.scale))
        return StageCalibration(
            n=len(self.runs.key_id),
            scale=(float(fit.scale.min()), middle, float(fit.scale.max())),
            offset_ms=middle * fit.shift_ms,
            least_ms=middle * fit.least_ms,
            shared={name: strength for name, strength in fit.strengths.items() if strength > 0.0},
            error=fit.error,
            stretch=self.stretch,
        )


def _least_p50_ms(figures: Figures, *, decode: bool) -> float:
    median = figures.quantiles.index(0.5)
    curves = [held.decode_curve if decode else held.prefill_curve for held in figures.keys]
    return min(min(curve.values_ms[median]) for curve in curves if curve is not None)


def _step_stretch(decode: _Stage, steps: PairedSteps, q: float) -> float | None:
    """The stretch of single steps, by maps that did not see their run; None where no step was timed."""
    n_runs = len(np.unique(steps.place))
    if not n_runs:
        return None
    # what leaving its run out moves the P50 of a run's steps by
    moved = decode.fit.left_out - decode.seen(decode.runs)
    left_out = decode.seen(steps) + moved[np.searchsorted(decode.runs.place, steps.place)]
    return _fit_stretch(left_out, decode.spread(steps, q), q, n_runs)


def _deviations(prefill: _Stage, decode: _Stage, q: float) -> tuple[Floats, Floats, Floats]:
    """Totals less their P50, and the sizes of both stages' deviations, of runs with decode."""
    rows = np.searchsorted(prefill.runs.place, decode.runs.place)
    side = 1.0 if q > 0.5 else -1.0
    beyond_ms, sizes = np.zeros(len(rows)), []
    for stage, at in ((prefill, rows), (decode, np.arange(len(rows)))):
        observed_ms = (stage.runs.observed_ms * stage.runs.n_steps)[at]
        p50_ms = observed_ms * np.exp(-stage.fit.left_out[at])
        beyond_ms += observed_ms - p50_ms
        sizes.append(p50_ms * np.abs(np.expm1(side * stage.stretch[q] * stage.spread(stage.runs, q)[at])))
    return beyond_ms, sizes[0], sizes[1]


def _normal_score(q: float) -> float:
    """The standard normal quantile."""
    return float(stats.norm.ppf(q))


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
        Size of log(quantile / P50) of each.
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


def _fit_correlation(beyond_ms: Floats, prefill_ms: Floats, decode_ms: Floats, q: float) -> float | None:
    """How far the deviations of prefill and decode go together, so that the share q of the totals lies below theirs.

    Parameters
    ----------
    beyond_ms : ndarray, shape (n,)
        Observed totals less their P50.
    prefill_ms, decode_ms : ndarray, shape (n,)
        Sizes of the deviations of the quantile q from the P50 in both stages.
    q : float
        The quantile; not 0.5.

    Returns
    -------
    float or None
        None where the runs are too few.
    """
    n = len(beyond_ms)
    level = max(q, 1.0 - q) * (n + 1) / n if n else 2.0
    if level > 1.0:
        return None
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
