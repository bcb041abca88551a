"""Reading a table file: all of it, or one line that says what is wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import duckdb
import pytest

import lutest
from lutest.reader.errors import TableError
from lutest.reader.file import read_figures
from tests.synthetic import make_figures, write_file


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_file(make_figures(), tmp_path_factory.mktemp("tables") / "table.duckdb")


@pytest.fixture
def path(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "table.duckdb"))


def spoil(path: Path, statement: str) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute(statement)


def test_everything_comes_back(written: Path) -> None:
    assert read_figures(written) == make_figures()
    assert read_figures(str(written)) == make_figures()


def test_no_connection_is_left(path: Path) -> None:
    read_figures(path)
    spoil(path, "CREATE TABLE other (x INTEGER)")  # would fail beside a reader of this process
    assert read_figures(path) == make_figures()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_that_the_caller_has_open_is_read(path: Path, read_only: bool) -> None:
    with duckdb.connect(str(path), read_only=read_only) as connection:
        assert read_figures(path) == make_figures()
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_file_that_is_read_is_not_changed(path: Path) -> None:
    before = path.read_bytes()
    path.chmod(0o444)
    lutest.load(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_is_not_a_table(tmp_path: Path) -> None:
    empty, text, plain, half = (tmp_path / name for name in ("empty", "text", "plain.duckdb", "half.duckdb"))
    empty.touch()
    text.write_text("tier,top_k\nlow,4\n" * 1000)
    with duckdb.connect(str(plain)) as connection:
        connection.execute("CREATE TABLE t (x INTEGER)")
    half.write_bytes(plain.read_bytes()[:5000])
    for path, said in (
        (tmp_path / "none.duckdb", "no such table file; build one with `lutest build`"),
        (tmp_path, "is a folder"),
        (empty, "not a DuckDB file, so it is no table"),
        (text, "not a DuckDB file, so it is no table"),
        (plain, "not a latency table"),
        (half, ""),
    ):
        with pytest.raises(TableError) as caught:
            lutest.load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert said in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE meta SET value = '99' WHERE key = 'schema_version'", "schema version 99, this lutest reads version 1"),
        ("DELETE FROM meta WHERE key = 'schema_version'", "no schema version"),
        ("UPDATE meta SET value = '[0.9]' WHERE key = 'quantiles'", "quantiles is '[0.9]'"),
        ("UPDATE meta SET value = '0.5, 0.95' WHERE key = 'quantiles'", "quantiles is '0.5, 0.95'"),
        ("UPDATE meta SET value = '[0.5, 0.99]' WHERE key = 'quantiles'", "with 0.5 and 0.95"),
        ("UPDATE meta SET value = '[0.5, 0.9, 0.95]' WHERE key = 'quantiles'", "p90_ms"),
        ("DROP TABLE decode_curve", "decode_curve"),
        ("ALTER TABLE prefill DROP COLUMN p99_ms", "p99_ms"),
        ("DELETE FROM prefill", "table prefill: holds no configuration"),
        (
            "DELETE FROM prefill WHERE top_k = 8 AND tier = 'low'",
            "top_k=8, num_blocks=12: has rows, but none in the tables beside it",
        ),
        ("DELETE FROM prefill_curve WHERE tier = 'high' AND top_k = 8", "table prefill_curve, tier='high', top_k=8"),
        ("DELETE FROM decode WHERE tier = 'high'", "table decode_curve, tier='high'"),
        ("DELETE FROM decode_curve WHERE tier = 'high'", "table decode_curve, tier='high'"),
        ("DELETE FROM decode_total WHERE tier = 'high'", "table decode_total, tier='high'"),
        ("DELETE FROM total WHERE tier = 'high'", "table total, tier='high'"),
        ("INSERT INTO prefill SELECT * FROM prefill WHERE tier = 'low'", "has 2 rows, not one"),
        ("INSERT INTO prefill_curve SELECT * FROM prefill_curve", "knot 400 after 400"),
        ("UPDATE prefill_curve SET prompt_tokens = -1 WHERE prompt_tokens = 40", "knot -1"),
        ("UPDATE prefill_curve SET prompt_tokens = NULL WHERE prompt_tokens = 40", "prompt_tokens is NULL"),
        ("UPDATE decode_curve SET kv_len = 0 WHERE kv_len = 41", "knot 0"),
        ("UPDATE decode_total SET decode_steps = 0 WHERE decode_steps = 1", "knot 0"),
        ("UPDATE prefill_curve SET p95_ms = 0.5 WHERE prompt_tokens = 600", "at 600: p95_ms is 0.5, below"),
        ("UPDATE prefill_curve SET p50_ms = 'nan' WHERE prompt_tokens = 600", "at 600: p50_ms is nan"),
        ("UPDATE prefill_curve SET p50_ms = NULL WHERE prompt_tokens = 600", "at 600: p50_ms is None"),
        ("UPDATE decode_curve SET p10_ms = 0 WHERE kv_len = 401", "at 401: p10_ms is 0.0"),
        ("UPDATE decode_curve SET p99_ms = 'infinity' WHERE kv_len = 401", "at 401: p99_ms is inf"),
        ("UPDATE decode_curve SET source = 'guessed' WHERE kv_len = 401", "source is 'guessed'"),
        ("UPDATE decode_curve SET n = -1 WHERE kv_len = 401", "n is -1"),
        ("UPDATE decode_total SET p50_ratio = 0 WHERE decode_steps = 4", "at 4: p50_ratio is 0.0"),
        ("UPDATE decode_total SET p95_ratio = 0.95 WHERE decode_steps = 4", "at 4: p95_ratio is 0.95, below"),
        ("UPDATE total SET p95_correlation = 1.5 WHERE top_k = 8", "p95_correlation is 1.5, not between 0 and 1"),
        ("UPDATE total SET p95_correlation = NULL WHERE top_k = 8", "p95_correlation is None"),
        ("UPDATE prefill SET p95_ms = p50_ms - 1 WHERE top_k = 8", "below the quantile before it"),
        ("UPDATE prefill SET p95_upper_ms = -1 WHERE top_k = 8", "p95_upper_ms is -1.0"),
        ("UPDATE prefill SET mean_ms = 'nan' WHERE top_k = 8", "mean_ms is nan"),
        ("UPDATE prefill SET n = 0 WHERE top_k = 8", "n is 0"),
        ("UPDATE prefill SET prompt_tokens_p50 = NULL WHERE top_k = 8", "prompt_tokens_p50 is None"),
        ("UPDATE prefill SET top_k = NULL WHERE top_k = 8", "top_k of the configuration ('"),
        ("ALTER TABLE prefill ALTER p50_ms TYPE VARCHAR", "p50_ms is '"),
        ("UPDATE output_length SET n = 0 WHERE output_tokens = 2", "n is 0"),
        ("INSERT INTO output_length SELECT * FROM output_length", "twice"),
        ("UPDATE quality SET accuracy = 'nan' WHERE n = 40", "accuracy is nan"),
    ],
)
def test_damage_is_named(path: Path, statement: str, said: str) -> None:
    spoil(path, statement)
    with pytest.raises(TableError) as caught:
        read_figures(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "lutest build" in message
    assert "\n" not in message


def test_a_null_correlation_of_the_median_is_none(path: Path) -> None:
    spoil(path, "UPDATE total SET p50_correlation = NULL")
    assert read_figures(path) == make_figures()


@pytest.mark.parametrize(
    "columns",
    [
        "low, 4",
        "[]",
        '[{"name": "tier", "kind": "number", "type": "VARCHAR"}]',
        '[{"name": "tier", "kind": "category"}]',
        '[{"name": 5, "kind": "category", "type": "VARCHAR"}]',
    ],
)
def test_key_columns_are_checked(path: Path, columns: str) -> None:
    spoil(path, f"UPDATE meta SET value = '{columns}' WHERE key = 'key_columns'")
    with pytest.raises(TableError, match=r"table meta: key_columns is .*, not one to eight columns"):
        read_figures(path)


def test_keys_are_in_order_whatever_the_order_of_rows(path: Path) -> None:
    for table in ("prefill", "prefill_curve", "decode", "decode_curve", "decode_total", "total", "quality"):
        spoil(path, f"UPDATE {table} SET tier = 'zero' WHERE tier = 'low'")
    keys = [held.key for held in read_figures(path).keys]
    assert keys == sorted(keys)
    assert keys[-1] == ("zero", 8, 16)


def test_a_mixed_table_says_so(path: Path) -> None:
    spoil(path, """INSERT INTO meta VALUES ('mixed', '{"device": ["A100", "H100"], "model": ["m"]}')""")
    explained = lutest.load(path)["low", 4, 12].explain(50, 3)
    assert "of runs that are mixed: device A100, H100; model m" in str(explained)
