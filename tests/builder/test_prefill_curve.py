"""Prefill curves over prompt length."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builder.keyed_fit import KEYS, fit_prefill_curve

LEVELS = [0.1, 0.5, 0.95, 0.99]
SHIPPED = Path(__file__).parents[2] / "tables" / "runs" / "direct.parquet"


def true_ms(top_k: object, num_blocks: object, prompt_tokens: object) -> np.ndarray:
    k, b, p = (np.asarray(value, dtype=float) for value in (top_k, num_blocks, prompt_tokens))
    return np.asarray(10 + 0.02 * p + b * (0.5 + 0.01 * p + 1e-5 * p * p + 0.001 * k * p))


def sample(
    runs: int, noise: float = 0.1, seed: int = 0, top_k: tuple[int, ...] = (2, 4, 8), blocks: tuple[int, ...] = (8, 16)
) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    rows = [
        (tier, k, b, int(p))
        for tier, low, high in (("low", 50, 200), ("high", 150, 600))
        for k in top_k
        for b in blocks
        for p in random.integers(low, high, runs)
    ]
    frame = pd.DataFrame(rows, columns=[*KEYS, "prompt_tokens"])
    frame["run_hash"] = random.permutation(len(frame)).astype("uint64")
    exact = true_ms(frame["top_k"], frame["num_blocks"], frame["prompt_tokens"])
    frame["prefill_ms"] = exact * np.exp(noise * random.normal(size=len(frame)))
    return frame


def at(curve: pd.DataFrame, runs: pd.DataFrame, column: str) -> np.ndarray:
    """The curve where runs stand, inside its knots."""
    values = np.empty(len(runs))
    for key, rows in runs.groupby(KEYS).indices.items():
        knots = curve[(curve[KEYS] == pd.Series(key, index=KEYS)).all(axis=1)]
        values[rows] = np.interp(runs["prompt_tokens"].to_numpy()[rows], knots["prompt_tokens"], knots[column])
    return values


def check_sane(curve: pd.DataFrame, columns: list[str]) -> None:
    values = curve[columns].to_numpy()
    assert np.isfinite(values).all()
    assert (values > 0).all()
    assert (np.diff(values, axis=1) >= 0).all()
    for _, knots in curve.groupby(KEYS):
        assert (np.diff(knots["prompt_tokens"]) > 0).all()
        assert (np.diff(knots[columns].to_numpy(), axis=0) >= -1e-9).all()
        # Beyond the last knot a reader goes on with its slope: P95 must not fall below P50 there.
        assert (np.diff(np.diff(knots[columns].to_numpy()[-2:], axis=0)) >= -1e-9).all()


def test_known_curve_is_recovered() -> None:
    runs = sample(40, noise=0.05)
    curve = fit_prefill_curve(runs, [0.5, 0.95])
    exact = true_ms(runs["top_k"], runs["num_blocks"], runs["prompt_tokens"])
    assert np.abs(at(curve, runs, "p50_ms") / exact - 1).mean() < 0.01
    assert np.median(at(curve, runs, "p95_ms") / exact) == pytest.approx(np.exp(0.05 * 1.645), abs=0.015)


def test_outliers_leave_p50_alone() -> None:
    runs = sample(40, noise=0.05)
    exact = true_ms(runs["top_k"], runs["num_blocks"], runs["prompt_tokens"])
    runs.loc[runs["run_hash"] % 20 == 0, "prefill_ms"] *= 30
    curve = fit_prefill_curve(runs, [0.5, 0.95])
    assert np.abs(at(curve, runs, "p50_ms") / exact - 1).mean() < 0.015


def test_a_key_of_its_own_is_followed_where_it_has_runs() -> None:
    # One key is 40 % slower than its neighbours say: many runs must win over borrowed strength.
    runs = sample(60, noise=0.03)
    odd = (runs[KEYS] == pd.Series(("low", 4, 8), index=KEYS)).all(axis=1)
    runs.loc[odd, "prefill_ms"] *= 1.4
    curve = fit_prefill_curve(runs, [0.5, 0.95])
    exact = true_ms(runs["top_k"], runs["num_blocks"], runs["prompt_tokens"])
    assert np.median((at(curve, runs, "p50_ms") / exact)[odd]) == pytest.approx(1.4, abs=0.03)
    assert np.median((at(curve, runs, "p50_ms") / exact)[~odd]) == pytest.approx(1.0, abs=0.02)


def test_a_thin_key_borrows_its_spread() -> None:
    runs = sample(60, noise=0.1)
    thin = (runs[KEYS] == pd.Series(("high", 8, 16), index=KEYS)).all(axis=1)
    curve = fit_prefill_curve(runs[~thin | (thin.cumsum() <= 5)], [0.5, 0.95])
    exact = true_ms(runs["top_k"], runs["num_blocks"], runs["prompt_tokens"])[thin]
    knots = curve[(curve[KEYS] == pd.Series(("high", 8, 16), index=KEYS)).all(axis=1)]
    assert knots["n"].sum() == 5
    assert np.median(at(curve, runs[thin], "p50_ms") / exact) == pytest.approx(1, abs=0.08)
    assert 0.85 <= np.mean(runs.loc[thin, "prefill_ms"] <= at(curve, runs[thin], "p95_ms")) <= 1


@pytest.mark.parametrize("runs", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_curves_are_sane_with_few_runs(runs: int, noise: float) -> None:
    columns = ["p10_ms", "p50_ms", "p95_ms", "p99_ms"]
    check_sane(fit_prefill_curve(sample(runs, noise), LEVELS), columns)
    check_sane(fit_prefill_curve(sample(runs, noise, top_k=(4,), blocks=(8,)), LEVELS), columns)
    single = sample(runs, noise).query("tier == 'low' and top_k == 4 and num_blocks == 8")
    check_sane(fit_prefill_curve(single, LEVELS), columns)


@pytest.mark.parametrize("runs", [1, 8, 40])
def test_a_constant_prompt_length_works(runs: int) -> None:
    frame = sample(runs).assign(prompt_tokens=300)
    curve = fit_prefill_curve(frame, LEVELS)
    check_sane(curve, ["p10_ms", "p50_ms", "p95_ms", "p99_ms"])
    assert set(curve.loc[curve["source"] == "measured", "prompt_tokens"]) == {300}


def test_knots_tell_where_runs_stand() -> None:
    runs = sample(30)
    curve = fit_prefill_curve(runs, [0.5, 0.95])
    for key, knots in curve.groupby(KEYS):
        own = runs[(runs[KEYS] == pd.Series(key, index=KEYS)).all(axis=1)]
        inner = knots[knots["source"] != "extrapolated"]
        assert knots["n"].sum() == len(own)
        assert inner["prompt_tokens"].min() == own["prompt_tokens"].min()
        assert inner["prompt_tokens"].max() == own["prompt_tokens"].max()
        assert len(knots) <= 17
        assert ((inner["n"] > 0) == (inner["source"] == "measured")).all()
        assert list(knots["source"].iloc[[0, -1]]) == ["measured", "extrapolated"]  # nothing made up below


def test_few_prompt_lengths_get_a_knot_each() -> None:
    runs = sample(40, noise=0.01)
    runs["prompt_tokens"] = 100 * 2 ** (runs["run_hash"] % 6).astype(int)
    exact = true_ms(runs["top_k"], runs["num_blocks"], runs["prompt_tokens"])
    curve = fit_prefill_curve(runs.assign(prefill_ms=exact), [0.5, 0.95])
    for _, knots in curve.groupby(KEYS):
        assert {100, 200, 400, 800, 1600, 3200} <= set(knots.loc[knots["n"] > 0, "prompt_tokens"])
    np.testing.assert_allclose(at(curve, runs, "p50_ms"), exact, rtol=0.01)


def test_a_gap_between_prompt_lengths_is_called_interpolated() -> None:
    runs = sample(40)
    runs["prompt_tokens"] = np.where(runs["run_hash"] % 2 == 0, 50, 600) + (runs["run_hash"] % 3).astype(int)
    runs["prefill_ms"] = true_ms(runs["top_k"], runs["num_blocks"], runs["prompt_tokens"])
    curve = fit_prefill_curve(runs, [0.5, 0.95])
    middle = curve[curve["prompt_tokens"].between(150, 500)]
    assert len(middle) > 0
    assert set(middle["source"]) == {"interpolated"}


def test_extrapolation_follows_other_keys() -> None:
    runs = sample(40, noise=0.02)
    curve = fit_prefill_curve(runs, [0.5, 0.95])
    last = curve[(curve["tier"] == "low")].groupby(KEYS, as_index=False).last()
    exact = true_ms(last["top_k"], last["num_blocks"], last["prompt_tokens"])
    assert np.abs(last["p50_ms"] / exact - 1).max() < 0.08


@settings(deadline=None, max_examples=2)
@given(st.floats(1e-3, 1e4), st.integers(0, 5))
def test_scaling_the_times_scales_the_curves(factor: float, seed: int) -> None:
    runs = sample(6, seed=seed)
    once = fit_prefill_curve(runs, [0.5, 0.95])
    scaled = fit_prefill_curve(runs.assign(prefill_ms=runs["prefill_ms"] * factor), [0.5, 0.95])
    for column in ("p50_ms", "p95_ms"):
        np.testing.assert_allclose(at(scaled, runs, column), at(once, runs, column) * factor, rtol=1e-3)


def test_order_of_rows_does_not_matter() -> None:
    runs = sample(12)
    shuffled = runs.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(fit_prefill_curve(runs, LEVELS), fit_prefill_curve(shuffled, LEVELS))


def halves(runs: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    chosen = np.random.default_rng(seed).permutation(len(runs)) % 2 == 0
    return runs[chosen], runs[~chosen]


def mean_pinball(observed: pd.Series, predicted: np.ndarray, q: float) -> float:
    beyond = observed.to_numpy() - predicted
    return float(np.maximum(q * beyond, (q - 1) * beyond).mean())


def test_coverage_and_loss_on_shipped_runs_not_seen() -> None:
    runs = duckdb.read_parquet(str(SHIPPED)).df().assign(run_hash=lambda frame: frame.index)
    coverage, won = [], []
    for seed in range(3):
        known, unseen = halves(runs, seed)
        curve = fit_prefill_curve(known, [0.5, 0.95])
        coverage.append(np.mean(unseen["prefill_ms"] <= at(curve, unseen, "p95_ms")))
        plain = unseen[KEYS].merge(known.groupby(KEYS)["prefill_ms"].quantile([0.5, 0.95]).unstack(), on=KEYS)
        for q, column in ((0.5, "p50_ms"), (0.95, "p95_ms")):
            own = mean_pinball(unseen["prefill_ms"], at(curve, unseen, column), q)
            won.append(own / mean_pinball(unseen["prefill_ms"], plain[q].to_numpy(), q))
    assert 0.93 <= np.mean(coverage) <= 0.97
    assert max(won) < 0.8
