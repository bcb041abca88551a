"""SQL users and Python callers get the same numbers, and every object of the file says what it is."""

from __future__ import annotations

import random
from pathlib import Path

import duckdb
import pytest

import lutest


@pytest.mark.parametrize("name", ["direct", "subtraction"])
def test_macros_agree_with_the_reader_on_random_queries(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(f"{name}_table")
    table = lutest.load(path)
    generator = random.Random(2)
    queries = []
    for index in range(1000):
        key = generator.choice(table.keys)
        knots = (0, 1, 2, 17, 300, 635, 2000)
        prompt = generator.choice(knots) if index % 5 == 0 else generator.randrange(0, 900)
        tokens = generator.choice((1, 2, 3, 9, 257, 3000)) if index % 3 == 0 else generator.randrange(1, 300)
        queries.append((*key, prompt, tokens, generator.choice(table.quantiles)))
    with duckdb.connect(str(path), read_only=True) as connection:
        connection.execute(
            "CREATE TEMP TABLE queries (i INT, t VARCHAR, k INT, b INT, p BIGINT, n BIGINT, level DOUBLE)"
        )
        connection.executemany(
            "INSERT INTO queries VALUES (?, ?, ?, ?, ?, ?, ?)", [(i, *query) for i, query in enumerate(queries)]
        )
        answers = connection.execute(
            """
            SELECT prefill_ms(t, k, b, p, level), decode_step_ms(t, k, b, p + n, level),
                decode_ms(t, k, b, p, n, level), total_ms(t, k, b, p, n, level)
            FROM queries ORDER BY i
            """
        ).fetchall()
    assert len(answers) == 1000
    for (tier, top_k, num_blocks, prompt, tokens, q), answer in zip(queries, answers, strict=True):
        key = lutest.Key(tier, top_k, num_blocks)
        expected = (
            table.prefill_ms(*key, prompt, q),
            table.decode_step_ms(*key, prompt + tokens, q),
            table.decode_ms(*key, prompt, tokens, q),
            table.total_ms(*key, prompt, tokens, q),
        )
        assert answer == pytest.approx(expected, rel=1e-9)


def test_feasible_is_that_of_the_reader(direct_table: Path) -> None:
    table = lutest.load(direct_table)
    for budget in (1.0, 300.0, 800.0, 1e9):
        with duckdb.connect(str(direct_table), read_only=True) as connection:
            rows = connection.execute("SELECT tier, top_k, num_blocks FROM feasible(?)", [budget]).fetchall()
        assert sorted(rows) == sorted(map(tuple, table.feasible(budget)))


def test_a_level_that_the_table_lacks_is_an_error(direct_table: Path) -> None:
    with (
        duckdb.connect(str(direct_table), read_only=True) as connection,
        pytest.raises(duckdb.Error, match=r"this table holds q = 0\.5, 0\.95, not q = 0\.9"),
    ):
        connection.execute("SELECT prefill_ms('low', 4, 12, 100, 0.9)").fetchall()


def test_an_unknown_key_is_null_never_zero(direct_table: Path) -> None:
    with duckdb.connect(str(direct_table), read_only=True) as connection:
        answer = connection.execute(
            "SELECT prefill_ms('low', 5, 12, 100, 0.5), total_ms('low', 5, 12, 100, 9, 0.5)"
        ).fetchall()
    assert answer == [(None, None)]


def test_everything_has_a_comment(direct_table: Path) -> None:
    with duckdb.connect(str(direct_table), read_only=True) as connection:
        bare = connection.execute(
            """
            SELECT table_name || '.' || column_name FROM duckdb_columns()
            WHERE NOT internal AND comment IS NULL AND table_name IN (SELECT table_name FROM duckdb_tables())
            UNION ALL SELECT table_name FROM duckdb_tables() WHERE comment IS NULL
            UNION ALL SELECT view_name FROM duckdb_views() WHERE NOT internal AND comment IS NULL
            UNION ALL SELECT function_name FROM duckdb_functions() WHERE NOT internal AND comment IS NULL
            """
        ).fetchall()
        named = connection.execute("SELECT count(*) FROM duckdb_functions() WHERE NOT internal").fetchone()
    assert bare == []
    assert named is not None
    assert named[0] >= 5
