"""Scores of predicted quantiles on held-out runs, and how far any prediction could get on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from held_out import TARGETS, Floats, Ints, Predicted, Runs, observed
from scipy import optimize

from lutest.judging.metrics import coverage, mape, pinball_loss, r_squared

__all__ = ["BANDS", "Limits", "Scores", "judge", "r_squared_limits"]

_REWEIGHTED = 2
BANDS = {
    "1": (1, 1),
    "2": (2, 2),
    "3–5": (3, 5),
    "6–10": (6, 10),
    "11–20": (11, 20),
    "21–50": (21, 50),
    "51+": (51, np.inf),
}


class Scores(NamedTuple):
    """How a predictor did on one target of one split; `bands`: band → (held-out runs, those under P95)."""

    n: int
    pinball_p50: float
    pinball_p95: float
    r_squared: float
    mape: float
    coverage_p95: float
    bands: dict[str, tuple[int, int]]


class Limits(NamedTuple):
    """What R² can be on held-out runs: a fair estimate, and a bound."""

    about: float
    at_most: float


def judge(runs: Runs, predicted: Predicted) -> Iterator[tuple[str, Scores]]:
    """Scores for each target that the runs have observations of."""
    tokens = runs.column("output_tokens")
    for target, (rows, values, _) in observed(runs).items():
        if not len(rows):
            continue
        p50, p95 = predicted[target][:, rows]
        bands = {}
        if target.endswith("total"):
            for band, (least, most) in BANDS.items():
                inside = (tokens[rows] >= least) & (tokens[rows] <= most)
                if inside.any():
                    bands[band] = int(inside.sum()), int((values[inside] <= p95[inside]).sum())
        yield (
            target,
            Scores(
                len(rows),
                pinball_loss(values, p50, 0.5),
                pinball_loss(values, p95, 0.95),
                r_squared(values, p50),
                mape(values, p50),
                coverage(values, p95),
                bands,
            ),
        )


def r_squared_limits(runs: Runs, judged: Ints) -> dict[str, Limits]:
    """How much of the variance of held-out runs is not noise.

    Parameters
    ----------
    runs : Runs
        All runs, those learnt from included: the more there are, the better the noise is known.
    judged : ndarray of int
        Places of the held-out runs.

    Notes
    -----
    Curves of the lengths are fitted per key by least squares: a parabola, for decode times the steps times a line over
    KV length. `about` fits all runs, weighted by a variance that has a constant part and one that grows with latency
    (feasible generalised least squares), and takes the noise of the held-out ones as residual² / (1 - leverage),
    which makes up for their having been seen (MacKinnon and White 1985, HC2). `at_most` is fitted to the held-out runs
    alone: no curve of this kind gets further on them, though much of that is noise learnt by heart where few long
    runs decide.
    """
    is_judged = np.zeros(len(runs.frame), dtype=bool)
    is_judged[judged] = True
    limits = {}
    designs = _designs(runs)
    for target, (rows, values, keys) in observed(runs).items():
        if not len(rows):
            continue
        shown = is_judged[runs.step_runs()] if target == "decode step" else is_judged[rows]
        by_key = [np.flatnonzero(keys == key) for key in np.unique(keys)]
        noise = _squared_noise([(designs[target][rows[own]], values[own]) for own in by_key])
        about, at_most = 0.0, 0.0
        for own, own_noise in zip(by_key, noise, strict=True):
            about += float(own_noise[shown[own]].sum())
            judged_rows = own[shown[own]]
            seen = values[judged_rows]
            at_most += float(np.square(seen - _fit(designs[target][rows[judged_rows]], seen).fitted).sum())
        spread = float(np.square(values[shown] - values[shown].mean()).sum())
        limits[target] = Limits(1 - about / spread, 1 - at_most / spread)
    return limits


class _Fit(NamedTuple):
    fitted: Floats
    squared_noise: Floats


def _squared_noise(parts: list[tuple[Floats, Floats]]) -> list[Floats]:
    """Squared noise of each observation of each key, given its design and observations."""
    typical = [max(float(np.median(values)), 1e-9) for _, values in parts]
    fits = [_fit(design, values) for design, values in parts]
    for _ in range(_REWEIGHTED):
        # of noise relative to the typical latency: what share is the same everywhere, what share grows with latency?
        growth = np.concatenate([np.square(fit.fitted / t) for fit, t in zip(fits, typical, strict=True)])
        noise = np.concatenate([fit.squared_noise / t**2 for fit, t in zip(fits, typical, strict=True)])
        rows = np.column_stack([np.ones(len(growth)), growth]) / (1 + growth)[:, None]
        level, slope = optimize.nnls(rows, noise / (1 + growth))[0]
        fits = [
            _fit(design, values, np.sqrt(np.maximum(level + slope * np.square(fit.fitted / t), 1e-12)))
            for (design, values), fit, t in zip(parts, fits, typical, strict=True)
        ]
    return [fit.squared_noise for fit in fits]


def _fit(design: Floats, values: Floats, scale: Floats | float = 1.0) -> _Fit:
    """Least squares with noise in proportion to `scale`."""
    scales = np.broadcast_to(scale, values.shape)
    scaled = design / scales[:, None]
    scaled = scaled / np.maximum(np.abs(scaled).max(axis=0, initial=0.0), 1e-12)
    basis, singular, _ = np.linalg.svd(scaled, full_matrices=False)
    basis = basis[:, singular > 1e-10 * singular.max(initial=0.0)]
    fitted = basis @ (basis.T @ (values / scales)) * scales
    leverage = np.square(basis).sum(axis=1)
    return _Fit(fitted, np.square(values - fitted) / np.maximum(1 - leverage, 1e-6))


def _designs(runs: Runs) -> dict[str, Floats]:
    prompt, steps = runs.column("prompt_tokens"), runs.decode_steps().astype(np.float64)
    kv = runs.step_column("kv_len")
    parabola = _powers(prompt)
    decode = np.column_stack([steps, steps * (prompt + (steps + 1) / 2)])
    designs = (parabola, _powers(kv), decode, np.column_stack([parabola, decode]))
    return dict(zip(TARGETS, designs, strict=True))


def _powers(x: Floats | Ints) -> Floats:
    return np.column_stack([np.ones(len(x)), x, np.square(x)]).astype(np.float64)
