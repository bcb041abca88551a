"""A served model, by GPU, number of GPUs and users: carried from A100 to H100, planned for, checked, rewarded."""

from __future__ import annotations

import math
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

import lutest
from lutest.calibration.key_similarity import EACH, NEAR, similarities, varying_components
from lutest.reader.figures import KeyColumn
from lutest.reward.latency import LatencyReward
from lutest.reward.rollout import Columns
from lutest.reward.terms import Weights


@pytest.fixture(scope="module")
def served(serving_runs: Path) -> pd.DataFrame:
    with duckdb.connect() as connection:
        return connection.execute("SELECT * FROM read_parquet(?)", [str(serving_runs)]).df()


def mean_error(path: Path, runs: pd.DataFrame) -> tuple[float, float]:
    """Mean absolute relative error of P50 of prefill and total."""
    table = lutest.load(path)
    ids = table.batch.key_ids(*(runs[name].to_numpy() for name in table.key_columns))
    prompts, outputs = runs["prompt_tokens"].to_numpy(), runs["output_tokens"].to_numpy()
    prefill_ms = runs["prefill_ms"].to_numpy(dtype=np.float64)
    total_ms = prefill_ms + np.array([np.sum(steps) for steps in runs["decode_steps_ms"]])
    prefill = np.abs(table.batch.prefill_ms(ids, prompts) / prefill_ms - 1.0)
    total = np.abs(table.batch.total_ms(ids, prompts, outputs) / total_ms - 1.0)
    return float(prefill.mean()), float(total.mean())


def test_fifty_runs_carry_a_table_from_one_gpu_to_another(served: pd.DataFrame, tmp_path: Path) -> None:
    overloaded = (served["n_gpus"] == 1) & (served["users"] == 64)  # where no A100 got beyond its first token
    old, new = (served[(served["gpu"] == gpu) & ~overloaded] for gpu in ("A100", "H100"))
    parent = lutest.build({"key": ["n_gpus", "users"]}, runs=old, output=tmp_path / "a100.duckdb").output
    learnt = new.sample(50, random_state=0)
    done = lutest.calibrate(parent, learnt, tmp_path / "h100.duckdb")
    assert done.n_runs == 50
    others = new.drop(index=learnt.index)
    before, after = mean_error(parent, others), mean_error(done.output, others)
    assert min(before) > 0.7
    assert after[0] < 0.45 * before[0]
    assert after[1] < 0.35 * before[1]
    table = lutest.load(done.output)
    assert table.key_columns == ("n_gpus", "users")
    assert table[2, 16].source == "calibrated"
    assert table.meta["device"] == '["H100"]'
    calibrator = lutest.OnlineCalibrator(table, min_samples=1)
    calibrator.observe((2, 16), 100, 1, 2.0 * table[2, 16].prefill_ms(100))
    assert calibrator.lookup(users=16, n_gpus=2).prefill_ms(100) > 1.5 * table[2, 16].prefill_ms(100)


def test_the_same_service_holds_and_a_slower_one_does_not(serving_table: Path, served: pd.DataFrame) -> None:
    assert lutest.check(serving_table, served).holds
    found = lutest.check(serving_table, served.assign(prefill_ms=1.3 * served["prefill_ms"]))
    assert not found.holds
    assert {test.coverage.stage for test in found.alarms} >= {"prefill", "total"}
    keys = [test["key"] for test in found.as_dict()["tests"] if test["key"] is not None]
    assert {"gpu": "H100", "n_gpus": 4, "users": 64} in keys


def test_runs_are_planned_over_all_key_columns(serving_table: Path) -> None:
    planned = lutest.plan(serving_table, 12)
    assert planned.key_columns == ("gpu", "n_gpus", "users")
    assert planned.deviation < planned.random_deviation
    for column in zip(*(run.key for run in planned.runs), strict=True):
        assert len(set(column)) > 1


def test_a_reward_reads_the_tables_own_key_columns(serving_table: Path) -> None:
    table = lutest.load(serving_table)
    row: dict[str, object] = {"gpu": "H100", "n_gpus": 2, "users": 16, "prompt_tokens": 100, "budget_ms": 500.0}
    row["output_tokens"] = 20
    reward = LatencyReward(table)
    outcome = reward.judge(row)
    assert outcome is not None
    assert outcome.latency_ms == table["H100", 2, 16].total_ms(100, 20, 0.95)
    renamed = {"card": "H100", **{name: value for name, value in row.items() if name != "gpu"}}
    assert LatencyReward(table, columns=Columns(key={"gpu": "card"})).judge(renamed) == outcome
    assert LatencyReward(table, parse=str.split).judge({**row, "users": 1}, "H100 2 16") == outcome
    some = LatencyReward(table, parse=lambda _: {"users": 16, "budget_ms": 1e9})
    assert some.judge({**row, "users": 1}, "") == outcome
    weighed = LatencyReward(table, weights=Weights(complexity=1.0)).judge(row)
    assert weighed is not None
    assert weighed.complexity_penalty == pytest.approx(2 / 4 * 16 / 64)
    made_up = reward.judge({**row, "gpu": "B200"})
    assert made_up is not None
    assert made_up.unknown
    assert made_up.reward < outcome.reward


def test_numbers_are_axes_and_categories_levels() -> None:
    columns = (KeyColumn("gpu", "category", "VARCHAR"), KeyColumn("users", "number", "BIGINT"))
    keys = [("A", 1), ("A", 4), ("A", 16), ("B", 4)]
    alike = similarities(columns, keys)
    assert list(alike) == ["gpu", "users", NEAR, EACH]
    assert alike["gpu"][0].tolist() == [1.0, 1.0, 1.0, 0.0]
    for place, row in zip((-0.5, 0.0, 0.5, 0.0), alike["users"], strict=True):
        assert row == pytest.approx([-0.5 * place, 0.0, 0.5 * place, 0.0])
    assert alike[NEAR][1] == pytest.approx([math.exp(-0.25 / 0.18), 1.0, math.exp(-0.25 / 0.18), 0.0])
    assert varying_components(alike, np.arange(4)) == ("gpu", "users", NEAR, EACH)
    assert varying_components(alike, np.array([1, 3])) == ("gpu", EACH)
    with_zero = similarities(columns[1:], [(0,), (1,), (4,)])
    assert with_zero["users"][0] == pytest.approx([0.25, 0.125, -0.25])
    assert varying_components(similarities(columns[:1], [("A",), ("B",), ("C",)]), np.arange(3)) == ("gpu", EACH)
