"""SQL on a table: read-only, and nothing but the table within reach."""

from __future__ import annotations

import ast
import hashlib
import shutil
from pathlib import Path

import duckdb
import pytest

import lutest
from lutest.reader.errors import ArgumentError, LutestError, TableError
from lutest.tablefile.sql import connect, run_query
from tests.synthetic import make_figures, write_file

REFUSED = (
    "SET memory_limit = '8GB'",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "ATTACH '{outside}/other.duckdb' AS other",
    "ATTACH ':memory:' AS other",
    "COPY prefill TO '{outside}/stolen.csv'",
    "COPY (SELECT 1) TO '{outside}/stolen.parquet' (FORMAT parquet)",
    "EXPORT DATABASE '{outside}/stolen'",
    "SELECT * FROM read_csv('{outside}/secret.csv')",
    "SELECT * FROM '{outside}/secret.csv'",
    "SELECT * FROM read_text('{outside}/secret.csv')",
    "SELECT * FROM glob('{outside}/*')",
    "INSTALL httpfs",
    "FORCE INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{outside}/evil.duckdb_extension'",
    "CREATE TABLE mine (a INTEGER)",
    "DELETE FROM prefill",
    "UPDATE prefill SET p50_ms = 0",
    "DROP TABLE prefill",
    "SELECT * FROM local_rows",
    "SELECT * FROM read_blob('{outside}/secret.csv')",
    "SELECT * FROM read_json('{outside}/secret.csv')",
    "SELECT * FROM read_parquet('{outside}/secret.csv')",
    "SELECT * FROM sniff_csv('{outside}/secret.csv')",
    "SELECT * FROM parquet_metadata('{outside}/secret.csv')",
    "SELECT * FROM query('FROM read_text(''{outside}/secret.csv'')')",
    "SELECT * FROM query_table('{outside}/secret.csv')",
    "SUMMARIZE '{outside}/secret.csv'",
    "SELECT getenv('HOME')",
    "COPY prefill FROM '{outside}/secret.csv'",
    "COPY prefill TO '/dev/stdout'",
    "EXPLAIN ANALYZE COPY prefill TO '{outside}/stolen.csv'",
    "IMPORT DATABASE '{outside}'",
    "PRAGMA import_database('{outside}')",
    "ATTACH 'https://example.org/other.duckdb' AS other",
    "CREATE PERSISTENT SECRET s (TYPE s3, KEY_ID 'a', SECRET 'b')",
    "INSTALL h3 FROM community",
    "INSTALL '{outside}/evil.duckdb_extension'",
    "SET threads = 64",
    "SET GLOBAL memory_limit = '1TB'",
    "SET SESSION temp_directory = '{outside}'",
    "PRAGMA temp_directory = '{outside}'",
    "SET custom_extension_repository = '{outside}'",
    "SET allow_unsigned_extensions = true",
    "PRAGMA profiling_output = '{outside}/profile.json'",
    "SET log_query_path = '{outside}/log'",
    "CALL enable_logging(storage = 'file', storage_path = '{outside}')",
    "CALL enable_logging(storage = 'file', storage_path = '{outside}'); SELECT 1",
    "CREATE TEMP TABLE mine AS FROM read_csv('{outside}/secret.csv')",
    "CREATE MACRO mine() AS 1",
    "CREATE VIEW mine AS SELECT 1",
    "ALTER TABLE prefill ADD COLUMN mine INTEGER",
    "COMMENT ON TABLE prefill IS 'mine'",
    ".system ls",
    ".read {outside}/secret.csv",
    "\\! ls",
)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    return tmp_path


@pytest.mark.parametrize("statement", REFUSED)
def test_refuses_what_reaches_beyond_the_table(statement: str, direct_table: Path, outside: Path) -> None:
    import pandas as pd

    local_rows = pd.DataFrame({"a": [1]})
    assert len(local_rows) == 1  # a variable that DuckDB would find by its name, if it looked
    before = hashlib.sha256(direct_table.read_bytes()).hexdigest()
    with connect(direct_table) as connection, pytest.raises(duckdb.Error):
        connection.execute(statement.replace("{outside}", str(outside)))
    assert [path.name for path in outside.iterdir()] == ["secret.csv"]
    assert hashlib.sha256(direct_table.read_bytes()).hexdigest() == before


@pytest.mark.parametrize("form", ["{view}", "{view}; SELECT 1"])
def test_one_statement_after_another_is_refused_as_well(form: str, direct_table: Path, outside: Path) -> None:
    statement = form.replace("{view}", f"SELECT 1; COPY prefill TO '{outside}/stolen.csv'")
    with pytest.raises(LutestError, match="query: Permission Error"):
        run_query(direct_table, statement)
    assert [path.name for path in outside.iterdir()] == ["secret.csv"]


def test_a_table_that_reads_other_files_is_not_read(tmp_path: Path, outside: Path) -> None:
    """A stranger's file may hold views in the place of tables."""
    path = write_file(make_figures(), tmp_path / "stranger.duckdb")
    with duckdb.connect(str(path)) as connection:
        connection.execute("DROP TABLE output_length")
        connection.execute(
            "CREATE VIEW output_length AS"
            f" SELECT content AS workload, 1 AS output_tokens, 1 AS n FROM read_text('{outside}/secret.csv')"
        )
    with pytest.raises(TableError, match=r"secret\.csv"):
        lutest.load(path)
    with connect(path) as connection, pytest.raises(duckdb.PermissionException):
        connection.execute("FROM output_length")


def test_no_file_of_lutest_is_a_pickle() -> None:
    package = Path(lutest.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not {name.partition(".")[0] for name in names} & {"pickle", "marshal", "shelve", "joblib"}, path


def test_no_extension_is_loaded_or_installed_on_its_own(direct_table: Path) -> None:
    with connect(direct_table) as connection:
        settings = connection.execute(
            "SELECT current_setting('autoload_known_extensions'), current_setting('autoinstall_known_extensions')"
        ).fetchone()
    assert settings == (False, False)


def test_answers_queries_with_macros(direct_table: Path) -> None:
    with connect(direct_table) as connection:
        rows = connection.execute(
            "SELECT count(*), min(prefill_ms(tier, top_k, num_blocks, 200, 0.5)) FROM configs"
        ).fetchall()
    assert rows[0][0] == 27
    assert rows[0][1] > 0


def test_unsafe_reaches_files_but_never_writes_the_table(direct_table: Path, outside: Path) -> None:
    with connect(direct_table, unsafe=True) as connection:
        assert connection.execute(f"SELECT a FROM read_csv('{outside}/secret.csv')").fetchall() == [(1,)]
        connection.execute(f"COPY (SELECT 2 AS a) TO '{outside}/written.csv'")
        assert (outside / "written.csv").read_text() == "a\n2\n"
        with pytest.raises(duckdb.Error, match="read-only"):
            connection.execute("DELETE FROM prefill")


def test_limits_hold(direct_table: Path) -> None:
    with connect(direct_table, memory_limit="64MB", threads=1) as connection:
        assert connection.execute("SELECT current_setting('threads')").fetchall() == [(1,)]
        with pytest.raises(duckdb.OutOfMemoryException):
            connection.execute("SELECT list(a) FROM range(100000000) AS r(a)").fetchall()


def test_bad_limits_are_named(direct_table: Path) -> None:
    with pytest.raises(ArgumentError, match="memory limit 'much'"):
        connect(direct_table, memory_limit="much")
    with pytest.raises(ArgumentError, match="threads is 0"):
        connect(direct_table, threads=0)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.duckdb"
    path.write_text("not a database, and long enough to have a header\n" * 1000)
    with pytest.raises(TableError, match=r"notes\.duckdb"):
        connect(path)
    with pytest.raises(TableError, match="no such table"):
        connect(tmp_path / "missing.duckdb")
    with pytest.raises(TableError, match="is a folder"):
        connect(tmp_path)
    assert not (tmp_path / "missing.duckdb").exists()


@pytest.mark.parametrize(
    ("name", "message"), [(".t.duckdb.0.lutest-tmp", "a temporary file"), ("t.duckdb.wal", "a log")]
)
def test_unfinished_files_are_refused_whatever_they_hold(
    name: str, message: str, direct_table: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    shutil.copy(direct_table, path)
    with pytest.raises(TableError, match=message):
        run_query(path, "SELECT 1")


def test_does_not_open_memory_for_the_name_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TableError, match="no such table"):
        connect(":memory:")
