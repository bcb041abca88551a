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
    held = [Coverage("prefill", name, 50, 1000, {0.5: (45, 45)}, {0.5: 5}, 1.2) for name in (None, key)]
    held += [Coverage("decode", name, 50, 1000, {0.5: (25, 25)}, {0.5: 25}, 1.0) for name in (None, key)]
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
            held.append(Coverage("prefill", None if key == "all" else (key,), n, n_table, both, within, 1.0))
        alarms += min(test.adjusted for test in adjusted_tests(held, rate)) <= rate
    assert 0 < alarms <= stats.binom.ppf(0.999, 400, rate)


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
