"""Exporting a table into formats that hold nothing but data: JSON, which `lutest.load` reads, and Parquet."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from lutest.reader.errors import ArgumentError, BuildError, TableError
from lutest.reader.file import EXPORT_ENDING, EXPORT_FORMAT, EXPORT_VERSION, read_figures
from lutest.reader.names import literal, quote
from lutest.tablefile.schema import TABLES
from lutest.tablefile.sql import connect
from lutest.tablefile.store import replaceable, replacing

if TYPE_CHECKING:
    import duckdb

_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class ExportSummary:
    """What was exported: the file or folder, and table → number of its rows."""

    output: Path
    rows: dict[str, int]


def export(table: str | os.PathLike[str], output: str | os.PathLike[str], *, parquet: bool = False) -> ExportSummary:
    """Write all rows of a table file as plain data.

    Parameters
    ----------
    table : path
        A file that `lutest build` wrote.
    output : path
        The JSON file to write, ending in ``.json``; with `parquet` the folder to make.
    parquet : bool
        Write one Parquet file per table, ``prefill.parquet`` and so on, instead of JSON.

    Returns
    -------
    ExportSummary

    Raises
    ------
    TableError
        `table` is not a sound table file.
    ArgumentError
        `output` does not end in ``.json``, or is a folder that holds something.
    BuildError
        `output` cannot be written. A file that stood there is then unchanged.

    Notes
    -----
    The JSON file is one object::

        {
          "format": "lutest export",
          "version": 1,
          "tables": {
            "prefill": {"columns": ["tier", "top_k", …], "rows": [["low", 4, …], …]},
            …
          }
        }

    Tables and columns are those of the table file, in its order. Whole numbers are JSON numbers without a point;
    floating-point numbers have a point or an exponent, and as many digits as bring back the very same number; a
    value that is not there is null. Rejected runs may hold "NaN", "Infinity" and "-Infinity", as text. Macros and
    views are left out. `lutest.load` reads such a file without DuckDB, and checks it as it checks a table file.
    """
    path, target = Path(table), Path(output)
    if path.name.lower().endswith(EXPORT_ENDING):
        raise ArgumentError(f"{path}: is an export already; export the table file that it came from")
    if not parquet and target.suffix.lower() != EXPORT_ENDING:
        raise ArgumentError(f"{target}: the output must end in {EXPORT_ENDING}, for `lutest.load` goes by that")
    if parquet and (target.is_file() or (target.is_dir() and any(target.iterdir()))):
        raise ArgumentError(f"{target}: stands there already; name a folder that is new or empty")
    key_columns = read_figures(path).key_columns  # nothing is made of a file that is not sound
    queries = {
        name: f"SELECT * FROM {quote(name)} ORDER BY {', '.join(map(quote, held.ordered_by(key_columns)))}"
        for name, held in TABLES.items()
    }
    with _failures(path, target):
        return (_write_parquet if parquet else _write_json)(path, target, queries)


@contextlib.contextmanager
def _failures(path: Path, target: Path) -> Iterator[None]:
    import duckdb

    try:
        yield
    except OSError as error:
        raise BuildError(f"{target}: cannot write the export: {error.strerror or error}") from error
    except duckdb.Error as error:
        raise TableError(f"{path}: cannot be exported: {str(error).splitlines()[0]}") from error


def _write_json(path: Path, target: Path, queries: Mapping[str, str]) -> ExportSummary:
    rows = {}
    replaced = replaceable(target, [path], "export")
    replaced.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(replaced) as temporary,
        connect(path) as connection,
        temporary.open("x", encoding="utf-8") as file,
    ):
        file.write(f'{{\n"format": {json.dumps(EXPORT_FORMAT)},\n"version": {EXPORT_VERSION},\n"tables": {{')
        for number, (name, query) in enumerate(queries.items()):
            file.write(f"{',' if number else ''}\n{json.dumps(name)}: ")
            rows[name] = _write_rows(connection, query, file)
        file.write("\n}\n}\n")
    return ExportSummary(target, rows)


def _write_rows(connection: duckdb.DuckDBPyConnection, query: str, file: TextIO) -> int:
    cursor = connection.execute(query)
    columns = [column[0] for column in cursor.description or ()]
    file.write(f'{{"columns": {json.dumps(columns)}, "rows": [')
    written = 0
    while rows := cursor.fetchmany(_ROWS_AT_ONCE):
        for row in rows:
            text = json.dumps([_plain(value) for value in row], ensure_ascii=False, allow_nan=False)
            file.write(f"{',' if written else ''}\n{text}")
            written += 1
    file.write("]}")
    return written


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _write_parquet(path: Path, target: Path, queries: Mapping[str, str]) -> ExportSummary:
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = {}
    with replacing(target.absolute()) as folder, connect(path, unsafe=True) as connection:
        folder.mkdir()
        # A stranger's file may hold views in the place of tables: nothing but this folder is in their reach.
        connection.execute(f"SET allowed_directories = [{literal(folder)}]")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        for name, query in queries.items():
            file = literal(folder / f"{name}.parquet")
            written = connection.execute(f"COPY ({query}) TO {file} (FORMAT parquet)").fetchone()
            assert written is not None
            rows[name] = written[0]
    return ExportSummary(target, rows)
