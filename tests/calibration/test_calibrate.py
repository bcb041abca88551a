"""Carrying a table to another device: the maps, the new file, and the command."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lutest
from lutest.builder.matched_runs import match_runs
from lutest.calibration.maps import IDENTITY, KeyMaps, StageMap, mapped_figures, mapped_key
from lutest.calibration.paired_runs import MOST_RUNS, pair_runs
from lutest.cli.main import main
from lutest.runs.work import work_database
from lutest.tablefile.verify import content_hash
from tests.calibration.conftest import COLUMNS
from tests.conftest import RUNS
from tests.synthetic import make_figures


@pytest.fixture(scope="module")
def wide_runs() -> pd.DataFrame:
    with duckdb.connect() as connection:
        return connection.execute("SELECT * FROM read_parquet(?)", [str(RUNS / "cpu-wide-preset.parquet")]).df()


@pytest.fixture(scope="module")
def calibrated(parent: Path, wide_runs: pd.DataFrame) -> Path:
    return lutest.calibrate(parent, wide_runs.sample(50, random_state=0), parent.with_name("new.duckdb")).output


def error(table: lutest.LatencyTable, runs: pd.DataFrame, stage: str) -> float:
    """Median absolute relative error of P50."""
    ids = table.batch.key_ids(*(runs[name].to_numpy() for name in table.key_columns))
    prompts, outputs = runs["prompt_tokens"].to_numpy(), runs["output_tokens"].to_numpy()
    predicted = (
        table.batch.prefill_ms(ids, prompts) if stage == "prefill" else table.batch.total_ms(ids, prompts, outputs)
    )
    return float(np.median(np.abs(predicted / runs[f"{stage}_ms"].to_numpy() - 1.0)))


def test_fifty_runs_carry_a_table_to_a_wider_model(
    table: lutest.LatencyTable, calibrated: Path, wide_runs: pd.DataFrame
) -> None:
    lutest.verify(calibrated)
    new = lutest.load(calibrated)
    for stage in ("prefill", "total"):
        assert error(table, wide_runs, stage) > 0.25
        assert error(new, wide_runs, stage) < 0.04
    for score in lutest.evaluate(new, wide_runs).overall:
        if score.stage in ("prefill", "total"):
            assert 0.90 < score.coverage[0.95] < 0.99


def test_a_factor_on_all_latencies_is_found_by_ten_runs(parent: Path, others: pd.DataFrame, tmp_path: Path) -> None:
    slower = others.assign(prefill_ms=2.5 * others["prefill_ms"], decode_ms=2.5 * others["decode_ms"])
    done = lutest.calibrate(parent, slower.sample(10, random_state=1), tmp_path / "new.duckdb")
    assert done.prefill is not None
    assert done.decode is not None
    assert done.prefill.scale[1] == pytest.approx(2.5, rel=0.05)
    assert done.decode.scale[1] == pytest.approx(2.5, rel=0.05)
    assert done.n_runs == 10


def test_one_run_without_decode_is_enough_and_leaves_decode_alone(
    parent: Path, table: lutest.LatencyTable, tmp_path: Path
) -> None:
    run = pd.DataFrame([("low", 4, 12, 100, 1, 300.0, 0.0)], columns=COLUMNS)
    done = lutest.calibrate(parent, run, tmp_path / "new.duckdb")
    old, new = table["low", 4, 12], lutest.load(done.output)["low", 4, 12]
    assert done.decode is None
    assert new.prefill_ms(100) == pytest.approx(300.0, rel=0.01)
    assert new.decode_ms(100, 9, 0.95) == pytest.approx(old.decode_ms(100, 9, 0.95), rel=1e-9)


def test_clamped_decode_and_wild_runs_do_not_carry_it_away(
    parent: Path, others: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = others.sample(40, random_state=2).reset_index(drop=True)
    runs.loc[:2, "prefill_ms"] *= 10
    runs.loc[runs.index[runs["output_tokens"] > 1][:4], "decode_ms"] = 0.0
    runs.to_csv(tmp_path / "runs.csv", index=False)
    arguments = ["calibrate", str(parent), str(tmp_path / "runs.csv"), "-o", str(tmp_path / "new.duckdb"), "--json"]
    assert main(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["n_runs"] == 40
    assert done["prefill"]["scale"][1] == pytest.approx(1.0, rel=0.05)
    assert done["decode"]["scale"][1] == pytest.approx(1.0, rel=0.05)


def test_no_more_runs_are_taken_than_help(table: lutest.LatencyTable, wide_runs: pd.DataFrame) -> None:
    with work_database() as connection:
        match_runs(connection, table, wide_runs[COLUMNS])
        prefill, decode = pair_runs(connection, table)
    assert len(prefill.key_id) == MOST_RUNS < len(wide_runs)
    assert 0 < len(decode.key_id) <= MOST_RUNS


def test_the_file_says_calibrated_and_keeps_its_parent(
    parent: Path, table: lutest.LatencyTable, calibrated: Path
) -> None:
    with duckdb.connect(str(parent), read_only=True) as connection:
        parent_hash = content_hash(connection)
    with duckdb.connect(str(calibrated), read_only=True) as connection:
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        assert meta["parent_content_hash"] == parent_hash == content_hash(connection, "parent")
        for name in ("prefill_curve", "decode_curve"):
            sources = connection.execute(f"SELECT DISTINCT source FROM {name} ORDER BY 1").fetchall()
            assert sources == [("calibrated",), ("extrapolated",)]  # what runs never reached stays a guess
        kept = connection.execute("SELECT DISTINCT source FROM parent.prefill_curve ORDER BY 1").fetchall()
        assert ("measured",) in kept
        uncommented = connection.execute(
            "SELECT count(*) FROM duckdb_columns() WHERE schema_name IN ('main', 'parent') AND NOT internal "
            "AND comment IS NULL AND table_name IN (SELECT table_name FROM duckdb_tables())"
        ).fetchone()
        assert uncommented == (0,)
    (source,) = json.loads(meta["calibration"])["runs"]
    assert source["rows_read"] == source["rows_used"] == 50
    assert len(source["sha256"]) == 64
    maps = json.loads(meta["calibration_maps"])
    assert len(maps) == 27
    assert "hidden 256" in meta["model"]
    new = lutest.load(calibrated)
    (first,) = (held["prefill"] for held in maps if tuple(held["key"]) == new.keys[0])
    curves = (held.figures.keys[0].prefill_curve.values_ms[0] for held in (table, new))
    for before, after in zip(*curves, strict=True):
        assert after == pytest.approx(max(first["scale"] * before + first["offset_ms"], first["least_ms"]), rel=1e-9)


def test_entries_explain_themselves_as_calibrated(calibrated: Path) -> None:
    table = lutest.load(calibrated, missing="interpolate")
    assert table["low", 4, 12].source == "calibrated"
    assert table["low", 4, 12].explain(100, 8, 0.95).total.source == "calibrated"
    assert table["low", 4, 12].explain(10_000, 8).total.source == "extrapolated"
    assert table.lookup("low", 5, 13).source == "interpolated"


def test_sql_gives_the_same_numbers(calibrated: Path) -> None:
    table = lutest.load(calibrated)
    with duckdb.connect(str(calibrated), read_only=True) as connection:
        for key in table.keys[::5]:
            found = connection.execute("SELECT total_ms(?, ?, ?, 90, 7, 0.95)", list(key)).fetchone()
            assert found is not None
            assert found[0] == pytest.approx(table[key].total_ms(90, 7, 0.95), rel=1e-9)


def test_the_same_runs_give_the_same_table(
    parent: Path, calibrated: Path, wide_runs: pd.DataFrame, tmp_path: Path
) -> None:
    other = lutest.calibrate(parent, wide_runs.sample(50, random_state=0).iloc[::-1], tmp_path / "other.duckdb").output
    with duckdb.connect(str(calibrated), read_only=True) as a, duckdb.connect(str(other), read_only=True) as b:
        query = "SELECT * FROM prefill_curve ORDER BY ALL"
        for left, right in zip(a.execute(query).fetchall(), b.execute(query).fetchall(), strict=True):
            assert left[:4] == right[:4]
            assert left[5] == pytest.approx(right[5], rel=1e-6)


def test_a_calibrated_table_is_calibrated_again_with_all_its_parents(
    parent: Path, calibrated: Path, others: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, output = tmp_path / "few.csv", tmp_path / "back.duckdb"
    others.sample(20, random_state=4).to_csv(few, index=False)
    assert main(["calibrate", str(calibrated), str(few), "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "calibrated with 20 runs\n" in printed
    assert "prefill: P50 x 0." in printed
    assert main(["info", str(output)]) == 0
    assert "with 20 runs from the table " + lutest.load(calibrated).meta["content_hash"] in capsys.readouterr().out
    lutest.verify(output)
    with duckdb.connect(str(output), read_only=True) as connection:
        assert content_hash(connection, "parent_2") == lutest.load(parent).meta["content_hash"]
    runs = others.assign(total_ms=others["prefill_ms"] + others["decode_ms"])
    assert error(lutest.load(output), runs, "prefill") < 0.05


def test_a_changed_parent_inside_the_file_is_noticed(calibrated: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.duckdb"
    copy.write_bytes(calibrated.read_bytes())
    with duckdb.connect(str(copy)) as connection:
        connection.execute("UPDATE parent.prefill SET p50_ms = p50_ms * 2")
    with pytest.raises(lutest.TableError):
        lutest.verify(copy)


def test_what_cannot_be_done_is_told_and_nothing_is_replaced(
    parent: Path, others: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, output = tmp_path / "runs.csv", tmp_path / "new.duckdb"
    others.head(20).to_csv(runs, index=False)
    before = {path: path.read_bytes() for path in (parent, runs)}
    for path, said in ((parent, "is one of the sources"), (runs, "a text file stands there")):
        assert main(["calibrate", str(parent), str(runs), "-o", str(path)]) == 2
        assert said in capsys.readouterr().err
        assert path.read_bytes() == before[path]
    assert main(["calibrate", str(parent), str(tmp_path / "none.parquet"), "-o", str(output)]) == 2
    assert "none.parquet" in capsys.readouterr().err
    other = pd.DataFrame([("tiny", 4, 12, 100, 1, 300.0, 0.0)], columns=COLUMNS)
    with pytest.raises(lutest.SourceError, match="configuration not in the table"):
        lutest.calibrate(parent, other, output)
    two = others.head(20).assign(device=["A100", "H100"] * 10, tier="low", top_k=4, num_blocks=12)
    with pytest.raises(lutest.SourceError, match="runs of several devices: A100, H100"):
        lutest.calibrate(parent, two, output)
    assert not output.exists()


def test_the_identity_changes_nothing_but_the_source() -> None:
    figures = make_figures()
    mapped = mapped_figures(figures, {held.key: KeyMaps() for held in figures.keys})
    for old, new in zip(figures.keys, mapped.keys, strict=True):
        assert new.source == "calibrated"
        assert new.prefill.quantiles_ms == pytest.approx(old.prefill.quantiles_ms, rel=1e-12)
        for before, after in zip(old.prefill_curve.values_ms, new.prefill_curve.values_ms, strict=True):
            assert after == pytest.approx(before, rel=1e-12)
        assert (new.decode_total is None) == (old.decode_total is None)
        if old.decode_total is not None and new.decode_total is not None:
            for before, after in zip(old.decode_total.ratios, new.decode_total.ratios, strict=True):
                assert after == pytest.approx(before, rel=1e-12)


@given(
    scale=st.floats(0.05, 20.0),
    offset_ms=st.floats(-0.5, 20.0),
    least_ms=st.floats(0.01, 50.0),
    stretch=st.floats(0.0, 5.0),
    widening=st.floats(0.0, 0.5),
)
def test_mapped_figures_stay_positive_and_ordered(
    scale: float, offset_ms: float, least_ms: float, stretch: float, widening: float
) -> None:
    stage = StageMap(scale, offset_ms, least_ms, (stretch,) * 4, (widening,) * 4)
    held = make_figures().keys[0]
    mapped = mapped_key(held, KeyMaps(stage, stage, stage), median=1)
    assert mapped.decode_curve is not None
    assert mapped.decode_total is not None
    assert mapped.decode is not None
    rows = [mapped.prefill.quantiles_ms, mapped.decode.quantiles_ms]
    for values in (mapped.prefill_curve.values_ms, mapped.decode_curve.values_ms, mapped.decode_total.ratios):
        rows += list(zip(*values, strict=True))
    for row in rows:
        assert all(0.0 < low <= high for low, high in pairwise(row))


def test_a_pure_scale_scales_every_answer() -> None:
    figures = make_figures()
    twice = StageMap(scale=2.0)
    maps = {held.key: KeyMaps(twice, twice, IDENTITY) for held in figures.keys}
    old, new = (lutest.LatencyTable(held)["low", 8, 16] for held in (figures, mapped_figures(figures, maps)))
    for q in figures.quantiles:
        for prompt in (None, 3, 95, 700):
            assert new.total_ms(prompt, 9, q) == pytest.approx(2 * old.total_ms(prompt, 9, q), rel=1e-9)
