"""Runs as they are read: keys of any columns, columns that no run has, and decode times told by the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutest.builder.build import build
from lutest.reader.errors import ConfigError
from lutest.reader.figures import KeyColumn
from lutest.reader.names import quote
from lutest.runs.configuration import config_of_meta, parse_config
from lutest.runs.sources import Source
from lutest.runs.work import read_runs
from tests.runs_frame import noisy_runs

MEASURED = {"prompt_tokens": 10, "output_tokens": 3, "prefill_ms": 5.0, "decode_ms": 20.0}


def read(
    source: Source, config: Mapping[str, object], columns: str = "*", table: str = "runs"
) -> tuple[tuple[KeyColumn, ...], list[tuple[Any, ...]]]:
    """The key columns, and columns of a table of the work database."""
    order = "key_id" if table == "keys" else 'source_id, "row"'
    with duckdb.connect() as connection:
        key = read_runs(connection, [source], parse_config(config), Path())
        return key, connection.execute(f"SELECT {columns} FROM {table} ORDER BY {order}").fetchall()


def frame(**columns: Sequence[object]) -> pd.DataFrame:
    """Sound runs with these columns."""
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()}).assign(**MEASURED)


# keys


@pytest.mark.parametrize(
    ("values", "kind", "expected", "keys"),
    [
        (["b", "a", "b"], None, ("category", "VARCHAR"), ["a", "b"]),
        ([8, 2, "4"], None, ("number", "BIGINT"), [2, 4, 8]),
        ([8, 0.5, -1], None, ("number", "DOUBLE"), [-1.0, 0.5, 8.0]),
        ([8, "all"], None, ("category", "VARCHAR"), ["8", "all"]),
        ([8, 16, None], "category", ("category", "VARCHAR"), ["16", "8"]),
        ([8, 16, None], "number", ("number", "BIGINT"), [8, 16]),
        ([2.5, float("inf")], None, ("category", "VARCHAR"), ["2.5", "Infinity"]),
        ([-0.0, 0, 2.5], None, ("number", "DOUBLE"), [0.0, 2.5]),
        (["é", "z", "Z"], None, ("category", "VARCHAR"), ["Z", "z", "é"]),
    ],
)
def test_kinds_are_told_by_the_data_unless_given(
    values: Sequence[object], kind: str | None, expected: tuple[str, str], keys: Sequence[object]
) -> None:
    source, config = frame(users=values), {"key": {"users": kind}}
    assert read(source, config, table="keys") == (
        (KeyColumn("users", *expected),),  # type: ignore[arg-type]
        list(enumerate(keys)),
    )
    named = [run for run in read(source, config, "key_id, users")[1] if run[0] is not None]
    assert set(named) == set(enumerate(keys))


def test_runs_with_a_bad_key_are_rejected_and_named_by_no_key() -> None:
    source = frame(gpu=["A", None, "", "B", "B", "B"], users=[1, 2, 3, "many", 1e300, "NaN"])
    key, runs = read(source, {"key": ["gpu", {"users": "number"}]}, "key_id, gpu, users, reason, detail")
    assert [column.type for column in key] == ["VARCHAR", "BIGINT"]
    assert runs == [
        (0, "A", 1, None, None),
        (None, None, 2, "missing_value", "no gpu: wants gpu"),
        (None, None, 3, "missing_value", "no gpu: wants gpu"),
        (None, "B", None, "not_a_number", "users is many, not a number"),
        (None, "B", None, "out_of_range", "users is 1e+300, beyond 1e+15"),
        (None, "B", None, "not_finite", "users is NaN, not a finite number"),
    ]


def test_a_canonical_column_may_be_a_key_column() -> None:
    source = frame(Model=["b", "a"], device=["x", "y"])
    config = {"key": ["model", "device"], "columns": {"model": "Model"}}
    assert read(source, config, table="keys")[1] == [(0, "a", "y"), (1, "b", "x")]


def test_counts_of_the_default_key_are_whole_and_at_least_one() -> None:
    source = frame(tier=["low"] * 4, top_k=[8, 0, 1.5, -1], num_blocks=[16] * 4)
    assert read(source, {}, "key_id, reason")[1] == [
        (0, None), (None, "out_of_range"), (None, "not_whole"), (None, "negative_value")
    ]  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(
    names=st.lists(
        st.text(min_size=1, max_size=8).filter(str.isidentifier), min_size=1, max_size=5, unique_by=str.lower
    ),
    data=st.data(),
)
def test_any_key_of_one_to_five_columns(names: list[str], data: st.DataObject) -> None:
    names = [f"{name}_" for name in names]
    text = st.text(min_size=1, max_size=3).filter(lambda drawn: "\0" not in drawn)
    values = text | st.integers(-(10**6), 10**6) | st.floats(-1e9, 1e9)
    columns = {name: data.draw(st.lists(values, min_size=3, max_size=3)) for name in names}
    key, keys = read(frame(**columns), {"key": names}, ", ".join(map(quote, names)), table="keys")
    assert [column.name for column in key] == names
    casts = [float if column.kind == "number" else str for column in key]
    sound = {tuple(cast(column[row]) for cast, column in zip(casts, columns.values(), strict=True)) for row in range(3)}
    assert keys == sorted(keys)
    assert {tuple(cast(value) for cast, value in zip(casts, key, strict=True)) for key in keys} <= sound


def test_a_table_reads_runs_as_it_was_built(tmp_path: Path) -> None:
    import lutest

    source = noisy_runs(runs_per_key=12).rename(columns={"tier": "size", "top_k": "experts", "prefill_ms": "ttft"})
    config = {"key": ["size", {"experts": "category"}], "columns": {"prefill_ms": "ttft", "device": {"constant": "x"}}}
    table = lutest.load(build(config, runs=source, output=tmp_path / "t.duckdb").output)
    own = config_of_meta(table.meta)
    assert own.key == (("size", "category"), ("experts", "category"))
    assert own.columns == parse_config(config).columns
    assert own.time_unit == "ms"


# columns that no run has


@pytest.mark.parametrize(
    ("missing", "config", "words"),
    [
        ("users", {"key": ["gpu", "users"]}, "no run has users: the fields are gpu, prompt_tokens, "),
        ("users", {"key": ["gpu", "users"]}, "`--set columns.users.constant=VALUE`"),
        ("tier", {}, "no run has tier, top_k, num_blocks: .* `--set 'key=.FIELD, ….'`"),
        ("prompt_tokens", {"key": "gpu", "columns": {"prompt_tokens": "isl"}}, "no run has prompt_tokens: "),
        (
            "prefill_ms",
            {"key": "gpu", "columns": {"prefill_ms": "ttft"}},
            "has prefill_ms, the time to the first token",
        ),
    ],
)
def test_a_column_that_no_run_has_is_one_line_with_the_fields(
    missing: str, config: Mapping[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read(frame(gpu=["A"]), config)
    assert str(error.value).isprintable()
    assert missing in str(error.value)


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_fields_are_told_for_every_kind_of_file(tmp_path: Path, ending: str) -> None:
    source, path = frame(gpu=["A"]), tmp_path / f"runs.{ending}"
    match ending:
        case "csv":
            source.to_csv(path, index=False)
        case "json":
            path.write_text(f'{{"per_sample_results": {source.to_json(orient="records")}}}')
        case "jsonl":
            source.to_json(path, orient="records", lines=True)
        case _:
            with duckdb.connect() as connection:
                connection.from_df(source).write_parquet(str(path))
    with pytest.raises(ConfigError, match="no run has users: the fields are gpu, prompt_tokens, output_tokens"):
        read(path, {"key": ["gpu", "users"]})


@pytest.mark.parametrize("config", [{}, {"key": "model", "columns": {"model": "Model", "total_ms": "Elapsed time"}}])
def test_a_log_without_a_time_to_first_token(tmp_path: Path, config: Mapping[str, object]) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,1,12.25,GPT-4,100,200,300,Conversation log\n"
    )
    with pytest.raises(ConfigError, match=r"no run has a time to first token, only tokens and .*\(Elapsed time\)"):
        read(path, config)


# decode by the clock


def clocked(prefill_ms: Sequence[float], total_ms: Sequence[float], output_tokens: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "gpu": "A",
            "prompt_tokens": 10,
            "output_tokens": output_tokens,
            "prefill_ms": prefill_ms,
            "total_ms": total_ms,
        }
    )


COLUMNS = "decode_ms, total_ms, one_pass, clamped, reason"


def test_decode_is_what_the_total_has_beyond_prefill() -> None:
    runs = read(clocked([5.25, 6.0], [25.5, 26.0]), {"key": "gpu"}, COLUMNS)[1]
    assert runs == [(20.25, 25.5, True, False, None), (20.0, 26.0, True, False, None)]
    one_token = read(clocked([5.25], [5.5], output_tokens=1), {"key": "gpu"}, COLUMNS)[1]
    assert one_token == [(0.0, 5.5, False, False, None)]


@pytest.mark.parametrize(("unit", "tick_ms"), [("ms", 1.0), ("s", 1.0), ("s", 10.0), ("us", 1e-3)])
def test_within_a_tick_of_the_clock_decode_is_censored(unit: str, tick_ms: float) -> None:
    scale = {"ms": 1.0, "s": 1e-3, "us": 1e3}[unit]
    prefill = [tick_ms * ticks for ticks in (51, 62, 73, 84, 97)]
    total = [first + tick_ms * ticks for first, ticks in zip(prefill, (7, 0, -1, -2, 1), strict=True)]
    source = clocked([time * scale for time in prefill], [time * scale for time in total])
    runs = read(source, {"key": "gpu", "time_unit": unit}, COLUMNS)[1]
    assert {run[2] for run in runs} == {True}
    assert [run[3] for run in runs] == [False, True, True, False, False]
    assert [run[4] for run in runs] == [None, None, None, "negative_value", None]
    assert [run[0] for run in runs] == pytest.approx([7 * tick_ms, 0, 0, -2 * tick_ms, tick_ms])
    assert [run[1] for run in runs[:3]] == pytest.approx([total[0], prefill[1], prefill[2]])  # no total below prefill


def test_a_fine_clock_has_no_tick_to_hide_behind() -> None:
    prefill = [50.123456, 61.7, 72.9, 83.111111, 95.5]
    runs = read(clocked(prefill, [time - 1 for time in prefill]), {"key": "gpu"}, "reason, detail")[1]
    assert {reason for reason, _ in runs} == {"negative_value"}
    assert runs[1][1].startswith("decode_ms is total_ms less prefill_ms: -1.0")


def test_a_decode_time_that_is_given_is_taken_and_is_not_of_one_pass() -> None:
    source = clocked([5.0, 5.0], [25.0, 25.0]).assign(decode_ms=[18.0, None])
    assert read(source, {"key": "gpu"}, COLUMNS)[1] == [
        (18.0, 25.0, False, False, None), (20.0, 25.0, True, False, None)
    ]  # fmt: skip
    timed = clocked([5.0], [25.0]).assign(decode_steps_ms=pd.Series([[9.0, 10.0]], dtype=object))
    assert read(timed, {"key": "gpu"}, COLUMNS)[1] == [(19.0, 25.0, False, False, None)]
