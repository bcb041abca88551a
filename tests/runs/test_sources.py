"""Sources: every way to give runs, every row accounted for, broken input refused in one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutest.reader.errors import SourceError
from lutest.runs.sources import Source, read_sources
from lutest.runs.sources.discovery import list_sources
from lutest.runs.sources.json_stream import Configuration, JsonText, read_runs
from lutest.runs.sources.run_rows import SourceFields

FIELDS = SourceFields(("tier", "top_k", "T_total", "dataset"), ("decode_steps_ms", "T_decode_per_step"))
BIG_INTEGER = "9" * 5000


def read(
    sources: Sequence[Source], base: Path, fields: SourceFields = FIELDS
) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
    """Rows of raw_runs with the column names of fields cut to their names, and of source_files."""
    with duckdb.connect() as connection:
        connection.execute("SET preserve_insertion_order = false")
        read_sources(connection, sources, fields, base=base)
        result = connection.execute('SELECT * FROM raw_runs ORDER BY source_id, "row"')
        names = [column[0].removeprefix("f:") for column in result.description or []]
        rows = [dict(zip(names, row, strict=True)) for row in result.fetchall()]
        files = connection.execute("SELECT * FROM source_files ORDER BY source_id").fetchall()
    assert sum(file[4] for file in files) == len(rows)
    return rows, files


def read_text(name: str, content: str | bytes, folder: Path, fields: SourceFields = FIELDS) -> list[dict[str, Any]]:
    """Rows of one file with this content."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read([path], folder, fields)[0]


def failure(name: str, content: str | bytes, folder: Path) -> str:
    """Message with which a file of this content is refused: one line that names the file."""
    with pytest.raises(SourceError) as caught:
        read_text(name, content, folder)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert "\n" not in message
    return message


def cells(rows: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


RUN = {"tier": "low", "top_k": 4, "T_total": 251.4522, "T_decode_per_step": [[12.5], [13.25]]}


# JSON


def test_profiler_layout(tmp_path: Path) -> None:
    folder = tmp_path / "vqa"
    folder.mkdir()
    content = json.dumps(
        {
            "tier": "high",
            "tier_range": {"min_crops": 9},
            "per_sample_results": [{"top_k": 4, "T_total": 0.1, "T_decode_per_step": [[49.8673], [51.0]]}, RUN],
            "dataset": "vqa-mixed",
        }
    )
    (folder / "a.json").write_text(content)
    rows, files = read([tmp_path], tmp_path)
    names = ["top_k", "T_total", "T_decode_per_step", "tier", "tier_range", "dataset"]
    assert files == [(1, "vqa/a.json", hashlib.sha256(content.encode()).hexdigest(), "vqa", 2, None, names)]
    assert cells(rows, "source_id", "row", "tier", "top_k", "T_total", "dataset") == [
        (1, 1, "high", "4", "0.1", "vqa-mixed"),
        (1, 2, "low", "4", "251.4522", "vqa-mixed"),
    ]
    assert cells(rows, "steps", "step_positions", "steps_problem", "problem") == [
        ([49.8673, 51.0], None, None, None),
        ([12.5, 13.25], None, None, None),
    ]


@pytest.mark.parametrize("header_first", [True, False])
def test_header_fills_absent_fields_not_nulls_nor_broken_runs(tmp_path: Path, header_first: bool) -> None:
    header = {"dataset": "vqa", "tier": "low"}
    runs = {"per_sample_results": [{"top_k": 1}, {"dataset": None}, 7, {"dataset": "own"}]}
    rows = read_text("a.json", json.dumps({**header, **runs} if header_first else {**runs, **header}), tmp_path)
    assert cells(rows, "dataset", "tier") == [("vqa", "low"), (None, "low"), (None, None), ("own", "low")]
    assert [row["problem"] for row in rows] == [None, None, "the run is 7, not an object", None]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([RUN, RUN], [("low", "4")] * 2),
        (RUN, [("low", "4")]),
        ([{"tier": "x", "per_sample_results": [{"top_k": 1}]}, {"per_sample_results": [{"top_k": 2}]}, RUN],
         [("x", "1"), (None, "2"), ("low", "4")]),
        ({"per_sample_results": []}, []),
        ([], []),
        ({}, [(None, None)]),
    ],
)  # fmt: skip
def test_other_json_layouts(tmp_path: Path, value: object, expected: list[tuple[str, str]]) -> None:
    assert cells(read_text("a.json", json.dumps(value), tmp_path), "tier", "top_k") == expected


def test_scalars_as_text_that_converts_back(tmp_path: Path) -> None:
    values = ["0.1", "1e22", "5e-324", "-0.0", "12345678901234567890", "true", '"7"', '"naïve 汉"', "[1, null]",
              '{"a": NaN}', "NaN", "-Infinity", "1e400", "null"]  # fmt: skip
    expected = ["0.1", "1e+22", "5e-324", "-0.0", "12345678901234567890", "true", "7", "naïve 汉", "[1, null]",
                '{"a": NaN}', "NaN", "-Infinity", "Infinity", None]  # fmt: skip
    content = "[" + ",".join(f'{{"T_total": {value}}}' for value in values) + "]"
    assert [row["T_total"] for row in read_text("a.json", content, tmp_path)] == expected


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_text_that_no_table_holds_is_a_problem(tmp_path: Path, name: str) -> None:
    lines = [r'{"tier": "a\u0000b", "top_k": 1, "T_decode_per_step": [1]}', r'{"tier": "\ud800"}', '{"tier": "ok"}']
    content = "[" + ",".join(lines) + "]" if name == "a.json" else "\n".join(lines)
    rows = read_text(name, content, tmp_path)
    assert rows[0]["problem"] == "the field 'tier' holds a NUL character"
    assert "surrogate" in rows[1]["problem"]
    assert cells(rows, "tier", "top_k", "steps") == [(None, None, None), (None, None, None), ("ok", None, None)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"per_sample_results": [{"a": 1}, {"a": 2', "byte offset 41: the file ends within a value"),
        ('{"per_sample_results": [{"tier": "lo', "byte offset 33: the file ends within a value"),
        ('{"per_sample_results": [{"a": 1}', "byte offset 32: expected ',' or ']', not the end of the file"),
        ('{"per_sample_results": [{"a": 1},]}', "byte offset 33: expecting value"),
        ('{"per_sample_results": {"a": 1}}', "per_sample_results is not a list"),
        ('{"per_sample_results": null}', "per_sample_results is not a list"),
        ('[{"per_sample_results": null}]', "per_sample_results is not a list"),
        ('{"per_sample_results": [], "per_sample_results": []}', "given twice"),
        ('{"tier": "a", "per_sample_results": [], "tier": "b"}', "'tier' is given twice"),
        ("{'tier': 1}", "byte offset 1: expected a field name in double quotes"),
        ('{"tier" 1}', "byte offset 8: expected ':', not '1'"),
        ('{"tier": 1}\n{"tier": 2}', "byte offset 12: more follows"),
        ("hello", "byte offset 0: expected an object or an array"),
        ("12", "expected an object or an array"),
        (" \n ", "not blanks alone"),
        ("", "the file is empty"),
        ("[" * 100_000, "nested too deeply"),
        ('{"x": ' * 100_000, "nested too deeply"),
        ('[{"é": tru}]', "byte offset 8: expecting value"),
        (b'[{"tier": "\xff"}]', "not UTF-8 text at byte offset 11"),
        (b'[{"tier": "\xe6\xb1', "not UTF-8 text at byte offset 11"),
        ('[{"tier": "low"}]'.encode("utf-16"), "not UTF-8 text at byte offset 0"),
        ('[{"tier": "low"}]'.encode("utf-16-le"), "byte offset 1"),
        (r'{"per_sample_results": [{}], "tier": "\u0000"}', "header field holds a NUL character"),
    ],
)  # fmt: skip
def test_malformed_json_names_the_place(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert expected in failure("a.json", content, tmp_path)


@pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="this Python reads integers of any length")
def test_integer_of_thousands_of_digits(tmp_path: Path) -> None:
    assert "limit (4300" in failure("a.json", f'[{{"top_k": {BIG_INTEGER}}}]', tmp_path)
    rows = read_text("a.jsonl", f'{{"top_k": {BIG_INTEGER}}}\n{{"top_k": 1}}', tmp_path)
    assert "limit (4300" in rows[0]["problem"]
    assert rows[1]["top_k"] == "1"


def test_json_with_byte_order_mark(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    assert read_text("a.json", mark + b'{"tier": "low"}', tmp_path)[0]["tier"] == "low"
    assert read_text("a.jsonl", mark + b'{"tier": "low"}', tmp_path)[0]["tier"] == "low"
    assert read_text("a.csv", mark + b"tier\nlow\n", tmp_path)[0]["tier"] == "low"
    assert "byte offset 14" in failure("a.json", mark + b'{"tier": x}'[:10] + b" \xff", tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    before=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    runs=st.lists(json_values, max_size=6),
    after=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    chunk_bytes=st.integers(1, 60),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    as_array=st.booleans(),
)
def test_chunks_do_not_matter(
    before: dict[str, Any],
    runs: list[Any],
    after: dict[str, Any],
    chunk_bytes: int,
    ascii_only: bool,
    indent: int | None,
    as_array: bool,
) -> None:
    before = {key: value for key, value in before.items() if key not in after}
    value = runs if as_array else {**before, "per_sample_results": runs, **after}
    content = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    whole = json.loads(content)
    headers: list[Configuration] = []
    elements = []
    for configuration, element in read_runs(JsonText(io.BytesIO(content), "x", chunk_bytes), {*before, *after}):
        elements.append(element)
        headers.append(configuration)
    if as_array:
        assert repr(elements) == repr(whole)
    else:
        assert repr(elements) == repr(whole.pop("per_sample_results"))
        assert all(repr(configuration.header) == repr(whole) for configuration in headers)


@settings(max_examples=200, deadline=None)
@given(content=st.text('[]{}",:0123456789.eE+-truefalsn \\ud8é', max_size=30), chunk_bytes=st.integers(1, 40))
def test_any_text_is_read_as_json_does_or_refused(content: str, chunk_bytes: int) -> None:
    try:
        whole = json.loads(content)
    except ValueError:
        whole = None
    try:
        elements = [element for _, element in read_runs(JsonText(io.BytesIO(content.encode()), "x", chunk_bytes), ())]
    except SourceError as error:
        assert not isinstance(whole, (list, dict)), error  # noqa: PT017 (either outcome may be right)
    else:
        assert isinstance(whole, (list, dict))
        assert isinstance(whole, dict) or repr(elements) == repr(whole)


@pytest.mark.parametrize("wrapped", [False, True], ids=["object", "object in an array"])
def test_large_object_in_bounded_memory(tmp_path: Path, wrapped: bool) -> None:
    run = {"tier": "low", "text": "x" * 24_000, "T_decode_per_step": [[40.0 + i / 7] for i in range(50)]}
    path = tmp_path / "big.json"
    rows = 2000
    with path.open("w") as stream:
        stream.write("[" * wrapped + '{"per_sample_results": [')
        stream.write(",\n".join([json.dumps(run)] * rows))
        stream.write('], "dataset": "vqa"}' + "]" * wrapped)
    assert path.stat().st_size > 48e6
    fields = SourceFields(("tier", "dataset"), ("T_decode_per_step",))
    with duckdb.connect() as connection:
        tracemalloc.start()  # what lutest holds, whatever DuckDB does with its own
        try:
            read_sources(connection, [path], fields, base=tmp_path)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        count = 'SELECT count(*), count("f:tier"), count("f:dataset"), sum(len(steps)) FROM raw_runs'
        assert connection.execute(count).fetchone() == (rows, rows, rows, rows * 50)
    # an object within an array is held up to 16 MiB of text before it is read field by field
    assert peak < (100e6 if wrapped else 30e6)


def test_long_single_values(tmp_path: Path) -> None:
    steps = [float(i) for i in range(100_000)]
    rows = read_text("a.json", json.dumps([{"tier": "x" * 1_500_000, "T_decode_per_step": steps}]), tmp_path)
    assert rows[0]["steps"] == steps
    assert len(rows[0]["tier"]) == 1_500_000


# steps


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([1.2, 3], ([1.2, 3.0], None, None)),
        ([[1.2], [3.4]], ([1.2, 3.4], None, None)),
        ([[1.0, 2.0], [3.0]], ([1.0, 2.0, 3.0], [1, 1, 2], None)),
        ([[], [3.0]], ([3.0], [2], None)),
        ([[1.0, 2.0], []], ([1.0, 2.0], [1, 1], None)),
        ([[], []], ([], [], None)),
        ([], ([], None, None)),
        (None, (None, None, None)),
        ([1.0, None], (None, None, "step 2 is null, not a number")),
        ([1.0, True], (None, None, "step 2 is True, not a number")),
        ([1.0, "2"], (None, None, "step 2 is '2', not a number")),
        ([1.0, [2.0]], (None, None, "step 2 is [2.0], not a number")),
        ([[1.0], 2.0], (None, None, "step 2 is 2.0, not a list as step 1 is")),
        ([[1.0], [[2.0]]], (None, None, "step 2 is [2.0], not a number")),
        ([[1.0], None], (None, None, "step 2 is null, not a list as step 1 is")),
        (5.0, (None, None, "T_decode_per_step is 5.0, not a list of numbers")),
        ({"a": 1}, (None, None, "T_decode_per_step is {'a': 1}, not a list of numbers")),
        ("[1.5, [2]", (None, None, "T_decode_per_step is '[1.5, [2]', not a list of numbers")),
        ("[[1.5], [2]]", ([1.5, 2.0], None, None)),
        ([-1.0, float("inf"), 10**400], ([-1.0, float("inf"), float("inf")], None, None)),
    ],
)  # fmt: skip
def test_steps(tmp_path: Path, steps: object, expected: tuple[Any, ...]) -> None:
    rows = read_text("a.json", json.dumps([{"T_decode_per_step": steps}]), tmp_path)
    rows += read_text("a.jsonl", json.dumps({"T_decode_per_step": steps}), tmp_path)
    rows += read([pd.DataFrame({"T_decode_per_step": pd.Series([steps], dtype=object)})], tmp_path)[0]
    assert cells(rows, "steps", "step_positions", "steps_problem") == [expected] * 3
    assert [row["problem"] for row in rows] == [None] * 3


def test_first_steps_field_that_is_not_null_counts(tmp_path: Path) -> None:
    runs = [
        {"decode_steps_ms": [1], "T_decode_per_step": [2]},
        {"decode_steps_ms": None, "T_decode_per_step": [2]},
        {},
    ]
    rows = read_text("a.json", json.dumps(runs), tmp_path)
    assert [row["steps"] for row in rows] == [[1.0], [2.0], None]


def test_batches_keep_steps_with_their_runs(tmp_path: Path) -> None:
    runs = [{"top_k": i, "T_decode_per_step": [i + j / 8 for j in range(i % 5)]} for i in range(12_000)]
    rows = read_text("a.json", json.dumps(runs), tmp_path)
    assert cells(rows, "row", "top_k", "steps") == [
        (i + 1, str(i), run["T_decode_per_step"]) for i, run in enumerate(runs)
    ]


# JSONL


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps(RUN), "", '{"tier": ', "[1]", '{"per_sample_results": []}', "[" * 100_000, '{"tier": "x"}']
    rows = read_text("a.jsonl", "\r\n".join(lines).encode() + b'\n{"tier": "\xff"}', tmp_path)
    assert [row["tier"] for row in rows] == ["low", None, None, None, None, "x", None]
    problems = [row["problem"] for row in rows]
    assert problems[0] is problems[5] is None
    assert problems[1].startswith("line 3 is not valid JSON: Expecting value at column")
    assert problems[2] == "line 4 is [1], not an object"
    assert "name the file .json" in problems[3]
    assert "nested too deeply" in problems[4]
    assert problems[6] == "line 8 is not UTF-8 text: invalid start byte at byte 11 of it"
    assert read_text("b.ndjson", "\n \n", tmp_path) == []
    assert "UTF-16" in failure("c.jsonl", '{"tier": "low"}'.encode("utf-16"), tmp_path)


# CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path: Path, delimiter: str) -> None:
    lines = [
        ["tier", " top_k", "T_total", "T_decode_per_step"],
        ["low", "4", "0.10", '"[1.5, 2.5]"'],
        ["", "", "", ""],
        [],
        ["low", "4"],
        ['"a"b', "4", "1", ""],
        ['"two\nlines"', "x", "NaN", "[1"],
    ]
    rows = read_text("a.csv", "\r\n".join(delimiter.join(line) for line in lines), tmp_path)
    assert cells(rows, "row", "tier", "top_k", "T_total", "steps") == [
        (1, "low", "4", "0.10", [1.5, 2.5]),
        (2, None, None, None, None),
        (3, None, None, None, None),
        (4, None, None, None, None),
        (5, "two\nlines", "x", "NaN", None),
    ]
    assert rows[2]["problem"] == "line 5 has 2 fields, where the header has 4"
    assert rows[3]["problem"].startswith("line 6 is not valid CSV")
    assert rows[4]["steps_problem"] == "T_decode_per_step is '[1', not a list of numbers"


def test_csv_that_cannot_be_read(tmp_path: Path) -> None:
    assert "two columns are named 'tier'" in failure("a.csv", "tier,top_k,tier\n", tmp_path)
    assert "within quotes opened in line 2" in failure("a.csv", 'tier,top_k\n"low,4\nlow,4\n', tmp_path)
    assert "not UTF-8 text at byte offset 5" in failure("a.csv", b"tier\n\xff\n", tmp_path)
    assert "first line is blank" in failure("a.csv", "\ntier\n", tmp_path)
    assert "the file is empty" in failure("a.csv", "", tmp_path)
    assert read_text("a.csv", "tier,x,x\n", tmp_path) == []


def test_csv_with_nul_characters_and_long_fields(tmp_path: Path) -> None:
    rows = read_text("a.csv", "tier\na\0b\nlow\n" + "x" * 500_000 + "\n", tmp_path)
    assert "NUL" in rows[0]["problem"]
    assert rows[1]["tier"] == "low"
    assert rows[2]["tier"] == "x" * 500_000


# Parquet


def write_parquet(path: Path, query: str) -> None:
    safe = path.with_name("safe.parquet")
    duckdb.connect().execute(f"COPY ({query}) TO '{safe}' (FORMAT parquet)")
    safe.rename(path)


def test_parquet_types(tmp_path: Path) -> None:
    fields = SourceFields(tuple("abcdefghi"), ("s",))
    write_parquet(
        tmp_path / "a.parquet",
        """SELECT 0.1::FLOAT a, 0.1::DOUBLE b, 7::TINYINT c, true d, 'x''y' e, 1.250::DECIMAL(6, 3) f,
        {'k': [1]} g, DATE '2024-01-31' h
        UNION ALL SELECT 'nan'::FLOAT, '-inf'::DOUBLE, NULL, NULL, 'a' || chr(0), NULL, NULL, NULL
        UNION ALL SELECT 'nan'::FLOAT, '-inf'::DOUBLE, NULL, NULL, NULL, NULL, NULL, NULL""",
    )
    rows, _ = read([tmp_path / "a.parquet"], tmp_path, fields)
    assert cells(rows, *"abcdefghi") == [
        (repr(float(np.float32(0.1))), "0.1", "7", "true", "x'y", "1.250", '{"k":[1]}', "2024-01-31", None),
        (None,) * 9,
        ("NaN", "-Infinity", *(None,) * 7),
    ]
    assert [row["problem"] for row in rows] == [None, "the field 'e' holds a NUL character", None]


FLAT = "(VALUES (1, [1.5, 2.5]::DOUBLE[]), (2, []), (3, NULL), (4, [1, NULL]), (5, ['nan'::DOUBLE])) v(top_k, s)"
NESTED = """(VALUES (1, [[1], [2]]), (2, [[1, 2], [], [3]]), (3, NULL), (4, [[1, NULL]]), (5, [NULL, [1]]),
    (6, [])) v(top_k, s)"""
TEXT = """(VALUES (1, '[1.5, 2.5]'), (2, '[[1, 2], [3]]'), (3, NULL), (4, '[1, null]'), (5, 'x')) v(top_k, s)"""
NULL_STEP = (None, None, "step 2 is null, not a number")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (FLAT, [([1.5, 2.5], None, None), ([], None, None), (None,) * 3, NULL_STEP, ([np.nan], None, None)]),
        (NESTED, [([1.0, 2.0], None, None), ([1.0, 2.0, 3.0], [1, 1, 3], None), (None,) * 3,
                  (None, None, "step 1 is null, not a number"), (None, None, "step 1 is null, not a number"),
                  ([], None, None)]),
        (TEXT, [([1.5, 2.5], None, None), ([1.0, 2.0, 3.0], [1, 1, 2], None), (None,) * 3, NULL_STEP,
                (None, None, "s is 'x', not a list of numbers")]),
        ("(VALUES (1, 2.5::DOUBLE), (2, NULL)) v(top_k, s)",
         [(None, None, "s is 2.5, not a list of numbers"), (None,) * 3]),
        ("(VALUES (1, ['a'])) v(top_k, s)", [(None, None, "step 1 is 'a', not a number")]),
    ],
)  # fmt: skip
def test_parquet_steps(tmp_path: Path, table: str, expected: list[tuple[Any, ...]]) -> None:
    write_parquet(tmp_path / "a.parquet", f"FROM {table}")
    rows, _ = read([tmp_path], tmp_path, SourceFields(("top_k", "absent"), ("absent", "s")))
    assert cells(rows, "row", "top_k", "absent") == [(i, str(i), None) for i in range(1, len(expected) + 1)]
    np.testing.assert_equal(cells(rows, "steps", "step_positions", "steps_problem"), expected)


def test_parquet_columns_that_clash(tmp_path: Path) -> None:
    folder = tmp_path / "tier=low"
    folder.mkdir()
    write_parquet(
        folder / "a.parquet", """SELECT 5 AS file_row_number, 'x' AS filename, 3 AS "a""b; --", 1 AS "row" """
    )
    rows, _ = read(["."], tmp_path, SourceFields(("tier", "filename", 'a"b; --', "row", "file_row_number"), ()))
    assert cells(rows, "tier", "filename", 'a"b; --', "file_row_number", "problem") == [(None, "x", "3", "5", None)]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"x" * 100 + b"PAR1", b"hello" * 50])
def test_broken_parquet(tmp_path: Path, content: bytes) -> None:
    failure("a.parquet", content, tmp_path)
    write_parquet(tmp_path / "b.parquet", "SELECT range AS top_k FROM range(5000)")
    whole = (tmp_path / "b.parquet").read_bytes()
    failure("b.parquet", whole[: len(whole) // 2], tmp_path)


# frames


def test_frame(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "tier": ["low", None, "high"],
            "top_k": pd.array([4, None, 6], dtype="Int64"),
            "T_total": [0.1, np.nan, np.inf],
            "dataset": pd.Series([1, "x", np.float32(0.1)], dtype=object),
            "T_decode_per_step": pd.Series([np.array([1, 2]), [np.array([1.5]), (2, 3)], None], dtype=object),
        },
    )
    frame.index = pd.Index([7, 7, 7])
    rows, files = read([frame], tmp_path)
    assert cells(rows, "row", "tier", "top_k", "T_total", "dataset") == [
        (1, "low", "4", "0.1", "1"),
        (2, None, None, None, "x"),
        (3, "high", "6", "Infinity", repr(float(np.float32(0.1)))),
    ]
    assert cells(rows, "steps", "step_positions") == [([1.0, 2.0], None), ([1.5, 2.0, 3.0], [1, 2, 2]), (None, None)]
    assert files[0][1] == "<DataFrame 1>"
    assert files[0][3:] == (None, 3, None, list(frame.columns))
    assert read([frame.copy()], tmp_path)[1] == files
    changed = frame.copy()
    changed.loc[:, "T_total"] = 1.0
    assert read([changed], tmp_path)[1][0][2] != files[0][2]


def test_frames_without_rows_or_columns(tmp_path: Path) -> None:
    assert read([pd.DataFrame({"tier": []})], tmp_path)[1][0][4] == 0
    rows, _ = read([pd.DataFrame({"unknown": [1, 2]}), pd.DataFrame({0: [1]})], tmp_path)
    assert cells(rows, "tier", "problem") == [(None, None)] * 3
    with pytest.raises(SourceError, match="<DataFrame 1>: two columns are named 'tier'"):
        read([pd.DataFrame([[1, 2]], columns=["tier", "tier"])], tmp_path)


def test_frame_cells_without_text(tmp_path: Path) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(SourceError, match="<DataFrame 1>: the column 'tier' holds values that are nested too deeply"):
        read([pd.DataFrame({"tier": pd.Series([deep], dtype=object)})], tmp_path)
    cells_at_fault = [{(1, 2): 3}, "\ud800"]
    rows, _ = read([pd.DataFrame({"tier": pd.Series([*cells_at_fault, "low"], dtype=object)})], tmp_path)
    assert [row["tier"] for row in rows] == [None, None, "low"]
    assert all(row["problem"].startswith("the field 'tier' holds") for row in rows[:2])


def test_column_types_are_never_guessed(tmp_path: Path) -> None:
    frame = pd.DataFrame({"tier": pd.Series([None] * 3000 + ["'; DROP TABLE raw_runs; --"], dtype=object)})
    rows, _ = read([frame], tmp_path)
    assert rows[-1]["tier"] == "'; DROP TABLE raw_runs; --"
    with duckdb.connect() as connection:
        connection.execute("SET pandas_analyze_sample = 77")
        read_sources(connection, [frame], FIELDS, base=tmp_path)
        assert connection.execute("SELECT current_setting('pandas_analyze_sample')").fetchone() == (77,)


# finding files


def names(sources: Sequence[str | Path], base: Path) -> list[str]:
    return [path.relative_to(base).as_posix() for path in list_sources(sources, base)]


def test_folders_and_globs(tmp_path: Path) -> None:
    for name in ["b.json", "x/a.JSON", "x/y/c.parquet", "x/y/d.csv", "x/README.md", "x/.hidden.json", ".git/e.json",
                 "x/f.tmp.json", "x/~g.csv"]:  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    everything = ["b.json", "x/a.JSON", "x/y/c.parquet", "x/y/d.csv"]
    assert names(["."], tmp_path) == everything
    assert names(["**"], tmp_path) == everything
    assert names([tmp_path / "x" / "*"], tmp_path) == everything[1:]
    assert names(["**/*.csv", "x/y"], tmp_path) == everything[2:]
    assert names(["b.json", "./x/../b.json", tmp_path / "b.json"], tmp_path) == ["b.json"]


def test_links_lead_to_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.json").write_text("[]")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path)
    (tmp_path / "b.json").symlink_to(tmp_path / "runs" / "a.json")
    assert names(["runs", "b.json"], tmp_path) == names(["b.json", "runs"], tmp_path) == ["b.json"]


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?b", "a'b", 'a"b', "a\nb", "a;b", "a\\b", "a{b,c}", "ä 汉", "%s"])
@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_odd_names_are_literal(tmp_path: Path, name: str, ending: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    odd = folder / f"{name}{ending}"
    for path, top_k in [(odd, 1), (folder / f"a1{ending}", 2), (folder / f"axb{ending}", 3)]:
        if ending == ".json":
            path.write_text(json.dumps({"top_k": top_k}))
        else:
            write_parquet(tmp_path / "x.parquet", f"SELECT {top_k} AS top_k")
            (tmp_path / "x.parquet").rename(path)
    rows, files = read([f"{name}{ending}"], folder)
    assert cells(rows, "top_k") == [("1",)]
    assert files[0][1] == f"{name}{ending}"
    assert files[0][3] == name
    odd.write_bytes(b"[")
    with pytest.raises(SourceError) as caught:
        read([odd], tmp_path)
    assert "\n" not in str(caught.value)


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"\xff.json")
    try:
        with open(path, "w") as stream:
            stream.write("[]")
    except OSError:
        return  # a file system that takes UTF-8 names alone cannot hold such a file
    assert read(["."], tmp_path)[1][0][1] == r"\udcff.json"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("absent.json", "absent.json: no such file or folder"),
        ("absent/*.csv", "absent/*.csv: matches no file that ends in .json, .jsonl, .ndjson, .csv or .parquet"),
        ("empty", "empty: no runs in this folder"),
        ("notes.txt", "notes.txt: unknown ending '.txt'"),
        ("loop.json", "loop.json: cannot be read: Too many levels"),
        ("broken.json", "broken.json: cannot be read: No such file"),
        ("pipe.json", "pipe.json: not a regular file"),
        ("notes.txt/a.json", "no such file or folder"),
        ("x" * 300 + ".json", "cannot be read: File name too long"),
        ("", "'' is not a path"),
        ("a\0b", "is not a path"),
        (7, "a source of runs is a path or a DataFrame, not 7"),
    ],
)
def test_sources_that_do_not_exist(tmp_path: Path, source: Any, expected: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "broken.json").symlink_to(tmp_path / "gone.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(SourceError) as caught:
        read([source], tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("[]")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match=r"^a\.json: cannot be read: Permission denied$"):
        read(["a.json"], tmp_path)


def test_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[]")

    def append(*_: object) -> None:
        with path.open("a") as stream:
            stream.write(" ")

    with duckdb.connect() as connection, pytest.raises(SourceError, match="changed while it was read"):
        read_sources(connection, [path], FIELDS, base=tmp_path, progress=append)


def test_order_given_does_not_matter(tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / f"{index}.json").write_text(json.dumps({"top_k": index // 2}))
    paths = sorted(tmp_path.iterdir())
    rows, files = read(paths, tmp_path)
    assert read(paths[::-1], tmp_path) == (rows, files)
    assert [file[0] for file in files] == list(range(1, 7))
    assert [(file[2], file[1]) for file in files] == sorted((file[2], file[1]) for file in files)


def test_fields_that_differ_in_case_alone(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="'a' and 'A' differ"):
        read([pd.DataFrame({"a": [1]})], tmp_path, SourceFields(("a", "A"), ()))
    with pytest.raises(SourceError, match="no sources"):
        read([], tmp_path)


def test_progress(tmp_path: Path) -> None:
    for name in ["a.jsonl", "b.jsonl"]:
        (tmp_path / name).write_text((json.dumps(RUN) + "\n") * 6000)
    calls: list[tuple[str, int, int]] = []
    with duckdb.connect() as connection:
        read_sources(connection, ["."], FIELDS, base=tmp_path, progress=lambda *call: calls.append(call))
    total = 2 * (tmp_path / "a.jsonl").stat().st_size
    done = [call[1] for call in calls]
    assert {call[2] for call in calls} == {total}
    assert done == sorted(done)
    assert done[-1] == total
    assert len(set(done)) > 3
    assert {call[0] for call in calls} == {"a.jsonl", "b.jsonl"}
