"""The fit: curves of prefill and decode step, and calibrated totals, from a bounded sample of each key's runs.

Estimand
--------
Of the runs that a key will have, for each level q: the q-quantile of prefill given the prompt length p; of a decode
step given the KV length; of decode and total given p and the number of steps m. Coverage is meant per key and length:
a share q of the runs that the builder never saw stays under.

Which quantile is which. The tables `prefill` and `decode` (`entry.prefill_p95_ms`) describe the runs at hand: type 7,
all lengths together. Curves and totals promise something of the next run, which stays under the k-th of n values with
probability k / (n + 1): the rank of their quantiles is (n + 1) q [5]_, for weighted values with n their effective
number, an exponential tail beyond the sample [12]_ (`quantiles.weighted_quantiles`). A key's own quantile, of its own
values and made-up ones, is at rank n q + 1/2, as the made-up ones already are what the next may be.

Model of a latency over length (`surface`, `location`; prefill and timed steps)
-------------------------------------------------------------------------------
Of the logarithm, so that units do not matter::

    log t = f(length, key) + u_key(length) + s_key · e

*Location.* f is a shape that all keys share: a level alone, linear, additive (levels of categories beside numbers),
quadratic, crossed (each level its own slopes), splines, or the logarithm of a transformer's work. Numbers of a key
are on a logarithmic axis where all are positive; the last number is what repeats the work. u is a random effect of
the key, up to six columns; with a shared level alone it is a level (and slope, and bend) per key, which is the
saturated model. Random effects are estimated by expectation–maximisation [1]_ [2]_ with Student-t errors [3]_; their
posterior variance is kept. The structure is chosen by the out-of-fold loss, five folds over runs.

*Scale and shape.* Residuals are out of fold. Each key has a scale, shrunk to that of all; quantiles of the scaled
residuals are a quantile regression [4]_ on length and numbers, shifted to the rank of conformal prediction [5]_. The
posterior variance of u widens them. Below 1 / (1 - q) runs in all, normal theory prolongs them.

*A key's own quantiles* (`quantiles.own_shifts`). Noise under load has modes, and each key its own: a Dirichlet process
round the noise of all [13]_. A key's quantile is that of its own residuals and of n0 made-up ones, spread like those of
all in units of the key's scale; distributions are mixed, as between the modes of two quantiles no run lies. n0 has the
least pinball loss out of fold, relative to each key's loss by the shared quantile; without a clear gain that one stays.
The steps of a run resemble each other; their effective sample size is Kish's [6]_.

*Standard errors* are those of that mixture's quantiles, sqrt(q (1 - q) / n) over the density [14]_, n with the
made-up observations in it, 300 at most, and the posterior standard deviation of the location. Between random halves
of the shipped runs curves differ by 0.3 to 1.5 times what they say, decode totals by 0.5 to 2.5. What sessions differ
by is not in them, nor in a P95.

*Knots* (`curves`). Piecewise-linear, exact at the knots; prefill rises (isotonic regression). Beyond its lengths a
key goes on with the growth of the others there, and beyond those of all with its last slope; below them nothing is
made up, and the reader holds the first knot's value.

Steps from run totals (`step_recovery`, `step_model`; keys without timed steps)
-------------------------------------------------------------------------------
For n tokens after a prompt of p::

    decode_ms = offset + Σ τ(p + i) + noise,    i = 1 … n - 1

τ is a line over KV length that all keys share, its level linear in the numbers of a key and their products with the
last, its slope in the last; each key deviates in level, tilt and bend (mixed-model equations [7]_, variances by
expectation–maximisation, the common slope's by evidence [8]_, so that one that cannot be told from zero becomes
zero). The offset, a share of prefill and a random effect per key, is what subtraction between passes adds; decode of
one and the same pass has none. It is told from τ by one-token runs and by the intercept over n. Noise is Student's t,
its variance a sum of the subtraction's (∝ prefill²), the steps' (∝ n - 1) and the run's (∝ (n - 1)²), times a factor
of the key. A zero is censored [9]_, "anything below", unless a total of the same subtraction tells the value. A total
says nothing of its steps' skewness: the P50 step is the run's median per step, and the spread of a step that of run
and steps together.

Totals (`totals`, `decode_ratios`)
----------------------------------
D is the sum of the P50 curve over a run's steps. Quantiles of decode are D times those of the ratio::

    decode_ms / D = c_key(m) + s_key(m) · e,    s² = v_run + v_step / m + v_fixed · w²

Noise of steps averages out within a run, that of slow runs does not; w is what noise of a fixed size comes to: 1 / m,
and for subtraction a prefill's. The variance components [10]_ maximise a Laplace likelihood, of all keys and shrunk
to it of each key. c is a local median over log m; subtraction adds an offset per key, in units of w. The quantiles of
e are local too, as their shape drifts from a step's to a run's; keys deviate as above, and before that, where it
lowers the loss out of fold, by a level of their own, the mean of decode over D shrunk to that of all [11]_: a step
that waits is no part of a sum of medians. Tails beyond the sample are exponential [12]_. D was fitted to the same
runs: residuals are too small by sqrt(1 - h), new runs off by sqrt(1 + h), h = H / runs of the key, and H in [0, 1] is
read off the spread of the keys' mean residuals.

A total is P50 + sqrt(a² + d² + 2·c·a·d), a and d what the quantiles of prefill and decode lie above their medians
(mirrored below). The correlation c of a level is the least with which a share q of all runs stays under, drawn to the
plain correlation, which is right at every level for elliptical distributions.

Levels above 0.5 are raised by the share of the runs that were left out as slow outliers, of steps, prefill and totals
alike, as there will be more; plain quantiles of a sample count outliers.

What it assumes, and when it fails
----------------------------------
Runs are independent given key and lengths, and those to come are like those seen: a machine that has changed is for
`check`. Lengths far beyond the measured ones are lines. Keys of few runs lean on the others: one unlike them needs
tens of runs to say so, and its P95 some hundred. A key's own quantiles are shifts of the shared ones, the same at
every length (for totals: local in m). D carries no error of its own: with a few runs of small noise whose curve bends
towards single runs, totals come out too narrow. A clock's ticks are smoothed over: a median between two ticks is no
tick.

References
----------
.. [1] N. M. Laird and J. H. Ware (1982), Random-effects models for longitudinal data, Biometrics 38.
.. [2] G. K. Robinson (1991), That BLUP is a good thing, Statistical Science 6.
.. [3] K. L. Lange, R. J. A. Little and J. M. G. Taylor (1989), Robust statistical modeling using the t distribution,
   JASA 84.
.. [4] R. Koenker and G. Bassett (1978), Regression quantiles, Econometrica 46.
.. [5] Y. Romano, E. Patterson and E. J. Candès (2019), Conformalized quantile regression, NeurIPS 32.
.. [6] L. Kish (1965), Survey Sampling, section 8.2.
.. [7] C. R. Henderson (1975), Best linear unbiased estimation and prediction under a selection model, Biometrics 31.
.. [8] D. J. C. MacKay (1992), Bayesian interpolation, Neural Computation 4.
.. [9] J. Tobin (1958), Estimation of relationships for limited dependent variables, Econometrica 26.
.. [10] S. R. Searle, G. Casella and C. E. McCulloch (1992), Variance Components.
.. [11] R. DerSimonian and N. Laird (1986), Meta-analysis in clinical trials, Controlled Clinical Trials 7.
.. [12] L. Breiman, C. Stone and C. Kooperberg (1990), Robust confidence bounds for extreme upper quantiles, J.
   Statist. Comput. Simul. 37.
.. [13] T. S. Ferguson (1973), A Bayesian analysis of some nonparametric problems, Annals of Statistics 1.
.. [14] M. M. Siddiqui (1960), Distribution of quantiles in samples from a bivariate population, J. Res. NBS 64B.
"""

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
from lutest.reader.names import error_column, quantile_column, quantile_suffix

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
        Runs, and timed steps of whole runs. ``one_pass``: decode is total less prefill of one and the same pass.
    outlier_share : float
        Share of the sound runs that were left out as outliers, slow ones.
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
    columns = [column(q) for column in (quantile_column, error_column) for q in data.quantiles]
    axes = read_key_axes(data.keys, data.key_columns)
    # Slow outliers were left out, and there will be more: level q of all runs is q / (1 - share) of those left.
    share = data.outlier_share
    levels = [q if q <= 0.5 else min(q / (1 - share), (1 + q) / 2) for q in data.quantiles]
    curves = fit_prefill_curve(runs, axes, levels), _decode_curve(runs, steps, axes, levels)
    found = (*curves, *calibrate_totals(runs, *curves, levels))
    names = {
        f"{quantile_suffix(level)}_{what}": f"{quantile_suffix(q)}_{what}"
        for level, q in zip(levels, data.quantiles, strict=True)
        for what in ("ms", "se_ms", "ratio", "se_ratio", "correlation")
    }
    prefill_curve, decode_curve, decode_total, total = (frame.rename(columns=names) for frame in found)
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
        figures = (column(q) for column in (quantile_column, error_column) for q in quantiles)
        return pd.DataFrame(dtype="float64", columns=["key_id", "kv_len", "n", *figures, "n_eff", "source"])
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
