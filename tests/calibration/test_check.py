"""Whether a table still holds: the tests, their false alarms and their power."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import lutest
from lutest.calibration.coverage import Coverage, adjusted_tests, exceedance_tail
from lutest.cli.main import main
from tests.conftest import RUNS

COLUMNS = ["tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms"]


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return duckdb.execute("SELECT * FROM read_parquet(?)", [str(RUNS / "cpu-preset.parquet")]).df()[COLUMNS]


@pytest.fixture(scope="module")
def halves(runs: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    order = np.random.default_rng(0).permutation(len(runs))
    built = lutest.build(runs=runs.iloc[order[::2]], output=tmp_path_factory.mktemp("half") / "half.duckdb")
    return built.output, runs.iloc[order[1::2]]


@pytest.mark.parametrize(("n", "n_table", "q"), [(10, 30, 0.5), (40, 200, 0.95), (100, 4000, 0.5), (7, 59, 0.95)])
def test_tails_are_those_of_the_beta_binomial(n: int, n_table: int, q: float) -> None:
    distribution = stats.betabinom(n, (n_table + 1) * (1 - q), (n_table + 1) * q)
    for k in range(n + 1):
        upwards = exceedance_tail(k, n, n_table, q, upwards=True)
        downwards = exceedance_tail(k, n, n_table, q, upwards=False)
        assert upwards == pytest.approx(distribution.sf(k - 1), rel=1e-6, abs=1e-12)
        assert downwards == pytest.approx(distribution.cdf(k), rel=1e-6, abs=1e-12)


def test_holm_adjusts_within_stages_and_configurations() -> None:
    key = ("low", 4, 12)
    held = [Coverage("prefill", name, 50, 1000, {0.5: (45, 45)}, {0.5: 5}, 1.2) for name in (None, key)]
    held += [Coverage("decode", name, 50, 1000, {0.5: (25, 25)}, {0.5: 25}, 1.0) for name in (None, key)]
    tests = adjusted_tests(held, 0.01)
    alarms = {(test.coverage.stage, test.coverage.key) for test in tests if test.adjusted <= 0.01}
    assert alarms == {("prefill", None), ("prefill", key)}
    for test in tests:
        assert test.adjusted >= min(1.0, 2 * test.p_value)
        assert test.adjusted <= min(1.0, 4 * test.p_value)


def test_runs_of_the_same_session_hold_and_slower_ones_do_not(halves: tuple[Path, pd.DataFrame]) -> None:
    path, others = halves
    table = lutest.load(path)
    chance = np.random.default_rng(1)
    alarms = found = 0
    for _ in range(12):
        sample = others.iloc[chance.choice(len(others), 100, replace=False)]
        alarms += not lutest.check(table, sample).holds
        slower = sample.assign(prefill_ms=1.05 * sample["prefill_ms"], decode_ms=1.05 * sample["decode_ms"])
        found += not lutest.check(table, slower).holds
    assert alarms <= 1
    assert found >= 11


def test_without_tolerance_the_alarms_come_at_the_stated_rate(halves: tuple[Path, pd.DataFrame]) -> None:
    path, others = halves
    table = lutest.load(path)
    chance = np.random.default_rng(2)
    alarms = 0
    for _ in range(30):
        sample = others.iloc[chance.choice(len(others), 100, replace=False)]
        alarms += not lutest.check(table, sample, false_alarm_rate=0.05, tolerance=0.0).holds
    assert alarms <= stats.binom.ppf(0.999, 30, 0.05)


def test_faster_runs_and_a_wider_tail_are_drift_as_well(halves: tuple[Path, pd.DataFrame]) -> None:
    path, others = halves
    faster = others.assign(prefill_ms=0.9 * others["prefill_ms"])
    (first, *_) = lutest.check(path, faster).alarms
    assert first.coverage.stage == "prefill"
    assert first.coverage.ratio == pytest.approx(0.9, rel=0.03)
    wide = others.copy()
    slow = np.random.default_rng(3).random(len(wide)) < 0.12
    wide.loc[slow, "prefill_ms"] *= 3
    assert 0.95 in {test.q for test in lutest.check(path, wide).alarms if test.coverage.stage == "prefill"}


@pytest.mark.parametrize(
    ("name", "value"), [("false_alarm_rate", 0.0), ("false_alarm_rate", 0.5), ("tolerance", -0.1), ("tolerance", 0.5)]
)
def test_rates_that_are_none(halves: tuple[Path, pd.DataFrame], name: str, value: float) -> None:
    path, others = halves
    with pytest.raises(lutest.ArgumentError, match=name):
        lutest.check(path, others, **{name: value})  # type: ignore[arg-type]


def test_the_command_exits_with_1_for_drift(
    halves: tuple[Path, pd.DataFrame], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, others = halves
    same, slower = tmp_path / "same.parquet", tmp_path / "slower.parquet"
    others.to_csv(same.with_suffix(".csv"), index=False)
    others.assign(prefill_ms=1.2 * others["prefill_ms"]).to_csv(slower.with_suffix(".csv"), index=False)
    assert main(["check", str(path), str(same.with_suffix(".csv"))]) == 0
    assert "still holds for" in capsys.readouterr().out
    assert main(["check", str(path), str(slower.with_suffix(".csv"))]) == 1
    printed = capsys.readouterr().out
    assert "no longer holds for" in printed
    assert "drift" in printed
    assert main(["check", str(path), str(slower.with_suffix(".csv")), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["holds"] is False
    assert main(["check", str(path), str(tmp_path / "none.csv")]) == 2
