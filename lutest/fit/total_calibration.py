"""Calibrated quantiles of decode totals and of totals, from whole runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize

from ..schema import KEY_COLUMNS, quantile_column, quantile_suffix

__all__ = ["Fold", "calibrate_totals"]

KEYS = list(KEY_COLUMNS)
MAX_KNOTS = 12
NEIGHBOURS = 150  # runs that a local quantile rests on, where there are as many
TAIL_RUNS = 10  # runs that an exponential tail rests on
PRIOR_KEYS = 2  # keys whose mean residual is taken to be 0 when the leverage is estimated: few keys say little
STEP_POWERS = (0.0, 0.5, 1.0)
LEAST_LEFT = 0.1  # of a variance, after the fit of a level
TELLING_RUNS = 15  # runs beyond a level that tell as much about its correlation as the plain one does
LEAST_RATIO = 1e-3
TINY = 1e-12

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


class Fold(NamedTuple):
    """Runs, by their ``run_hash``, and the curves fitted to all others."""

    run_hashes: Collection[str]
    prefill_curve: pd.DataFrame
    decode_curve: pd.DataFrame


def calibrate_totals(
    run_sample: pd.DataFrame,
    prefill_curve: pd.DataFrame,
    decode_curve: pd.DataFrame,
    quantiles: Sequence[float],
    folds: Sequence[Fold] = (),
    outlier_share: float = 0.0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Calibrate quantiles of ``decode_ms`` and ``total_ms`` on whole runs.

    Parameters
    ----------
    run_sample : DataFrame
        One row a run: keys, ``prompt_tokens``, ``output_tokens``, ``prefill_ms``, ``decode_ms``, ``total_ms`` and
        ``timed``.
    prefill_curve, decode_curve : DataFrame
        Knots of the fitted curves, as in the tables of the same names (``p50_sum_ms`` is not read).
    quantiles : sequence of float
        Levels, ascending, 0.5 among them.
    folds : sequence of Fold, optional
        Runs, and the curves fitted without them: each run is then judged by curves that never saw it. Runs of no fold,
        and of keys that a fold's curves lack, are judged by the curves themselves.
    outlier_share : float, optional
        Share of the runs that were left out as outliers. Nearly all of them are slow, and there will be more: level q
        of all runs is level q / (1 - share) of those that are left, for q above 0.5.

    Returns
    -------
    decode_total : DataFrame
        Keys, ``decode_steps``, ``n``, one ``pXX_ratio`` a level, ``source``: quantiles of ``decode_ms`` over D, the sum
        of the P50 curve over the run's steps. The product of D and a ratio never falls with the number of steps;
        ratios are above 0 and do not fall with the level. A key without a decode curve or without a run of two tokens
        has no row.
    total : DataFrame
        Keys, ``n`` (runs of two tokens or more), ``pXX_correlation`` in [0, 1] a level; each key of `prefill_curve`.

    Notes
    -----
    A run's ratio is modelled as ``base(m) + s(m) · u``, m the number of steps. Its variance has components [1]_:
    s² = v_run + v_step / m + v_fixed · w². Noise of steps averages out within a run, that of slow runs does not;
    w is what noise that does not grow with the run comes to in the ratio: 1 / m, and for runs timed by subtraction
    that of a whole prefill, as each pass holds one. The components maximise a Laplace likelihood: of all keys, and of
    each key as far as keys differ by more than chance [2]_. For runs timed by subtraction ``base`` holds an offset of
    the key as well, in units of w.

    Quantiles of u are local ones over all keys, weighted by closeness in log m: their shape drifts from that of a step
    to that of a run as m grows, their median from median to mean. A key's own quantile counts as far as the coverages
    of the keys differ by more than chance. Levels beyond the sample are continued by an exponential tail [3]_.

    Without folds D was fitted on the same runs: residuals are too small by sqrt(1 - h), and new runs lie off by
    sqrt(1 + h), where h = H / runs of the key. H in [0, 1] is read off the spread of the keys' mean residuals: 1 where
    the curve of each key follows its own runs, so that none is left. That knows of levels alone: where curves bend
    towards single runs (few runs, small noise), only folds tell how far new runs lie off. Ranks are
    those of conformal prediction, (n + 1) · q [4]_.

    A total's correlation is the least c with which a share q of the runs (same ranks, same correction) is at most
    P50 + sqrt(a² + d² + 2·c·a·d), each run weighted by its say in c, 2·a·d / (a² + d²); mirrored for levels below 0.5.
    Few runs lie beyond a level: it is drawn to the plain correlation of the deviations of prefill and decode, which is
    right at every level for elliptical distributions.

    References
    ----------
    .. [1] S. R. Searle, G. Casella and C. E. McCulloch, Variance Components (1992).
    .. [2] R. DerSimonian and N. Laird, Meta-analysis in clinical trials, Controlled Clinical Trials 7 (1986).
    .. [3] L. Breiman, C. Stone and C. Kooperberg, Robust confidence bounds for extreme upper quantiles,
       J. Statist. Comput. Simul. 37 (1990).
    .. [4] Y. Romano, E. Patterson and E. J. Candès, Conformalized quantile regression, NeurIPS (2019).
    """
    levels = np.asarray(quantiles, dtype=float)
    sought = np.where(levels > 0.5, np.minimum(levels / (1 - outlier_share), (1 + levels) / 2), levels)
    keys = _keys(run_sample, Fold(frozenset(), prefill_curve, decode_curve), folds, levels)
    ratio_columns = [f"{quantile_suffix(q)}_ratio" for q in levels]
    correlation_columns = [f"{quantile_suffix(q)}_correlation" for q in levels]
    rows = []
    correlations: dict[tuple[object, ...], Array] = {}
    for timed in (True, False):
        part = [key for key in keys if key.timed == timed]
        if not part:
            continue
        knots = _knots(part)
        ratios, inflation = _decode_ratios(part, knots, sought, cross_fitted=len(folds) > 0)
        tables = [_rows(key, knots, own, levels) for key, own in zip(part, ratios, strict=True)]
        final = np.stack([table[ratio_columns].to_numpy(float) for table in tables])
        found = _correlations(part, final, knots, inflation, sought)
        correlations.update({key.name: found for key in part})
        rows.extend(tables)
    columns = [*KEYS, "decode_steps", "n", *ratio_columns, "source"]
    decode_total = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)
    decode_total = decode_total.sort_values([*KEYS, "decode_steps"], ignore_index=True)

    total = prefill_curve[KEYS].drop_duplicates().sort_values(KEYS, ignore_index=True)
    names = list(total.itertuples(index=False, name=None))
    sizes = {key.name: len(key.steps) for key in keys}
    # A key without decode runs takes part in no total of two tokens; the widest of the others is on the safe side.
    fallback = np.max(list(correlations.values()), axis=0) if correlations else np.ones(len(levels))
    total["n"] = np.array([sizes.get(name, 0) for name in names], dtype="int64")
    held = np.array([correlations.get(name, fallback) for name in names]).reshape(len(names), len(levels))
    for number, column in enumerate(correlation_columns):
        total[column] = held[:, number]
    return decode_total, total


@dataclass(frozen=True)
class _Curve:
    """Piecewise-linear curve over integer knots: constant before them, never falling after them."""

    knots: Array
    values: Array  # knots × levels

    def at(self, x: Array) -> Array:
        """Value of each level at each x."""
        place = np.clip(np.searchsorted(self.knots, x, side="right") - 1, 0, None)
        distance = np.maximum(x - self.knots[place], 0.0)
        return np.asarray(self.values[place] + distance[:, None] * self._slopes()[place])

    def sum_between(self, start: Array, stop: Array, level: int) -> Array:
        """Sum of one level over start + 1, …, stop."""
        return self.sum_to(stop, level) - self.sum_to(start, level)

    def sum_to(self, x: Array, level: int) -> Array:
        """Sum of one level over 1, 2, …, x."""
        value, slope = self.values[:, level], self._slopes()[:, level]
        steps = np.diff(self.knots)
        sums = value[0] * self.knots[0] + np.concatenate(
            [[0.0], np.cumsum(steps * value[:-1] + slope[:-1] * steps * (steps + 1) / 2)]
        )
        place = np.clip(np.searchsorted(self.knots, x, side="right") - 1, 0, None)
        distance = x - self.knots[place]
        inside = sums[place] + distance * value[place] + slope[place] * distance * (distance + 1) / 2
        return np.asarray(np.where(x < self.knots[0], value[0] * x, inside))

    def steadiness(self, level: int) -> float:
        """Least ratio of the curve at a place to the curve at a place before."""
        value = self.values[:, level]
        return float(np.min(value / np.maximum.accumulate(value)))

    def _slopes(self) -> Array:
        if len(self.knots) == 1:
            return np.zeros_like(self.values)
        inner = np.diff(self.values, axis=0) / np.diff(self.knots)[:, None]
        return np.concatenate([inner, np.maximum(inner[-1:], 0.0)])


@dataclass(frozen=True)
class _Key:
    """Runs of two tokens or more of one key, and its curves at them."""

    name: tuple[object, ...]
    timed: bool
    steps: Array
    ratio: Array  # decode_ms over D
    fixed: Array  # what noise of a fixed size comes to in the ratio
    decode_ms: Array  # D
    prefill_ms: Array  # runs × levels
    seen_ms: tuple[Array, Array, Array]  # prefill, decode and total as measured
    fixed_one: float  # `fixed` of a run of one step at the key's median prompt
    steadiness: float


def _keys(run_sample: pd.DataFrame, whole: Fold, folds: Sequence[Fold], levels: Array) -> list[_Key]:
    columns = [quantile_column(q) for q in levels]
    middle = _middle(levels)
    curves = [
        (_curves(fold.prefill_curve, "prompt_tokens", columns), _curves(fold.decode_curve, "kv_len", columns))
        for fold in (whole, *folds)
    ]
    prefill, decode = curves[0]
    runs = run_sample[run_sample["output_tokens"] >= 2]
    # Sums of floats depend on their order; rows come in any.
    order = [*KEYS, "output_tokens", "prompt_tokens", "decode_ms", "prefill_ms", "total_ms"]
    runs = runs.sort_values([*order, "run_hash"] if folds else order)
    keys = []
    for name, group in runs.groupby(KEYS):
        if name not in decode or name not in prefill:
            continue
        prompt = group["prompt_tokens"].to_numpy(float)
        steps = group["output_tokens"].to_numpy(float) - 1
        first = prefill[name].at(prompt)
        expected = decode[name].sum_between(prompt, prompt + steps, middle)
        for fold, (own_prefill, own_decode) in zip(folds, curves[1:], strict=True):
            mine = group["run_hash"].isin(fold.run_hashes).to_numpy()
            if mine.any() and name in own_prefill and name in own_decode:
                first[mine] = own_prefill[name].at(prompt[mine])
                expected[mine] = own_decode[name].sum_between(prompt[mine], (prompt + steps)[mine], middle)
        timed = bool(group["timed"].any())
        median_prompt = np.array([np.median(prompt)])
        # Passes that are subtracted each carry the noise of a prefill; timed runs at most that of a step or so.
        fixed, fixed_one = 1 / steps, 1.0
        if not timed:
            fixed = first[:, middle] / expected
            fixed_one = float((prefill[name].at(median_prompt) / decode[name].at(median_prompt + 1))[0, middle])
        seen = (group[column].to_numpy(float) for column in ("prefill_ms", "decode_ms", "total_ms"))
        prefill_ms, decode_ms, total_ms = seen
        keys.append(
            _Key(
                name,
                timed,
                steps,
                decode_ms / expected,
                fixed,
                expected,
                first,
                (prefill_ms, decode_ms, total_ms),
                fixed_one,
                decode[name].steadiness(middle),
            )
        )
    return keys


def _curves(curve: pd.DataFrame, place: str, columns: list[str]) -> dict[tuple[object, ...], _Curve]:
    ordered = curve.sort_values([*KEYS, place])
    return {
        name: _Curve(group[place].to_numpy(float), group[columns].to_numpy(float))
        for name, group in ordered.groupby(KEYS)
    }


def _middle(levels: Array) -> int:
    return int(np.flatnonzero(levels == 0.5)[0])


def _decode_ratios(keys: list[_Key], knots: Array, levels: Array, cross_fitted: bool) -> tuple[Array, Array]:
    """Ratios, keys × knots × levels, and what the deviation of each run is to be multiplied by."""
    sizes = np.array([len(key.steps) for key in keys])
    owner = np.repeat(np.arange(len(keys)), sizes)
    steps = np.concatenate([key.steps for key in keys])
    ratio = np.concatenate([key.ratio for key in keys])
    fixed = np.concatenate([key.fixed for key in keys])
    place, at = np.log2(knots), np.log2(steps)

    center = _local_quantiles(at, ratio, place, np.array([0.5]))[:, 0]
    offset = np.zeros(len(keys))
    residual = ratio - np.interp(at, place, center)
    spread = _spread(_components(residual, steps, fixed, owner, len(keys))[owner], steps, fixed)
    if not keys[0].timed:
        offset = _offsets(residual, fixed, spread, owner, len(keys))
        corrected = ratio - offset[owner] * fixed
        center = _local_quantiles(at, corrected, place, np.array([0.5]))[:, 0]
        residual = corrected - np.interp(at, place, center)
    components = _components(residual, steps, fixed, owner, len(keys))
    spread = _spread(components[owner], steps, fixed)
    u = residual / spread

    level, shrinkage = np.zeros(len(keys)), np.ones_like(u)
    if not cross_fitted:
        level, shrinkage = _leverage(u, spread, steps, owner, len(keys))
    full = u / shrinkage
    shape = _local_quantiles(at, full, place, levels)
    shifts = np.empty((len(keys), len(levels)))
    for number, q in enumerate(levels):
        shifts[:, number] = _key_shifts(full - np.interp(at, place, shape[:, number]), owner, sizes, float(q))
    ratios = np.empty((len(keys), len(knots), len(levels)))
    for number, key in enumerate(keys):
        at_knots = key.fixed_one / knots
        ahead = np.sqrt(_spread(components[[number]], knots, at_knots) ** 2 + level[number])
        ratios[number] = (center + offset[number] * at_knots)[:, None] + ahead[:, None] * (shape + shifts[number])
    ratios = np.maximum(np.sort(ratios, axis=2), LEAST_RATIO)
    return ratios, np.sqrt(1 + level[owner] / spread**2) / shrinkage


def _components(residual: Array, steps: Array, fixed: Array, owner: Indices, n_keys: int) -> Array:
    """Components of the variance of a ratio, keys × 3: of a run, of a step, of noise of a fixed size.

    Those of all keys together, and round them each key's own, as far as the keys' sizes differ by more than chance.
    """
    size = float(np.mean(np.abs(residual)))
    if size <= TINY:
        return np.tile([TINY**2, 0.0, 0.0], (n_keys, 1))
    design = np.stack([np.ones_like(steps), 1 / steps, fixed**2])
    start = 2 * np.log(size) - np.log(3 * design.mean(axis=1))
    pooled = _most_likely(np.abs(residual), design, start, 0.0)
    logs = np.tile(pooled, (n_keys, 1))
    deviation = np.abs(residual) / _spread(np.exp(logs[:1]), steps, fixed)
    sizes = np.bincount(owner)
    own = np.bincount(owner, deviation) / sizes
    chance = (np.mean(deviation**2) / np.mean(deviation) ** 2 - 1) / sizes
    # Less one standard error: a key's own components are worth their noise only where keys clearly differ.
    doubt = np.sqrt(2 * (n_keys - 1))
    between = _between(own / np.mean(own), chance, doubt) if n_keys > 1 and chance.min() > 0 else 0.0
    if between > 0:
        for key in range(n_keys):
            mine = owner == key
            # A variance goes with the square of a size, hence 4: the prior variance of its logarithm.
            logs[key] = _most_likely(np.abs(residual[mine]), design[:, mine], pooled, 1 / (4 * between))
    return np.exp(logs)


def _most_likely(absolute: Array, design: Array, start: Array, precision: float) -> Array:
    """Logarithms of components that maximise a Laplace likelihood, with a normal prior round `start`."""

    def loss(logs: Array) -> tuple[float, Array]:
        parts = np.exp(logs)[:, None] * design
        variance = parts.sum(axis=0)
        deviation = absolute / np.sqrt(variance)
        slope = (parts * ((1 - deviation) / variance)).sum(axis=1) / 2
        away = logs - start
        value = np.sum(np.log(variance) / 2 + deviation) + precision * np.sum(away**2) / 2
        return float(value) / len(absolute), (slope + precision * away) / len(absolute)

    bounds = [(value - 25, value + 10) for value in start]
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return np.asarray(found.x, dtype=float)


def _spread(components: Array, steps: Array, fixed: Array) -> Array:
    run, step, constant = components.T
    return np.asarray(np.sqrt(run + step / steps + constant * fixed**2))


def _offsets(residual: Array, fixed: Array, spread: Array, owner: Indices, n_keys: int) -> Array:
    """Offset of each key in units of `fixed`: least absolute deviations, shrunk to their mean."""
    estimate, error = np.zeros(n_keys), np.ones(n_keys)
    for key in range(n_keys):
        mine = owner == key
        x, weight = fixed[mine], fixed[mine] / spread[mine]
        values = residual[mine] / x
        order = np.argsort(values, kind="stable")
        total = np.cumsum(weight[order])
        estimate[key] = np.interp(total[-1] / 2, total - weight[order] / 2, values[order])
        deviation = (residual[mine] - estimate[key] * x) / spread[mine]
        # Sandwich error with a Laplace density at the median, 1 / (2 E|u|).
        error[key] = np.mean(np.abs(deviation)) / np.sqrt(np.sum(weight**2))
    return _shrink(estimate, error**2)


def _shrink(estimate: Array, variance: Array) -> Array:
    """Empirical Bayes: estimates drawn to their mean as far as chance explains how they differ."""
    if len(estimate) < 2 or not np.all(variance > 0):
        return estimate
    between = _between(estimate, variance)
    mean = np.average(estimate, weights=1 / variance)
    return np.asarray(mean + (estimate - mean) * between / (between + variance))


def _between(estimate: Array, variance: Array, doubt: float = 0.0) -> float:
    """Variance between estimates beyond their own, by moments, `doubt` taken off the chi-squared statistic."""
    weight = 1 / variance
    mean = np.average(estimate, weights=weight)
    excess = np.sum(weight * (estimate - mean) ** 2) - (len(estimate) - 1) - doubt
    room = weight.sum() - np.sum(weight**2) / weight.sum()
    # One weight that dwarfs the others leaves no room: nothing can be told of a variance between them.
    return max(0.0, float(excess / room)) if room > 1e-9 * weight.sum() else 0.0


def _leverage(u: Array, spread: Array, steps: Array, owner: Indices, n_keys: int) -> tuple[Array, Array]:
    """Variance of each key's fitted level, and what its fit has shrunk the deviation of each run by.

    A level fitted with weights ω, proportional to a power of the number of steps, leaves weighted mean residuals near 0
    in every key. So the power whose means spread least, against what the residuals would have them, is the one used.
    """
    bound = 2 * float(np.mean(np.abs(u)))
    if bound <= TINY:
        return np.zeros(n_keys), np.ones_like(u)
    score = np.clip(u, -bound, bound)
    score = score - score.mean()
    least, weight, held = np.inf, u, u
    for power in STEP_POWERS:
        shares = steps**power
        shares = shares / np.bincount(owner, shares, n_keys)[owner]
        variance = np.asarray(np.bincount(owner, (shares * spread) ** 2, n_keys), dtype=float)
        means = np.bincount(owner, shares * spread * score, n_keys)
        ratio = float(np.sum(means**2 / variance) / np.mean(score**2)) / (n_keys + PRIOR_KEYS)
        if ratio < least:
            least, weight, held = ratio, shares, variance
    share = max(0.0, 1 - least)
    left = 1 - share * (2 * weight - held[owner] / spread**2)
    return share * held, np.sqrt(np.maximum(left, LEAST_LEFT))


def _key_shifts(excess: Array, owner: Indices, sizes: Indices, q: float) -> Array:
    """Shift of each key's quantile against the pooled one, as far as coverages differ by more than chance."""
    if len(sizes) < 2:
        return np.zeros(len(sizes))
    below = np.bincount(owner, (excess <= 0).astype(float), len(sizes)) / sizes
    chance = q * (1 - q) / sizes
    between = _between(below, chance)
    if between == 0.0:
        return np.zeros(len(sizes))
    level = np.array([q])
    own = np.array(
        [_quantiles(np.sort(excess[owner == key]), np.ones(sizes[key]), level)[0] for key in range(len(sizes))]
    )
    return np.asarray(own * between / (between + chance))


def _local_quantiles(at: Array, values: Array, places: Array, levels: Array) -> Array:
    """Quantiles of `values` near each place (places × levels), tricube weights over the distance."""
    order = np.argsort(values, kind="stable")
    at, values = at[order], values[order]
    quantiles = np.empty((len(places), len(levels)))
    for number, place in enumerate(places):
        distance = np.abs(at - place)
        near = np.partition(distance, min(NEIGHBOURS, len(at)) - 1)[min(NEIGHBOURS, len(at)) - 1]
        reach = max(1.0, 1.5 * float(near))
        weight = np.clip(1 - (distance / reach) ** 3, 0, None) ** 3
        used = weight > 0
        quantiles[number] = _quantiles(values[used], weight[used], levels)
    return quantiles


def _quantiles(values: Array, weight: Array, levels: Array) -> Array:
    """Quantiles of weighted ascending values at ranks (n + 1) · q, an exponential tail beyond the sample."""
    total = weight.sum()
    effective = total**2 / np.sum(weight**2)
    rank = ((np.cumsum(weight) - weight / 2) / total * effective + 0.5) / (effective + 1)
    found = np.interp(levels, rank, values)
    for number, q in enumerate(levels):
        if q > rank[-1]:
            found[number] = max(values[-1], _tail(values, weight, rank, effective, q))
        elif q < rank[0]:
            found[number] = min(values[0], -_tail(-values[::-1], weight[::-1], 1 - rank[::-1], effective, 1 - q))
    return found


def _tail(values: Array, weight: Array, rank: Array, effective: float, q: float) -> float:
    anchor = max(0.5, 1 - TAIL_RUNS / (effective + 1))
    threshold = float(np.interp(anchor, rank, values))
    beyond = rank > anchor
    if not beyond.any():
        return threshold
    excess = float(np.sum(weight[beyond] * (values[beyond] - threshold)) / weight[beyond].sum())
    return threshold + excess * float(np.log((1 - anchor) / (1 - q)))


def _rising(ratios: Array, knots: Array, weight: Array, steadiness: float) -> Array:
    """Ratios (knots × levels) changed as little as makes D · ratio rise with the number of steps.

    D(m + 1) / D(m) ≥ 1 + κ / m, κ the steadiness of the P50 curve, and ratios are linear in m between knots a < b:
    r_a ≤ r_b · (1 + κ · (b - a) / (b - 1)) suffices. In logarithms that is isotonic regression, which also keeps the
    levels in order.
    """
    allowed = np.log1p(0.999 * steadiness * np.diff(knots) / np.maximum(knots[1:] - 1, 1))
    grade = np.concatenate([[0.0], np.cumsum(allowed)])
    lifted = np.log(ratios) + grade[:, None]
    if np.all(np.diff(lifted, axis=0) >= 0):
        return ratios
    # Min-max formula of isotonic regression: few knots.
    size = len(knots)
    total = np.concatenate([np.zeros((1, lifted.shape[1])), np.cumsum(weight[:, None] * lifted, axis=0)])
    mass = np.concatenate([[0.0], np.cumsum(weight)])
    fitted = np.empty_like(lifted)
    for i in range(size):
        means = [
            np.min([(total[b + 1] - total[a]) / (mass[b + 1] - mass[a]) for b in range(i, size)], axis=0)
            for a in range(i + 1)
        ]
        fitted[i] = np.max(means, axis=0)
    return np.asarray(np.exp(fitted - grade[:, None]))


def _correlations(keys: list[_Key], ratios: Array, knots: Array, inflation: Array, levels: Array) -> Array:
    """Correlation of each level for keys timed alike."""
    middle = _middle(levels)
    decode = [
        key.decode_ms[:, None]
        * np.stack([np.interp(key.steps, knots, own[:, level]) for level in range(len(levels))], axis=1)
        for key, own in zip(keys, ratios, strict=True)
    ]
    of_prefill = [(key.seen_ms[0] - key.prefill_ms[:, middle]) for key in keys]
    of_decode = [(key.seen_ms[1] - own[:, middle]) for key, own in zip(keys, decode, strict=True)]
    of_total = [
        (key.seen_ms[2] - key.prefill_ms[:, middle] - own[:, middle]) for key, own in zip(keys, decode, strict=True)
    ]
    x, y, z = (np.concatenate(parts) for parts in (of_prefill, of_decode, of_total))
    a = np.concatenate([np.abs(key.prefill_ms - key.prefill_ms[:, [middle]]) for key in keys])
    d = np.concatenate([np.abs(own - own[:, [middle]]) for own in decode])
    found = np.ones(len(levels))
    for level, q in enumerate(levels):
        squares, product = a[:, level] ** 2 + d[:, level] ** 2, 2 * a[:, level] * d[:, level]
        # Where one part dwarfs the other no c tells.
        telling = product > 1e-6 * squares
        if q == 0.5 or not telling.any():
            continue
        squares, product = squares[telling], product[telling]
        say = product / squares
        deviation, share = (z, q) if q > 0.5 else (-z, 1 - q)
        deviation = (deviation * inflation)[telling]
        needed = ((np.sign(deviation) * deviation**2 - squares) / product).clip(-1.0, 2.0)
        order = np.argsort(needed, kind="stable")
        covering = _quantiles(needed[order], say[order], np.array([share]))[0]
        u = np.clip(x[telling] / a[telling, level], -2, 2)
        v = np.clip(y[telling] / d[telling, level], -2, 2)
        scale = np.sqrt(np.sum(say * u**2) * np.sum(say * v**2))
        plain = np.sum(say * u * v) / scale if scale > 0 else 1.0
        beyond = np.sum(say) ** 2 / np.sum(say**2) * (1 - share)
        trust = beyond / (beyond + TELLING_RUNS)
        found[level] = np.clip(trust * np.clip(covering, 0, 1) + (1 - trust) * plain, 0.0, 1.0)
    return found


def _knots(keys: list[_Key]) -> Array:
    """Numbers of steps from the least to the largest of the runs, about an octave apart."""
    least = min(float(key.steps.min()) for key in keys)
    largest = max(float(key.steps.max()) for key in keys)
    size = min(MAX_KNOTS, 1 + int(np.ceil(np.log2(largest / least))))
    return np.unique(np.round(np.geomspace(least, largest, size)))


def _rows(key: _Key, knots: Array, ratios: Array, levels: Array) -> pd.DataFrame:
    nearest = np.abs(np.log(key.steps)[:, None] - np.log(knots)).argmin(axis=1)
    count = np.bincount(nearest, minlength=len(knots))
    inside = (knots >= key.steps.min()) & (knots <= key.steps.max())
    ratios = _rising(ratios, knots, np.maximum(count, 1.0), key.steadiness)
    rows = pd.DataFrame([key.name] * len(knots), columns=KEYS)
    rows["decode_steps"] = knots.astype("int64")
    rows["n"] = count.astype("int64")
    for number, q in enumerate(levels):
        rows[f"{quantile_suffix(q)}_ratio"] = ratios[:, number]
    rows["source"] = np.where(count > 0, "measured", np.where(inside, "interpolated", "extrapolated"))
    return rows
