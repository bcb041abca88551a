"""Decode step recovered from run totals: known truths, censoring, few runs, and the shipped runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from tests.builder.keyed_fit import KEYS, fit_step_curve, recover_step_curve

TABLES = Path(__file__).parents[2] / "tables" / "runs"
Key = tuple[str, int, int]


def totals(
    output_tokens: Sequence[int],
    step_ms: Callable[[np.ndarray], np.ndarray] = lambda kv_len: np.full(len(kv_len), 46.0),
    key: Key = ("low", 4, 12),
    prompt_tokens: Sequence[int] = (200,),
    prefill_ms: float = 500.0,
    offset_ms: float = 0.0,
) -> pd.DataFrame:
    """Runs without noise; prompt lengths are taken in turn."""
    rows = []
    for i, n in enumerate(output_tokens):
        prompt = prompt_tokens[i % len(prompt_tokens)]
        decode = float(step_ms(prompt + np.arange(1.0, n)).sum()) + offset_ms
        rows.append((prompt, n, prefill_ms, decode))
    return as_sample(pd.DataFrame(rows, columns=["prompt_tokens", "output_tokens", "prefill_ms", "before"]), key, False)


def as_sample(runs: pd.DataFrame, key: Key, total_measured: bool) -> pd.DataFrame:
    runs = runs.assign(**dict(zip(KEYS, key, strict=True)), workload="w", timed=False, total_given=True)
    runs["run_hash"] = [f"{key}{i}" for i in range(len(runs))]
    runs["decode_ms"] = runs["before"].clip(lower=0)
    runs["total_ms"] = runs["prefill_ms"] + (runs["before"] if total_measured else runs["decode_ms"])
    runs["clamped"] = (runs["decode_ms"] == 0) & (runs["output_tokens"] >= 2)
    return runs.drop(columns="before")


def true_step(key: Key, kv_len: np.ndarray) -> np.ndarray:
    _, top_k, num_blocks = key
    return 2 + num_blocks * (1.2 + 0.15 * top_k) + 0.0012 * num_blocks * kv_len


def subtraction(
    seed: int, total_measured: bool, offsets: tuple[float, float] = (-30.0, 40.0), runs_per_key: int = 120
) -> pd.DataFrame:
    """Subtraction as profilers do it, with symmetric noise of a run, of steps, and of prefill (heavy-tailed)."""
    rng = np.random.default_rng(seed)
    parts = []
    for tier, typical in (("low", 110), ("medium", 260), ("high", 480)):
        for top_k in (4, 8):
            for num_blocks in (12, 16):
                key = (tier, top_k, num_blocks)
                offset = rng.uniform(*offsets)
                rows = []
                for _ in range(runs_per_key):
                    prompt = int(typical * rng.uniform(0.7, 1.4))
                    n = int(
                        rng.choice(
                            [1, 2, int(rng.integers(3, 12)), int(rng.integers(12, 49))], p=[0.08, 0.32, 0.4, 0.2]
                        )
                    )
                    steps = true_step(key, prompt + np.arange(1.0, n)) * (1 + rng.normal(0, 0.12, n - 1))
                    prefill = 0.35 * prompt * num_blocks
                    before = steps.sum() * (1 + rng.normal(0, 0.08)) + offset + 0.05 * prefill * rng.standard_t(3)
                    rows.append((prompt, n, prefill * np.exp(rng.normal(0, 0.08)), before))
                columns = ["prompt_tokens", "output_tokens", "prefill_ms", "before"]
                parts.append(as_sample(pd.DataFrame(rows, columns=columns), key, total_measured))
    return pd.concat(parts, ignore_index=True)


def at(curve: pd.DataFrame, kv_len: np.ndarray) -> np.ndarray:
    return np.asarray(np.interp(kv_len, curve["kv_len"], curve["p50_ms"]))


def errors(sample: pd.DataFrame) -> np.ndarray:
    """Relative error of the P50 curve per key, on average over the KV lengths."""
    found = []
    for key, curve in recover_step_curve(sample, (0.5, 0.95)).groupby(KEYS):
        kv_len = np.linspace(curve["kv_len"].min(), curve["kv_len"].max(), 20)
        found.append(float(np.mean(at(curve, kv_len) / true_step(key, kv_len) - 1)))
    return np.array(found)


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(totals(range(2, 65)), id="two to 64 tokens"),
        pytest.param(totals(range(1, 65)), id="one-token runs beside"),
        pytest.param(totals([2, 4, 8, 30]), id="four runs"),
        pytest.param(totals([2] * 20), id="one length only"),
        pytest.param(totals([5]), id="one run"),
        pytest.param(totals(range(2, 65), prompt_tokens=(100, 300, 800)), id="prompts vary"),
        pytest.param(totals(range(2, 65), prefill_ms=0.1), id="prefill tiny"),
        pytest.param(totals(range(2, 65), prefill_ms=50_000.0), id="prefill huge"),
        pytest.param(totals(list(range(1, 201)) * 5), id="a thousand runs"),
        pytest.param(
            pd.concat([totals(range(2, 65), key=("low", k, b)) for k in (4, 6, 8) for b in (12, 14, 16)]),
            id="nine keys alike",
        ),
    ],
)
def test_constant_step_comes_out_flat_without_fencepost(sample: pd.DataFrame) -> None:
    curve = recover_step_curve(sample, (0.5, 0.95))
    np.testing.assert_allclose(curve["p50_ms"], 46.0, rtol=1e-6)
    assert (curve["p95_ms"] >= curve["p50_ms"]).all()


@pytest.mark.parametrize("offset_ms", [30.0, -30.0, -120.0])
def test_constant_offset_does_not_leak_into_the_step(offset_ms: float) -> None:
    curve = recover_step_curve(totals(range(1, 65), offset_ms=offset_ms), (0.5, 0.95))
    np.testing.assert_allclose(curve["p50_ms"], 46.0, rtol=1e-6)


def test_growth_with_kv_length_is_recovered() -> None:
    sample = totals(range(2, 120), lambda kv_len: 20 + 0.05 * kv_len, prompt_tokens=(100, 250, 600, 900))
    curve = recover_step_curve(sample, (0.5, 0.95))
    np.testing.assert_allclose(curve["p50_ms"], 20 + 0.05 * curve["kv_len"], rtol=1e-5)


def test_bend_that_the_data_show_is_followed() -> None:
    def step_ms(kv_len: np.ndarray) -> np.ndarray:
        return np.asarray(30 + 0.05 * np.maximum(kv_len - 400, 0))

    sample = totals(range(2, 120), step_ms, prompt_tokens=(50, 150, 300, 450, 600, 750))
    curve = recover_step_curve(sample, (0.5, 0.95))
    kv_len = np.linspace(60, 860, 50)
    # Three knots stand where the runs are, not at the bend: a straight line would be off by 20 %.
    np.testing.assert_allclose(at(curve, kv_len), step_ms(kv_len), rtol=0.08)


@pytest.mark.parametrize("total_measured", [True, False], ids=["values before clamping", "left-censored"])
@pytest.mark.parametrize("offsets", [(-30.0, 40.0), (-40.0, -20.0)], ids=["offsets around zero", "offsets below zero"])
def test_offset_noise_and_clamping_leave_the_step_unbiased(total_measured: bool, offsets: tuple[float, float]) -> None:
    samples = [subtraction(seed, total_measured, offsets) for seed in range(3)]
    several = pd.concat(samples)
    several = several[several["output_tokens"] >= 2]
    assert 0.08 < several["clamped"].mean() < 0.25
    found = np.concatenate([errors(sample) for sample in samples])
    # About 30 clear runs a key, each good to 12 %: 2.2 % a key, and 0.4 % on the mean of 36 (three of these allowed).
    assert abs(found.mean()) < 0.012
    assert np.median(np.abs(found)) < 0.022
    naive = several["decode_ms"] / several["output_tokens"] / true_step(("low", 6, 14), several["prompt_tokens"])
    assert naive.median() < 0.9


def test_key_with_three_runs_leans_on_the_others() -> None:
    sample = subtraction(4, True)
    thin = (sample["tier"] == "medium") & (sample["top_k"] == 8) & (sample["num_blocks"] == 16)
    few = sample[thin & (sample["output_tokens"] == 2)].head(3)
    curve = recover_step_curve(pd.concat([sample[~thin], few]), (0.5, 0.95))
    curve = curve[(curve["tier"] == "medium") & (curve["top_k"] == 8) & (curve["num_blocks"] == 16)]
    kv_len = curve["kv_len"].to_numpy(dtype=float)
    np.testing.assert_allclose(curve["p50_ms"], true_step(("medium", 8, 16), kv_len), rtol=0.08)
    assert set(curve["source"]) == {"extrapolated"}


def test_key_unlike_the_others_keeps_its_own_level() -> None:
    def constant(level: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda kv_len: np.full(len(kv_len), level)

    samples = [
        totals(range(1, 60), constant(level), key=("low", top_k, 12), offset_ms=10.0)
        for top_k, level in ((2, 30.0), (4, 50.0), (6, 33.0), (8, 35.0))
    ]
    curve = recover_step_curve(pd.concat(samples), (0.5, 0.95))
    assert curve.groupby("top_k")["p50_ms"].mean().tolist() == pytest.approx([30.0, 50.0, 33.0, 35.0], rel=1e-4)


def test_quantiles_ascend_and_follow_the_spread_of_runs() -> None:
    rng = np.random.default_rng(0)
    sample = totals([2, 3, 5, 9, 17] * 60)
    sample["decode_ms"] *= np.exp(rng.normal(0, 0.1, len(sample)))
    sample["total_ms"] = sample["prefill_ms"] + sample["decode_ms"]
    curve = recover_step_curve(sample, (0.05, 0.5, 0.95, 0.99))
    columns = ["p5_ms", "p50_ms", "p95_ms", "p99_ms"]
    levels = curve[columns].to_numpy()
    assert (np.diff(levels, axis=1) > 0).all()
    assert (levels > 0).all()
    # exp(1.645 · 0.1) = 1.18
    assert (curve["p95_ms"] / curve["p50_ms"]).to_numpy() == pytest.approx(1.18, abs=0.05)


def test_knots_cover_the_steps_and_count_them() -> None:
    sample = totals([2, 5, 9, 33], prompt_tokens=(100, 140))
    curve = recover_step_curve(sample, (0.5, 0.95))
    assert curve["kv_len"].iloc[0] == 101
    assert curve["kv_len"].iloc[-1] == 140 + 32
    assert curve["n"].sum() == (sample["output_tokens"] - 1).sum()
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
    assert set(curve["source"]) == {"interpolated"}


def test_order_of_rows_does_not_matter_and_times_only_scale() -> None:
    sample = subtraction(1, False, runs_per_key=20)
    curve = recover_step_curve(sample, (0.5, 0.95))
    shuffled = recover_step_curve(sample.sample(frac=1, random_state=5), (0.5, 0.95))
    pd.testing.assert_frame_equal(curve, shuffled, check_exact=True)
    times = ["prefill_ms", "decode_ms", "total_ms"]
    scaled = recover_step_curve(sample.assign(**{name: sample[name] * 1e-3 for name in times}), (0.5, 0.95))
    np.testing.assert_allclose(scaled["p50_ms"], curve["p50_ms"] * 1e-3, rtol=1e-9)
    np.testing.assert_allclose(scaled["p95_ms"], curve["p95_ms"] * 1e-3, rtol=1e-9)


@pytest.mark.parametrize(
    "sample",
    [
        pytest.param(totals([1, 1, 1]), id="one token each"),
        pytest.param(totals([2, 3]).assign(timed=True), id="timed"),
        pytest.param(totals([2, 3], offset_ms=-1e3), id="all clamped"),
    ],
)
def test_runs_that_say_nothing_give_no_rows(sample: pd.DataFrame) -> None:
    curve = recover_step_curve(sample, (0.5, 0.95))
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


def test_one_token_key_beside_others_gives_no_rows() -> None:
    sample = pd.concat([totals(range(2, 20)), totals([1, 1], key=("low", 8, 12))])
    assert set(recover_step_curve(sample, (0.5, 0.95))["top_k"]) == {4}


def test_one_token_zeros_by_definition_are_no_measurement_of_the_offset() -> None:
    sample = pd.concat([totals(range(2, 40)), totals([1] * 30)])
    np.testing.assert_allclose(recover_step_curve(sample, (0.5, 0.95))["p50_ms"], 46.0, rtol=1e-6)


def shipped(name: str) -> pd.DataFrame:
    with duckdb.connect() as connection:
        runs = connection.execute("SELECT * FROM read_parquet(?)", [str(TABLES / f"{name}.parquet")]).df()
    runs["timed"] = (runs["output_tokens"] >= 2) & ("decode_steps_ms" in runs)
    runs["total_given"] = True
    runs["clamped"] = ~runs["timed"] & (runs["output_tokens"] >= 2) & (runs["decode_ms"] == 0)
    runs["run_hash"] = [f"{name}{i:05}" for i in range(len(runs))]
    return runs


def timed_steps(runs: pd.DataFrame) -> pd.DataFrame:
    timed = runs[runs["timed"]]
    count = timed["decode_steps_ms"].map(len).to_numpy()
    steps = timed.loc[timed.index.repeat(count), [*KEYS, "run_hash", "prompt_tokens"]].reset_index(drop=True)
    steps["position"] = np.concatenate([np.arange(1, n + 1) for n in count])
    steps["kv_len"] = steps.pop("prompt_tokens") + steps["position"]
    steps["step_ms"] = np.concatenate(list(timed["decode_steps_ms"]))
    return steps


def sums(curve: pd.DataFrame, runs: pd.DataFrame) -> np.ndarray:
    """Sum of the P50 curve over each run's steps."""
    of_key = dict(iter(curve.groupby(KEYS)))
    return np.array(
        [
            at(of_key[tier, top_k, num_blocks], prompt + np.arange(1.0, n)).sum()
            for tier, top_k, num_blocks, prompt, n in runs[[*KEYS, "prompt_tokens", "output_tokens"]].itertuples(
                index=False
            )
        ]
    )


def test_shipped_subtraction_agrees_with_directly_timed_steps() -> None:
    runs, direct = shipped("subtraction"), shipped("direct")
    recovered = recover_step_curve(runs, (0.5, 0.95))
    steps = timed_steps(direct)
    timed = dict(iter(fit_step_curve(steps, direct, (0.5, 0.95)).groupby(KEYS)))
    found, naive = [], []
    for key, curve in recovered.groupby(KEYS):
        of_key = steps[(steps[KEYS] == list(key)).all(axis=1)]
        kv_len = np.linspace(of_key["kv_len"].min(), of_key["kv_len"].max(), 100)
        reference = at(timed[key], kv_len)
        found.append(np.median(np.abs(at(curve, kv_len) / reference - 1)))
        several = runs[(runs[KEYS] == list(key)).all(axis=1) & (runs["output_tokens"] >= 2)]
        naive.append((several["decode_ms"] / several["output_tokens"]).median() / np.median(reference) - 1)
        assert (of_key["step_ms"] <= np.interp(of_key["kv_len"], curve["kv_len"], curve["p95_ms"])).mean() > 0.9
    assert len(found) == 12
    assert np.median(found) < 0.03
    assert np.median(naive) < -0.1


def test_shipped_subtraction_gives_unbiased_totals() -> None:
    runs, direct = shipped("subtraction"), shipped("direct")
    recovered = recover_step_curve(runs, (0.5, 0.95))
    known = recovered[KEYS].drop_duplicates()
    for judged in (runs, direct[direct["timed"]].merge(known, on=KEYS)):
        several = judged[judged["output_tokens"] >= 2]
        decode = several["total_ms"] - several["prefill_ms"]
        predicted = sums(recovered, several)
        assert predicted.sum() / decode.sum() == pytest.approx(1, abs=0.02)
        total = (predicted + several["prefill_ms"]) / several["total_ms"]
        assert total.median() == pytest.approx(1, abs=0.02)
        long = several["output_tokens"] >= 9
        assert np.median(predicted[long] / decode[long]) == pytest.approx(1, abs=0.02)
