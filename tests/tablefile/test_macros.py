"""SQL users and Python callers get the same numbers, and every object of the file says what it is."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest

import lutest
from lutest.builder.build import build
from lutest.reader.batch import Batch
from lutest.reader.entry import Entry
from lutest.reader.errors import ConfigError
from lutest.reader.figures import Curve
from lutest.reader.names import literal, quote
from lutest.reader.over_lengths import levels_of
from lutest.reader.table import LatencyTable
from lutest.tablefile.macros import ESTIMATE_QUANTILE, PREFILL_SHARE, write_macros
from lutest.tablefile.schema import refuse_key_names
from tests.runs_frame import noisy_runs
from tests.synthetic import make_figures, within_of, write_file

TABLE_FIXTURES = ["direct_table", "subtraction_table", "serving_table", "one_column", "five_columns"]
KEYS = (("low", 4, 12), ("low", 8, 12), ("high", 4, 12), ("high", 8, 12))


@pytest.fixture(scope="module")
def one_column(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of GPUs by name, of four quantiles, where one configuration has no decode."""
    frame = noisy_runs(KEYS).drop(columns=["top_k", "num_blocks"])
    alone = frame[frame["tier"] == "low"].assign(
        tier="H100, 80GB", output_tokens=1, decode_ms=0.0, decode_steps_ms=None
    )
    runs = pd.concat([frame, alone]).rename(columns={"tier": "select"})
    config = {"key": ["select"], "quantiles": [0.1, 0.5, 0.95, 0.99]}
    return build(config, runs=runs, output=tmp_path_factory.mktemp("one") / "one.duckdb").output


@pytest.fixture(scope="module")
def five_columns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of five key columns, with names that SQL could mistake for its own, and accuracies on two workloads."""
    frame = noisy_runs(KEYS).assign(rate=0.5, tp=2)
    frame = frame.rename(columns={"tier": 'Model\'s "name"', "top_k": "order", "num_blocks": "x"})
    halves = [frame.assign(workload=name, accuracy=0.2 * i + frame["order"] / 100) for i, name in enumerate(("a", "b"))]
    config = {"key": ['Model\'s "name"', "order", "x", {"tp": "category"}, "rate"]}
    return build(config, runs=pd.concat(halves), output=tmp_path_factory.mktemp("five") / "five.duckdb").output


@pytest.fixture
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def connection(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(str(path), read_only=True) as opened:
        yield opened


every_table = pytest.mark.parametrize("path", TABLE_FIXTURES, indirect=True)


@every_table
def test_estimates_agree_with_the_reader_on_random_queries(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    table = lutest.load(path)
    generator = random.Random(2)
    queries: list[tuple[Any, ...]] = []
    for index in range(400):
        key = generator.choice([key for key in table.keys if table[key].decode_step_p50_ms is not None])
        knots = (0, 1, 2, 17, 300, 635, 2000, None)
        prompt = generator.choice(knots) if index % 5 == 0 else generator.randrange(0, 900)
        tokens = generator.choice((1, 2, 3, 9, 257, 3000)) if index % 3 == 0 else generator.randrange(1, 300)
        queries.append((*key, prompt, tokens, generator.choice(table.quantiles)))
    types = ", ".join(f"c{i} {column.type}" for i, column in enumerate(table.figures.key_columns))
    key_of_query = ", ".join(f"c{i}" for i in range(len(table.key_columns)))
    connection.execute(f"CREATE TEMP TABLE queries (i INT, {types}, p BIGINT, n BIGINT, level DOUBLE)")
    marks = ", ".join("?" * (len(table.key_columns) + 4))
    connection.executemany(f"INSERT INTO queries VALUES ({marks})", [(i, *query) for i, query in enumerate(queries)])
    answers = connection.execute(
        f"""
        SELECT prefill_ms({key_of_query}, p, level), decode_step_ms({key_of_query}, coalesce(p, 5) + n, level),
            decode_ms({key_of_query}, p, n, level), total_ms({key_of_query}, p, n, level),
            prefill_ms({key_of_query}, p), decode_step_ms({key_of_query}, n), decode_ms({key_of_query}, p, n),
            known(total_ms({key_of_query}, p, n)), source_at({key_of_query}, p, n)
        FROM queries ORDER BY i
        """
    ).fetchall()
    assert len(answers) == len(queries)
    for (*values, prompt, tokens, q), answer in zip(queries, answers, strict=True):
        entry = table[tuple(values)]
        expected = (
            entry.prefill_ms(prompt, q),
            entry.decode_step_ms((5 if prompt is None else prompt) + tokens, q),
            entry.decode_ms(prompt, tokens, q),
            entry.total_ms(prompt, tokens, q),
            entry.prefill_ms(prompt),
            entry.decode_step_ms(tokens),
            entry.decode_ms(prompt, tokens),
            entry.total_ms(prompt, tokens),
        )
        assert answer[:-1] == pytest.approx(expected, rel=1e-9)
        assert answer[-1] == entry.source_at(prompt, tokens)


def _names(table: LatencyTable) -> str:
    return ", ".join(map(quote, table.key_columns))


@every_table
def test_unknown_lengths_are_the_sums_over_all_lengths(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    table = lutest.load(path)
    levels = levels_of(table.quantiles)
    names, workload = _names(table), next(iter(table.output_lengths))
    counts = {None: Counter[int](), workload: Counter(dict(table.output_lengths[workload]))}
    for lengths in table.output_lengths.values():
        counts[None].update(dict(lengths))
    budget = table[table.keys[-1]].total_ms(None, 9)
    for given, prompt, of in (("", None, None), (", 90", 90, None), (f", NULL, {literal(workload)}", None, workload)):
        rows = connection.execute(
            f"SELECT {names}, p_within({names}, {budget}{given}), expected_total_ms({names}{given}) FROM configs"
        ).fetchall()
        assert len(rows) == len(table)
        for *key, within, expected in rows:
            entry = table[tuple(key)]
            if entry.decode_step_p50_ms is None:
                assert (within, expected) == (None, None)
                continue
            share = mean = 0.0
            for tokens, n in counts[of].items():
                totals = list(accumulate((entry.total_ms(prompt, tokens, q) for q in table.quantiles), max))
                share += n * within_of(totals, table.quantiles, budget)
                weighted = sum(weight * ms for weight, ms in zip(levels.weights, totals, strict=True))
                mean += n * (weighted if len(totals) > 2 else totals[0])
            n_runs = counts[of].total()
            assert within == pytest.approx(share / n_runs, rel=1e-9, abs=1e-12)
            assert expected == pytest.approx(mean / n_runs, rel=1e-9)


@pytest.mark.parametrize("path", TABLE_FIXTURES[2:], indirect=True)
def test_searches_are_those_of_the_reader(path: Path, connection: duckdb.DuckDBPyConnection) -> None:
    table = lutest.load(path)
    names = _names(table)
    totals = sorted(table[key].expected_total_ms() for key in table.keys if table[key].decode_step_p50_ms is not None)
    column = table.key_columns[0]
    prompts = {key[0]: 60 + 40 * i for i, key in enumerate(table.keys)}
    pairs = ", ".join(f"{literal(value)}: {tokens}" for value, tokens in prompts.items())
    mapped = f"MAP {{{literal(column)}: MAP {{{pairs}}}}}"
    requests: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        (", q := 0.5, margin := 0.2", {"q": 0.5, "margin": 0.2}),
        (", prefill_share := 0.3, prompt_tokens := 70", {"prefill_share": 0.3, "prompt_tokens": 70}),
        (", output_tokens := 9, prompt_tokens := 70", {"output_tokens": 9, "prompt_tokens": 70}),
        (", prompt_tokens := 5000", {"prompt_tokens": 5000}),
        (", p_at_least := 0.7", {"p_at_least": 0.7}),
        (", by := 'expected', margin := 0.1", {"by": "expected", "margin": 0.1}),
        (f", prompt_tokens_by := {mapped}", {"prompt_tokens": {column: prompts}}),
    ]
    for budget in (totals[0], totals[len(totals) // 2]):
        for given, arguments in requests:
            rows = connection.execute(f"SELECT {names} FROM feasible(?{given})", [budget]).fetchall()
            assert rows == table.feasible(budget, **arguments), (budget, given)  # in the same order


def test_best_is_that_of_the_reader(five_columns: Path) -> None:
    table = lutest.load(five_columns)
    names = _names(table)
    with duckdb.connect(str(five_columns), read_only=True) as connection:
        for budget in (1.0, 150.0, 1e9):
            for workload in ("a", "b"):
                query = f"SELECT {names}, latency_ms, accuracy FROM best(?, workload := ?)"
                rows = connection.execute(query, [budget, workload]).fetchall()
                best = table.best(budget, workload=workload)
                expected = [] if best is None else [(*best.key, pytest.approx(best.latency_ms), best.quality)]
                assert rows == expected
        with pytest.raises(duckdb.Error, match="whose accuracy"):
            connection.execute("FROM best(1e9)").fetchall()
        with pytest.raises(duckdb.Error, match="no accuracy on the workload c; allowed: a, b"):
            connection.execute("FROM best(1e9, workload := 'c')").fetchall()


def test_of_equal_accuracies_the_fastest_is_best(tmp_path: Path) -> None:
    path = build(runs=noisy_runs(KEYS).assign(accuracy=0.5), output=tmp_path / "table.duckdb").output
    best = lutest.load(path).best(1e9)
    with duckdb.connect(str(path), read_only=True) as connection:
        rows = connection.execute("SELECT tier, top_k, num_blocks FROM best(1e9)").fetchall()
    assert best is not None
    assert rows == [best.key] == [("low", 4, 12)]


def test_no_accuracy_is_an_error(direct_table: Path) -> None:
    with (
        duckdb.connect(str(direct_table), read_only=True) as connection,
        pytest.raises(duckdb.Error, match="the table holds no accuracy"),
    ):
        connection.execute("FROM best(1e9)").fetchall()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("prefill_ms('low', 4, 12, 100, 0.9)", r"this table holds q = 0\.5, 0\.95, not q = 0\.9"),
        ("p_within('low', 4, 12, 100, 100, 'web')", "no output lengths of workload web"),
    ],
)
def test_what_an_estimate_cannot_answer_is_an_error(request_: str, message: str, direct_table: Path) -> None:
    with duckdb.connect(str(direct_table), read_only=True) as connection, pytest.raises(duckdb.Error, match=message):
        connection.execute(f"SELECT {request_}").fetchall()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("prompt_tokens_by := MAP {'low': 150, 'medium': 300}", "no whole number for tier = high"),
        ("prompt_tokens_by := MAP {'low': 150, 'medium': 300, 'high': NULL}", "no whole number for tier = high"),
        ("prompt_tokens_by := MAP {'small': 150}", "of none of the key columns tier, top_k, num_blocks"),
        ("prompt_tokens_by := MAP {'size': MAP {'low': 150}}", "of none of the key columns"),
        (
            "prompt_tokens_by := MAP {8: 150, 16: 300}",
            "values of num_blocks and top_k, of which name one",
        ),
        (
            "prompt_tokens_by := MAP {'low': 150}, prompt_tokens := 7",
            "one of prompt_tokens, prompt_tokens_by and text_tokens",
        ),
        ("p_at_least := 0.9, q := 0.95", "one of p_at_least"),
        ("p_at_least := 0.9, output_tokens := 5", "one of p_at_least"),
        ("p_at_least := 0.9, by := 'expected'", "one of p_at_least"),
        ("by := 'expected', output_tokens := 5", "one of p_at_least"),
        ("by := 'mean'", "by is mean; allowed: expected"),
        ("p_at_least := 1", "p_at_least is 1; allowed: above 0 and below 1"),
        ("q := 0.9", "this table holds q"),
    ],
)
def test_what_a_search_cannot_answer_is_an_error(given: str, message: str, direct_table: Path) -> None:
    with duckdb.connect(str(direct_table), read_only=True) as connection, pytest.raises(duckdb.Error, match=message):
        connection.execute(f"FROM feasible(900, {given})").fetchall()


def test_the_defaults_are_those_of_python(direct_table: Path) -> None:
    table = lutest.load(direct_table)
    shares = inspect.signature(table.feasible).parameters
    for name in ("prefill_ms", "decode_step_ms", "decode_ms", "total_ms"):
        assert inspect.signature(getattr(Entry, name)).parameters["q"].default == ESTIMATE_QUANTILE
    assert shares["prefill_share"].default == PREFILL_SHARE
    limit = table.keys[5]
    at_share = table[limit].prefill_p95_ms / 0.8
    with duckdb.connect(str(direct_table), read_only=True) as connection:
        for budget in (at_share * (1 - 1e-9), at_share * (1 + 1e-9)):
            rows = connection.execute("SELECT tier, top_k, num_blocks FROM feasible(?)", [budget]).fetchall()
            assert rows == table.feasible(budget)
            assert (limit in rows) == (budget > at_share)


def test_an_unknown_key_or_length_is_null_never_zero(direct_table: Path) -> None:
    asked = (
        "prefill_ms('low', 5, 12, 100)", "total_ms('low', 5, 12, 100, 9, 0.5)", "p_within('low', 5, 12, 1e9)",
        "expected_total_ms('low', 5, 12)", "prefill_ms('low', 4, 12, -1)", "decode_ms('low', 4, 12, 100, 0)",
        "total_ms('low', 4, 12, 100, 0)", "decode_ms('low', 4, 12, -1, 5)",
    )  # fmt: skip
    with duckdb.connect(str(direct_table), read_only=True) as connection:
        answer = connection.execute(f"SELECT {', '.join(asked)}").fetchone()
    assert answer == (None,) * len(asked)


def test_names_that_mean_something_else_are_no_key_columns(five_columns: Path) -> None:
    own = lutest.load(five_columns).key_columns
    with duckdb.connect(str(five_columns), read_only=True) as connection:
        columns = connection.execute(
            "SELECT column_name FROM duckdb_columns() WHERE NOT internal AND table_name = 'configs'"
            " OR table_name IN (SELECT table_name FROM duckdb_tables())"
        ).fetchall()
        parameters = connection.execute(
            "SELECT unnest(parameters) FROM duckdb_functions()"
            " WHERE NOT internal AND function_name <> 'normal_share'"  # which takes no key
        ).fetchall()
    methods = (LatencyTable.lookup, LatencyTable.feasible, LatencyTable.best, LatencyTable.frontier, Batch.key_ids)
    of_methods = {name for method in methods for name in inspect.signature(method).parameters} - {
        "key",
        "named",
        "table",
    }
    names = {name for (name,) in (*columns, *parameters)} | of_methods - {"values"}
    assert len(names) > 60
    for name in names.difference(own):
        for spelled in (name, name.upper()):
            with pytest.raises(ConfigError, match=f"`key` names the column {spelled}, a name with a meaning"):
                refuse_key_names(["gpu", spelled])
    refuse_key_names(own)
    for bad, message in (
        ([], "0 columns"),
        ([f"c{i}" for i in range(9)], "9 columns"),
        (["gpu", "GPU"], "GPU twice"),
        ([" "], "printable"),
        (["a\nb"], "printable"),
    ):
        with pytest.raises(ConfigError, match=message):
            refuse_key_names(bad)


def test_everything_has_a_comment(five_columns: Path) -> None:
    with duckdb.connect(str(five_columns), read_only=True) as connection:
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
    assert named[0] >= 15


def test_quantiles_do_not_cross_beyond_the_last_knot_in_sql_either(tmp_path: Path) -> None:
    figures = make_figures()
    steep = Curve((100, 200), ((8.0, 8.0), (10.0, 20.0), (30.0, 31.0), (40.0, 41.0)), (5, 5), ("measured",) * 2)
    figures = replace(figures, keys=(replace(figures.keys[0], prefill_curve=steep), *figures.keys[1:]))
    entry = LatencyTable(figures)[figures.keys[0].key]
    with duckdb.connect(str(write_file(figures, tmp_path / "table.duckdb"))) as connection:
        write_macros(connection, figures.quantiles, figures.key_columns)
        for q in figures.quantiles:
            answer = connection.execute("SELECT prefill_ms(?, ?, ?, 5000, ?)", [*entry.key, q]).fetchone()
            assert answer == (pytest.approx(entry.prefill_ms(5000, q), rel=1e-12),)
    assert entry.prefill_ms(5000, 0.1) < entry.prefill_ms(5000) < entry.prefill_ms(5000, 0.95)
