"""Whether a table still holds: the tests, their false alarms and their power."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import lutest
from lutest.calibration.coverage import Coverage, adjusted_tests, exceedance_tail
from lutest.cli.main import main


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
    held = [Coverage("prefill", name, 50, 1000, {0.5: (45, 45)}, {0.5: 5}, 1.2, 0.1) for name in (None, key)]
    held += [Coverage("decode", name, 50, 1000, {0.5: (25, 25)}, {0.5: 25}, 1.0, 0.1) for name in (None, key)]
    tests = adjusted_tests(held, 0.01)
    alarms = {(test.coverage.stage, test.coverage.key) for test in tests if test.adjusted <= 0.01}
    assert alarms == {("prefill", None), ("prefill", key)}
    for test in tests:
        assert test.adjusted >= min(1.0, 2 * test.p_value)
        assert test.adjusted <= min(1.0, 4 * test.p_value)


def test_the_alarms_come_at_the_stated_rate() -> None:
    chance = np.random.default_rng(2)
    n_tables, n_runs, rate = (400, 150), (60, 25), 0.05
    alarms = 0
    for _ in range(400):
        held = []
        for key, n_table, n in zip(("all", "one"), n_tables, n_runs, strict=True):
            quantiles = dict(zip((0.5, 0.95), np.quantile(chance.lognormal(size=n_table), (0.5, 0.95)), strict=True))
            runs = chance.lognormal(size=n)
            above = {q: int((runs > value).sum()) for q, value in quantiles.items()}
            within = {q: n - k for q, k in above.items()}
            both = {q: (k, k) for q, k in above.items()}
            held.append(Coverage("prefill", None if key == "all" else (key,), n, n_table, both, within, 1.0, 0.1))
        alarms += min(test.adjusted for test in adjusted_tests(held, rate)) <= rate
    assert 0 < alarms <= stats.binom.ppf(0.999, 400, rate)


def test_runs_that_follow_one_another_are_alike(table: lutest.LatencyTable, others: pd.DataFrame) -> None:
    """A machine that is slow for a while, then fast, is no drift: dependence widens the test, order alone tells it."""
    spells = np.repeat([1.1, 1.1, 0.9, 1.1, 0.9, 1.1, 1.1, 1.1, 0.9, 1.1], 20)
    sample = others.sample(200, random_state=1)
    in_order = sample.assign(prefill_ms=sample["prefill_ms"] * spells)
    shuffled = in_order.sample(frac=1, random_state=2)

    def p_value(runs: pd.DataFrame) -> float:
        found = lutest.check(table, runs, tolerance=0)
        return min(t.p_value for t in found.tests if t.coverage.key is None and t.coverage.stage == "prefill")

    assert p_value(in_order) > 3 * p_value(shuffled)


def test_it_says_what_it_could_have_found(table: lutest.LatencyTable, others: pd.DataFrame) -> None:
    one = lutest.check(table, others.head(1))
    assert one.holds is None
    assert set(one.detectable.values()) == {None}
    found = lutest.check(table, others.sample(200, random_state=3))
    assert found.holds
    shifts = [shift for shift in found.detectable.values() if shift is not None]
    assert len(shifts) == 3
    assert 0.02 < min(shifts) <= max(shifts) < 0.25
    told = []
    for seed in range(10):
        sample = others.sample(200, random_state=100 + seed)
        slower = {name: (1 + max(shifts)) * sample[name] for name in ("prefill_ms", "decode_ms")}
        told.append(lutest.check(table, sample.assign(**slower)).holds)
    assert told.count(False) >= 8  # nine in ten, by the weakest of three stages


def test_runs_of_the_same_session_hold_and_slower_ones_do_not(table: lutest.LatencyTable, others: pd.DataFrame) -> None:
    for seed in range(3):
        sample = others.sample(100, random_state=seed)
        assert lutest.check(table, sample).holds
        slower = sample.assign(prefill_ms=1.05 * sample["prefill_ms"], decode_ms=1.05 * sample["decode_ms"])
        assert not lutest.check(table, slower).holds


def test_faster_runs_and_a_wider_tail_are_drift_as_well(parent: Path, others: pd.DataFrame) -> None:
    (first, *_) = lutest.check(parent, others.assign(prefill_ms=0.9 * others["prefill_ms"])).alarms
    assert first.coverage.stage == "prefill"
    assert first.coverage.ratio == pytest.approx(0.9, rel=0.03)
    wide = others.copy()
    wide.loc[np.random.default_rng(3).random(len(wide)) < 0.12, "prefill_ms"] *= 3
    assert 0.95 in {test.q for test in lutest.check(parent, wide).alarms if test.coverage.stage == "prefill"}


@pytest.mark.parametrize(
    ("name", "value"), [("false_alarm_rate", 0.0), ("false_alarm_rate", 0.5), ("tolerance", -0.1), ("tolerance", 0.5)]
)
def test_rates_that_are_none(table: lutest.LatencyTable, others: pd.DataFrame, name: str, value: float) -> None:
    with pytest.raises(lutest.ArgumentError, match=name):
        lutest.check(table, others, **{name: value})  # type: ignore[arg-type]


def test_the_command_exits_with_1_for_drift(
    parent: Path, others: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, slower = str(tmp_path / "same.csv"), str(tmp_path / "slower.csv")
    others.to_csv(same, index=False)
    others.assign(prefill_ms=1.2 * others["prefill_ms"]).to_csv(slower, index=False)
    assert main(["check", str(parent), same]) == 0
    assert "still holds for" in capsys.readouterr().out
    assert main(["check", str(parent), slower]) == 1
    printed = capsys.readouterr().out
    assert "no longer holds for" in printed
    assert "drift" in printed
    assert main(["check", str(parent), slower, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["holds"] is False
    assert [test["key"] for test in told["tests"][:2]] == [None, None]
    assert {"tier": "low", "top_k": 4, "num_blocks": 12} in [test["key"] for test in told["tests"]]
    assert main(["check", str(parent), str(tmp_path / "none.csv")]) == 2


def test_too_few_runs_cannot_tell(
    parent: Path, others: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(tmp_path / "one.csv")
    others.head(1).to_csv(one, index=False)
    assert main(["check", str(parent), one]) == 3
    printed = capsys.readouterr().out
    assert "cannot tell whether it holds for 1 run" in printed
    assert "no shift" in printed
    assert main(["check", str(parent), one, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["holds"] is None


def test_the_runs_that_calibrated_a_table_do_not_check_it(
    parent: Path, others: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, more, new = str(tmp_path / "few.csv"), str(tmp_path / "more.csv"), str(tmp_path / "new.duckdb")
    others.head(40).to_csv(few, index=False)
    others.head(240).to_csv(more, index=False)
    assert main(["calibrate", str(parent), few, "-o", new]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["check", new, few]) == 2
    assert "calibrated the table" in capsys.readouterr().err
    assert lutest.check(new, more).left_out == {"calibrated the table": 40}
    assert main(["info", new]) == 0
    assert "own runs" in capsys.readouterr().out
    assert main(["info", new, "--json"]) == 0
    assert sum(key["own_runs"] for key in json.loads(capsys.readouterr().out)["keys"]) == 40
    others.head(1).to_csv(few, index=False)
    assert main(["calibrate", str(parent), few, "-o", new]) == 0
    assert "warning: calibrated with 1 run:" in capsys.readouterr().out
