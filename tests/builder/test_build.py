"""The main job: runs in, a table out, every run accounted for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lutest
from lutest.builder.build import BuildSummary, build
from lutest.reader.errors import BuildError, ConfigError, LutestError
from lutest.reader.names import quote
from tests.conftest import RUNS
from tests.runs_frame import BOTH_KEYS, DEFAULT_KEY, constant_step_runs, keyed, noisy_runs


def _query(path: Path, sql: str) -> pd.DataFrame:
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(sql).df()


def _accounts(path: Path) -> pd.DataFrame:
    accounts = _query(path, "SELECT * FROM sources")
    assert (accounts["rows_read"] == accounts["rows_used"] + accounts["rows_rejected"]).all()
    rejected = _query(path, "SELECT source_id, count(*) AS n FROM rejected_runs GROUP BY source_id")
    assert rejected["n"].sum() == accounts["rows_rejected"].sum()
    return accounts


@pytest.mark.parametrize("name", ["direct", "subtraction", "serving"])
def test_prefill_quantiles_are_those_of_the_sound_runs(name: str, request: pytest.FixtureRequest) -> None:
    table: Path = request.getfixturevalue(f"{name}_table")
    runs = _query_runs(request.getfixturevalue(f"{name}_runs"))
    rejected = _query(table, "SELECT row, reason FROM rejected_runs")
    runs["outlier"] = runs["row"].isin(rejected.loc[rejected["reason"] == "outlier", "row"])
    sound = runs[runs["outlier"] | ~runs["row"].isin(rejected["row"])]
    assert (~sound["outlier"]).sum() == _accounts(table)["rows_used"].sum() > 1000
    key = list(lutest.load(table).key_columns)
    prefill = _query(table, "SELECT * FROM prefill").set_index(key)
    groups = sound.groupby(key)
    assert len(groups) == len(prefill)
    for values_of_key, group in groups:
        values = group["prefill_ms"].to_numpy()
        accepted = values[~group["outlier"]]
        row = prefill.loc[values_of_key]
        assert row["n"] == len(accepted)
        np.testing.assert_allclose(
            [row["p50_ms"], row["p95_ms"], row["mean_ms"], row["std_ms"]],
            [*np.quantile(values, [0.5, 0.95]), accepted.mean(), accepted.std(ddof=1)],
            rtol=1e-9,
        )
        assert (row["min_ms"], row["max_ms"]) == (values.min(), values.max())


@pytest.mark.parametrize("name", ["direct", "serving"])
def test_decode_quantiles_are_those_of_the_timed_steps(name: str, request: pytest.FixtureRequest) -> None:
    table: Path = request.getfixturevalue(f"{name}_table")
    runs = _query_runs(request.getfixturevalue(f"{name}_runs"))
    rejected = _query(table, "SELECT row, reason FROM rejected_runs")
    runs["outlier"] = runs["row"].isin(rejected.loc[rejected["reason"] == "outlier", "row"])
    sound = runs[runs["outlier"] | ~runs["row"].isin(rejected["row"])]
    key = list(lutest.load(table).key_columns)
    decode = _query(table, "SELECT * FROM decode").set_index(key)
    for values_of_key, group in sound[sound["output_tokens"] >= 2].groupby(key):
        used = group[~group["outlier"]]
        steps, all_steps = (np.concatenate(held["decode_steps_ms"].to_list()) for held in (used, group))
        row = decode.loc[values_of_key]
        assert (row["n"], row["n_steps"], row["steps"]) == (len(used), len(steps), "timed")
        np.testing.assert_allclose(
            [row["p50_ms"], row["p95_ms"], row["mean_ms"], row["std_ms"]],
            [*np.quantile(all_steps, [0.5, 0.95]), steps.mean(), steps.std(ddof=1)],
            rtol=1e-9,
        )


def _query_runs(path: Path) -> pd.DataFrame:
    with duckdb.connect() as connection:
        runs = connection.execute("SELECT * FROM read_parquet(?)", [str(path)]).df()
    runs["row"] = np.arange(1, len(runs) + 1)
    return runs


def test_upper_bound_of_p95_is_an_order_statistic(tmp_path: Path) -> None:
    values = np.exp(np.random.default_rng(1).normal(5, 0.2, 100))
    frame = pd.DataFrame([_one(prefill_ms=value, prompt_tokens=100 + i) for i, value in enumerate(values)])
    table = build({"cleaning": {"outliers": "none"}}, runs=frame, output=tmp_path / "t.duckdb").output
    # P(Binomial(100, 0.95) < 99) = 0.9629 is the first at or above 0.95.
    assert _query(table, "SELECT p95_upper_ms FROM prefill").iat[0, 0] == np.sort(values)[98]
    few = build(runs=frame.head(58), output=tmp_path / "few.duckdb").output
    assert _query(few, "SELECT p95_upper_ms FROM prefill")["p95_upper_ms"].isna().all()
    enough = build({"cleaning": {"outliers": "none"}}, runs=frame.head(59), output=tmp_path / "enough.duckdb").output
    assert _query(enough, "SELECT p95_upper_ms FROM prefill").iat[0, 0] == values[:59].max()


@pytest.mark.parametrize("key", BOTH_KEYS)
def test_constant_steps_from_totals_are_flat(tmp_path: Path, key: tuple[str, ...]) -> None:
    runs = keyed(constant_step_runs(46.0), key)
    entry = lutest.load(build({"key": list(key)}, runs=runs, output=tmp_path / "t.duckdb").output)["low", 4, 12]
    for kv_len in (101, 120, 150, 163, 400):
        assert entry.decode_step_ms(kv_len) == pytest.approx(46.0, rel=1e-6)
    for output_tokens in (2, 4, 8, 30, 64):
        expected = 46.0 * (output_tokens - 1)
        assert entry.decode_ms(100, output_tokens) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("key", BOTH_KEYS)
def test_hash_does_not_depend_on_order_files_or_threads(tmp_path: Path, key: tuple[str, ...]) -> None:
    config = {"key": list(key)}
    frame = keyed(noisy_runs(runs_per_key=12), key)
    frame["decode_steps_ms"] = [str(steps) for steps in frame["decode_steps_ms"]]
    shuffled = frame.sample(frac=1.0, random_state=3)
    parts = {"a": frame.iloc[:15], "b": frame.iloc[15:]}
    for name, part in parts.items():
        part.to_csv(tmp_path / f"{name}.csv", index=False)

    def tables(summary: BuildSummary) -> list[pd.DataFrame]:
        names = ("prefill", "prefill_curve", "decode", "decode_curve", "decode_total", "total", "output_length")
        return [_query(summary.output, f"SELECT * FROM {name}") for name in names]

    whole = build(config, runs=frame, output=tmp_path / "whole.duckdb")
    first = build(config, runs=[tmp_path / "a.csv", tmp_path / "b.csv"], output=tmp_path / "1.duckdb")
    second = build(config, runs=[tmp_path / "b.csv", tmp_path / "a.csv"], output=tmp_path / "2.duckdb")
    again = build(config, runs=shuffled, output=tmp_path / "3.duckdb")
    assert first.content_hash == second.content_hash

    def workload(table: pd.DataFrame) -> pd.DataFrame:
        return table.drop(columns="workload", errors="ignore")

    for expected, *others in zip(tables(whole), tables(again), tables(first), strict=True):
        for other in others:
            pd.testing.assert_frame_equal(workload(expected), workload(other), check_exact=True)


def _one(**changes: object) -> dict[str, object]:
    run: dict[str, object] = {
        "tier": "low",
        "top_k": 4,
        "num_blocks": 12,
        "prompt_tokens": 100,
        "output_tokens": 3,
        "prefill_ms": 50.5,
        "decode_ms": 20.25,
    }
    return {**run, **changes}


FAULTS: list[tuple[dict[str, object], str, str]] = [
    ({"prefill_ms": None}, "missing_value", "prefill_ms"),
    ({"tier": None}, "missing_value", "tier"),
    ({"decode_ms": None}, "missing_value", "decode_ms"),
    ({"prefill_ms": "fast"}, "not_a_number", "fast"),
    ({"top_k": True}, "not_a_number", "true"),
    ({"prefill_ms": float("inf")}, "not_finite", "prefill_ms"),
    ({"total_ms": "NaN"}, "not_finite", "total_ms"),
    ({"decode_ms": -0.5}, "negative_value", "-0.5"),
    ({"prefill_ms": 1e308}, "out_of_range", "1e+308"),
    ({"accuracy": 1e300}, "out_of_range", "accuracy"),
    ({"output_tokens": 0}, "no_output_tokens", "0"),
    ({"output_tokens": 2.5}, "not_whole", "2.5"),
    ({"top_k": 0}, "out_of_range", "top_k"),
    ({"prefill_ms": 0}, "zero_prefill", "prefill_ms"),
    ({"decode_steps_ms": [10.0]}, "step_count_mismatch", "1 steps for 3"),
    ({"decode_steps_ms": [10.0, -1.0]}, "negative_value", "-1"),
    ({"decode_steps_ms": [10.0, float("nan")]}, "not_finite", "step"),
    ({"decode_steps_ms": [10.0, None]}, "bad_steps", "step 2"),
    ({"decode_steps_ms": "soon"}, "bad_steps", "soon"),
    ({"decode_steps_ms": [10.0, 0.0]}, "zero_step", "a decode step is 0"),
    ({"decode_steps_ms": [10.0, 5e-324]}, "out_of_range", "below 1e-06 ms"),
    ({"decode_steps_ms": [[], [10.0]]}, "bad_steps", "a position before the last one has no step"),
    ({"decode_steps_ms": [6e8, 6e8], "decode_ms": None}, "out_of_range", "decode_ms is the sum of its steps"),
    ({"prefill_ms": 5e-324}, "out_of_range", "between 0 and 1e-06 ms"),
    ({"decode_ms": 1e-9}, "out_of_range", "between 0 and 1e-06 ms"),
    ({"total_ms": 0}, "zero_total", "total_ms"),
    ({"top_k": "a\n\x1b[31mb"}, "not_a_number", "top_k is a [31mb, not a number"),
]


def test_structural_rejects(tmp_path: Path) -> None:
    good = [_one(prefill_ms=50.0 + i / 7) for i in range(5)]
    bad = [_one(**changes) for changes, _, _ in FAULTS]
    output = build(runs=pd.DataFrame([*good, *bad], dtype=object), output=tmp_path / "t.duckdb").output
    rejected = _query(output, 'SELECT "row", reason, detail FROM rejected_runs ORDER BY "row"').to_numpy().tolist()
    told = list(enumerate(FAULTS, len(good) + 1))
    assert [(row, reason) for row, reason, _ in rejected] == [(row, reason) for row, (_, reason, _) in told]
    for (_, _, detail), (_, (_, _, said)) in zip(rejected, told, strict=True):
        assert said in detail
    assert _accounts(output)["rows_used"].tolist() == [len(good)]


def test_one_token_runs_feed_prefill_only(tmp_path: Path) -> None:
    frame = constant_step_runs(46.0)
    ones = frame.head(5).assign(
        output_tokens=1, decode_ms=[0.0, 3.0, 8.0, 0.0, 99.0], prefill_ms=300.0 + np.arange(5) / 7
    )
    table = build(runs=pd.concat([frame, ones]), output=tmp_path / "t.duckdb").output
    assert _query(table, "SELECT n FROM prefill").iat[0, 0] == len(frame) + 5
    assert _query(table, "SELECT n FROM decode").iat[0, 0] == len(frame)
    assert lutest.load(table)["low", 4, 12].decode_step_ms(130) == pytest.approx(46.0, rel=1e-6)


def test_a_table_of_one_token_runs_alone_answers_prefill_and_says_why_it_has_no_decode(tmp_path: Path) -> None:
    frame = pd.DataFrame([_one(output_tokens=1, decode_ms=0.0, prefill_ms=50 + i / 7) for i in range(5)])
    entry = lutest.load(build(runs=frame, output=tmp_path / "t.duckdb").output)["low", 4, 12]
    assert entry.total_ms(100, 1) == entry.prefill_ms(100)
    with pytest.raises(LutestError, match="one token"):
        entry.total_ms(100, 2)


def test_clamped_zeros_are_kept_and_counted(tmp_path: Path) -> None:
    frame = constant_step_runs(46.0)
    clamped = frame.head(4).assign(decode_ms=0.0, output_tokens=2, prefill_ms=[201.1, 202.2, 203.3, 204.4])
    summary = build(runs=pd.concat([frame, clamped]), output=tmp_path / "t.duckdb")
    assert summary.n_clamped == 4
    assert _query(summary.output, "SELECT n, n_clamped FROM decode").to_numpy().tolist() == [[len(frame) + 4, 4]]
    assert "outlier" not in summary.rejected


def test_what_sessions_differ_by_stands_beside_p95(tmp_path: Path) -> None:
    chance = np.random.default_rng(12)
    runs = noisy_runs(runs_per_key=96, seed=3)
    session = np.arange(len(runs)) % 8
    level = np.exp(0.1 * chance.normal(size=8))[session]
    started = 1.7e12 + 86_400e3 * session + 1e3 * np.arange(len(runs))
    one = build(runs=runs.assign(started_ms=1.7e12 + 1e3 * np.arange(len(runs))), output=tmp_path / "one.duckdb")
    days = runs.assign(started_ms=started, prefill_ms=level * runs["prefill_ms"])
    several = build(runs=days, output=tmp_path / "several.duckdb")
    dated = days.assign(started_at=pd.to_datetime(started, unit="ms").astype(str)).drop(columns="started_ms")
    same = build(runs=dated, output=tmp_path / "dated.duckdb")
    alone, many, again = (json.loads(lutest.load(built.output).meta["sessions"]) for built in (one, several, same))
    assert again == many
    assert alone == {"n": 1, "prefill": None, "decode_step": None}
    assert many["n"] == 8
    assert 0.05 < many["prefill"]["deviation"] < 0.2
    assert 1.1 < many["prefill"]["p95_factor"] < 1.5
    assert many["decode_step"]["p95_factor"] < 1.05
    unknown = build(runs=runs, output=tmp_path / "unknown.duckdb").output
    assert json.loads(lutest.load(unknown).meta["sessions"])["n"] == 0


class TestDuplicates:
    """A run counts once, however often it lies in the folder."""

    def _frame(self) -> pd.DataFrame:
        frame = noisy_runs(runs_per_key=10)
        frame["decode_steps_ms"] = [str(steps) for steps in frame["decode_steps_ms"]]
        return frame

    def test_rank_files_beside_their_merged_file(self, tmp_path: Path) -> None:
        frame = self._frame()
        folder = tmp_path / "vqa"
        folder.mkdir()
        frame.to_csv(folder / "runs.csv", index=False)
        frame.iloc[::2].to_csv(folder / "runs_rank0.csv", index=False)
        frame.iloc[1::2].to_csv(folder / "runs_rank1.csv", index=False)
        summary = build(runs=folder, output=tmp_path / "t.duckdb")
        assert summary.rejected == {"duplicate": len(frame)}
        assert _accounts(summary.output)["rows_used"].sum() == len(frame)
        alone = build(runs=folder / "runs.csv", output=tmp_path / "alone.duckdb")
        prefill = "SELECT * FROM prefill"
        pd.testing.assert_frame_equal(_query(summary.output, prefill), _query(alone.output, prefill))

    def test_a_row_twice_in_one_file(self, tmp_path: Path) -> None:
        frame = self._frame()
        summary = build(runs=pd.concat([frame, frame.head(3)]), output=tmp_path / "t.duckdb")
        assert summary.rejected == {"duplicate": 3}

    def test_a_coarse_clock_makes_no_duplicates(self, tmp_path: Path) -> None:
        frame = pd.DataFrame([_one(prefill_ms=50 + i % 3, output_tokens=1, decode_ms=0) for i in range(30)])
        assert build(runs=frame, output=tmp_path / "t.duckdb").rejected == {}
        frame.to_csv(tmp_path / "merged.csv", index=False)
        frame.head(12).to_csv(tmp_path / "part.csv", index=False)
        both = build(runs=[tmp_path / "merged.csv", tmp_path / "part.csv"], output=tmp_path / "both.duckdb")
        assert both.rejected == {"duplicate": 12}

    def test_same_times_with_other_ids_are_two_runs(self, tmp_path: Path) -> None:
        frame = pd.DataFrame([_one(sample_id=i) for i in range(6)])
        assert build(runs=frame, output=tmp_path / "t.duckdb").rejected == {}

    def test_a_value_does_not_pass_for_the_one_beside_it(self, tmp_path: Path) -> None:
        names = ("sample_id", "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms", "total_ms")
        shifted = [
            dict(zip(names, values, strict=True)) for values in (("1.0", 2, 3, 4, 5, None), (None, 1, 2, 3, 4, 5))
        ]
        frame = pd.DataFrame([_one(**run) for run in shifted], dtype=object)
        assert build(runs=frame, output=tmp_path / "t.duckdb").rejected == {}


class TestOutliers:
    """Fences on the log scale, per key, at the run's prompt length."""

    def _lognormal(self, n: int, seed: int, sigma: float = 0.6) -> pd.DataFrame:
        generator = np.random.default_rng(seed)
        prompts = generator.integers(100, 1000, n)
        noise = np.exp(generator.normal(0, sigma, n))
        return pd.DataFrame([_one(prompt_tokens=p, prefill_ms=p * e) for p, e in zip(prompts, noise, strict=True)])

    def test_clean_lognormal_data_keep_their_tail(self, tmp_path: Path) -> None:
        frame = self._lognormal(4000, seed=5)
        quartiles = np.quantile(frame["prefill_ms"], [0.25, 0.75])
        tukey = quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])
        assert (frame["prefill_ms"] > tukey).mean() > 0.04
        summary = build(runs=frame, output=tmp_path / "t.duckdb")
        assert summary.rejected.get("outlier", 0) <= 1

    def test_an_outlier_is_told_at_its_prompt_length(self, tmp_path: Path) -> None:
        frame = self._lognormal(200, seed=6, sigma=0.02)
        frame.loc[0, ["prompt_tokens", "prefill_ms"]] = [100, 500.0]  # a usual time, but of a prompt five times as long
        summary = build(runs=frame, output=tmp_path / "t.duckdb")
        rejected = _query(summary.output, "SELECT row, reason, detail FROM rejected_runs")
        assert rejected[["row", "reason"]].to_numpy().tolist() == [[1, "outlier"]]
        assert "above" in rejected["detail"].iat[0]
        kept = build({"cleaning": {"outliers": "none"}}, runs=frame, output=tmp_path / "kept.duckdb")
        assert kept.rejected == {}
        wide = build({"cleaning": {"k": 100}}, runs=frame, output=tmp_path / "wide.duckdb")
        assert wide.rejected == {}

    def test_a_second_mode_of_the_machine_is_kept(self, tmp_path: Path) -> None:
        frame = self._lognormal(400, seed=7, sigma=0.02)
        slow = np.random.default_rng(8).random(400) < 0.1
        frame.loc[slow, "prefill_ms"] *= 1.5
        summary = build(runs=frame, output=tmp_path / "t.duckdb")
        assert "outlier" not in summary.rejected
        assert summary.n_kept_beyond_fences == slow.sum()
        entry = lutest.load(summary.output)["low", 4, 12]
        fresh = self._lognormal(400, seed=9, sigma=0.02)
        fresh.loc[np.random.default_rng(10).random(400) < 0.1, "prefill_ms"] *= 1.5
        below = [
            ms <= entry.prefill_ms(int(prompt), 0.95)
            for ms, prompt in zip(fresh["prefill_ms"], fresh["prompt_tokens"], strict=True)
        ]
        assert 0.92 <= np.mean(below) <= 0.98

    def test_the_tail_of_one_key_among_many_is_kept(self, tmp_path: Path) -> None:
        frame = pd.concat(
            [self._lognormal(200, seed=20 + users, sigma=0.02).assign(num_blocks=users) for users in range(1, 9)]
        ).reset_index(drop=True)
        slow = (frame["num_blocks"] == 3) & (np.arange(len(frame)) % 8 == 0)  # 25 of 200, under 2 % of all
        frame.loc[slow, "prefill_ms"] *= 3
        frame.loc[0, "prefill_ms"] *= 3
        summary = build(runs=frame, output=tmp_path / "t.duckdb")
        assert (summary.rejected["outlier"], summary.n_kept_beyond_fences) == (1, 25)
        prefill = _query(summary.output, "SELECT p95_ms FROM prefill WHERE num_blocks = 3").iat[0, 0]
        assert prefill == np.quantile(frame.loc[frame["num_blocks"] == 3, "prefill_ms"], 0.95)

    def test_no_length_band_is_lost(self, tmp_path: Path) -> None:
        """Most steps take a tick, some wait: means of several steps lie where hardly any single step does."""
        chance = np.random.default_rng(11)
        lengths = [2] * 200 + [20] * 6
        runs = [
            _one(prefill_ms=50 + chance.integers(9), output_tokens=n, decode_steps_ms=(25 + 100 * waits).tolist())
            for n in lengths
            if (waits := chance.random(n - 1) < 0.02 + 0.3 * (n > 2)) is not None
        ]
        frame = pd.DataFrame(runs).drop(columns="decode_ms")
        frame.loc[len(frame) - 1, ["prompt_tokens", "prefill_ms"]] = [30_000, 9000.0]  # the only one of its length
        output = build(runs=frame, output=tmp_path / "t.duckdb").output
        rejected = _query(output, "SELECT row, output_tokens, prompt_tokens FROM rejected_runs")
        assert not (rejected["output_tokens"] > 2).any()
        assert lutest.load(output)["low", 4, 12].total_ms(100, 20) > 25 * 19 * 1.5

    def test_what_is_cut_comes_back_in_every_p95(self, tmp_path: Path) -> None:
        frames = [
            self._lognormal(100, seed=40 + blocks, sigma=0.02).assign(num_blocks=blocks, output_tokens=3)
            for blocks in range(1, 9)
        ]
        frame = pd.concat(frames).reset_index(drop=True)
        noise = np.exp(np.random.default_rng(4).uniform(-0.1, 0.1, (len(frame), 2)))
        frame = frame.drop(columns="decode_ms").assign(decode_steps_ms=list(20 * noise))
        slow = frame.index % 100 < 2  # two of each hundred
        frame.loc[slow, "prefill_ms"] *= 5
        cut = build(runs=frame, output=tmp_path / "cut.duckdb")
        assert cut.rejected == {"outlier": slow.sum()}
        bare = build(runs=frame[~slow], output=tmp_path / "bare.duckdb")
        held, others = (lutest.load(built.output)["low", 4, 5] for built in (cut, bare))
        assert held.prefill_p95_ms > others.prefill_p95_ms
        for verb, lengths in (("prefill_ms", (500,)), ("decode_step_ms", (500,)), ("total_ms", (500, 3))):
            assert getattr(held, verb)(*lengths, 0.95) > getattr(others, verb)(*lengths, 0.95)
            assert getattr(held, verb)(*lengths, 0.5) == pytest.approx(getattr(others, verb)(*lengths, 0.5), rel=1e-9)

    def test_few_runs_are_not_judged(self, tmp_path: Path) -> None:
        frame = pd.DataFrame([_one(prefill_ms=value) for value in (50.01, 50.02, 50.03, 900.01)])
        assert build(runs=frame, output=tmp_path / "t.duckdb").rejected == {}


class TestColumnsAndUnits:
    """What build.yaml says of the sources' fields."""

    def test_seconds(self, tmp_path: Path) -> None:
        frame = noisy_runs(keys=[("low", 4, 12)], runs_per_key=10)
        seconds = frame.assign(
            prefill_ms=frame["prefill_ms"] / 1e3,
            decode_ms=frame["decode_ms"] / 1e3,
            decode_steps_ms=[[step / 1e3 for step in steps] for steps in frame["decode_steps_ms"]],
        )
        expected = lutest.load(build(runs=frame, output=tmp_path / "ms.duckdb").output)["low", 4, 12]
        entry = lutest.load(build({"time_unit": "s"}, runs=seconds, output=tmp_path / "s.duckdb").output)["low", 4, 12]
        for q in (0.5, 0.95):
            assert entry.total_ms(90, 9, q) == pytest.approx(expected.total_ms(90, 9, q))

    def test_fields_sums_and_constants(self, tmp_path: Path) -> None:
        frame = pd.DataFrame({"v": [1.5, 2.5], "l": [10.0, 20.0], "len": [7, 9], "out": [2, 2], "d": [5.0, 6.0]})
        columns = {
            "tier": {"constant": "it's"},
            "top_k": {"constant": 2},
            "num_blocks": {"constant": 3},
            "prompt_tokens": "len",
            "output_tokens": "out",
            "prefill_ms": ["v", "l"],
            "decode_ms": "d",
        }
        table = build({"columns": columns}, runs=frame, output=tmp_path / "t.duckdb").output
        row = _query(table, "SELECT tier, top_k, num_blocks, min_ms, max_ms FROM prefill").to_numpy().tolist()
        assert row == [["it's", 2, 3, 11.5, 22.5]]

    def test_more_quantiles(self, tmp_path: Path) -> None:
        frame = noisy_runs(runs_per_key=10)
        levels = [0.1, 0.5, 0.95, 0.999]
        table = lutest.load(build({"quantiles": levels}, runs=frame, output=tmp_path / "t.duckdb").output)
        assert table.quantiles == tuple(levels)
        values = [table["low", 4, 12].total_ms(100, 12, q) for q in levels]
        assert values == sorted(values)
        assert "p99_9_ms" in _query(Path(table.path), "SELECT * FROM prefill").columns


class TestMixedMachines:
    """Runs of two models, or on two devices, do not share a figure without anybody having said so."""

    def _files(self, folder: Path, key: tuple[str, ...], **of_b: str | None) -> list[Path]:
        frame = keyed(noisy_runs(runs_per_key=8).drop(columns="decode_steps_ms"), key)
        a = frame.head(12).assign(model="llama", device="A100")
        b = frame.tail(12).assign(**{"model": "llama", "device": "A100", **of_b})
        paths = [folder / "a.csv", folder / "b.csv"]
        for path, part in zip(paths, (a, b), strict=True):
            part.to_csv(path, index=False)
        return paths

    @pytest.mark.parametrize("key", BOTH_KEYS)
    def test_refused_in_one_line_that_says_the_ways_out(self, tmp_path: Path, key: tuple[str, ...]) -> None:
        files = self._files(tmp_path, key, model="qwen", device="H100")
        output = tmp_path / "t.duckdb"
        with pytest.raises(BuildError) as error:
            build({"key": list(key)}, runs=files, output=output)
        message = str(error.value)
        assert "\n" not in message
        for said in ("'llama'", "'qwen'", "'A100'", "'H100'", "a.csv", "b.csv", "--mixed"):
            assert said in message
        assert f"`key: [model, {', '.join(key)}]`" in message
        assert not output.exists()

    def test_a_key_column_tells_them_apart(self, tmp_path: Path) -> None:
        files = self._files(tmp_path, DEFAULT_KEY, model="qwen", device="H100")
        output = build({"key": ["model", *DEFAULT_KEY]}, runs=files, output=tmp_path / "t.duckdb").output
        table = lutest.load(output)
        assert table.key_columns == ("model", *DEFAULT_KEY)
        assert {key[0] for key in table.keys} == {"llama", "qwen"}
        assert "mixed" not in table.meta

    def test_mixed_on_purpose_says_so(self, tmp_path: Path) -> None:
        files = self._files(tmp_path, DEFAULT_KEY, device="H100")
        with pytest.raises(BuildError, match=r"2 devices: .*`key: \[device, tier, top_k, num_blocks\]`"):
            build(runs=files, output=tmp_path / "t.duckdb")
        table = lutest.load(build(runs=files, output=tmp_path / "t.duckdb", mixed=True).output)
        assert json.loads(table.meta["mixed"]) == {"model": [], "device": ["A100", "H100"]}

    def test_no_name_beside_a_name_is_one_machine(self, tmp_path: Path) -> None:
        files = self._files(tmp_path, DEFAULT_KEY, model=None, device=None)
        table = lutest.load(build(runs=files, output=tmp_path / "t.duckdb", mixed=True).output)
        assert "mixed" not in table.meta

    def test_the_shipped_runs_of_three_models_on_three_devices(self, tmp_path: Path) -> None:
        runs = [RUNS / f"{name}.parquet" for name in ("direct", "cpu-preset-later", "cpu-preset-2-threads")]
        with pytest.raises(BuildError, match=r"2 models: .*; 3 devices: .*`key: \[device, tier, top_k, num_blocks\]`"):
            build(runs=runs, output=tmp_path / "t.duckdb")
        with pytest.raises(BuildError, match=r"3 models: .*; 3 devices: .*`key: \[model, device, tier, "):
            build(runs=[*runs, RUNS / "cpu-wide-preset.parquet"], output=tmp_path / "t.duckdb")


def test_a_build_replaces_none_but_tables(tmp_path: Path) -> None:
    runs = tmp_path / "runs.csv"
    noisy_runs().to_csv(runs, index=False)
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("On latency")
    for output in (runs, thesis):
        before = output.read_bytes()
        with pytest.raises(LutestError, match=output.name):
            build(runs=runs, output=output)
        assert output.read_bytes() == before


def test_without_anything_to_build_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no tables/build\.yaml here; .*`lutest build RUNS… -o TABLE`"):
        build()


def test_arguments_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "build.yaml"
    config.write_text("key: [gpu, n_gpus, users]\noutput: elsewhere.duckdb\nsources: [nowhere.csv]\n")
    frame = keyed(noisy_runs(), BOTH_KEYS[1])
    summary = build(config, runs=frame, output=tmp_path / "t.duckdb")
    assert summary.output == tmp_path / "t.duckdb"
    assert lutest.load(summary.output).key_columns == BOTH_KEYS[1]
    assert not (tmp_path / "elsewhere.duckdb").exists()


_NAMES = ("gpu", "n gpus", 'say "hi"', "größe", "order")
_VALUES: dict[str, st.SearchStrategy[str | float]] = {
    "category": st.text("aB1é'\"% -", min_size=1, max_size=4).filter(lambda text: bool(text.strip())),
    "number": st.integers(1, 300) | st.integers(1, 40).map(lambda n: n / 8),
}


@pytest.mark.parametrize("n_columns", [1, 5])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_keys_of_any_columns(tmp_path_factory: pytest.TempPathFactory, n_columns: int, data: st.DataObject) -> None:
    names = data.draw(st.permutations(_NAMES))[:n_columns]
    kinds = {name: data.draw(st.sampled_from(sorted(_VALUES))) for name in names}
    keys = data.draw(st.sets(st.tuples(*(_VALUES[kinds[name]] for name in names)), min_size=1, max_size=4))
    rows = [
        {**_one(prefill_ms=40 + place + i / 7), **dict(zip(names, key, strict=True))}
        for place, key in enumerate(keys)
        for i in range(3)
    ]
    output = tmp_path_factory.mktemp("keys") / "t.duckdb"
    path = build({"key": kinds}, runs=pd.DataFrame(rows, dtype=object), output=output).output
    table = lutest.load(path)
    assert table.key_columns == tuple(names)
    assert list(table.keys) == sorted(keys)
    lookups = ", ".join(f"{quote(name)}" for name in names)
    stored = _query(path, f"SELECT {lookups}, p50_ms FROM prefill")
    for place, key in enumerate(keys):
        assert table[key].prefill_p50_ms == pytest.approx(40 + place + 1 / 7)
    assert stored["p50_ms"].tolist() == [table[key].prefill_p50_ms for key in table.keys]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: {"sources": [str(folder / "empty")], "output": str(folder / "t.duckdb")}, "empty"),
        (lambda folder: {"sources": [str(folder / "nothing*.json")], "output": str(folder / "t.duckdb")}, "nothing"),
        (lambda folder: {"sources": ["x.parquet"], "output": str(folder)}, "folder"),
        (lambda _: {"sources": ["x.parquet"]}, "no output: .*-o table.duckdb"),
        (lambda folder: {"output": str(folder / "t.duckdb")}, "no runs: .*`sources`"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, make: Callable[[Path], dict[str, object]], words: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LutestError, match=words) as error:
        build(make(tmp_path))
    assert "\n" not in str(error.value)


def test_no_run_left_names_the_commonest_reason(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"2 were rejected as zero_prefill.*prefill_ms"):
        build(runs=pd.DataFrame([_one(prefill_ms=0)] * 2), output=tmp_path / "t.duckdb")
    assert not (tmp_path / "t.duckdb").exists()


def test_old_table_survives_a_failed_build(tmp_path: Path) -> None:
    output = build(runs=noisy_runs(), output=tmp_path / "t.duckdb").output
    before = output.read_bytes()
    (tmp_path / "bad.json").write_text('{"per_sample_results": [{"tier": "low"')
    with pytest.raises(LutestError, match=r"bad\.json"):
        build(runs=tmp_path / "bad.json", output=output)
    assert output.read_bytes() == before
    assert sorted(path.suffix for path in tmp_path.iterdir() if not path.name.startswith(".")) == [".duckdb", ".json"]


def test_unknown_option_beside_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean `quantiles`"):
        build({"quantils": [0.5]}, runs=noisy_runs(), output=tmp_path / "t.duckdb")


def test_random_rows_are_all_accounted_for(tmp_path: Path) -> None:
    generator = random.Random(11)
    values: list[object] = [None, "x", -1, 0, 1, 2.5, float("nan"), float("inf"), 1e308, True, "12", [1], {}, "low", 40]
    rows = [_one(**{name: generator.choice(values) for name in generator.sample(list(_one()), 2)}) for _ in range(400)]
    summary = build(runs=pd.DataFrame([*rows, _one()], dtype=object), output=tmp_path / "t.duckdb")
    assert _accounts(summary.output)["rows_read"].sum() == 401


def test_a_key_of_clamped_runs_alone_answers_by_what_others_say(tmp_path: Path) -> None:
    frame = constant_step_runs(46.0)
    clamped = frame.head(3).assign(decode_ms=0.0, num_blocks=16, prefill_ms=[201.1, 202.2, 203.3])
    path = build(runs=pd.concat([frame, clamped]), output=tmp_path / "t.duckdb").output
    assert _query(path, "SELECT n_clamped, mean_ms > 0 FROM decode").to_numpy().tolist() == [[0, True], [3, True]]
    assert lutest.load(path)["low", 4, 16].decode_step_ms(130) > 0


def test_names_beyond_ascii_are_read_back_as_written(tmp_path: Path) -> None:
    workloads = ["\U0001f600", "mixed", "%s{}$1?", "[null, 1]"]
    frame = noisy_runs(runs_per_key=12)
    frame["workload"] = [workloads[i % 4] for i in range(len(frame))]
    path = build(runs=frame, output=tmp_path / "t.duckdb").output
    assert lutest.load(path).output_lengths.keys() == set(workloads)


def test_one_key_that_dwarfs_the_others_leaves_figures_finite(tmp_path: Path) -> None:
    names = ["tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms"]
    rows: list[tuple[object, ...]] = [
        ("x", 4, 12, 100, 2, 50.25, 999e6),
        ("low", 10**6, 12, 1000, 1, 999e6, 0.0),
        ("low", 4, 12, 1, 2, 13.0, 13.0),
        ("x", 4, 12, 10**9, 17, 1000.0, 12.5),
        ("low", 10**6, 12, 999_999_999, 1, 50.25, 50.25),
        ("x", 4, 12, 4, 2, 1.0, 1e9),
        ("low", 4, 12, 4, 3, 999e6, 12.5),
    ]
    frame = pd.DataFrame(rows, columns=names)
    table = lutest.load(build({"cleaning": {"outliers": "none"}}, runs=frame, output=tmp_path / "t.duckdb").output)
    assert 0 < table["x", 4, 12].total_ms(100, 5, 0.5) <= table["x", 4, 12].total_ms(100, 5, 0.95) < float("inf")


# One run of most configurations: a fit with a level for each left no variance, and blew its quantiles up to infinity.
FEW_RUNS = [
    ("high", 8, 12, 290, 2, 102.2158, 6.3376),
    ("high", 8, 12, 339, 2, 110.7149, 6.369),
    ("medium", 8, 14, 150, 1, 46.3886, 0.0),
    ("high", 4, 16, 236, 2, 51.8262, 6.1703),
    ("medium", 6, 16, 156, 2, 44.5119, 7.0318),
    ("medium", 6, 14, 139, 3, 54.9437, 12.479),
    ("low", 4, 12, 69, 2, 26.5867, 4.9776),
    ("high", 4, 14, 235, 16, 48.5793, 80.4742),
    ("low", 8, 14, 108, 2, 52.2604, 7.038),
    ("high", 6, 16, 299, 2, 80.1643, 7.1236),
    ("medium", 4, 12, 152, 2, 32.2367, 5.5357),
    ("medium", 6, 16, 125, 2, 58.894, 7.6752),
    ("low", 4, 12, 100, 6, 21.5872, 22.3871),
    ("medium", 8, 12, 128, 1, 52.3401, 0.0),
    ("low", 4, 12, 98, 8, 22.8039, 32.9254),
    ("low", 4, 16, 106, 8, 29.0052, 43.9021),
    ("low", 8, 16, 63, 16, 43.9219, 144.7098),
    ("medium", 4, 12, 211, 12, 38.8962, 55.4284),
    ("low", 4, 16, 102, 2, 27.8542, 6.0807),
    ("high", 4, 16, 278, 12, 63.8579, 67.4554),
    ("high", 6, 16, 289, 6, 75.9043, 34.7519),
    ("medium", 8, 16, 142, 8, 51.2555, 52.6436),
    ("high", 8, 12, 256, 6, 62.2003, 28.5883),
    ("medium", 4, 14, 194, 4, 58.9415, 16.9252),
    ("medium", 8, 12, 233, 16, 56.8041, 88.156),
]


def test_a_handful_of_runs_builds_a_table_of_plausible_figures(tmp_path: Path) -> None:
    columns = ["tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms"]
    few = pd.DataFrame(FEW_RUNS, columns=columns)
    table = lutest.load(build({"cleaning": {"outliers": "none"}}, runs=few, output=tmp_path / "few.duckdb").output)
    slowest = few["prefill_ms"].max()
    for held in table.figures.keys:
        for values in held.prefill_curve.values_ms:
            assert max(values) < 20 * slowest
