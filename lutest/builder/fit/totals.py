"""Calibrated quantiles of decode totals and of totals, from whole runs beside the curves that were fitted to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize

from lutest.builder.fit.decode_ratios import RunsOfKey, decode_ratios
from lutest.builder.fit.observations import Floats
from lutest.builder.fit.quantiles import local_weights, weighted_quantiles
from lutest.reader.names import error_column, quantile_column, quantile_suffix

MAX_KNOTS = 12
TELLING_RUNS = 15  # runs beyond a level that tell as much about its correlation as the plain one does


def calibrate_totals(
    run_sample: pd.DataFrame,
    prefill_curve: pd.DataFrame,
    decode_curve: pd.DataFrame,
    quantiles: Sequence[float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Calibrate quantiles of ``decode_ms`` and ``total_ms`` on whole runs.

    Parameters
    ----------
    run_sample : DataFrame
        One row a run: ``key_id``, ``prompt_tokens``, ``output_tokens``, ``prefill_ms``, ``decode_ms``, ``total_ms``,
        ``timed`` and ``one_pass``.
    prefill_curve, decode_curve : DataFrame
        Knots of the fitted curves, as in the tables of the same names (``p50_sum_ms`` is not read).
    quantiles : sequence of float
        Levels, ascending, 0.5 among them.

    Returns
    -------
    decode_total : DataFrame
        ``key_id``, ``decode_steps``, ``n``, one ``pXX_ratio`` a level, its standard error ``pXX_se_ratio``,
        ``n_eff``, ``source``: quantiles of ``decode_ms`` over D, the sum of the P50 curve over the run's steps. The
        product of D and a ratio never falls with the number of steps; ratios are above 0 and do not fall with the
        level. A key without a decode curve or without a run of two tokens has no row.
    total : DataFrame
        ``key_id``, ``n`` (runs of two tokens or more), ``pXX_correlation`` in [0, 1] a level; each key of
        `prefill_curve`.
    """
    levels = np.asarray(quantiles, dtype=float)
    keys = _runs_of_keys(run_sample, prefill_curve, decode_curve, levels)
    ratio_columns = [f"{quantile_suffix(q)}_ratio" for q in levels]
    error_columns = [f"{quantile_suffix(q)}_se_ratio" for q in levels]
    correlation_columns = [f"{quantile_suffix(q)}_correlation" for q in levels]
    rows = []
    correlations: dict[int, Floats] = {}
    for one_pass in (True, False):
        part = [key for key in keys if key.one_pass == one_pass]
        if not part:
            continue
        knots = _knots(part)
        ratios, errors, inflation = decode_ratios(part, knots, levels)
        tables = [
            _rows(key, knots, *own, levels) for key, own in zip(part, zip(ratios, errors, strict=True), strict=True)
        ]
        final = np.stack([table[ratio_columns].to_numpy(float) for table in tables])
        found = _total_correlations(part, final, knots, inflation, levels)
        correlations.update({key.key_id: found for key in part})
        rows.extend(tables)
    columns = ["key_id", "decode_steps", "n", *ratio_columns, *error_columns, "n_eff", "source"]
    decode_total = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)
    decode_total = decode_total.sort_values(["key_id", "decode_steps"], ignore_index=True)

    names = np.unique(prefill_curve["key_id"]).tolist()
    total = pd.DataFrame({"key_id": names})
    sizes = {key.key_id: len(key.steps) for key in keys}
    # A key without decode runs takes part in no total of two tokens; the widest of the others is on the safe side.
    fallback = np.max(list(correlations.values()), axis=0) if correlations else np.ones(len(levels))
    total["n"] = np.array([sizes.get(name, 0) for name in names], dtype="int64")
    held = np.array([correlations.get(name, fallback) for name in names]).reshape(len(names), len(levels))
    for number, column in enumerate(correlation_columns):
        total[column] = held[:, number]
    return decode_total, total


def _knots(keys: list[RunsOfKey]) -> Floats:
    """Numbers of steps from the least to the largest of the runs, about an octave apart."""
    least = min(float(key.steps.min()) for key in keys)
    largest = max(float(key.steps.max()) for key in keys)
    size = min(MAX_KNOTS, 1 + int(np.ceil(np.log2(largest / least))))
    return np.unique(np.round(np.geomspace(least, largest, size)))


def _rows(key: RunsOfKey, knots: Floats, ratios: Floats, errors: Floats, levels: Floats) -> pd.DataFrame:
    nearest = np.abs(np.log(key.steps)[:, None] - np.log(knots)).argmin(axis=1)
    count = np.bincount(nearest, minlength=len(knots))
    inside = (knots >= key.steps.min()) & (knots <= key.steps.max())
    ratios = _rising(ratios, knots, np.maximum(count, 1.0), key.steadiness)
    rows = pd.DataFrame({"key_id": key.key_id, "decode_steps": knots.astype("int64")})
    rows["n"] = count.astype("int64")
    for number, q in enumerate(levels):
        rows[f"{quantile_suffix(q)}_ratio"] = ratios[:, number]
        rows[f"{quantile_suffix(q)}_se_ratio"] = errors[:, number]
    weights = [local_weights(np.log2(key.steps), place) for place in np.log2(knots)]
    rows["n_eff"] = [float(weight.sum()) for weight in weights]
    rows["source"] = np.where(count > 0, "measured", np.where(inside, "interpolated", "extrapolated"))
    return rows


def _rising(ratios: Floats, knots: Floats, weight: Floats, steadiness: float) -> Floats:
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
    fitted = np.stack([optimize.isotonic_regression(column, weights=weight).x for column in lifted.T], axis=1)
    return np.asarray(np.exp(fitted - grade[:, None]))


def _total_correlations(
    keys: list[RunsOfKey], ratios: Floats, knots: Floats, inflation: Floats, levels: Floats
) -> Floats:
    """Correlation of each level for keys timed alike."""
    middle = _place_of_median(levels)
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
        covering = weighted_quantiles(needed[order], say[order], np.array([share]))[0]
        u = np.clip(x[telling] / a[telling, level], -2, 2)
        v = np.clip(y[telling] / d[telling, level], -2, 2)
        scale = np.sqrt(np.sum(say * u**2) * np.sum(say * v**2))
        plain = np.sum(say * u * v) / scale if scale > 0 else 1.0
        beyond = np.sum(say) ** 2 / np.sum(say**2) * (1 - share)
        trust = beyond / (beyond + TELLING_RUNS)
        found[level] = np.clip(trust * np.clip(covering, 0, 1) + (1 - trust) * plain, 0.0, 1.0)
    return found


def _runs_of_keys(
    run_sample: pd.DataFrame, prefill_curve: pd.DataFrame, decode_curve: pd.DataFrame, levels: Floats
) -> list[RunsOfKey]:
    """Runs of two tokens or more by key, beside the curves at them."""
    columns = [quantile_column(q) for q in levels]
    middle = _place_of_median(levels)
    prefill = _curves(prefill_curve, "prompt_tokens", columns)
    decode = _curves(decode_curve, "kv_len", columns)
    relative = decode_curve.get(error_column(levels[middle]), 0.0) / decode_curve[columns[middle]]
    doubts = relative.fillna(0.0).groupby(decode_curve["key_id"]).median().to_dict()
    runs = run_sample[run_sample["output_tokens"] >= 2]
    # Sums of floats depend on their order; rows come in any.
    runs = runs.sort_values(["key_id", "output_tokens", "prompt_tokens", "decode_ms", "prefill_ms", "total_ms"])
    keys = []
    for key_id, group in runs.groupby("key_id"):
        if key_id not in decode or key_id not in prefill:
            continue
        prompt = group["prompt_tokens"].to_numpy(float)
        steps = group["output_tokens"].to_numpy(float) - 1
        first = prefill[key_id].at(prompt)
        expected = decode[key_id].sum_between(prompt, prompt + steps, middle)
        one_pass = bool((group["timed"] | group["one_pass"]).any())
        median_prompt = np.array([np.median(prompt)])
        # Passes that are subtracted each carry the noise of a prefill; a single one at most that of a step or so.
        fixed, fixed_one = 1 / steps, 1.0
        if not one_pass:
            fixed = first[:, middle] / expected
            fixed_one = float((prefill[key_id].at(median_prompt) / decode[key_id].at(median_prompt + 1))[0, middle])
        prefill_ms, decode_ms, total_ms = (
            group[column].to_numpy(float) for column in ("prefill_ms", "decode_ms", "total_ms")
        )
        keys.append(
            RunsOfKey(
                key_id,
                one_pass,
                steps,
                decode_ms / expected,
                fixed,
                expected,
                first,
                (prefill_ms, decode_ms, total_ms),
                fixed_one,
                decode[key_id].steadiness(middle),
                doubts.get(key_id, 0.0),
            )
        )
    return keys


def _curves(curve: pd.DataFrame, place: str, columns: list[str]) -> dict[int, _KnotCurve]:
    ordered = curve.sort_values(["key_id", place])
    return {
        name: _KnotCurve(group[place].to_numpy(float), group[columns].to_numpy(float))
        for name, group in ordered.groupby("key_id")
    }


def _place_of_median(levels: Floats) -> int:
    """Place of 0.5 among the levels."""
    return int(np.flatnonzero(levels == 0.5)[0])


@dataclass(frozen=True)
class _KnotCurve:
    """Piecewise-linear curve over integer knots: constant before them, never falling after them."""

    knots: Floats
    values: Floats  # knots × levels

    def at(self, x: Floats) -> Floats:
        """Value of each level at each x."""
        place = np.clip(np.searchsorted(self.knots, x, side="right") - 1, 0, None)
        distance = np.maximum(x - self.knots[place], 0.0)
        return np.asarray(self.values[place] + distance[:, None] * self._slopes()[place])

    def sum_between(self, start: Floats, stop: Floats, level: int) -> Floats:
        """Sum of one level over start + 1, …, stop."""
        return self.sum_to(stop, level) - self.sum_to(start, level)

    def sum_to(self, x: Floats, level: int) -> Floats:
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

    def _slopes(self) -> Floats:
        if len(self.knots) == 1:
            return np.zeros_like(self.values)
        inner = np.diff(self.values, axis=0) / np.diff(self.knots)[:, None]
        return np.concatenate([inner, np.maximum(inner[-1:], 0.0)])
