"""OnlineCalibrator: what it corrects, what it ignores, and what becomes of its state."""

from __future__ import annotations

import json
import pickle
from math import inf, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import lutest
from lutest.calibration.online import OnlineCalibrator
from tests.synthetic import NO_DECODE, make_figures

Observation = tuple[tuple[str, int, int], int, int, float, float]
KEY = ("low", 4, 12)


@pytest.fixture(scope="module")
def observations(others: pd.DataFrame) -> list[Observation]:
    """Runs in several orders, one after the other."""
    rows = pd.concat([others.sample(frac=1, random_state=seed) for seed in range(4)]).itertuples(index=False)
    return [((t, int(k), int(b)), int(p), int(n), float(a), float(d)) for t, k, b, p, n, a, d in rows]


def feed(calibrator: OnlineCalibrator, held: list[Observation], prefill: float = 1.0, decode: float = 1.0) -> None:
    for key, prompt, output, prefill_ms, decode_ms in held:
        calibrator.observe(key, prompt, output, prefill * prefill_ms, decode * decode_ms)


def test_nothing_is_corrected_before_enough_samples(
    table: lutest.LatencyTable, observations: list[Observation]
) -> None:
    calibrator = lutest.OnlineCalibrator(table, min_samples=20)
    feed(calibrator, observations[:19], 2.0, 2.0)
    assert calibrator.overall() == (1.0, 1.0)
    assert calibrator[KEY] is table[KEY]
    feed(calibrator, observations[19:20], 2.0, 2.0)
    assert calibrator.overall().prefill == pytest.approx(2.0, rel=0.05)


def test_each_stage_follows_its_own_factor(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    calibrator = lutest.OnlineCalibrator(table)
    feed(calibrator, observations[:600], 1.5, 0.7)
    factors = calibrator.factors(*KEY)
    assert factors.prefill == pytest.approx(1.5, rel=0.03)
    assert factors.decode == pytest.approx(0.7, rel=0.03)
    entry, old = calibrator[KEY], table[KEY]
    for q in (0.5, 0.95):
        assert entry.prefill_ms(100, q) == pytest.approx(old.prefill_ms(100, q) * factors.prefill, rel=2e-3)
        assert entry.decode_ms(100, 9, q) == pytest.approx(old.decode_ms(100, 9, q) * factors.decode, rel=2e-3)
        assert entry.decode_step_ms(100, q) == pytest.approx(old.decode_step_ms(100, q) * factors.decode, rel=2e-3)
    assert old.total_ms(100, 9) == lutest.LatencyTable(table.figures)[KEY].total_ms(100, 9)


def test_a_corrected_entry_has_all_verbs_and_says_so(
    table: lutest.LatencyTable, observations: list[Observation]
) -> None:
    calibrator = lutest.OnlineCalibrator(table)
    feed(calibrator, observations[:600], 1.5, 0.7)
    entry = calibrator[KEY]
    assert entry is calibrator.lookup(*KEY)
    assert entry is calibrator.lookup(num_blocks=12, top_k=4, tier="low")
    assert entry.source == "calibrated"
    assert entry.max_output_tokens(entry.total_ms(100, 12, 0.95), 100) == 12
    explained = entry.explain(100, 9, 0.95)
    for part in (explained.prefill, explained.decode_step, explained.decode, explained.total):
        assert part is not None
        assert part.source == "calibrated"
    corrected = calibrator.corrected()
    twin = corrected[KEY]
    assert twin.source == "calibrated"
    for one, other in (
        (entry.total_ms(100, 9, 0.95), twin.total_ms(100, 9, 0.95)),
        (entry.expected_total_ms(100), twin.expected_total_ms(100)),
        (entry.p_within(150.0, 100), twin.p_within(150.0, 100)),
    ):
        assert one == pytest.approx(other, rel=5e-3)
    feasible = [key for key in table.keys if calibrator[key].total_ms(100, 8, 0.95) <= 80.0]
    assert corrected.feasible(80.0, prompt_tokens=100, output_tokens=8) == feasible
    assert 0 < len(feasible) < len(table.keys)


def test_an_entry_is_kept_until_the_factors_move(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    calibrator = lutest.OnlineCalibrator(table, half_life=1e6)
    feed(calibrator, observations[:600], 1.5, 0.7)
    entry = calibrator[KEY]
    feed(calibrator, observations[600:601], 1.5, 0.7)
    assert calibrator[KEY] is entry
    feed(calibrator, observations[600:1600], 2.5, 0.7)
    assert calibrator[KEY].prefill_ms(100) > 1.05 * entry.prefill_ms(100)


def test_a_configuration_that_was_filled_in_follows_all_and_keeps_its_source(
    parent: Path, observations: list[Observation]
) -> None:
    table = lutest.load(parent, missing="interpolate")
    calibrator = lutest.OnlineCalibrator(table)
    feed(calibrator, observations[:300], 1.5, 1.5)
    key = ("low", 5, 12)
    calibrator.observe(key, 100, 8, 1.5 * table[key].prefill_ms(100), 1.5 * table[key].decode_ms(100, 8))
    assert calibrator.factors(*key) == calibrator.overall()
    assert calibrator[key].source == table[key].source == "interpolated"
    expected = table[key].prefill_ms(100, 0.95) * calibrator.overall().prefill
    assert calibrator[key].prefill_ms(100, 0.95) == pytest.approx(expected, rel=1e-9)
    assert calibrator.corrected()[key].prefill_ms(100, 0.95) == pytest.approx(expected, rel=0.05)


def test_a_configuration_that_differs_gets_a_factor_of_its_own(
    table: lutest.LatencyTable, observations: list[Observation]
) -> None:
    calibrator = lutest.OnlineCalibrator(table, half_life=2000)
    for key, prompt, output, prefill_ms, decode_ms in observations[:3000]:
        calibrator.observe(key, prompt, output, prefill_ms * (1.5 if key == KEY else 1.0), decode_ms)
    assert calibrator.overall().prefill == pytest.approx(1.0, rel=0.02)
    assert calibrator.factors(*KEY).prefill > 1.3
    assert calibrator.factors("high", 8, 16).prefill == pytest.approx(1.0, rel=0.03)


def test_a_step_is_followed_within_three_half_lives(
    table: lutest.LatencyTable, observations: list[Observation]
) -> None:
    calibrator = lutest.OnlineCalibrator(table, half_life=100)
    feed(calibrator, observations[:1000])
    before = calibrator.overall()
    feed(calibrator, observations[1000:1300], 1.3, 1.3)
    for new, old in zip(calibrator.overall(), before, strict=True):
        assert new / old == pytest.approx(1.3, rel=0.03)
    feed(calibrator, observations[1300:2500], 1.3, 1.3)
    assert max(calibrator.overall()) < 1.3 * 1.05


def test_outliers_move_the_factors_little(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    clean, spoiled = lutest.OnlineCalibrator(table), lutest.OnlineCalibrator(table)
    feed(clean, observations[:800])
    chance = np.random.default_rng(0)
    for key, prompt, output, prefill_ms, decode_ms in observations[:800]:
        slow = 10.0 if chance.random() < 0.05 else 1.0
        spoiled.observe(key, prompt, output, slow * prefill_ms, slow * decode_ms)
    for a, b in zip(clean.overall(), spoiled.overall(), strict=True):
        assert b == pytest.approx(a, rel=0.01)


def test_factors_are_bounded(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    calibrator = lutest.OnlineCalibrator(table, bound=2.0)
    feed(calibrator, observations[:100], 50.0, 1e-3)
    assert calibrator.factors(*KEY) == pytest.approx((2.0, 0.5))


def test_weights_are_brought_back_without_a_trace(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    calibrator = lutest.OnlineCalibrator(table, half_life=2.0)
    feed(calibrator, observations[:1500], 1.2, 1.2)  # 750 doublings: beyond what a float holds by half
    assert calibrator.overall().prefill == pytest.approx(1.2, rel=0.2)
    assert calibrator.n_observed == 1500


def test_merged_workers_know_what_one_would(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    workers = [lutest.OnlineCalibrator(table, half_life=1e6) for _ in range(4)]
    for number, worker in enumerate(workers):
        feed(worker, observations[number * 200 : (number + 1) * 200], 1.4, 1.4)
    alone = lutest.OnlineCalibrator(table, half_life=1e6)
    feed(alone, observations[:800], 1.4, 1.4)
    first, *others = workers
    for other in others:
        first.merge(other)
    assert first.n_observed == 800
    assert first.overall() == pytest.approx(tuple(alone.overall()), rel=1e-3)
    one, other = json.loads(first.to_json()), json.loads(alone.to_json())
    for left, right in zip(one["configurations"], other["configurations"], strict=True):
        assert left["key"] == right["key"]
        for a, b in zip(left["stages"], right["stages"], strict=True):
            assert a["bins"] == pytest.approx(b["bins"], rel=2e-3)  # of a weight that fades by 0.06 % on the way
            assert a["beyond_tail"] == pytest.approx(b["beyond_tail"], rel=2e-3)
    with pytest.raises(lutest.ArgumentError, match="same half-life"):
        first.merge(lutest.OnlineCalibrator(table, half_life=5))


def test_state_survives_json_and_pickle(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    calibrator = lutest.OnlineCalibrator(table, half_life=150, min_samples=5, bound=3.0)
    feed(calibrator, observations[:400], 1.25, 0.9)
    text = calibrator.to_json()
    assert len(text) < 200_000
    for back in (OnlineCalibrator.from_json(table, text), pickle.loads(pickle.dumps(calibrator))):
        assert back.n_observed == 400
        for key in table.keys:
            assert back.factors(*key) == pytest.approx(tuple(calibrator.factors(*key)), rel=1e-9)
        feed(back, observations[400:500])
    assert json.loads(back.to_json())["half_life"] == 150


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "other"}', "null", '{"format": "lutest online calibration 2", "half_life": "x"}'],
)
def test_what_is_no_state_is_refused(table: lutest.LatencyTable, text: str) -> None:
    with pytest.raises(lutest.ArgumentError):
        OnlineCalibrator.from_json(table, text)


def test_a_state_of_another_table_is_refused(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    calibrator = lutest.OnlineCalibrator(table)
    feed(calibrator, observations[:30])
    with pytest.raises(lutest.ArgumentError, match="content hash"):
        OnlineCalibrator.from_json(lutest.LatencyTable(make_figures()), calibrator.to_json())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((KEY, -1, 3, 10.0, 10.0), "prompt_tokens"),
        ((KEY, 10, 0, 10.0, 10.0), "output_tokens"),
        ((KEY, 2.5, 3, 10.0, 10.0), "prompt_tokens"),
        ((KEY, 10, 3, nan, 10.0), "prefill_ms"),
        ((KEY, 10, 3, inf, 10.0), "prefill_ms"),
        ((KEY, 10, 3, -5.0, 10.0), "prefill_ms"),
        ((KEY, 10, 3, 0.0, 10.0), "prefill_ms"),
        ((KEY, 10, 3, 10.0, -1.0), "decode_ms"),
        ((KEY, 10, 3, 10.0, nan), "decode_ms"),
        ((KEY, 10, 1, 10.0, 10.0), "decode_ms"),
        ((KEY, 10, 3, 10.0, None), "decode_ms"),
        ((KEY, 10, 3, "10", 10.0), "prefill_ms"),
    ],
)
def test_bad_observations_are_refused_and_leave_nothing(
    table: lutest.LatencyTable, arguments: tuple[object, ...], name: str
) -> None:
    calibrator = lutest.OnlineCalibrator(table)
    before = calibrator.to_json()
    with pytest.raises(lutest.ArgumentError, match=name):
        calibrator.observe(*arguments)  # type: ignore[arg-type]
    assert calibrator.to_json() == before


def test_unknown_configurations_are_refused(table: lutest.LatencyTable) -> None:
    calibrator = lutest.OnlineCalibrator(table)
    with pytest.raises(lutest.UnknownKeyError, match="nearest measured"):
        calibrator.observe(("low", 5, 12), 10, 3, 10.0, 10.0)
    with pytest.raises(lutest.UnknownKeyError):
        calibrator.factors("low", 5, 12)


def test_lengths_beyond_all_that_was_measured_count_alike(table: lutest.LatencyTable) -> None:
    calibrator = lutest.OnlineCalibrator(table, min_samples=1)
    far, entry = 10**6, table[KEY]
    calibrator.observe(KEY, far, 3, 2.0 * entry.prefill_ms(far), 3.0 * entry.decode_ms(far, 3))
    assert calibrator.factors(*KEY) == pytest.approx((2.0, 3.0), rel=0.01)


def test_clamped_decode_counts_as_the_least(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    calibrator = lutest.OnlineCalibrator(table)
    feed(calibrator, observations[:300])
    before = calibrator.overall().decode
    for _ in range(5):
        calibrator.observe(KEY, 100, 8, table[KEY].prefill_ms(100), 0.0)
    assert 0.95 * before < calibrator.overall().decode <= before


def test_a_configuration_without_decode_takes_prefill() -> None:
    calibrator = lutest.OnlineCalibrator(lutest.LatencyTable(make_figures()), min_samples=1)
    calibrator.observe(NO_DECODE, 500, 3, 2.0 * calibrator.table[NO_DECODE].prefill_ms(500), 50.0)
    assert calibrator.factors(*NO_DECODE) == pytest.approx((2.0, 1.0), rel=0.01)


def test_drift_is_told_and_its_absence(table: lutest.LatencyTable, observations: list[Observation]) -> None:
    alarms = 0
    for number in range(20):
        calibrator = lutest.OnlineCalibrator(table)
        feed(calibrator, observations[number * 150 : (number + 1) * 150])
        alarms += not calibrator.check().holds
    assert alarms <= 1
    feed(calibrator, observations[:150], 1.2)
    check = calibrator.check()
    assert {test.coverage.stage for test in check.alarms} == {"prefill"}
    held = check.as_dict()
    assert held["holds"] is False
    assert {"tier": "low", "top_k": 4, "num_blocks": 12} in [test["key"] for test in held["tests"]]


def test_the_correction_is_written_back_as_a_table(
    table: lutest.LatencyTable, parent: Path, observations: list[Observation], tmp_path: Path
) -> None:
    calibrator = lutest.OnlineCalibrator(table)
    feed(calibrator, observations[:500], 1.3, 1.1)
    done = lutest.calibrate(parent, calibrator, tmp_path / "corrected.duckdb")
    lutest.verify(done.output)
    back, corrected = lutest.load(done.output), calibrator.corrected()
    assert back["low", 4, 12].source == "calibrated"
    assert back.meta["parent_content_hash"] == table.meta["content_hash"]
    for key in table.keys[::6]:
        assert back[key].total_ms(100, 9, 0.95) == pytest.approx(corrected[key].total_ms(100, 9, 0.95), rel=1e-9)
    with pytest.raises(lutest.ArgumentError, match="content hash"):
        lutest.calibrate(done.output, calibrator, tmp_path / "again.duckdb")


@pytest.mark.parametrize(
    "settings", [{"half_life": 0.0}, {"half_life": nan}, {"min_samples": 0}, {"bound": 1.0}, {"bound": 9}]
)
def test_settings_that_are_none(table: lutest.LatencyTable, settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(lutest.ArgumentError, match=name):
        lutest.OnlineCalibrator(table, **settings)  # type: ignore[arg-type]
