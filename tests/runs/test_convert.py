"""Conversion to Parquet: every run kept, and the same table built from it."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import duckdb
import pandas as pd
import pytest

from lutest.builder.build import BuildSummary, build
from lutest.reader.errors import BuildError, ConfigError, SourceError
from lutest.runs.configuration import BuildConfig, resolve_config
from lutest.runs.convert import convert
from lutest.runs.work import read_runs
from tests.children import run_child

HEADER = {"tier": "low", "top_k": 4, "num_active_blocks": 12, "device": "cpu"}


def _run(number: int, steps: Sequence[object], **changes: object) -> dict[str, object]:
    run: dict[str, object] = {
        "sample_id": number,
        "output_tokens": len(steps) + 1,
        "actual_vision_tokens": 100 + number,
        "actual_text_tokens": 20,
        "T_vision_total": 10.0 + number / 7,
        "T_LLM_prefill": 100.0 + number / 3,
        "T_LLM_decode": 46.1 * len(steps) + number / 9,
        "T_decode_per_step": steps,
    }
    return {**run, **changes}


def _write_results(folder: Path, runs: Sequence[dict[str, object]], **header: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "low.json"
    path.write_text(json.dumps({**HEADER, **header, "per_sample_results": list(runs)}))
    return folder


def _sound_runs() -> list[dict[str, object]]:
    return [_run(number, [[46.0 + step / 10 + number / 11] for step in range(number % 7)]) for number in range(40)]


def _build(runs: Path, output: Path) -> BuildSummary:
    return build({"cleaning": {"outliers": "none"}}, runs=runs, output=output)  # made-up noise has fences of its own


def _rows(path: Path, query: str, *arguments: object) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(query, list(arguments)).fetchall()


def _parquet(path: Path, columns: str = "*") -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        return connection.execute(f"SELECT {columns} FROM read_parquet(?)", [str(path)]).fetchall()


def _same_figures(first: BuildSummary, second: BuildSummary) -> None:
    tables = ("prefill", "prefill_curve", "decode", "decode_curve", "decode_total", "total", "output_length")
    for table in tables:
        rows = _rows(first.output, f"SELECT * FROM {table} ORDER BY ALL")
        assert rows == _rows(second.output, f"SELECT * FROM {table} ORDER BY ALL"), table
    assert _rows(first.output, "SELECT count(*) FROM prefill") != [(0,)]


def test_a_table_of_the_converted_runs_is_that_of_the_original(tmp_path: Path) -> None:
    results = _write_results(tmp_path / "vqa", _sound_runs())
    summary = convert(results, tmp_path / "runs.parquet")
    assert (summary.rows, summary.problems) == (40, {})
    original = _build(results, tmp_path / "original.duckdb")
    converted = _build(summary.output, tmp_path / "converted.duckdb")
    _same_figures(original, converted)
    assert _rows(converted.output, "SELECT DISTINCT workload FROM output_length") == [("vqa",)]


def test_columns_without_a_value_are_left_out(tmp_path: Path) -> None:
    results = _write_results(tmp_path / "vqa", _sound_runs())
    summary = convert(results, tmp_path / "runs.parquet")
    assert "device" in summary.columns
    assert not {"model", "accuracy", "total_ms"} & set(summary.columns)
    with duckdb.connect() as connection:
        described = connection.execute("DESCRIBE SELECT * FROM read_parquet(?)", [str(summary.output)]).fetchall()
    assert tuple(row[0] for row in described) == summary.columns


def test_the_same_runs_give_the_same_rows(tmp_path: Path) -> None:
    runs = _sound_runs()
    forward = convert(_write_results(tmp_path / "a" / "vqa", runs), tmp_path / "forward.parquet")
    backward = convert(_write_results(tmp_path / "b" / "vqa", runs[::-1]), tmp_path / "backward.parquet")
    rows = _parquet(forward.output)
    assert rows == _parquet(backward.output)
    samples = [int(sample_id) for (sample_id,) in _parquet(forward.output, "sample_id")]
    assert samples == list(range(40))


FAULTS: list[tuple[dict[str, object], str]] = [
    ({"T_LLM_prefill": "fast"}, "not_a_number"),
    ({"T_LLM_prefill": None}, "missing_value"),
    ({"T_LLM_prefill": -1.0, "T_vision_total": 0.5}, "negative_value"),
    ({"T_LLM_prefill": 1e300}, "out_of_range"),
    ({"T_LLM_prefill": 0, "T_vision_total": 0}, "zero_prefill"),
    ({"top_k": 4.5}, "not_whole"),
    ({"top_k": -0.2}, "negative_value"),
    ({"tier": None}, "missing_value"),
    ({"output_tokens": 0}, "no_output_tokens"),
    ({"output_tokens": 9}, "step_count_mismatch"),
    ({"accuracy": "good"}, "not_a_number"),
    ({"actual_vision_tokens": "NaN", "total_sequence_length": 120}, "not_finite"),
    ({"T_decode_per_step": [[46.0], ["slow"]]}, "bad_steps"),
    ({"T_decode_per_step": [[46.0], [-1.0]]}, "negative_value"),
    ({"T_decode_per_step": [[46.0], [1e300]]}, "out_of_range"),
    ({"T_LLM_decode": None, "T_decode_per_step": [[46.0, 47.0], [46.0]]}, "missing_value"),
]


def test_rejected_runs_and_repeated_positions_are_kept_as_they_are(tmp_path: Path) -> None:
    repeated = [_run(40, [[40.0, 41.0], [], [43.0]]), _run(70, [[46.5, 47.5], [46.0]])]
    bad = [_run(41 + place, [[46.0], [47.0]], **change) for place, (change, _) in enumerate(FAULTS)]
    results = _write_results(tmp_path / "vqa", [*_sound_runs(), *repeated, *bad])
    summary = convert(results, tmp_path / "runs.parquet")
    steps = dict(_parquet(summary.output, "sample_id, decode_steps_ms"))
    assert steps["40"] == [[40.0, 41.0], [], [43.0]]
    assert steps["70"] == [[46.5, 47.5], [46.0]]
    assert steps["1"] == [[46.0 + 1 / 11]]
    reasons = Counter(["bad_steps", *(reason for _, reason in FAULTS)])
    assert (summary.rows, summary.problems) == (42 + len(FAULTS), dict(reasons))
    original, converted = _read(results), _read(summary.output)
    assert [run["reason"] for run in original[40:]] == ["bad_steps", *(reason for _, reason in FAULTS), None]
    for run, again in zip(original, converted, strict=True):
        assert (run["reason"] is None) == (again["reason"] is None)
        assert run == again or run["reason"], run["sample_id"]


def _read(source: Path) -> list[dict[str, Any]]:
    """Runs as a build reads them, in the order of their samples."""
    with duckdb.connect() as connection:
        read_runs(connection, [source], BuildConfig(), Path())
        result = connection.execute("SELECT * EXCLUDE (source_id, row) FROM runs ORDER BY sample_id::INTEGER")
        names = [column[0] for column in result.description or []]
        return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def test_a_configuration_maps_columns_and_units(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("t,k,b,prompt,out,ttft,rest\nlow,4,12,100,2,0.25,0.046\n")
    (tmp_path / "build.yaml").write_text(
        "sources: runs.csv\noutput: x.duckdb\ntime_unit: s\ncolumns: {tier: t, top_k: k, num_blocks: b,"
        " prompt_tokens: prompt, output_tokens: out, prefill_ms: ttft, decode_ms: rest, device: {constant: H100}}\n"
    )
    summary = convert(tmp_path / "runs.csv", tmp_path / "runs.parquet", config=tmp_path / "build.yaml")
    assert _parquet(summary.output, "tier, top_k, num_blocks, prefill_ms, decode_ms, device") == [
        ("low", 4, 12, 250.0, 46.0, "H100")
    ]


def test_failures_leave_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "out" / "runs.parquet"
    results = _write_results(tmp_path / "vqa", _sound_runs())
    convert(results, output)
    old = output.read_bytes()
    empty = _write_results(tmp_path / "empty", [])
    strange = tmp_path / "strange.csv"
    strange.write_text("a,b\n1,2\n")
    with pytest.raises(SourceError, match=r"nowhere\.json"):
        convert(tmp_path / "nowhere.json", output)
    with pytest.raises(BuildError, match="no runs"):
        convert(empty, output)
    with pytest.raises(ConfigError, match=r"no run has tier.* the fields are a, b"):
        convert(strange, output)
    with pytest.raises(ConfigError, match=r"must end in \.parquet"):
        convert(strange, tmp_path / "out" / "runs.csv")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(BuildError, match="is a folder"):
        convert(strange, tmp_path / "folder.parquet")
    with pytest.raises(BuildError, match=r"cannot be written|cannot make the folder"):
        convert(results, output / "below" / "runs.parquet")
    assert output.read_bytes() == old
    assert [path for path in output.parent.iterdir() if not path.name.endswith(".lutest-lock")] == [output]


def test_only_a_converted_file_is_replaced(tmp_path: Path) -> None:
    results = _write_results(tmp_path / "vqa", _sound_runs())
    other = tmp_path / "other.parquet"
    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT 1 AS a) TO '{other}' (FORMAT parquet)")
    with pytest.raises(BuildError, match=r"other\.parquet: another Parquet file stands there"):
        convert(results, other)
    summary = convert(results, tmp_path / "runs.parquet")
    with pytest.raises(BuildError, match=r"runs\.parquet: is one of the sources"):
        convert(summary.output, summary.output)
    assert convert(results, summary.output).rows == summary.rows


def test_a_key_of_ones_own_stands_under_its_names(tmp_path: Path) -> None:
    frame = pd.DataFrame({"card": ["H100", "A100"], "users": [8, 0.5], "prompt_tokens": 10, "output_tokens": 3})
    frame = frame.assign(prefill_ms=[5.5, 6.5], total_ms=[15.5, 6.5])
    config = {"key": ["gpu", "users"], "columns": {"gpu": "card"}}
    summary = convert(frame, tmp_path / "runs.parquet", config=config)
    assert summary.columns == ("workload", "gpu", "users", "prompt_tokens", "output_tokens", "prefill_ms", "total_ms")
    assert _parquet(summary.output, "gpu, users, total_ms") == [("A100", 0.5, 6.5), ("H100", 8.0, 15.5)]
    with duckdb.connect() as connection:
        key = read_runs(connection, [summary.output], resolve_config({"key": ["gpu", "users"]}), Path())
        runs = connection.execute("SELECT key_id, decode_ms, one_pass, clamped FROM runs ORDER BY key_id").fetchall()
    assert [(column.name, column.kind) for column in key] == [("gpu", "category"), ("users", "number")]
    assert runs == [(0, 0.0, True, True), (1, 10.0, True, False)]


def _convert_to_the_last_step(runs: str, output: str) -> None:
    """Convert, to be killed when the file is written but not yet in its place; for a child, which ends with that."""
    mock.patch.object(os, "replace", side_effect=lambda *_: os.kill(os.getpid(), signal.SIGKILL)).start()
    convert(runs, output)


def test_a_conversion_clears_the_work_of_a_killed_one(tmp_path: Path) -> None:
    runs = str(_write_results(tmp_path / "vqa", _sound_runs()))
    output = tmp_path / "out" / "runs.parquet"
    assert run_child(_convert_to_the_last_step, runs, str(output)).killed
    assert any(path.name.endswith(".lutest-tmp") for path in output.parent.iterdir())
    neighbour = output.parent / f".other.parquet.{'0' * 32}.lutest-tmp"
    neighbour.write_bytes(b"of another file")
    convert(runs, output)
    left = [path for path in output.parent.iterdir() if not path.name.endswith(".lutest-lock")]
    assert sorted(left) == [neighbour, output]


def test_the_shipped_runs_are_what_the_command_writes(direct_runs: Path, tmp_path: Path) -> None:
    again = convert(direct_runs, tmp_path / "again.parquet")
    assert again.rows == 2025
    assert _parquet(again.output) == _parquet(direct_runs)
    assert direct_runs.stat().st_size < 1_000_000
