"""Each finding on runs that have the fault and on runs that have not."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

from lutest.cli.judging import render_findings
from lutest.judging.diagnose import diagnose
from lutest.judging.finding import Finding
from lutest.reader.errors import SourceError
from tests.runs_frame import BOTH_KEYS, constant_step_runs, keyed, noisy_runs

NAMES = [
    "fencepost",
    "kv_growth",
    "clamped",
    "subtraction",
    "unaccounted_time",
    "duplicates",
    "outliers",
    "trend",
    "thin_keys",
    "rejected_runs",
    "clock",
]


@pytest.fixture(scope="module")
def healthy() -> pd.DataFrame:
    """Timed runs without a fault, 80 for each of three configurations."""
    runs = noisy_runs(runs_per_key=80, seed=7)
    return runs.assign(total_ms=(runs["prefill_ms"] + runs["decode_ms"]) * 1.001)


def untimed(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.drop(columns=["decode_steps_ms", "total_ms"], errors="ignore")


def finding(name: str, runs: pd.DataFrame | Path | list[pd.DataFrame], **options: object) -> Finding:
    (found,) = (item for item in diagnose(runs, **options) if item.name == name)  # type: ignore[arg-type]
    return found


def test_healthy_runs_pass(healthy: pd.DataFrame) -> None:
    findings = {item.name: item.severity for item in diagnose(healthy)}
    assert {name for name, severity in findings.items() if severity != "ok"} <= {"fencepost", "kv_growth"}


# Which denominator


def test_constant_steps_are_told_from_the_fencepost_in_so_many_words() -> None:
    found = finding("fencepost", constant_step_runs(46.0, [2, 4, 8, 30] * 20))
    assert found.severity == "note"
    assert "23 / 34.5 / 40.2 / 44.5 ms at 2 / 3–5 / 6–10 / 21+ tokens" in found.sentence
    assert "apparent KV-cache growth of 93 %" in found.sentence
    assert "is the fencepost, not the KV cache" in found.sentence
    assert "the steps are constant at 46 ms at all output lengths" in found.sentence
    assert found.figures["denominator"] == "n - 1"
    assert found.figures["growth_over_n_minus_1"] == pytest.approx(0, abs=1e-9)
    assert found.figures["correlation_over_n"] > 0.6
    assert found.figures["correlation_over_n_minus_1"] == 0
    assert found.figures["extra_steps"] == pytest.approx(0, abs=1e-9)


def test_the_published_figures_are_the_fencepost() -> None:
    lengths = [2, 4, 8, 15, 30] * 20
    per_token = np.array([24.6, 34.4, 41.1, 41.5, 45.2] * 20)
    runs = constant_step_runs(lengths=lengths).assign(
        decode_ms=per_token * np.array(lengths), T_decode_per_token=per_token
    )
    found = finding("fencepost", runs)
    assert "24.6 / 34.4 / 41.1 / 41.5 / 45.2 ms at 2 / 3–5 / 6–10 / 11–20 / 21+ tokens" in found.sentence
    assert "apparent KV-cache growth of 84 %" in found.sentence
    assert found.figures["denominator"] == "n - 1"
    assert finding("per_token_field", runs).severity == "warning"


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_n_steps_in_decode_ms_are_a_warning(noise: float) -> None:
    runs = constant_step_runs(46.0, list(range(2, 41)) * 4)
    factor = np.exp(np.random.default_rng(1).normal(0, noise, len(runs)))
    found = finding("fencepost", runs.assign(decode_ms=46.0 * runs["output_tokens"] * factor))
    assert found.severity == "warning"
    assert found.figures["denominator"] == "n"
    assert found.figures["extra_steps"] == pytest.approx(1, abs=0.1)
    assert "decode_ms holds n steps where a run of n tokens has n − 1" in found.sentence
    assert "constant at 4" in found.sentence


def test_an_offset_of_half_a_step_is_neither() -> None:
    runs = constant_step_runs(40.0, list(range(2, 41)) * 2)
    found = finding("fencepost", runs.assign(decode_ms=runs["decode_ms"] + 20.0))
    assert found.severity == "warning"
    assert found.figures["denominator"] == "neither"
    assert "20 ms whatever its length" in found.sentence


def test_one_output_length_tells_no_denominator() -> None:
    found = finding("fencepost", constant_step_runs(lengths=[8] * 30).assign(prefill_ms=np.arange(30) + 100.5))
    assert found.severity == "note"
    assert found.figures["denominator"] is None
    assert "cannot be told" in found.sentence


def test_long_outputs_hardly_show_the_fencepost() -> None:
    found = finding("fencepost", constant_step_runs(lengths=range(200, 300)))
    assert found.severity == "ok"
    assert found.figures["denominator"] == "n - 1"


def test_configurations_of_different_speed_do_not_mix() -> None:
    fast = constant_step_runs(5.0, [2] * 50 + [30] * 10)
    slow = constant_step_runs(80.0, [2] * 10 + [30] * 50).assign(tier="high")
    figures = finding("fencepost", pd.concat([fast, slow])).figures
    assert figures["growth_over_n_minus_1"] == pytest.approx(0, abs=1e-9)
    assert figures["growth_over_n"] == pytest.approx(29 / 30 / (1 / 2) - 1)


@pytest.mark.parametrize(("slope", "seen"), [(0.0, False), (0.0005, True), (-0.0005, True)])
def test_growth_with_kv_length_is_what_is_left_after_the_fencepost(slope: float, seen: bool) -> None:
    generator = np.random.default_rng(5)
    n = generator.integers(2, 120, 400)
    prompt = generator.integers(50, 400, 400)
    mean_kv = prompt + n / 2
    step = 30 * (1 + slope * (mean_kv - mean_kv.mean())) * np.exp(generator.normal(0, 0.03, 400))
    runs = constant_step_runs(lengths=n.tolist()).assign(prompt_tokens=prompt, decode_ms=step * (n - 1))
    found = finding("kv_growth", runs)
    assert found.severity == ("note" if seen else "ok")
    assert found.figures["growth_per_100_tokens"] == pytest.approx(100 * slope, abs=0.005)
    assert found.figures["growth_per_100_tokens_low"] < 100 * slope < found.figures["growth_per_100_tokens_high"]
    assert ("no growth" in found.sentence) is not seen


def test_a_stored_time_per_token_is_checked() -> None:
    runs = constant_step_runs()
    wrong = finding("per_token_field", runs.assign(T_decode_per_token=runs["decode_ms"] / runs["output_tokens"]))
    assert wrong.severity == "warning"
    assert "T_decode_per_token is decode_ms / n in 100 % of runs, the fencepost error" in wrong.sentence
    right = finding("per_token_field", runs.assign(decode_per_token_ms=runs["decode_ms"] / (runs["output_tokens"] - 1)))
    assert right.severity == "ok"
    odd = finding("per_token_field", runs.assign(T_decode_per_token=7.0))
    assert odd.severity == "note"
    assert [item.name for item in diagnose(runs)] == NAMES


def test_a_stored_time_per_token_has_the_unit_of_the_runs() -> None:
    runs = constant_step_runs()
    seconds = runs.assign(
        decode_ms=runs["decode_ms"] / 1000,
        prefill_ms=runs["prefill_ms"] / 1000,
        T_decode_per_token=runs["decode_ms"] / 1000 / runs["output_tokens"],
    )
    assert finding("per_token_field", seconds, config={"time_unit": "s"}).severity == "warning"


# Subtraction


def subtracted(runs: pd.DataFrame, noise_ms: float) -> pd.DataFrame:
    """Decode as a profiler of separate passes gives it."""
    noise = np.random.default_rng(3).normal(0, noise_ms, len(runs))
    decode = np.maximum(runs["decode_ms"] + noise, 0.0)
    return untimed(runs).assign(decode_ms=decode, total_ms=runs["prefill_ms"] + decode)


def test_clamped_zeros_are_counted(healthy: pd.DataFrame) -> None:
    runs = subtracted(healthy, 40.0)
    several = runs["output_tokens"] >= 2
    zeros = int((runs.loc[several, "decode_ms"] == 0).sum())
    found = finding("clamped", runs)
    assert found.severity == "warning"
    assert found.figures["n_clamped"] == zeros > 3
    assert found.figures["share"] == pytest.approx(zeros / several.sum())
    one = runs[~several]
    assert found.figures["share_zero_one_token"] == pytest.approx((one["decode_ms"] == 0).mean())
    assert f"{zeros} of {several.sum()} runs of two tokens or more" in found.sentence


def test_noise_of_subtraction_shows_at_short_outputs(healthy: pd.DataFrame) -> None:
    found = finding("subtraction", subtracted(healthy, 20.0))
    assert found.severity == "warning"
    assert found.figures["first"] > 3 * found.figures["last"]
    assert found.figures["one_token_decode_ms"]["p95"] > 10
    assert finding("subtraction", untimed(healthy)).severity == "ok"


def test_offsets_of_configurations_are_found() -> None:
    parts = []
    for tier, offset in (("low", -15.0), ("high", 25.0)):
        runs = constant_step_runs(40.0, list(range(2, 60)) * 3).assign(tier=tier)
        noise = np.random.default_rng(2).normal(offset, 3.0, len(runs))
        parts.append(runs.assign(decode_ms=runs["decode_ms"] + noise))
    offsets = finding("subtraction", pd.concat(parts)).figures["offset_ms"]
    assert offsets["min"] == pytest.approx(-15, abs=2)
    assert offsets["max"] == pytest.approx(25, abs=2)


def test_time_that_no_stage_accounts_for(healthy: pd.DataFrame) -> None:
    stages = healthy["prefill_ms"] + healthy["decode_ms"]
    found = finding("unaccounted_time", healthy.assign(total_ms=stages * 1.1))
    assert found.severity == "warning"
    assert found.figures["share_of_total"] == pytest.approx(0.1 / 1.1, rel=1e-6)
    assert "9.1 % of the total" in found.sentence
    overlapping = finding("unaccounted_time", healthy.assign(total_ms=stages * 0.9))
    assert overlapping.severity == "warning"
    assert overlapping.figures["share_negative"] == 1
    assert "add up to more than the total" in overlapping.sentence


def test_totals_that_are_the_sum_of_stages_betray_subtraction(healthy: pd.DataFrame) -> None:
    found = finding("unaccounted_time", subtracted(healthy, 1.0))
    assert found.severity == "note"
    assert "made by subtraction" in found.sentence
    assert "record total_ms" in finding("unaccounted_time", untimed(healthy)).sentence


# Runs one by one


def test_duplicates(healthy: pd.DataFrame) -> None:
    found = finding("duplicates", [healthy, healthy.iloc[:30]])
    assert found.severity == "warning"
    assert found.figures["n_duplicates"] == 30
    assert "30 of 270 runs (11.1 %)" in found.sentence


def test_outliers(healthy: pd.DataFrame) -> None:
    slow = healthy.copy()
    slow.loc[::60, "prefill_ms"] *= 20
    found = finding("outliers", slow)
    assert found.severity == "note"
    assert found.figures["n_slow"] == 4
    assert found.figures["n_fast"] == 0


def test_a_coarse_clock_makes_no_outliers(direct_runs: Path) -> None:
    runs = duckdb.execute("SELECT * EXCLUDE (decode_steps_ms) FROM read_parquet(?)", [str(direct_runs)]).df()
    shares = []
    for tick in (1e-9, 1.0, 5.0, 10.0):
        rounded = {name: (runs[name] / tick).round() * tick for name in ("prefill_ms", "decode_ms")}
        shares.append(finding("outliers", runs.assign(**rounded)).figures["share"])
    assert max(shares) - shares[0] <= 0.0025
    ticks = constant_step_runs(lengths=[8] * 100).assign(prefill_ms=[20.0] * 90 + [21.0] * 6 + [22.0] * 4)
    assert finding("outliers", ticks).figures["n_outliers"] == 0  # a range of no tick between the quartiles


def test_too_many_for_outliers_are_kept(healthy: pd.DataFrame) -> None:
    slow = healthy.copy()
    slow.loc[::10, "prefill_ms"] *= 20
    found = finding("outliers", slow)
    assert found.severity == "warning"
    assert found.figures["n_outliers"] == 0
    assert found.figures["n_kept"] == 24
    assert "a build keeps them" in found.sentence


def test_raw_fences_cut_a_tail_that_the_fences_of_a_build_keep() -> None:
    generator = np.random.default_rng(9)
    runs = constant_step_runs(lengths=[8] * 800).assign(prefill_ms=100 * np.exp(generator.normal(0, 0.6, 800)))
    found = finding("outliers", runs)
    assert found.figures["n_outliers"] == 0
    assert found.figures["raw_fence_share"] > 0.02
    assert found.figures["raw_fence_p95_change"] < -0.05


@pytest.mark.parametrize("by_id", [False, True])
def test_a_trend_follows_the_order_of_runs(healthy: pd.DataFrame, by_id: bool) -> None:
    place = healthy.groupby(["tier", "top_k", "num_blocks"]).cumcount() / 80
    slower = healthy.assign(prefill_ms=healthy["prefill_ms"] * (1 + 0.3 * place))
    if by_id:  # the rows are shuffled, and the ids keep the order
        slower = slower.assign(sample_id=np.arange(len(slower)) * 3).sample(frac=1, random_state=0)
    found = finding("trend", slower)
    assert found.severity == "warning"
    assert found.figures["prefill"]["change"] == pytest.approx(1.3**0.9 - 1, abs=0.06)
    assert found.figures["prefill"]["change_low"] > 0.1
    assert found.figures["prefill"]["spearman"] > 0.5
    assert found.figures["prefill"]["by_tenth"][9] > found.figures["prefill"]["by_tenth"][0] + 0.15
    assert found.figures["decode step"]["change_low"] < 0 < found.figures["decode step"]["change_high"]


def test_a_trend_is_not_seen_in_longer_prompts(healthy: pd.DataFrame) -> None:
    ordered = healthy.sort_values("prompt_tokens", kind="stable", ignore_index=True)
    assert finding("trend", ordered).severity == "ok"


def test_a_trend_needs_runs(healthy: pd.DataFrame) -> None:
    found = finding("trend", healthy.iloc[:12])
    assert found.severity == "note"
    assert "no trend can be seen" in found.sentence


def test_thin_configurations(healthy: pd.DataFrame) -> None:
    noted = finding("thin_keys", noisy_runs(runs_per_key=40))
    assert noted.severity == "note"
    assert "low 4 12 (40, 19 more)" in noted.sentence
    assert noted.figures["runs_missing"] == 57
    few = finding("thin_keys", pd.concat([healthy, noisy_runs([("low", 6, 8)], 5)]))
    assert few.severity == "warning"
    assert "low 6 8 (5, 54 more)" in few.sentence
    assert few.figures["keys"] == [{"tier": "low", "top_k": 6, "num_blocks": 8, "n": 5, "runs_missing": 54}]


def test_findings_do_not_depend_on_the_names_of_key_columns(healthy: pd.DataFrame) -> None:
    runs = pd.concat([healthy, noisy_runs([("low", 6, 8)], 5)])
    own, other = (diagnose(keyed(runs, key), config={"key": list(key)}) for key in BOTH_KEYS)
    (thin,) = (item for item in other if item.name == "thin_keys")
    assert thin.figures["keys"] == [{"gpu": "low", "n_gpus": 6, "users": 8, "n": 5, "runs_missing": 54}]
    assert [item for item in own if item.name != "thin_keys"] == [item for item in other if item.name != "thin_keys"]


def test_nothing_is_written_where_it_is_called(
    healthy: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "diagnose").mkdir()
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o500)
    try:
        assert [item.name for item in diagnose(healthy)] == NAMES
    finally:
        tmp_path.chmod(0o700)
    assert [path.name for path in tmp_path.iterdir()] == ["diagnose"]


def test_rejected_runs_are_told_by_reason(healthy: pd.DataFrame) -> None:
    broken = healthy.copy()
    broken.loc[:4, "prefill_ms"] = -1.0
    broken.loc[5:6, "output_tokens"] = 0
    found = finding("rejected_runs", broken)
    assert found.severity == "warning"
    assert {reason: item["n"] for reason, item in found.figures["by_reason"].items()} == {
        "negative_value": 5,
        "no_output_tokens": 2,
    }
    assert "7 of 240 runs (2.9 %)" in found.sentence


def test_a_coarse_clock(healthy: pd.DataFrame) -> None:
    assert finding("clock", healthy.assign(prefill_ms=healthy["prefill_ms"].round(4))).severity == "ok"
    tick = 15.625
    found = finding("clock", untimed(healthy).assign(prefill_ms=np.ceil(healthy["prefill_ms"] / tick) * tick))
    assert found.severity == "warning"
    assert found.figures["prefill"]["tick_ms"] == pytest.approx(tick)
    assert "prefill comes in steps of 15.6 ms" in found.sentence


# The whole


def test_of_runs_that_are_all_rejected_nothing_else_is_known(healthy: pd.DataFrame) -> None:
    (rejected,) = diagnose(healthy.assign(prefill_ms=-1.0))
    assert rejected.name == "rejected_runs"
    assert rejected.figures["n_rejected"] == 240


@pytest.mark.parametrize("lengths", [[1] * 40, [2] * 40, [1], [2, 3, 5]])
def test_few_and_short_runs_give_every_finding(lengths: list[int]) -> None:
    assert [item.name for item in diagnose(constant_step_runs(lengths=lengths))] == NAMES


def test_no_runs_are_an_error() -> None:
    with pytest.raises(SourceError, match="no runs"):
        diagnose(constant_step_runs(lengths=[]))


def test_the_order_of_sources_does_not_matter(healthy: pd.DataFrame) -> None:
    parts = [healthy.iloc[:100], healthy.iloc[100:]]
    assert diagnose(parts) == diagnose(parts[::-1])


def test_findings_are_json_and_text(healthy: pd.DataFrame) -> None:
    findings = diagnose(healthy)
    content = json.loads(json.dumps([item.as_dict() for item in findings], allow_nan=False))
    assert [item["name"] for item in content] == NAMES
    assert all(item.keys() == {"name", "severity", "sentence", "figures"} for item in content)
    text = render_findings(findings)
    assert all(len(line) <= 110 for line in text.splitlines())
    words = " ".join(text.split())
    assert all(item.sentence in words for item in findings)
    assert text.splitlines()[-1].endswith(" ok")


def test_the_shipped_runs(direct_runs: Path, subtraction_runs: Path) -> None:
    direct = {item.name: item for item in diagnose(direct_runs)}
    assert [item.name for item in direct.values() if item.severity == "warning"] == []
    assert direct["fencepost"].figures["denominator"] == "n - 1"
    assert abs(direct["fencepost"].figures["extra_steps"]) < 0.05
    assert direct["fencepost"].figures["correlation_over_n"] > 0.3
    assert abs(direct["fencepost"].figures["correlation_over_n_minus_1"]) < 0.1
    assert 0.01 < direct["kv_growth"].figures["growth_per_100_tokens"] < 0.05
    passes = {item.name: item for item in diagnose(subtraction_runs)}
    assert {item.name for item in passes.values() if item.severity == "warning"} == {"clamped", "subtraction"}
    assert passes["clamped"].figures["share"] == pytest.approx(0.07, abs=0.02)
    assert "made by subtraction" in passes["unaccounted_time"].sentence
    # two ways of timing the same model agree on the step
    assert passes["fencepost"].figures["denominator"] == "n - 1"
