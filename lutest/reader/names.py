"""The names of the file as far as reading needs them: version, key and quantile columns, and what is no table."""

from __future__ import annotations

import os

from lutest.reader.errors import TableError

SCHEMA_VERSION = 1
KEY_COLUMNS = "key_columns"  # row of meta: the key columns as JSON, in their order
REBUILD = "build it again with `lutest build`"
TEMPORARY_ENDING = ".lutest-tmp"  # what a build leaves when it is killed
LOG_ENDINGS = (".wal", ".wal.checkpoint", ".wal.recovery")  # DuckDB's own, of changes not yet in the file itself


def quantile_suffix(q: float) -> str:
    """Name of a quantile in column names: 0.5 → ``p50``, 0.999 → ``p99_9``."""
    return "p" + f"{q * 100:.10g}".replace(".", "_")


def quantile_column(q: float) -> str:
    """Column that holds the quantile `q` of a latency, in milliseconds."""
    return f"{quantile_suffix(q)}_ms"


def error_column(q: float) -> str:
    """Column that holds the standard error of the quantile `q` of a latency, in milliseconds."""
    return f"{quantile_suffix(q)}_se_ms"


def quote(identifier: str) -> str:
    """Quote an SQL identifier."""
    return '"' + identifier.replace('"', '""') + '"'


def literal(text: object) -> str:
    """Quote a text for SQL, where a statement takes no parameters."""
    return "'" + str(text).replace("'", "''") + "'"


def refuse_other_files(path: str | os.PathLike[str]) -> None:
    """Refuse a file that is no DuckDB file, before DuckDB says so in its own words.

    Raises
    ------
    TableError
        Runs, or an export, where a table file is wanted, or something else.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        if file.read(12)[8:] == b"DUCK":
            return
    if name.lower().endswith(".json"):
        raise TableError(
            f"{name}: no table file; if it is an export, `lutest.load`, `lutest lookup` and `lutest feasible` read it, "
            "and what else there is to know is in the table that it was exported from"
        )
    if name.lower().endswith((".csv", ".parquet", ".jsonl", ".ndjson", ".gz")):
        raise TableError(
            f"{name}: runs, not a table; `lutest build {name} -o table.duckdb` makes a table of them, and where both "
            "are given the table stands first"
        )
    raise TableError(f"{name}: not a DuckDB file, so it is no table; build one with `lutest build`")


def refuse_unfinished(path: str | os.PathLike[str]) -> None:
    """Refuse names that are no table's, whatever they hold.

    Raises
    ------
    TableError
        What a killed build left, or a log of DuckDB.
    """
    name = os.fspath(path)
    if name.endswith(TEMPORARY_ENDING):
        raise TableError(f"{name}: a temporary file of a build that runs or was killed, not a table; build again")
    if name.endswith(LOG_ENDINGS):
        raise TableError(f"{name}: a log of DuckDB, not a table; name the file that it belongs to")
