"""The map of one stage from few runs: scales that configurations share, an offset and a floor, by cross-validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lutest.builder.fit.quantiles import weighted_quantile
from lutest.calibration.key_similarity import EACH, varying_components
from lutest.calibration.paired_runs import PairedRuns

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LEVEL_STRENGTH = 1e4  # the scale that all configurations share is as good as free
_STRENGTHS = (0.0, 3.0, 30.0, 300.0)  # variances of a component, in units of a run's
_NO_FLOOR = 0.1  # far below all that there is: for what is asked beyond the table
_SHIFTS = (0.0, -0.6, -0.3, -0.1, 0.1, 0.3, 1.0, 3.0)  # in units of the least P50 of the table
_FLOORS = (_NO_FLOOR, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)  # the same
_ROUNDS = 2
_LEAST_RUNS = 4  # below, a plain scale
_TEMPER = 0.5  # of the evidence for a map against one scale: all of it trusts chance, a quarter keeps to the scale
_PRICE = 0.75  # of the error, over the number of runs: what each part of a map must earn
_REWEIGHTINGS = 3
_OUTLYING = 1.5  # standard deviations from which on a run counts less (Huber)
_LARGEST_ERROR = 1.0  # of a log: beyond it, a run is as wrong as can be
_LEAST_ERROR = 1e-6


@dataclass(frozen=True)
class StageFit:
    """The map of one stage: a P50 of t becomes ``scale * max(t + shift_ms, least_ms)``.

    Attributes
    ----------
    scale : ndarray, shape (n_keys,)
        Of each configuration of the table.
    shift_ms, least_ms : float
        Of all of them, in the table's time: an offset, and what nothing gets below.
    deviation : ndarray, shape (n_keys,)
        Standard deviation of log scale: how uncertain it is.
    left_out : ndarray, shape (n_runs,)
        log(observed / P50) of each run by the map fitted to all the others.
    strengths : dict
        Component → its variance, in units of a run's.
    error : float
        Mean absolute `left_out`.
    """

    scale: Floats
    shift_ms: float
    least_ms: float
    deviation: Floats
    left_out: Floats
    strengths: Mapping[str, float]
    error: float

    @property
    def is_plain(self) -> bool:
        """One scale for all configurations, and no more."""
        return self.shift_ms == 0.0 and not any(self.strengths.values())


def share_level(one: StageFit, other: StageFit) -> tuple[StageFit, StageFit]:
    """Two stages of one scale each, drawn towards each other as far as runs do not tell them apart.

    A device that is slower in one stage is likely to be as much slower in the other: the difference of their logarithms
    is shrunk by the share of it that chance explains (positive-part Stein shrinkage, as in Efron and Morris 1973).

    References
    ----------
    B. Efron and C. Morris (1973), Stein's estimation rule and its competitors, J. Am. Stat. Assoc. 68.
    """
    if not (one.is_plain and other.is_plain):
        return one, other
    levels = [float(np.log(fit.scale[0])) for fit in (one, other)]
    # the variance of a median
    variances = [1.57 * max(_squared_scale(fit.left_out), 1e-12) / len(fit.left_out) for fit in (one, other)]
    middle = float(np.average(levels, weights=[1.0 / variance for variance in variances]))
    share = min(1.0, sum(variances) / max((levels[0] - levels[1]) ** 2, 1e-300))
    moves = [share * (middle - level) for level in levels]
    moved = [
        replace(fit, scale=fit.scale * np.exp(move), left_out=fit.left_out - move)
        for fit, move in zip((one, other), moves, strict=True)
    ]
    return moved[0], moved[1]


@dataclass(frozen=True)
class _Candidate:
    shift_ms: float
    least_ms: float
    strengths: dict[str, float]


def fit_stage(runs: PairedRuns, parts: Mapping[str, Floats], unit_ms: float) -> StageFit:
    """Fit the map of one stage.

    log(observed) is log(max(predicted + shift, least)) plus a scale of the configuration plus noise. The scales are a
    Gaussian process over the configurations with the components of `key_similarity`; runs far out count less (Huber
    1964). How strong the components are, shift and least are averaged over a grid, weighted by the mean absolute error
    of each run by the fit to all others, for which there is a closed form. So is, in the end, the map as a whole with
    one scale for all configurations, by half of the evidence: the best of many looks better than it is. The median of
    the errors is taken off at last, for noise is skewed.

    Parameters
    ----------
    runs : PairedRuns
        One run or more.
    parts : mapping
        Component → covariance of all configurations of the table, as `similarities` gives it.
    unit_ms : float
        The least P50 of the table: offsets stay well above its negative, so that nothing falls to zero.

    References
    ----------
    C. E. Rasmussen and C. K. I. Williams, Gaussian Processes for Machine Learning (2006), sections 2.7 and 5.4.2.
    P. J. Huber (1964), Robust estimation of a location parameter, Ann. Math. Stat. 35.
    """
    own = {name: part[np.ix_(runs.key_id, runs.key_id)] for name, part in parts.items()}
    plain = _Candidate(0.0, _NO_FLOOR * unit_ms, dict.fromkeys(parts, 0.0))
    chosen = _choose(runs, own, varying_components(parts, runs.key_id), unit_ms, plain)
    errors = np.array([float(np.average(_errors(runs, own, held), weights=runs.weight)) for held in (chosen, plain)])
    errors = np.maximum(errors, _LEAST_ERROR)
    shares = (errors.min() / errors) ** (_TEMPER * len(runs.key_id))
    shares = shares / shares.sum()
    # One map for both, so that they differ in the scales alone.
    shift_ms = float(shares[0] * chosen.shift_ms)
    least_ms = float(np.exp(shares @ np.log([chosen.least_ms, plain.least_ms])))
    log_scale, variance, left_out = (np.zeros(n) for n in (len(parts[EACH]), len(parts[EACH]), len(runs.key_id)))
    fits = [_fitted(runs, parts, own, _Candidate(shift_ms, least_ms, held.strengths)) for held in (chosen, plain)]
    for share, (log_scales, _, errors) in zip(shares, fits, strict=True):
        log_scale += share * log_scales
        left_out += share * errors
    for share, (log_scales, variances, _) in zip(shares, fits, strict=True):
        variance += share * (variances + (log_scales - log_scale) ** 2)
    middle = weighted_quantile(left_out, runs.weight, 0.5) if len(left_out) >= _LEAST_RUNS else 0.0
    left_out = left_out - middle
    return StageFit(
        scale=np.exp(log_scale + middle),
        shift_ms=shift_ms,
        least_ms=least_ms,
        deviation=np.sqrt(variance),
        left_out=left_out,
        strengths={name: float(shares[0]) * strength for name, strength in chosen.strengths.items()},
        error=float(np.average(np.abs(left_out), weights=runs.weight)),
    )


def _fitted(
    runs: PairedRuns, parts: Mapping[str, Floats], own: Mapping[str, Floats], candidate: _Candidate
) -> tuple[Floats, Floats, Floats]:
    """Logarithms of the scales, their variances, and the residual of each run left out."""
    weights, left_out, inverse = _solved(runs, own, candidate)
    of_all = _covariance(candidate.strengths, parts)
    to_all = of_all[:, runs.key_id]
    explained = np.einsum("ij,jk,ik->i", to_all, inverse, to_all)
    # the variance of a run: what is left out, standardised, has variance 1 in units of it
    noise = _squared_scale(left_out * np.sqrt(np.diag(inverse)))
    return to_all @ weights, noise * np.maximum(np.diag(of_all) - explained, 0.0), left_out


def _choose(
    runs: PairedRuns, parts: Mapping[str, Floats], components: tuple[str, ...], unit_ms: float, plain: _Candidate
) -> _Candidate:
    """The parts of the map: each the mean over what it might be, weighted by cross-validation, the others held."""
    chosen = plain
    if len(runs.key_id) < _LEAST_RUNS:
        return plain
    for _ in range(_ROUNDS):
        tried = [
            _Candidate(shift * unit_ms, least * unit_ms, chosen.strengths)
            for shift in _SHIFTS
            for least in _FLOORS
            if not (shift > 0.0 and least > _NO_FLOOR)
        ]
        weights = _worths(runs, parts, tried, unit_ms)
        shift_ms, least_ms = weights @ [(candidate.shift_ms, candidate.least_ms) for candidate in tried]
        chosen = _Candidate(float(shift_ms), float(least_ms), chosen.strengths)
        for name in components:
            tried = [replace(chosen, strengths={**chosen.strengths, name: strength}) for strength in _STRENGTHS]
            weights = _worths(runs, parts, tried, unit_ms)
            strength = float(np.expm1(weights @ np.log1p(_STRENGTHS)))
            chosen = replace(chosen, strengths={**chosen.strengths, name: strength})
    return chosen


def _worths(runs: PairedRuns, parts: Mapping[str, Floats], candidates: Sequence[_Candidate], unit_ms: float) -> Floats:
    """Weights of candidates: their likelihood if errors of runs left out were Laplace-distributed, parts at a price."""
    n = len(runs.key_id)
    prices = []
    for candidate in candidates:
        n_parts = (candidate.shift_ms != 0.0) + (candidate.least_ms > _NO_FLOOR * unit_ms)
        n_parts += sum(strength > 0.0 for strength in candidate.strengths.values())
        error = float(np.average(_errors(runs, parts, candidate), weights=runs.weight))
        prices.append(max(error, _LEAST_ERROR) * (1.0 + _PRICE * n_parts / n))
    worths = (np.min(prices) / np.array(prices)) ** n
    return np.asarray(worths / worths.sum())


def _errors(runs: PairedRuns, parts: Mapping[str, Floats], candidate: _Candidate) -> Floats:
    _, left_out, _ = _solved(runs, parts, candidate)
    return np.asarray(np.minimum(np.abs(left_out), _LARGEST_ERROR))


def _covariance(strengths: Mapping[str, float], parts: Mapping[str, Floats]) -> Floats:
    level = np.full_like(parts[EACH], _LEVEL_STRENGTH)
    return sum((strength * parts[name] for name, strength in strengths.items()), level)


def _solved(runs: PairedRuns, parts: Mapping[str, Floats], candidate: _Candidate) -> tuple[Floats, Floats, Floats]:
    """Weights of the runs in the fitted scales, the residual of each run left out, and the inverse that gave them."""
    mapped = np.maximum(runs.predicted_ms[0.5] + candidate.shift_ms, candidate.least_ms)
    target = np.log(runs.observed_ms) - np.log(mapped)
    covariance = _covariance(candidate.strengths, parts)
    left_out = target - np.median(target)  # to start with: a mean of all would follow what lies far out
    for _ in range(_REWEIGHTINGS):
        size = np.abs(left_out)
        reach = _OUTLYING * (1.4826 * float(np.median(size)) + 1e-9)
        robust = runs.weight * np.minimum(1.0, reach / np.maximum(size, 1e-12))
        inverse = np.linalg.inv(covariance + np.diag(1.0 / robust))
        weights = inverse @ target
        left_out = weights / np.diag(inverse)
    return weights, left_out, np.asarray(inverse, dtype=np.float64)


def _squared_scale(values: Floats) -> float:
    return float((1.4826 * np.median(np.abs(values))) ** 2)
