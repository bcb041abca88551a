"""Exports: all of a table as plain data, loaded by validation alone."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import duckdb
import pandas as pd
import pytest

import lutest
from lutest.builder.build import build
from lutest.cli.main import main
from lutest.reader.errors import ArgumentError, BuildError, TableError
from lutest.reader.file import read_figures
from lutest.reader.names import quote
from lutest.tablefile.export import export
from lutest.tablefile.schema import TABLES
from tests import mutation
from tests.runs_frame import noisy_runs
from tests.synthetic import KEY_COLUMNS, make_figures, write_file


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table with a hostile tier, accuracies, and rejected runs whose figures are not finite."""
    frame = noisy_runs((("low", 4, 12), (mutation.HOSTILE_TIER, 4, 12)), runs_per_key=20).assign(accuracy=0.5)
    bad = frame.head(3).assign(prefill_ms=["NaN", "-Infinity", "Infinity"], decode_ms=[None, "1e400", -1.5])
    runs = pd.concat([frame, bad]).astype(object)
    return build(runs=runs, output=tmp_path_factory.mktemp("table") / "t.duckdb").output


@pytest.fixture(scope="module")
def exported(table: Path) -> Path:
    return export(table, table.with_name("t.json")).output


@pytest.fixture
def content(exported: Path) -> Any:
    return json.loads(exported.read_text(encoding="utf-8"))


def _rows(path: Path, name: str) -> list[tuple[Any, ...]]:
    order = ", ".join(map(quote, TABLES[name].ordered_by(KEY_COLUMNS)))
    with duckdb.connect(str(path), read_only=True) as connection:
        return connection.execute(f"SELECT * FROM {name} ORDER BY {order}").fetchall()


def test_json_gives_back_the_very_same_figures(table: Path, exported: Path) -> None:
    assert read_figures(exported) == read_figures(table)
    original, loaded = lutest.load(table), lutest.load(exported)
    for key in original.keys:
        assert loaded[key].total_ms(100, 9, 0.95) == original[key].total_ms(100, 9, 0.95)
    assert dict(loaded.meta) == dict(original.meta)


def test_json_holds_every_row_of_every_table(table: Path, content: Any) -> None:
    assert content["tables"].keys() == TABLES.keys()
    for name, held in content["tables"].items():
        rows = [tuple(float(value) if value in ("NaN", "Infinity", "-Infinity") else value for value in row)
                for row in held["rows"]]  # fmt: skip
        assert repr(rows) == repr(_rows(table, name))
    assert len(content["tables"]["rejected_runs"]["rows"]) == 3


def test_loading_an_export_needs_no_duckdb(exported: Path) -> None:
    code = (
        "import sys, lutest\n"
        f"lutest.load({str(exported)!r})['low', 4, 12].total_ms(100, 9, 0.95)\n"
        "assert not {'duckdb', 'pandas', 'pickle'} & set(sys.modules) - {'pickle'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parquet_holds_every_row_of_every_table(table: Path, tmp_path: Path) -> None:
    summary = export(table, tmp_path / "it's", parquet=True)
    assert {path.name for path in summary.output.iterdir()} == {f"{name}.parquet" for name in TABLES}
    with duckdb.connect() as connection:
        for name in TABLES:
            path = str(summary.output / f"{name}.parquet")
            rows = connection.execute("SELECT * FROM read_parquet(?)", [path]).fetchall()
            assert repr(rows) == repr(_rows(table, name))
            assert summary.rows[name] == len(rows)
    assert [path.name for path in tmp_path.iterdir()] == ["it's"]


def test_command(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "t.json"
    assert main(["export", str(table), "-o", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert main(["export", str(table), "-o", str(tmp_path / "folder"), "--parquet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]["prefill"] == 2
    assert main(["lookup", str(output), "low", "4", "12", "--output-tokens", "9"]) == 0
    assert "total" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "parquet"), [("t.duckdb", False), ("t", False), ("full", True), ("file.json", True)])
def test_output_is_named_as_it_has_to_be(name: str, parquet: bool, table: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file.json").write_text("mine")
    with pytest.raises(ArgumentError, match=name):
        export(table, tmp_path / name, parquet=parquet)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file.json").read_text() == "mine"


def test_what_cannot_be_exported(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="an export already"):
        export(exported, tmp_path / "again.json")
    with pytest.raises(TableError, match="no such table"):
        export(tmp_path / "missing.duckdb", tmp_path / "t.json")
    path = write_file(make_figures(), tmp_path / "partial.duckdb")
    with duckdb.connect(str(path)) as connection:
        connection.execute("DROP TABLE sources")
    shutil.copy(exported, tmp_path / "t.json")
    with pytest.raises(TableError, match="sources"):
        export(path, tmp_path / "t.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="cannot be written"):
        export(path, tmp_path / "file" / "t.json")
    assert (tmp_path / "t.json").read_bytes() == exported.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "partial.duckdb", "t.json"]


@pytest.mark.parametrize("parquet", [False, True])
def test_a_stranger_exports_nothing_of_ours(parquet: bool, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("secret\n")
    path = write_file(make_figures(), tmp_path / "stranger.duckdb")
    with duckdb.connect(str(path)) as connection:
        connection.execute("DROP TABLE sources")
        connection.execute(
            f"CREATE VIEW sources AS SELECT 1 AS source_id, content AS path FROM read_text('{tmp_path}/secret.csv')"
        )
    with pytest.raises(TableError, match="Permission"):
        export(path, tmp_path / "t.json", parquet=parquet)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["secret.csv", "stranger.duckdb"]


def _set(*place: Any, value: Any) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for step in place[:-1]:
            content = content[step]
        content[place[-1]] = value

    return change


FIRST = ("tables", "prefill", "rows", 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("format", value="other"), 'no "format": "lutest export"'),
        (_set("version", value=2), "version 2 of the export format"),
        (_set("version", value=True), "version True"),
        (_set("tables", value=[]), "table meta is missing"),
        (_set("tables", "prefill", value=None), "table prefill is missing"),
        (_set("tables", "prefill", "rows", value={}), "not made of columns and rows"),
        (_set("tables", "prefill", "columns", value=["tier"]), "no column top_k"),
        (_set(*FIRST, value=["low"]), "table prefill, row 1: not a list of 15"),
        (_set(*FIRST, 0, value=["low"]), "row 1: a value is a list"),
        (_set(*FIRST, 0, value=7), "is no category"),
        (_set(*FIRST, 1, value=4.0), "is no number"),
        (_set(*FIRST, 3, value=True), "n is True"),
        (_set(*FIRST, 4, value=-1.0), "not finite and above 0"),
        (_set(*FIRST, 4, value=12), "not finite and above 0"),
        (_set(*FIRST, 4, value="NaN"), "not finite and above 0"),
        (_set(*FIRST, 4, value=float("nan")), "NaN is no number"),
        (_set(*FIRST, 4, value=1e300), "below the quantile before it"),
        (_set(*FIRST, 3, value=2**63), "is too large"),
        (_set("tables", "prefill", "rows", value=[]), "holds no configuration"),
        (_set("tables", "meta", "rows", value=[]), "has no schema version"),
        (_set("tables", "decode_curve", "rows", value=[]), "has no rows"),
        (_set("tables", "quality", "rows", 0, 6, value="x"), "accuracy_lower is 'x'"),
        (_set("tables", "quality", "rows", 0, 3, value=7), "workload is 7"),
        (_set("tables", "output_length", "rows", 0, 0, value=None), "workload is None"),
        (_set("tables", "meta", "rows", 0, 1, value=None), "None, not text"),
    ],
)
def test_an_unsound_export_is_refused_in_one_line(
    change: Callable[[Any], None], words: str, content: Any, tmp_path: Path
) -> None:
    changed = copy.deepcopy(content)
    change(changed)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(TableError, match=r"t\.json: ") as caught:
        lutest.load(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 100_000, "{", '{"a":' * 50_000, "\0", '{"format": "lutest export", "version": ' + "9" * 5000],
)
def test_what_is_no_export_at_all(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(TableError, match=r"t\.json: not"):
        lutest.load(path)


def test_damaged_exports_are_refused_or_answer(exported: Path, tmp_path: Path) -> None:
    whole, path = exported.read_bytes(), tmp_path / "t.json"
    outcomes = set()
    for seed in range(150):
        path.write_bytes(mutation.damaged(Random(seed), whole))
        try:
            table = lutest.load(path)
        except TableError as error:
            outcomes.add("refused")
            message = str(error)
            assert message.startswith(f"{path}: ")
            assert message.isprintable()
            continue
        outcomes.add("loaded")
        for key in table.keys:
            totals = [table[key].total_ms(100, 9, q) for q in table.quantiles]
            assert 0 < totals[0] <= totals[-1]
    assert outcomes == {"refused", "loaded"}
