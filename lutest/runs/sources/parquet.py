"""Runs of a Parquet file into ``raw_runs``, by SQL where the types allow it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from lutest.reader.errors import SourceError
from lutest.reader.names import literal, quote
from lutest.runs.sources.discovery import printable
from lutest.runs.sources.run_rows import RunWriter, SourceFields, field_column

FETCH_ROWS = 2_000

_PLAIN_PATH = re.compile(r"[\w/.+=@ -]+", re.ASCII)
_NUMERIC = re.compile(r"(?:U?(?:TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(\d+,\d+\))((?:\[\]){0,2})")
_NESTED = re.compile(r".*\[\d*\]|(?:STRUCT|MAP|UNION)\(.*", re.DOTALL)
_AFTER_CAUSE = re.compile(r"\s*(?:\n\nLINE |Stack Trace:)")  # an excerpt of the query, addresses of functions
# what DuckDB raises, and what its binding makes of C++ exceptions on damaged files
_FAILURES = (duckdb.Error, RuntimeError, ValueError, IndexError, OverflowError, MemoryError)


def read_parquet(
    connection: duckdb.DuckDBPyConnection, path: Path, shown: str, fields: SourceFields, writer: RunWriter
) -> None:
    """Read a Parquet file of one row a run.

    Parameters
    ----------
    connection : duckdb.DuckDBPyConnection
        Holds the table ``raw_runs``.
    path : Path
        The file.
    shown : str
        The file, for messages.
    fields : SourceFields
        The fields to keep.
    writer : RunWriter
        Takes the runs.

    Raises
    ------
    SourceError
        The file is not valid Parquet.
    """
    with _plainly_named(path) as name:
        try:
            types = _column_types(connection, name)
            writer.note(types)
            if all(_NUMERIC.fullmatch(types[field]) for field in fields.steps if field in types):
                writer.add_query(_query(name, fields, types))
            else:
                _insert_row_by_row(connection, name, fields, types, writer)
        except duckdb.TransactionException:  # the work database has no room: no fault of the file
            raise
        except _FAILURES as error:
            if "No space left" in str(error):  # for the part
                raise
            cause = " ".join(_AFTER_CAUSE.split(str(error))[0].replace(name, shown).split())
            raise SourceError(f"{shown}: cannot be read as Parquet: {printable(cause)}") from None


@contextmanager
def _plainly_named(path: Path) -> Iterator[str]:
    """Name of the file without glob characters or others that DuckDB would take for more than a name."""
    if _PLAIN_PATH.fullmatch(str(path)):
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="lutest-") as folder:
        link = Path(folder, "source.parquet")
        link.symlink_to(path)
        yield str(link)


def _column_types(connection: duckdb.DuckDBPyConnection, name: str) -> dict[str, str]:
    described = connection.execute("DESCRIBE SELECT * FROM read_parquet(?, hive_partitioning = false)", [name])
    return {str(row[0]): str(row[1]) for row in described.fetchall()}


def _selection(name: str, types: dict[str, str], columns: list[str]) -> str:
    """Select the row number and `columns` of a file."""
    numbered = "file_row_number" not in {column.lower() for column in types}
    row = "file_row_number" if numbered else "row_number() OVER () - 1"
    option = ", file_row_number = true" if numbered else ""
    select = ", ".join([f'{row} + 1 AS "row"', *columns])
    return f"SELECT {select} FROM read_parquet({literal(name)}, hive_partitioning = false{option})"


def _cells(fields: SourceFields, types: dict[str, str]) -> list[str]:
    return [f"{_text(quote(name), types.get(name))} AS c{i}" for i, name in enumerate(fields.scalars)]


def _text(column: str, kind: str | None) -> str:
    """Expression for the text of a scalar column."""
    if kind is None:
        return "NULL::VARCHAR"
    if kind in ("FLOAT", "DOUBLE"):
        return (
            f"CASE WHEN isnan({column}) THEN 'NaN' WHEN isinf({column}) THEN "
            f"CASE WHEN {column} > 0 THEN 'Infinity' ELSE '-Infinity' END ELSE {column}::DOUBLE::VARCHAR END"
        )
    if _NESTED.fullmatch(kind):
        return f"to_json({column})::VARCHAR"
    return f"{column}::VARCHAR"


def _query(name: str, fields: SourceFields, types: dict[str, str]) -> str:
    """Rows of ``raw_runs``, all within DuckDB: steps are numbers in lists, flat or one list per position."""
    steps = [field for field in fields.steps if field in types]
    columns = [f"{quote(field)} AS s{i}" for i, field in enumerate(steps)]
    inner = _selection(name, types, [*_cells(fields, types), *columns])
    problem = _first_case(
        [
            (f"contains(c{i}, chr(0))", literal(f"the field {field!r} holds a NUL character"))
            for i, field in enumerate(fields.scalars)
            if field in types
        ]
    )
    depths = [_depth(types[field]) for field in steps]
    present = [f"s{i} IS NOT NULL" for i in range(len(steps))]
    fault = _first_case(
        [
            (test, _step_fault(f"s{i}", field, depths[i]))
            for i, (test, field) in enumerate(zip(present, steps, strict=True))
        ]
    )
    flat = _first_case([(test, _flat(f"s{i}", depths[i])) for i, test in enumerate(present)], "DOUBLE[]")
    positions = _first_case([(test, _positions(f"s{i}", depths[i])) for i, test in enumerate(present)], "INTEGER[]")
    values = "".join(
        f", CASE WHEN problem IS NULL THEN c{i} END AS {quote(field_column(field))}"
        for i, field in enumerate(fields.scalars)
    )
    return f"""
        SELECT
            "row", problem,
            CASE WHEN problem IS NULL AND fault IS NULL THEN {flat} END AS steps,
            CASE WHEN problem IS NULL AND fault IS NULL THEN {positions} END AS step_positions,
            CASE WHEN problem IS NULL THEN fault END AS steps_problem{values}
        FROM (SELECT *, {problem} AS problem, {fault} AS fault FROM ({inner}))
        """


def _insert_row_by_row(
    connection: duckdb.DuckDBPyConnection, name: str, fields: SourceFields, types: dict[str, str], writer: RunWriter
) -> None:
    """Insert through Python: steps are text, or of types that need a look at each value."""
    steps = [f"{quote(field) if field in types else 'NULL'} AS s{i}" for i, field in enumerate(fields.steps)]
    scalars = len(fields.scalars)
    with connection.cursor() as reader:  # a result is lost when its own connection runs another statement
        query = _selection(name, types, [*_cells(fields, types), *steps])
        reader.execute(f'{query} ORDER BY "row"')
        while rows := reader.fetchmany(FETCH_ROWS):
            for row in rows:
                writer.add(row[1 : scalars + 1], row[scalars + 1 :])


def _depth(kind: str) -> int:
    return kind.count("[]")


def _first_case(cases: list[tuple[str, str]], kind: str = "VARCHAR") -> str:
    """Expression for the value that belongs to the first condition that holds."""
    if not cases:
        return f"NULL::{kind}"
    return "CASE " + " ".join(f"WHEN {test} THEN {value}" for test, value in cases) + f" ELSE NULL::{kind} END"


def _step_fault(column: str, field: str, depth: int) -> str:
    if depth == 0:
        return f"{literal(field + ' is ')} || {column}::VARCHAR || ', not a list of numbers'"
    missing = "e IS NULL"
    if depth == 2:
        missing += " OR coalesce(list_position([y IS NULL FOR y IN e], true), 0) > 0"
    return f"'step ' || list_position([{missing} FOR e IN {column}], true)::VARCHAR || ' is null, not a number'"


def _flat(column: str, depth: int) -> str:
    if depth == 0:
        return "NULL::DOUBLE[]"
    return f"flatten({column})::DOUBLE[]" if depth == 2 else f"{column}::DOUBLE[]"


def _positions(column: str, depth: int) -> str:
    if depth < 2:
        return "NULL::INTEGER[]"
    numbered = f"flatten([[i FOR y IN {column}[i]] FOR i IN range(1, len({column}) + 1)])::INTEGER[]"
    return f"CASE WHEN list_position([len(e) <> 1 FOR e IN {column}], true) IS NOT NULL THEN {numbered} END"
