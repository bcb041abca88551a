"""Calibrated quantiles of decode totals and of totals, from whole runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from lutest.builder.fit.calibration_runs import CalibrationKey, Fold, read_calibration_keys
from lutest.builder.fit.decode_ratios import decode_ratios
from lutest.builder.fit.total_correlation import total_correlations
from lutest.reader.names import KEY_COLUMNS, quantile_suffix

__all__ = ["Fold", "calibrate_totals"]

KEYS = list(KEY_COLUMNS)
MAX_KNOTS = 12

Array = npt.NDArray[np.float64]


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
    keys = read_calibration_keys(run_sample, Fold(frozenset(), prefill_curve, decode_curve), folds, levels)
    ratio_columns = [f"{quantile_suffix(q)}_ratio" for q in levels]
    correlation_columns = [f"{quantile_suffix(q)}_correlation" for q in levels]
    rows = []
    correlations: dict[tuple[object, ...], Array] = {}
    for timed in (True, False):
        part = [key for key in keys if key.timed == timed]
        if not part:
            continue
        knots = _knots(part)
        ratios, inflation = decode_ratios(part, knots, sought, cross_fitted=len(folds) > 0)
        tables = [_rows(key, knots, own, levels) for key, own in zip(part, ratios, strict=True)]
        final = np.stack([table[ratio_columns].to_numpy(float) for table in tables])
        found = total_correlations(part, final, knots, inflation, sought)
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


def _knots(keys: list[CalibrationKey]) -> Array:
    """Numbers of steps from the least to the largest of the runs, about an octave apart."""
    least = min(float(key.steps.min()) for key in keys)
    largest = max(float(key.steps.max()) for key in keys)
    size = min(MAX_KNOTS, 1 + int(np.ceil(np.log2(largest / least))))
    return np.unique(np.round(np.geomspace(least, largest, size)))


def _rows(key: CalibrationKey, knots: Array, ratios: Array, levels: Array) -> pd.DataFrame:
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
