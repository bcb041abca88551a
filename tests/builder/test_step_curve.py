"""Decode-step curves over KV length."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builder.keyed_fit import KEYS, fit_step_curve

LEVELS = [0.1, 0.5, 0.95, 0.99]
SHIPPED = Path(__file__).parents[2] / "tables" / "runs" / "direct.parquet"


def true_ms(num_blocks: object, kv_len: object) -> np.ndarray:
    return np.asarray(num_blocks, dtype=float) * (1.5 + 0.002 * np.asarray(kv_len, dtype=float))


def sample(
    runs: int, run_noise: float = 0.1, step_noise: float = 0.05, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    random = np.random.default_rng(seed)
    rows = [
        (tier, k, b, int(p), int(steps))
        for tier, low, high in (("low", 50, 200), ("high", 150, 600))
        for k in (4, 8)
        for b in (8, 16)
        for p, steps in zip(random.integers(low, high, runs), 1 + random.geometric(0.08, runs), strict=True)
    ]
    frame = pd.DataFrame(rows, columns=[*KEYS, "prompt_tokens", "steps"])
    frame["run_hash"] = random.permutation(len(frame)).astype("uint64")
    frame["timed"] = True
    steps = frame.loc[frame.index.repeat(frame["steps"])].reset_index(drop=True)
    steps["position"] = steps.groupby("run_hash").cumcount() + 1
    steps["kv_len"] = steps["prompt_tokens"] + steps["position"]
    slow = run_noise * random.normal(size=len(frame))
    noise = slow[steps["run_hash"].to_numpy().astype(int)] + step_noise * random.normal(size=len(steps))
    steps["step_ms"] = true_ms(steps["num_blocks"], steps["kv_len"]) * np.exp(noise)
    return steps, frame


def at(curve: pd.DataFrame, steps: pd.DataFrame, column: str) -> np.ndarray:
    values = np.empty(len(steps))
    for key, rows in steps.groupby(KEYS).indices.items():
        knots = curve[(curve[KEYS] == pd.Series(key, index=KEYS)).all(axis=1)]
        values[rows] = np.interp(steps["kv_len"].to_numpy()[rows], knots["kv_len"], knots[column])
    return values


def check_sane(curve: pd.DataFrame, columns: list[str]) -> None:
    values = curve[columns].to_numpy()
    assert np.isfinite(values).all()
    assert (values > 0).all()
    assert (np.diff(values, axis=1) >= 0).all()
    for _, knots in curve.groupby(KEYS):
        assert (np.diff(knots["kv_len"]) > 0).all()
        end = np.diff(knots[columns].to_numpy()[-2:], axis=0)
        assert (end >= -1e-9).all()
        assert (np.diff(end) >= -1e-9).all()


def test_known_curve_is_recovered_from_correlated_steps() -> None:
    steps, runs = sample(60, run_noise=0.06, step_noise=0.03)
    curve = fit_step_curve(steps, runs, [0.5, 0.95])
    exact = true_ms(steps["num_blocks"], steps["kv_len"])
    assert np.abs(at(curve, steps, "p50_ms") / exact - 1).mean() < 0.015
    spread = np.exp(1.645 * np.hypot(0.06, 0.03))
    assert np.median(at(curve, steps, "p95_ms") / exact) == pytest.approx(spread, abs=0.02)


def test_one_long_slow_run_does_not_carry_its_key() -> None:
    steps, runs = sample(30, run_noise=0.05, step_noise=0.02)
    longest = runs.loc[runs["steps"].idxmax()]
    extra = steps[steps["run_hash"] == longest["run_hash"]]
    long = pd.concat([extra] * 40, ignore_index=True)
    long["position"] = np.arange(1, len(long) + 1)
    long["step_ms"] *= 2
    other = steps[steps["run_hash"] != longest["run_hash"]]
    curve = fit_step_curve(pd.concat([other, long], ignore_index=True), runs, [0.5, 0.95])
    exact = true_ms(other["num_blocks"], other["kv_len"])
    assert np.abs(at(curve, other, "p50_ms") / exact - 1).max() < 0.1


def test_falling_steps_are_let_fall() -> None:
    steps, runs = sample(40, run_noise=0.01, step_noise=0.01)
    steps["step_ms"] *= (steps["kv_len"] / 100.0) ** -0.5
    curve = fit_step_curve(steps, runs, [0.5, 0.95])
    inner = curve[curve["source"] != "extrapolated"]
    ends = inner.groupby(KEYS)["p50_ms"].agg(["first", "last"])
    assert (ends["last"] < ends["first"]).all()
    check_sane(curve, ["p50_ms", "p95_ms"])


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_curves_are_sane_with_few_runs(runs: int, noise: float) -> None:
    steps, frame = sample(runs, noise, noise)
    check_sane(fit_step_curve(steps, frame, LEVELS), ["p10_ms", "p50_ms", "p95_ms", "p99_ms"])
    one = steps.query("tier == 'low' and top_k == 4 and num_blocks == 8")
    check_sane(fit_step_curve(one, frame, LEVELS), ["p10_ms", "p50_ms", "p95_ms", "p99_ms"])


def test_a_single_step_is_a_curve() -> None:
    steps, runs = sample(1)
    curve = fit_step_curve(steps.head(1), runs, [0.5, 0.95])
    check_sane(curve, ["p50_ms", "p95_ms"])
    assert curve.loc[curve["source"] == "measured", "p50_ms"].to_numpy() == pytest.approx(steps["step_ms"].iloc[0])


def test_no_timed_steps_make_no_curve() -> None:
    steps, runs = sample(3)
    curve = fit_step_curve(steps, runs.assign(timed=False), [0.5, 0.95])
    assert len(curve) == 0
    assert list(curve.columns) == [
        *KEYS,
        "kv_len",
        "n",
        "p50_ms",
        "p95_ms",
        "p50_se_ms",
        "p95_se_ms",
        "n_eff",
        "source",
    ]


def test_every_step_counts_at_its_nearest_knot() -> None:
    steps, runs = sample(25)
    curve = fit_step_curve(steps, runs, [0.5, 0.95])
    pd.testing.assert_series_equal(
        curve.groupby(KEYS)["n"].sum(), steps.groupby(KEYS).size(), check_names=False, check_dtype=False
    )


@settings(deadline=None, max_examples=2)
@given(st.floats(1e-3, 1e4), st.integers(0, 5))
def test_scaling_the_times_scales_the_curves(factor: float, seed: int) -> None:
    steps, runs = sample(6, seed=seed)
    once = fit_step_curve(steps, runs, [0.5, 0.95])
    scaled = fit_step_curve(steps.assign(step_ms=steps["step_ms"] * factor), runs, [0.5, 0.95])
    for column in ("p50_ms", "p95_ms"):
        np.testing.assert_allclose(at(scaled, steps, column), at(once, steps, column) * factor, rtol=1e-3)


def test_order_of_rows_does_not_matter() -> None:
    steps, runs = sample(8)
    shuffled = steps.sample(frac=1, random_state=1), runs.sample(frac=1, random_state=2)
    pd.testing.assert_frame_equal(fit_step_curve(steps, runs, LEVELS), fit_step_curve(*shuffled, LEVELS))


def test_coverage_on_shipped_runs_not_seen() -> None:
    runs = duckdb.read_parquet(str(SHIPPED)).df()
    runs = runs[runs["output_tokens"] >= 2].reset_index(drop=True)
    runs = runs.assign(run_hash=runs.index, timed=True)
    steps = runs.explode("decode_steps_ms").rename(columns={"decode_steps_ms": "step_ms"}).astype({"step_ms": float})
    steps["position"] = steps.groupby("run_hash").cumcount() + 1
    steps["kv_len"] = steps["prompt_tokens"] + steps["position"]
    coverage = []
    for seed in range(3):
        chosen = np.random.default_rng(seed).permutation(len(runs)) % 2 == 0
        unseen = steps[~chosen[steps["run_hash"]]].reset_index(drop=True)
        curve = fit_step_curve(steps[chosen[steps["run_hash"]]], runs[chosen], [0.5, 0.95])
        coverage.append(np.mean(unseen["step_ms"] <= at(curve, unseen, "p95_ms")))
    assert 0.93 <= np.mean(coverage) <= 0.97
