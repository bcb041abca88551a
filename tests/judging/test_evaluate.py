"""Judging a table: figures against a plain loop, what is left out, and warnings."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lutest import load
from lutest.builder.build import build
from lutest.cli.judging import render_evaluation
from lutest.judging.evaluate import BANDS, Evaluation, Score, evaluate
from lutest.reader.errors import SourceError
from lutest.reader.figures import Key
from lutest.runs.convert import convert
from tests.runs_frame import BOTH_KEYS, keyed, noisy_runs

KEYS = (("low", 4, 12), ("low", 8, 12), ("high", 4, 12))


@pytest.fixture(scope="module")
def own() -> pd.DataFrame:
    """The runs that the table is built from."""
    return noisy_runs(KEYS, runs_per_key=80, seed=1).assign(device="desk", model="small")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, own: pd.DataFrame) -> Path:
    return build(runs=own, output=tmp_path_factory.mktemp("evaluate") / "table.duckdb").output


@pytest.fixture(scope="module")
def fresh() -> pd.DataFrame:
    return noisy_runs(KEYS, runs_per_key=80, seed=2).assign(device="desk", model="small")


@pytest.fixture(scope="module")
def judged(table: Path, fresh: pd.DataFrame) -> Evaluation:
    return evaluate(table, fresh)


def score_of(evaluation: Evaluation, stage: str, *, key: Key | None = None, output_tokens: str | None = None) -> Score:
    scores = evaluation.by_key if key else evaluation.by_output_tokens if output_tokens else evaluation.overall
    (found,) = (s for s in scores if (s.stage, s.key, s.output_tokens) == (stage, key, output_tokens))
    return found


def loop(table: Path, runs: pd.DataFrame, stage: str, q: float) -> tuple[list[float], list[float]]:
    """Observed and predicted of a stage, run by run and step by step."""
    held = load(table)
    observed, predicted = [], []
    for run in runs.itertuples(index=False):
        entry = held[run.tier, run.top_k, run.num_blocks]
        prompt, n = run.prompt_tokens, run.output_tokens
        if stage == "prefill":
            pairs = [(run.prefill_ms, entry.prefill_ms(prompt, q))]
        elif stage == "total":
            pairs = [(run.prefill_ms + run.decode_ms, entry.total_ms(prompt, n, q))]
        elif stage == "decode total":
            pairs = [(run.decode_ms, entry.decode_ms(prompt, n, q))] if n > 1 else []
        else:
            pairs = [(step, entry.decode_step_ms(prompt + i, q)) for i, step in enumerate(run.decode_steps_ms, 1)]
        observed += [pair[0] for pair in pairs]
        predicted += [pair[1] for pair in pairs]
    return observed, predicted


@pytest.mark.parametrize("stage", ["prefill", "decode step", "decode total", "total"])
@pytest.mark.parametrize(
    ("group", "chosen"),
    [
        ({}, lambda runs: runs),
        ({"key": ("high", 4, 12)}, lambda runs: runs[runs["tier"] == "high"]),
        ({"output_tokens": "3–5"}, lambda runs: runs[runs["output_tokens"].between(3, 5)]),
        ({"output_tokens": "11–20"}, lambda runs: runs[runs["output_tokens"].between(11, 20)]),
    ],
    ids=["overall", "key", "3–5", "11–20"],
)
def test_figures_equal_those_of_a_loop(
    table: Path, fresh: pd.DataFrame, judged: Evaluation, stage: str, group: dict[str, Any], chosen: Any
) -> None:
    score = score_of(judged, stage, **group)
    observed, p50 = loop(table, chosen(fresh), stage, 0.5)
    _, p95 = loop(table, chosen(fresh), stage, 0.95)
    relative = [p / o - 1 for o, p in zip(observed, p50, strict=True)]
    assert score.n == len(observed) > 10
    assert score.mae_ms == pytest.approx(np.mean([abs(o - p) for o, p in zip(observed, p50, strict=True)]))
    assert score.mape == pytest.approx(np.mean(np.abs(relative)))
    assert score.median_ape == pytest.approx(median(map(abs, relative)))
    assert score.bias == pytest.approx(median(relative))
    assert score.r_squared == pytest.approx(1 - np.mean(np.subtract(observed, p50) ** 2) / np.var(observed))
    assert score.coverage[0.95] == pytest.approx(np.mean([o <= p for o, p in zip(observed, p95, strict=True)]))
    losses = [max(0.95 * (o - p), 0.05 * (p - o)) for o, p in zip(observed, p95, strict=True)]
    assert score.pinball_ms[0.95] == pytest.approx(np.mean(losses))


def test_figures_do_not_depend_on_the_names_of_key_columns(
    tmp_path: Path, own: pd.DataFrame, fresh: pd.DataFrame, judged: Evaluation
) -> None:
    key = BOTH_KEYS[1]
    renamed = keyed(own, key).rename(columns={"users": "clients"})
    config = {"key": list(key), "columns": {"users": "clients"}}
    built = build(config, runs=renamed, output=tmp_path / "table.duckdb").output
    evaluation = evaluate(built, keyed(fresh, key).rename(columns={"users": "clients"}))  # read as the table was built
    assert evaluation.overall == judged.overall
    assert evaluation.by_key == judged.by_key
    first = evaluation.as_dict()["by_key"][0]
    assert [first[name] for name in key] == list(evaluation.by_key[0].key or ())


def test_groups_add_up_to_the_whole(judged: Evaluation) -> None:
    assert judged.n_runs == 240
    for score in judged.overall:
        assert sum(s.n for s in judged.by_key if s.stage == score.stage) == score.n
        assert sum(s.n for s in judged.by_output_tokens if s.stage == score.stage) == score.n
    assert {s.output_tokens for s in judged.by_output_tokens} == set(BANDS[:5])


def test_bands_have_their_ends(table: Path) -> None:
    lengths = (1, 2, 3, 5, 6, 10, 11, 20, 21, 50, 51)
    runs = pd.DataFrame(
        {
            "tier": "low", "top_k": 4, "num_blocks": 12, "prompt_tokens": 100, "prefill_ms": 50.0 + np.arange(11),
            "output_tokens": lengths, "decode_ms": [26.0 * (n - 1) for n in lengths],
        }
    )  # fmt: skip
    sizes = {s.output_tokens: s.n for s in evaluate(table, runs).by_output_tokens if s.stage == "total"}
    assert sizes == {"1": 1, "2": 1, "3–5": 2, "6–10": 2, "11–20": 2, "21–50": 2, "51+": 1}


def test_a_given_total_is_what_totals_are_judged_by(table: Path, fresh: pd.DataFrame) -> None:
    doubled = evaluate(table, fresh.assign(total_ms=2 * (fresh["prefill_ms"] + fresh["decode_ms"])))
    assert score_of(doubled, "total").bias == pytest.approx(-0.5, abs=0.05)
    assert abs(score_of(doubled, "prefill").bias) < 0.05


def test_fresh_runs_of_the_same_kind_give_no_warning(judged: Evaluation) -> None:
    assert judged.warnings == ()
    assert judged.left_out == {}


def test_own_runs_are_told_by_their_digest(table: Path, own: pd.DataFrame) -> None:
    (warning,) = evaluate(table, own).warnings
    assert "240 of 240 runs" in warning
    assert "built from" in warning


def test_own_runs_are_told_after_a_conversion_too(table: Path, own: pd.DataFrame, tmp_path: Path) -> None:
    convert(own.drop(columns="model"), tmp_path / "runs.parquet")
    (warning,) = evaluate(table, tmp_path / "runs.parquet").warnings
    assert "the table was built from some of these very runs" in warning


def test_halves_of_one_set_are_not_taken_for_each_other(tmp_path: Path, direct_frame: pd.DataFrame) -> None:
    runs = direct_frame[direct_frame["top_k"] == 4]
    built = build(runs=runs.iloc[::2], output=tmp_path / "half.duckdb").output
    evaluation = evaluate(built, runs.iloc[1::2])
    assert evaluation.warnings == ()
    assert score_of(evaluation, "decode total").r_squared > 0.95
    assert 0.85 < score_of(evaluation, "total").coverage[0.95] < 0.99
    assert abs(score_of(evaluation, "total").bias) < 0.03


def test_another_device_or_model_is_named(table: Path, fresh: pd.DataFrame) -> None:
    device, model = evaluate(table, fresh.assign(device="rack", model="large")).warnings
    assert "another device (rack) than the table (desk)" in device
    assert "another model (large) than the table (small)" in model
    assert evaluate(table, fresh.drop(columns=["device", "model"])).warnings == ()


def test_a_table_without_its_file_says_that_it_cannot_tell(table: Path, tmp_path: Path, fresh: pd.DataFrame) -> None:
    copy = Path(shutil.copy(table, tmp_path))
    held = load(copy)
    copy.unlink()
    (warning,) = evaluate(held, fresh).warnings
    assert "not known" in warning


def test_unknown_configurations_duplicates_and_rejects_are_left_out_and_counted(
    table: Path, fresh: pd.DataFrame, judged: Evaluation
) -> None:
    broken = fresh.iloc[:3].assign(prefill_ms=-1.0)
    strange = fresh.iloc[3:8].assign(top_k=99)
    evaluation = evaluate(table, pd.concat([fresh, broken, strange, fresh.iloc[:7]], ignore_index=True))
    assert evaluation.left_out == {"duplicate": 7, "negative_value": 3, "configuration not in the table": 5}
    assert evaluation.n_runs == judged.n_runs
    assert evaluation.overall == judged.overall


def test_outliers_are_kept(table: Path, fresh: pd.DataFrame, judged: Evaluation) -> None:
    slow = fresh.copy()
    slow.loc[0, "prefill_ms"] *= 100
    evaluation = evaluate(table, slow)
    assert evaluation.n_runs == judged.n_runs
    assert score_of(evaluation, "prefill").mae_ms > 2 * score_of(judged, "prefill").mae_ms


def test_clamped_runs_count_for_coverage_and_not_for_percentages(table: Path, fresh: pd.DataFrame) -> None:
    runs = fresh.drop(columns="decode_steps_ms")
    several = runs.index[runs["output_tokens"] >= 2]
    runs.loc[several[:40], "decode_ms"] = 0.0
    evaluation = evaluate(table, runs)
    whole = score_of(evaluation, "decode total")
    assert evaluation.n_clamped == 40
    assert whole.n == len(several)
    assert whole.mape < 0.2
    assert whole.bias < 0.1
    judged = evaluate(table, fresh.drop(columns="decode_steps_ms"))
    assert whole.coverage[0.5] > score_of(judged, "decode total").coverage[0.5] + 0.05
    assert "40 runs clamped at zero decode" in render_evaluation(evaluation)


def test_untimed_runs_have_no_figures_for_steps(table: Path, fresh: pd.DataFrame) -> None:
    evaluation = evaluate(table, fresh.drop(columns="decode_steps_ms"))
    assert [score.stage for score in evaluation.overall] == ["prefill", "decode total", "total"]
    assert "decode step" not in render_evaluation(evaluation)


def test_a_configuration_without_decode_figures_is_judged_by_prefill_and_one_token(
    tmp_path: Path, fresh: pd.DataFrame
) -> None:
    low = fresh["tier"] == "low"
    one = fresh.assign(output_tokens=1, decode_ms=0.0, decode_steps_ms=[[] for _ in range(len(fresh))])
    built = build(runs=pd.concat([fresh[low], one[~low]]), output=tmp_path / "half.duckdb").output
    evaluation = evaluate(built, noisy_runs(KEYS, runs_per_key=40, seed=3))
    high = [score for score in evaluation.by_key if score.key == ("high", 4, 12)]
    assert [score.stage for score in high] == ["prefill", "total"]
    assert high[0].n == 40
    assert 0 < high[1].n < 10


def test_runs_of_no_known_configuration_are_an_error_that_names_both_sides(table: Path, fresh: pd.DataFrame) -> None:
    with pytest.raises(SourceError, match=r"240 configuration not in the table.*99.*top_k=4"):
        evaluate(table, fresh.assign(top_k=99))
    with pytest.raises(SourceError, match="240 negative_value"):
        evaluate(table, fresh.assign(prefill_ms=-1.0))
    with pytest.raises(SourceError, match="no runs"):
        evaluate(table, fresh.iloc[:0])


def test_columns_and_unit_come_from_the_configuration(table: Path, fresh: pd.DataFrame, judged: Evaluation) -> None:
    own = fresh.drop(columns=["decode_steps_ms"]).rename(columns={"prefill_ms": "ttft"})
    own["ttft"], own["decode_ms"] = own["ttft"] / 1000, own["decode_ms"] / 1000
    evaluation = evaluate(table, own, config={"columns": {"prefill_ms": "ttft"}, "time_unit": "s"})
    assert score_of(evaluation, "total").mae_ms == pytest.approx(score_of(judged, "total").mae_ms)


def test_as_dict_is_json_without_nan(table: Path, judged: Evaluation) -> None:
    content = json.loads(json.dumps(judged.as_dict(), allow_nan=False))
    assert content["n_runs"] == 240
    assert content["overall"][0]["coverage"].keys() == {"p50", "p95"}
    assert content["by_key"][0]["tier"] == "high"
    assert content["by_output_tokens"][0]["output_tokens"] == "1"
    single = evaluate(table, noisy_runs(KEYS[:1], runs_per_key=1, seed=4)).as_dict()
    assert single["overall"][0]["r_squared"] is None
    json.dumps(single, allow_nan=False)


def test_text_shows_each_stage_band_and_configuration(judged: Evaluation) -> None:
    text = render_evaluation(judged)
    lines = text.splitlines()
    assert lines[0] == "240 runs of 3 configurations, outliers kept"
    for start in ("prefill ", "decode step ", "decode total ", "total ", "11–20 ", "low 8 12 ", "high 4 12 "):
        assert sum(line.startswith(start) for line in lines) == 1, start
    prefill = score_of(judged, "prefill")
    (line,) = (line for line in lines if line.startswith("prefill "))
    assert f"{prefill.r_squared:.4f}" in line
    assert f"{100 * prefill.coverage[0.95]:.1f}" in line
    assert "nan" not in text
    assert not math.isnan(prefill.r_squared)
