"""Calibrated totals: coverage on runs never seen, order, monotonicity, few runs."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutest.reader.names import quantile_column, quantile_suffix
from tests.builder.keyed_fit import KEYS, calibrate_totals, fit_prefill_curve, fit_step_curve

LEVELS = (0.05, 0.5, 0.95)
BANDS = ((2, 2), (3, 5), (6, 10), (11, 20), (21, 50), (51, 10_000))
SHIPPED_RUNS = Path(__file__).parents[2] / "tables" / "runs" / "direct.parquet"

Array = npt.NDArray[np.float64]


def make_runs(
    n_keys: int,
    n_runs: int,
    seed: int = 0,
    run_spread: float = 0.1,
    step_spread: float = 0.25,
    shared: float = 0.0,
    lengths: tuple[int, ...] = (2, 3, 4, 6, 9, 15, 20, 35, 80, 150),
) -> pd.DataFrame:
    """Runs of two components: lognormal runs, lognormal steps (median 1), `shared` of a run's noise with prefill."""
    rng = np.random.default_rng(seed)
    rows = []
    for key in range(n_keys):
        step_ms, prefill_ms = 10.0 + 3 * key, 200.0 + 20 * key
        for _ in range(n_runs):
            tokens = int(rng.choice(lengths))
            slow, other = rng.normal(size=2)
            noise = np.exp(step_spread * rng.normal(size=tokens - 1))
            decode = step_ms * noise.sum() * np.exp(run_spread * slow)
            prefill = prefill_ms * np.exp(run_spread * (shared * slow + np.sqrt(1 - shared**2) * other))
            rows.append(("low", key, 12, int(rng.integers(50, 400)), tokens, prefill, decode, prefill + decode))
    columns = [*KEYS, "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms", "total_ms"]
    runs = pd.DataFrame(rows, columns=columns)
    runs["run_hash"] = [f"{row:08d}" for row in range(len(runs))]
    runs["workload"] = "made"
    return runs.assign(total_given=True, timed=True, clamped=False)


def flat_curves(
    runs: pd.DataFrame, run_spread: float = 0.1, fitted: bool = False, levels: tuple[float, ...] = LEVELS
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Curves of `make_runs`: the true ones, or with each key's level fitted to its own runs."""
    normal = {0.05: -1.6449, 0.5: 0.0, 0.95: 1.6449, 0.99: 2.3263}
    prefill, decode = [], []
    for name, group in runs.groupby(KEYS):
        number = int(group["top_k"].iloc[0])
        step_ms, prefill_ms = 10.0 + 3 * number, 200.0 + 20 * number
        if fitted:
            many = group[group["output_tokens"] >= 2]
            step_ms = float(np.median(many["decode_ms"] / (many["output_tokens"] - 1)))
        prefill.append((*name, 100, len(group), *[prefill_ms * np.exp(run_spread * normal[q]) for q in levels]))
        decode.append((*name, 100, len(group), *[step_ms * np.exp(0.3 * normal[q]) for q in levels]))
    columns = [quantile_column(q) for q in levels]
    return (
        pd.DataFrame(prefill, columns=[*KEYS, "prompt_tokens", "n", *columns]).assign(source="measured"),
        pd.DataFrame(decode, columns=[*KEYS, "kv_len", "n", *columns]).assign(source="measured"),
    )


def step_sums(curve: pd.DataFrame, longest: int) -> Array:
    """Sum of the P50 steps over KV lengths 1 … x, for x = 0 … longest, added up one by one."""
    knots, value = curve["kv_len"].to_numpy(float), curve["p50_ms"].to_numpy(float)
    x = np.arange(1, longest + 1, dtype=float)
    steps = np.interp(x, knots, value)
    if len(knots) > 1:
        slope = max(0.0, (value[-1] - value[-2]) / (knots[-1] - knots[-2]))
        steps = steps + slope * np.maximum(x - knots[-1], 0.0)
    return np.concatenate([[0.0], np.cumsum(steps)])


def value_at(curve: pd.DataFrame, x: Array, column: str) -> Array:
    knots, value = curve["prompt_tokens"].to_numpy(float), curve[column].to_numpy(float)
    slope = max(0.0, (value[-1] - value[-2]) / (knots[-1] - knots[-2])) if len(knots) > 1 else 0.0
    return np.asarray(np.interp(x, knots, value) + slope * np.maximum(x - knots[-1], 0.0))


def predict(
    runs: pd.DataFrame,
    prefill_curve: pd.DataFrame,
    decode_curve: pd.DataFrame,
    decode_total: pd.DataFrame,
    total: pd.DataFrame,
    q: float,
) -> pd.DataFrame:
    """Quantiles of decode and total of `runs`, by the formulas of the reader."""
    parts = []
    suffix = quantile_suffix(q)
    for name, group in runs.groupby(KEYS):
        prefill, decode, ratios, own = (
            table[(table[KEYS] == list(name)).all(axis=1)]
            for table in (prefill_curve, decode_curve, decode_total, total)
        )
        prompt = group["prompt_tokens"].to_numpy()
        steps = group["output_tokens"].to_numpy() - 1
        sums = step_sums(decode, int((prompt + steps).max()))
        expected = sums[prompt + steps] - sums[prompt]
        middle, wanted = (
            expected * np.interp(steps, ratios["decode_steps"], ratios[f"{level}_ratio"]) for level in ("p50", suffix)
        )
        p50 = value_at(prefill, prompt.astype(float), "p50_ms")
        a = np.abs(value_at(prefill, prompt.astype(float), f"{suffix}_ms") - p50)
        d = np.abs(wanted - middle)
        c = float(own[f"{suffix}_correlation"].iloc[0])
        sign = 1 if q >= 0.5 else -1
        summed = p50 + middle + sign * np.sqrt(a**2 + d**2 + 2 * c * a * d)
        parts.append(group.assign(decode_q=wanted, total_q=summed))
    return pd.concat(parts)


def coverage(predicted: pd.DataFrame, what: str) -> dict[tuple[int, int], float]:
    below = predicted[f"{what}_ms"] <= predicted[f"{what}_q"]
    return {band: float(below[predicted["output_tokens"].between(*band)].mean()) for band in BANDS}


def test_coverage_in_every_band_on_fresh_runs() -> None:
    seen, fresh = make_runs(12, 400, seed=1), make_runs(12, 400, seed=2)
    curves = flat_curves(seen)
    tables = calibrate_totals(seen, *curves, LEVELS)
    for q, tolerance in ((0.05, 0.03), (0.5, 0.06), (0.95, 0.025)):
        predicted = predict(fresh, *curves, *tables, q)
        for what in ("decode", "total"):
            for band, share in coverage(predicted, what).items():
                assert share == pytest.approx(q, abs=tolerance), (what, q, band)


def test_ratios_pass_from_those_of_a_step_to_those_of_a_run() -> None:
    runs = make_runs(10, 800, seed=3, run_spread=0.05, step_spread=0.5)
    decode_total, _ = calibrate_totals(runs, *flat_curves(runs, 0.05), LEVELS)
    mean = decode_total.groupby("decode_steps")[["p50_ratio", "p95_ratio"]].mean()
    one, most = mean.iloc[0], mean.iloc[-1]
    step, run = np.hypot(0.5, 0.05), 0.05
    assert one["p50_ratio"] == pytest.approx(1.0, rel=0.03)
    assert one["p95_ratio"] == pytest.approx(np.exp(1.6449 * step), rel=0.06)
    # Skewed steps: what a long run takes follows their mean, which lies above their median.
    average = np.exp(0.5**2 / 2)
    spread = np.hypot(run, np.sqrt(np.exp(0.25) - 1) / np.sqrt(149))
    assert most["p50_ratio"] == pytest.approx(average, rel=0.02)
    assert most["p95_ratio"] == pytest.approx(average * np.exp(1.6449 * spread), rel=0.04)


def test_ten_runs_a_key_cover_although_curves_follow_them() -> None:
    shares = []
    for seed in range(4):
        seen, fresh = make_runs(20, 10, seed=10 + seed), make_runs(20, 100, seed=50 + seed)
        curves = flat_curves(seen, fitted=True)
        predicted = predict(fresh, *curves, *calibrate_totals(seen, *curves, LEVELS), 0.95)
        shares.append([(predicted[f"{what}_ms"] <= predicted[f"{what}_q"]).mean() for what in ("decode", "total")])
    assert np.mean(shares, axis=0) == pytest.approx([0.95, 0.95], abs=0.02)


def test_small_noise_gives_tight_bounds() -> None:
    runs = make_runs(5, 100, seed=4, run_spread=0.003, step_spread=0.01)
    decode_total, _ = calibrate_totals(runs, *flat_curves(runs, 0.003), LEVELS)
    assert decode_total["p95_ratio"].between(1.0, 1.03).all()
    assert decode_total["p50_ratio"].between(0.995, 1.005).all()


def test_noisier_key_has_wider_bounds_when_runs_show_it() -> None:
    calm, wild = make_runs(2, 500, seed=5, run_spread=0.02), make_runs(4, 500, seed=6, run_spread=0.3)
    runs = pd.concat([calm, wild[wild["top_k"] >= 2]], ignore_index=True)
    decode_total, _ = calibrate_totals(runs, *flat_curves(runs), LEVELS)
    longest = decode_total[decode_total["decode_steps"] == 149].set_index("top_k")["p95_ratio"]
    assert (longest[[0, 1]] < 1.2).all()
    assert (longest[[2, 3]] > 1.4).all()


def test_correlation_tells_shared_from_separate_noise() -> None:
    found = {}
    for shared in (0.0, 1.0):
        runs = make_runs(10, 300, seed=7, step_spread=0.01, shared=shared, lengths=(11, 16, 21, 26))
        found[shared] = calibrate_totals(runs, *flat_curves(runs), LEVELS)[1]["p95_correlation"]
    assert (found[0.0] < 0.3).all()
    assert (found[1.0] > 0.8).all()


def clamp(runs: pd.DataFrame, seed: int, offset_ms: float = 0.0) -> pd.DataFrame:
    """The same runs as three passes would give them: decode by subtraction, cut off at 0."""
    rng = np.random.default_rng(seed)
    total = runs["total_ms"] + rng.normal(size=len(runs)) * 20 + offset_ms
    decode = np.maximum(total - runs["prefill_ms"], 0)
    return runs.assign(decode_ms=decode, total_ms=total, timed=False, clamped=decode == 0)


def test_clamped_runs_keep_their_share() -> None:
    seen, fresh = clamp(make_runs(8, 400, seed=8), seed=9), clamp(make_runs(8, 400, seed=10), seed=11)
    assert seen["clamped"].mean() > 0.02
    curves = flat_curves(seen)
    decode_total, total = calibrate_totals(seen, *curves, LEVELS)
    assert (decode_total["p5_ratio"] > 0).all()
    assert decode_total.loc[decode_total["decode_steps"] == 1, "p95_ratio"].min() > 2
    for band, share in coverage(predict(fresh, *curves, decode_total, total, 0.95), "decode").items():
        assert share == pytest.approx(0.95, abs=0.03), band


def test_offset_of_subtraction_fades_with_the_steps() -> None:
    runs = clamp(make_runs(8, 150, seed=12), seed=13, offset_ms=15.0)
    decode_total, _ = calibrate_totals(runs, *flat_curves(runs), LEVELS)
    first = decode_total[decode_total["top_k"] == 0]["p50_ratio"].to_numpy()
    assert first[0] == pytest.approx(2.5, abs=0.5)
    assert first[-1] == pytest.approx(1.0, abs=0.1)


curve_values = st.lists(st.floats(0.5, 20.0), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(values=curve_values, spread=st.floats(0.0, 1.5), seed=st.integers(0, 1000), subtracted=st.booleans())
def test_decode_never_falls_with_output_tokens(values: list[float], spread: float, seed: int, subtracted: bool) -> None:
    runs = make_runs(2, 25, seed=seed, run_spread=spread / 3, step_spread=spread)
    if subtracted:
        runs = clamp(runs, seed)
    prefill_curve, _ = flat_curves(runs)
    knots = 60 + 37 * np.arange(len(values))
    decode_curve = pd.concat(
        [
            pd.DataFrame({"kv_len": knots, "p5_ms": values, "p50_ms": values, "p95_ms": values}).assign(
                tier="low", top_k=top_k, num_blocks=12, n=1, source="measured"
            )
            for top_k in (0, 1)
        ]
    )
    decode_total, _ = calibrate_totals(runs, prefill_curve, decode_curve, LEVELS)
    sums = step_sums(decode_curve[decode_curve["top_k"] == 0], 900)
    steps = np.arange(1, 400)
    for _, ratios in decode_total.groupby(KEYS):
        levels = ratios[["p5_ratio", "p50_ratio", "p95_ratio"]].to_numpy()
        assert (levels > 0).all()
        assert (np.diff(levels, axis=1) >= 0).all()
        for prompt in (0, 30, 59, 75, 120, 200, 400):
            for column in ("p5_ratio", "p50_ratio", "p95_ratio"):
                decode = (sums[prompt + steps] - sums[prompt]) * np.interp(
                    steps, ratios["decode_steps"], ratios[column]
                )
                assert (np.diff(decode) >= -1e-9 * decode[1:]).all()


@pytest.mark.parametrize("factor", [1024.0, 0.37])
def test_scale_of_times_cancels(factor: float) -> None:
    runs = make_runs(4, 40, seed=14)
    curves = flat_curves(runs, fitted=True)
    times = ["prefill_ms", "decode_ms", "total_ms"]
    columns = [quantile_column(q) for q in LEVELS]
    prefill_curve, decode_curve = (curve.assign(**{name: curve[name] * factor for name in columns}) for curve in curves)
    expected = calibrate_totals(runs, *curves, LEVELS)
    found = calibrate_totals(
        runs.assign(**{name: runs[name] * factor for name in times}), prefill_curve, decode_curve, LEVELS
    )
    for left, right in zip(expected, found, strict=True):
        pd.testing.assert_frame_equal(left, right, rtol=1e-4)


def test_order_of_rows_does_not_matter() -> None:
    runs = make_runs(4, 40, seed=15)
    prefill_curve, decode_curve = flat_curves(runs, fitted=True)
    expected = calibrate_totals(runs, prefill_curve, decode_curve, LEVELS)
    found = calibrate_totals(
        runs.sample(frac=1, random_state=1), prefill_curve.iloc[::-1], decode_curve.iloc[::-1], LEVELS
    )
    for left, right in zip(expected, found, strict=True):
        pd.testing.assert_frame_equal(left, right)


@pytest.mark.parametrize("n_runs", [1, 2, 3, 5])
def test_few_runs_in_all(n_runs: int) -> None:
    runs = make_runs(1, n_runs, seed=16)
    decode_total, total = calibrate_totals(runs, *flat_curves(runs, fitted=True), LEVELS)
    assert decode_total["n"].sum() == n_runs
    assert ((decode_total["p95_ratio"] >= decode_total["p50_ratio"]) & (decode_total["p95_ratio"] < 5)).all()
    assert decode_total["p50_ratio"].between(0.3, 2.0).all()
    assert total["p95_correlation"].between(0, 1).all()
    if n_runs > 2:
        assert (decode_total["p95_ratio"] > 1.02 * decode_total["p50_ratio"]).all()


def test_noiseless_runs_have_ratio_one() -> None:
    runs = make_runs(2, 20, seed=17, run_spread=0.0, step_spread=0.0)
    decode_total, _ = calibrate_totals(runs, *flat_curves(runs, 0.0), LEVELS)
    assert np.allclose(decode_total[["p5_ratio", "p50_ratio", "p95_ratio"]], 1.0, atol=1e-6)


def test_key_without_decode_runs_has_a_correlation_alone() -> None:
    runs = make_runs(3, 30, seed=18)
    silent = runs["top_k"] == 1
    runs.loc[silent, "output_tokens"] = 1
    runs.loc[silent, "decode_ms"] = 0.0
    prefill_curve, decode_curve = flat_curves(runs)
    decode_total, total = calibrate_totals(runs, prefill_curve, decode_curve[decode_curve["top_k"] != 1], LEVELS)
    assert set(decode_total["top_k"]) == {0, 2}
    assert list(total["n"]) == [30, 0, 30]
    assert total["p95_correlation"].between(0, 1).all()


def test_no_decode_runs_at_all() -> None:
    runs = make_runs(2, 5, seed=19).assign(output_tokens=1, decode_ms=0.0)
    prefill_curve, decode_curve = flat_curves(make_runs(2, 5, seed=19))
    decode_total, total = calibrate_totals(runs, prefill_curve, decode_curve.iloc[:0], LEVELS)
    assert len(decode_total) == 0
    assert list(decode_total.columns) == [
        *KEYS, "decode_steps", "n", "p5_ratio", "p50_ratio", "p95_ratio", "p5_se_ratio", "p50_se_ratio", "p95_se_ratio",
        "n_eff", "source",
    ]  # fmt: skip
    assert list(total["p95_correlation"]) == [1.0, 1.0]


def test_knots_say_what_they_rest_on() -> None:
    runs = make_runs(2, 60, seed=22)
    runs = runs[(runs["top_k"] == 0) | (runs["output_tokens"].isin([3, 20]))]
    decode_total, _ = calibrate_totals(runs, *flat_curves(runs), LEVELS)
    second = decode_total[decode_total["top_k"] == 1].set_index("decode_steps")
    assert len(second) <= 12
    assert second.index[0] == 1
    assert second.index[-1] == 149
    assert second.loc[[1, 149], "source"].eq("extrapolated").all()
    assert second["n"].sum() == (runs["top_k"] == 1).sum()
    assert second.loc[second["n"] > 0, "source"].eq("measured").all()
    inside = second[(second.index > 2) & (second.index < 19) & (second["n"] == 0)]
    assert len(inside) > 0
    assert inside["source"].eq("interpolated").all()


def test_levels_asked_for() -> None:
    runs = make_runs(3, 60, seed=21)
    levels = (0.5, 0.95, 0.99)
    decode_total, total = calibrate_totals(runs, *flat_curves(runs, levels=levels), levels)
    assert (decode_total["p99_ratio"] >= decode_total["p95_ratio"]).all()
    assert (decode_total["p99_ratio"] > decode_total["p95_ratio"]).any()
    assert "p99_correlation" in total
    assert "p5_ratio" not in decode_total


def test_halves_of_shipped_runs_cover_and_differ_as_they_say() -> None:
    with duckdb.connect() as connection:
        runs = connection.sql(f"SELECT * FROM '{SHIPPED_RUNS}'").df()
    runs["run_hash"] = [f"{row:08d}" for row in range(len(runs))]
    runs = runs.assign(total_given=True, timed=True, clamped=False)
    kept, halves = [], []
    for half in range(2):
        seen = pd.Series(np.random.default_rng(0).permutation(len(runs)) % 2 == half, index=runs.index)
        part = runs[seen]
        steps = part[[*KEYS, "run_hash", "prompt_tokens", "decode_steps_ms"]].explode("decode_steps_ms").dropna()
        steps["position"] = steps.groupby("run_hash").cumcount() + 1
        steps["kv_len"] = steps["prompt_tokens"] + steps["position"]
        steps["step_ms"] = steps["decode_steps_ms"].astype(float)
        step_sample = steps[[*KEYS, "run_hash", "position", "kv_len", "step_ms"]].reset_index(drop=True)
        run_sample = part.drop(columns="decode_steps_ms").reset_index(drop=True)
        curves = (fit_prefill_curve(run_sample, LEVELS), fit_step_curve(step_sample, run_sample, LEVELS))
        tables = calibrate_totals(run_sample, *curves, LEVELS)
        kept.append(predict(runs[~seen & (runs["output_tokens"] >= 2)], *curves, *tables, 0.95))
        halves.append(curves)
    predicted = pd.concat(kept)
    for what in ("decode", "total"):
        assert (predicted[f"{what}_ms"] <= predicted[f"{what}_q"]).mean() == pytest.approx(0.95, abs=0.015)
        for band, share in coverage(predicted, what).items():
            # Chance alone: 40 runs stand in the last band, a share of 40 has an error of 3 %.
            assert share == pytest.approx(0.95, abs=0.06), (what, band)

    for one, other, place in zip(*halves, ("prompt_tokens", "kv_len"), strict=True):
        for q in ("p50", "p95"):
            # They differ by what the standard errors say: at each key's middle knot, over all keys.
            scores = []
            for key, knots in one.groupby(KEYS):
                middle = knots.iloc[len(knots) // 2]
                same = other[(other[KEYS] == pd.Series(key, KEYS)).all(axis=1)]
                at, error = (np.interp(middle[place], same[place], same[f"{q}_{what}"]) for what in ("ms", "se_ms"))
                scores.append((middle[f"{q}_ms"] - at) / np.hypot(middle[f"{q}_se_ms"], error))
            assert 0.4 < np.sqrt(np.mean(np.square(scores))) < 2.5, (place, q)
            assert (one["n_eff"] > 1).all()
