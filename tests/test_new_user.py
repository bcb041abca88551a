"""What a new user types: every wrong use ends in a word of advice, never in a wrong number."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import duckdb
import numpy as np
import pandas as pd
import pytest

import lutest
from lutest.cli.main import main


@pytest.fixture(scope="module")
def table(direct_table: Path) -> lutest.LatencyTable:
    return lutest.load(direct_table)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    capsys.readouterr()
    try:
        status = main(list(map(str, arguments)))
    except SystemExit as stopped:
        status = int(str(stopped.code))
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_length_of_the_text_alone_is_no_prompt_length_of_a_tier_with_many_crops(
    table: lutest.LatencyTable,
) -> None:
    small, large = table["low", 8, 16], table["high", 8, 16]
    # never cheaper than what was measured, however short the prompt is said to be
    assert large.total_ms(60, 8, 0.95) >= 0.9 * large.total_ms(383, 8, 0.95) > small.total_ms(60, 8, 0.95)
    with pytest.warns(lutest.LutestWarning, match=r"left out 18 of 27 .*text_tokens=60"):
        found = table.feasible(1500, prompt_tokens=60)
    assert found
    assert {key[0] for key in found} == {"low"}
    with pytest.warns(lutest.LutestWarning, match=r"left out 27 of 27 .*more than twice"):
        assert table.feasible(1e9, prompt_tokens=100_000) == []
    explained = large.explain(60, 8)
    assert explained.total.source == large.source_at(60, 8) == "extrapolated"
    assert "text_tokens=60" in explained.out_of_reach
    assert "text_tokens=60" in str(explained)
    assert large.explain(500, 8).out_of_reach == ""


def test_each_configuration_adds_its_own_vision_tokens_to_a_text(
    table: lutest.LatencyTable, direct_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = {key: table[key].prompt_tokens(60) for key in table}
    assert prompts["low", 8, 16] < prompts["medium", 8, 16] < prompts["high", 8, 16]
    found = table.feasible(1500, text_tokens=60, output_tokens=8)
    assert found == table.feasible(1500, prompt_tokens=prompts, output_tokens=8)
    assert 0 < len(found) < len(table)
    quality = {key: float(key[1]) for key in table}
    best = table.best(1500, text_tokens=60, output_tokens=8, quality=quality)
    assert best is not None
    assert best.source in ("measured", "interpolated")
    assert {option.source for option in table.frontier(text_tokens=60, quality=quality)} <= {"measured", "interpolated"}
    status, out, err = run(capsys, "feasible", direct_table, 1500, "--text-tokens", 60, "--output-tokens", 8)
    assert (status, err) == (0, "")
    assert f"{len(found)} of 27" in out
    assert "source" in out
    assert "measured" in out
    query = "SELECT tier, top_k, num_blocks, source FROM feasible(1500, text_tokens := 60, output_tokens := 8)"
    status, out, _ = run(capsys, "sql", direct_table, "--csv", query)
    assert status == 0
    assert len(out.splitlines()) == len(found) + 1
    assert "measured" in out
    status, out, _ = run(capsys, "lookup", direct_table, "high", 8, 16, "--text-tokens", 60)
    assert status == 0
    assert f"{prompts['high', 8, 16]} prompt tokens" in out
    with pytest.raises(lutest.ArgumentError, match="one of the two"):
        table.feasible(1500, text_tokens=60, prompt_tokens=150)


def test_a_table_without_text_and_vision_apart_says_so(serving_table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(lutest.ArgumentError, match="do not hold vision and text tokens apart"):
        lutest.load(serving_table).feasible(1500, text_tokens=60)
    status, _, err = run(capsys, "feasible", serving_table, 1500, "--text-tokens", 60)
    assert status == 2
    assert "give prompt_tokens" in err
    status, _, err = run(capsys, "sql", serving_table, "FROM feasible(1500, text_tokens := 60)")
    assert status == 2
    assert "give prompt_tokens" in err


def test_one_prompt_length_for_all_tiers_is_shown_for_what_it_is(
    direct_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "feasible", direct_table, 1500, "--prompt-tokens", 150)
    assert status == 0
    assert "left out 9 of 27" in err
    assert "extrapolated" in out
    status, out, _ = run(capsys, "lookup", direct_table, "high", 8, 16, "--prompt-tokens", 150)
    assert status == 0
    assert "left out by searches and rewards" in out
    query = "SELECT count(*) FROM feasible(1500, prompt_tokens := 150) WHERE tier = 'high'"
    assert run(capsys, "sql", direct_table, "--csv", query)[1].split()[-1] == "0"


def test_lengths_are_named(table: lutest.LatencyTable) -> None:
    with pytest.raises(TypeError):
        cast(Any, table).feasible(1500, 16)
    for key in table:
        budget_ms = table[key].total_ms(None, 8, 0.95)
        tokens = table[key].max_output_tokens(budget_ms)
        assert tokens >= 8
        assert key in table.feasible(budget_ms, output_tokens=tokens)
        assert key not in table.feasible(budget_ms, output_tokens=tokens + 1)


def test_a_wrong_tier_in_sql_can_be_made_to_fail(direct_table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "total_ms('full', 8, 16, 150, 32)"
    assert run(capsys, "sql", direct_table, f"SELECT {asked}")[0] == 0
    status, _, err = run(capsys, "sql", direct_table, f"SELECT known({asked})")
    assert status == 2
    assert "tier high, low, medium" in err


@pytest.fixture(scope="module")
def logs(direct_frame: pd.DataFrame) -> pd.DataFrame:
    """Runs as a server's log has them: a time to the first token and one of all, under names of its own."""
    named = {"prompt_tokens": "n_in", "output_tokens": "n_out", "prefill_ms": "ttft_ms"}
    kept = direct_frame[["tier", "top_k", "num_blocks", *named]].rename(columns=named)
    return kept.assign(e2e_ms=direct_frame["prefill_ms"] + direct_frame["decode_ms"])


LOGS = {"prompt_tokens": "n_in", "output_tokens": "n_out", "prefill_ms": "ttft_ms", "total_ms": "e2e_ms"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"decode_ms": "e2e_ms"}, "decode_ms is total_ms in .*`--set columns.total_ms=e2e_ms`"),
        ({"decode_ms": "e2e_ms", "total_ms": "none"}, "does not begin near 0 .*`--set columns.total_ms=e2e_ms`"),
        ({"prefill_ms": "e2e_ms"}, "prefill_ms .* is total_ms"),
        ({"prefill_ms": "e2e_ms", "decode_ms": "ttft_ms", "total_ms": "none"}, "prefill_ms .* rises with"),
        ({"output_tokens": "n_in", "prompt_tokens": "n_out"}, "no output tokens|does not rise"),
    ],
)
def test_a_time_taken_for_another_is_refused_with_the_mapping_that_is_meant(
    columns: dict[str, str], said: str, logs: pd.DataFrame, tmp_path: Path
) -> None:
    output = tmp_path / "t.duckdb"
    with pytest.raises(lutest.BuildError, match=f"{said}.*insist with `--implausible`"):
        lutest.build({"columns": LOGS | columns}, runs=logs, output=output)
    assert not output.exists()


def test_who_insists_gets_the_table(logs: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = logs[(logs["tier"] == "low") & (logs["num_blocks"] == 16)]
    few.to_csv(tmp_path / "logs.csv", index=False)
    columns = ", ".join(f"{name}: {field}" for name, field in (LOGS | {"decode_ms": "e2e_ms"}).items())
    asked = ("build", tmp_path / "logs.csv", "-o", tmp_path / "t.duckdb", "--set", f"columns={{{columns}}}")
    assert run(capsys, *asked)[0] == 2
    assert run(capsys, *asked, "--implausible")[0] == 0


def test_seconds_taken_for_milliseconds_are_refused_with_the_unit(logs: pd.DataFrame, tmp_path: Path) -> None:
    seconds = logs.assign(ttft_ms=logs["ttft_ms"] / 1e3, e2e_ms=logs["e2e_ms"] / 1e3)
    with pytest.raises(lutest.BuildError, match=r"a decode step takes 0\.03\d* ms .*`--set time_unit=s`"):
        lutest.build({"columns": LOGS}, runs=seconds, output=tmp_path / "t.duckdb")
    mixed = logs.assign(ttft_ms=logs["ttft_ms"] / 1e3)
    with pytest.raises(lutest.BuildError, match="two units"):
        lutest.build({"columns": LOGS}, runs=mixed, output=tmp_path / "t.duckdb")
    slow = seconds.assign(ttft_ms=seconds["ttft_ms"] * 10, e2e_ms=seconds["e2e_ms"] * 10)  # 0.3 ms: it may be
    few = slow[(slow["tier"] == "low") & (slow["num_blocks"] == 16)]
    with pytest.warns(lutest.LutestWarning, match=r"`--set time_unit=s`"):
        lutest.build({"columns": LOGS}, runs=few, output=tmp_path / "t.duckdb")


def test_missing_columns_are_all_named_with_the_line_that_maps_them(
    logs: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.drop(columns="tier").to_csv(tmp_path / "logs.csv", index=False)
    status, _, err = run(capsys, "build", tmp_path / "logs.csv", "-o", tmp_path / "t.duckdb")
    assert status == 2
    for name in ("tier", *LOGS, *logs.columns[1:]):
        assert name in err
    mapped = ", ".join(f"{name}: {field}" for name, field in LOGS.items())
    assert f"columns={{tier: FIELD, {mapped}}}" in err


def test_diagnose_says_nothing_of_runs_that_cannot_be_used(
    direct_frame: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    direct_frame.head(40).assign(output_tokens=0).to_json(tmp_path / "runs.jsonl", orient="records", lines=True)
    status, out, _ = run(capsys, "diagnose", tmp_path / "runs.jsonl")
    assert status == 1
    assert "40 of 40 runs (100 %) no build can use: 40 no_output_tokens" in " ".join(out.split())
    assert " ok " not in out


def test_broken_files_are_all_named_and_can_be_skipped(
    logs: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = logs.rename(columns={field: name for name, field in LOGS.items()})
    few = named[(named["tier"] == "low") & (named["num_blocks"] == 16)]
    folder = tmp_path / "folder"
    folder.mkdir()
    few.iloc[:150].to_csv(folder / "a.csv", index=False)
    few.iloc[150:].to_csv(folder / "b.csv.gz", index=False)
    few.head(40).assign(output_tokens=0).to_csv(folder / "unused.csv", index=False)
    few.head(40).to_csv(folder / "c.csv.bz2", index=False)
    (folder / "broken.json").write_text('{"x": [1,2')
    (folder / "broken.parquet").write_text("PAR1xxxx")
    (folder / "broken.csv.gz").write_bytes((folder / "b.csv.gz").read_bytes()[:300])
    (folder / "empty.csv").touch()
    output = tmp_path / "t.duckdb"
    status, _, err = run(capsys, "build", folder, "-o", output)
    assert (status, output.exists()) == (2, False)
    broken = ("broken.json", "broken.parquet", "broken.csv.gz", "empty.csv")
    for name in ("4 files cannot be read", *broken):
        assert name in err
    status, out, err = run(capsys, "build", folder, "-o", output, "--skip-broken")
    assert status == 0
    assert "none of its 40 runs is used: no_output_tokens" in err
    assert "not read, for they are packed: c.csv.bz2" in err
    query = "SELECT path FROM sources WHERE problem IS NOT NULL"
    stored = run(capsys, "sql", output, "--csv", query)[1]
    for name in broken:
        assert name in out
        assert name in stored
    assert lutest.load(output)["low", 8, 16].n > 0
    counted = run(capsys, "sql", output, "--csv", "SELECT sum(rows_used) FROM sources WHERE path LIKE '%.gz'")[1]
    assert int(counted.split()[-1]) > 20  # what is packed with gzip is read


def test_runs_stand_first(logs: pd.DataFrame, tmp_path: Path) -> None:
    named = logs.rename(columns={field: name for name, field in LOGS.items()})
    few = named[(named["tier"] == "low") & (named["num_blocks"] == 16)]
    few.to_csv(tmp_path / "runs.csv", index=False)
    first = lutest.build(few, output=tmp_path / "a.duckdb")
    assert lutest.load(first.output).keys == (("low", 4, 16), ("low", 6, 16), ("low", 8, 16))
    assert lutest.build(str(tmp_path / "runs.csv"), output=tmp_path / "b.duckdb").sources[0].rows_used > 100
    with pytest.raises(lutest.ConfigError, match="runs are given twice"):
        lutest.build(few, runs=few, output=tmp_path / "c.duckdb")


BATCH: dict[str, Any] = {"prompts": ["p"] * 3, "completions": ["c"] * 3, "completion_ids": [[1] * 8] * 3}
TIERS: dict[str, Any] = {"tier": ["low", "medium", "high"], "top_k": [8] * 3, "num_blocks": [16] * 3}


def test_a_reward_of_text_alone_prefers_the_tier_of_few_crops(table: lutest.LatencyTable) -> None:
    reward = lutest.TRLReward(lutest.LatencyReward(table, 1500.0))
    low, medium, high = reward(**BATCH, **TIERS, text_tokens=[60] * 3)
    assert cast(float, low) > cast(float, medium) > cast(float, high)
    logged: dict[str, float] = {}
    with pytest.warns(lutest.LutestWarning, match=r"prompt_tokens=60 is less than half .*text_tokens=60"):
        low, medium, high = reward(**BATCH, **TIERS, prompt_tokens=[60] * 3, log_metric=logged.__setitem__)
    assert cast(float, low) > cast(float, medium) == high
    assert logged["latency/unknown"] == pytest.approx(2 / 3)
    assert logged["latency/extrapolated"] == pytest.approx(1 / 3)


def test_misspelt_columns_fail_at_the_first_batch(table: lutest.LatencyTable) -> None:
    reward = lutest.TRLReward(lutest.LatencyReward(table, 1500.0))
    misspelt = {"tiers": TIERS["tier"], "topk": TIERS["top_k"], "num_blocks": TIERS["num_blocks"]}
    with pytest.raises(lutest.ArgumentError, match=r"no column 'tier' \('tiers'\?\), 'top_k' \('topk'\?\)"):
        reward(**BATCH, **misspelt)
    with pytest.raises(lutest.ArgumentError, match=r"'prompt_tokens' \('prompt_token'\?\)"):
        reward(**BATCH, **TIERS, prompt_token=[150] * 3)
    with pytest.raises(lutest.ArgumentError, match=r"no column 'budget_ms' in the data set"):
        lutest.TRLReward(lutest.LatencyReward(table))(**BATCH, **TIERS)
    scored = lutest.VerlReward(lutest.LatencyReward(table, 1500.0))
    with pytest.warns(lutest.LutestWarning, match=r"'num_blocks' not in \['tiers', 'topk'\]"):
        scored("mine", "42", "42", {"tiers": "low", "topk": 8})


def test_a_budget_in_seconds_is_refused(table: lutest.LatencyTable) -> None:
    with pytest.raises(lutest.ArgumentError, match=r"budget_ms is 1\.5, but the fastest .*milliseconds"):
        lutest.LatencyReward(table, 1.5)
    with pytest.warns(lutest.LutestWarning, match=r"budget_ms is 1\.5, but the fastest"):
        assert lutest.TRLReward(lutest.LatencyReward(table))(**BATCH, **TIERS, budget_ms=[1.5] * 3) == [None] * 3


def test_wrong_use_of_a_reward_fails_where_it_is_made(table: lutest.LatencyTable) -> None:
    with pytest.raises(lutest.ArgumentError, match=r"its corrected\(\)"):
        lutest.LatencyReward(cast(Any, lutest.OnlineCalibrator(table)), 1500.0)
    for form in (lutest.TRLReward, lutest.VerlReward, lutest.OpenRLHFReward):
        with pytest.raises(lutest.ArgumentError, match="allowed: a LatencyReward"):
            form(cast(Any, table))
    with pytest.raises(lutest.ArgumentError, match="workload is 'vqa'; allowed: "):
        lutest.LatencyReward(table, 1500.0, workload="vqa")


def test_no_rollout_ends_a_run_or_drowns_its_group(table: lutest.LatencyTable) -> None:
    reward = lutest.LatencyReward(table, 1500.0)
    row = {"tier": "high", "top_k": 8, "num_blocks": 16, "prompt_tokens": 500}
    silent = reward.judge({**row, "output_tokens": 0})
    assert silent == reward.judge({**row, "completion_ids": []}) == reward.judge({**row, "output_tokens": 1})
    with pytest.warns(lutest.LutestWarning, match="more than twice"):
        huge = reward.judge({**row, "prompt_tokens": 10_000_000, "output_tokens": 8})
    long = reward.judge({**row, "output_tokens": 10_000_000})
    assert silent is not None
    for outcome in (huge, long):
        assert outcome is not None
        assert -5.0 <= outcome.reward < silent.reward
    assert huge is not None
    assert (huge.unknown, huge.latency_ms) == (True, None)
    harsher = lutest.LatencyReward(table, 1500.0, weights=lutest.Weights(most_overrun=10.0))
    far = harsher.judge({**row, "output_tokens": 10_000_000})
    assert far is not None
    assert far.reward == pytest.approx(-101.0)


def timed(recorder: lutest.Recorder, key: Any, **options: Any) -> None:
    with recorder.run(key, **options) as run:
        with run.prefill():
            pass
        with run.step():
            pass


@pytest.mark.parametrize(
    ("key", "options", "said"),
    [
        (("low", 4, 12), {"sample_id": "img_0000"}, "sample_id is 'img_0000'; allowed: a whole number"),
        (("low", 4, 12), {"prompt_tokens": "5"}, "prompt_tokens is '5'"),
        (("low", 4, 12), {"prompt_tokens": 2**31}, "prompt_tokens is 2147483648"),
        ("a", {}, "'a' is no configuration: it is a tuple of tier, top_k, num_blocks"),
        (("low", 4), {}, "is no configuration"),
        (("low\ud800", 4, 12), {}, "is no configuration"),
        (("low", 2**63, 12), {}, "is no configuration"),
    ],
)
def test_what_could_not_be_stored_is_refused_before_it_is_timed(
    key: Any, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with lutest.Recorder(tmp_path, model="m") as recorder:
        with pytest.raises(lutest.ArgumentError, match=said), recorder.run(key, **{"prompt_tokens": 5, **options}):
            pytest.fail("timed")
        timed(recorder, ("low", 4, 12), prompt_tokens=5)
    with lutest.Recorder(tmp_path, model="m") as again:  # nothing stands in the way
        assert again.plan([("low", 4, 12)], 2) == [(("low", 4, 12), 1)]


def test_numbers_of_numpy_are_recorded(tmp_path: Path) -> None:
    with lutest.Recorder(tmp_path, model="m", runs_per_shard=2) as recorder:
        for number in range(3):
            key = ("low", np.int64(4), np.float64(12.0))
            timed(recorder, key, sample_id=np.int32(number), prompt_tokens=np.int64(5), text_tokens=np.int64(2))
    runs = duckdb.read_parquet(str(tmp_path / "*.parquet")).fetchall()
    assert len(runs) == 3


def test_runs_where_a_table_is_wanted_are_called_so(
    direct_runs: Path, direct_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs.csv").write_text("tier,top_k\nlow,4\n")
    with pytest.raises(lutest.TableError, match=r"logs\.csv: runs, not a table; `lutest build "):
        lutest.load(tmp_path / "logs.csv")
    assert "runs, not a table" in run(capsys, "info", direct_runs)[2]
    assert "the table stands first" in run(capsys, "check", direct_runs, direct_table)[2]
    lutest.export(direct_table, tmp_path / "t.json")
    for verb in (("info",), ("sql", "SELECT 1")):
        status, _, err = run(capsys, verb[0], tmp_path / "t.json", *verb[1:])
        assert status == 2
        assert "`lutest lookup` and `lutest feasible` read it" in err
    status, out, _ = run(capsys, "feasible", tmp_path / "t.json", 1500, "--text-tokens", 40)
    assert status == 0
    assert "27" in out


def test_a_key_of_too_few_values_shows_a_whole_one(table: lutest.LatencyTable) -> None:
    for finds in (table, lutest.OnlineCalibrator(table)):
        with pytest.raises(lutest.ArgumentError, match=r"tier, top_k, num_blocks, such as 'high', 4, 12"):
            cast(Any, finds)["low"]


def test_the_command_says_its_version_and_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"lutest {lutest.__version__}\n", "")
    status, _, err = run(capsys, "biuld", "x")
    assert status == 2
    assert "did you mean `lutest build`?" in err
    status, _, err = run(capsys, "build", "--outptu", "x")
    assert status == 2
    assert "see `lutest build --help`" in err


def test_a_table_pickles_to_no_more_than_its_file(table: lutest.LatencyTable, direct_table: Path) -> None:
    assert table.batch.total_ms(0, 150, 8, q=0.95) > 0.0  # what it keeps for speed stays here
    assert len(pickle.dumps(table)) < direct_table.stat().st_size
