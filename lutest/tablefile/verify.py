"""Verifying a table file: every byte against its seal, every row against the content hash, every count of runs."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lutest.reader.errors import TableError
from lutest.reader.file import EXPORT_ENDING, read_figures
from lutest.reader.names import LOG_ENDINGS, REBUILD, quote, refuse_unfinished
from lutest.reader.seal import check_seal
from lutest.tablefile.schema import TABLES, stored_key_columns
from lutest.tablefile.sql import connect

if TYPE_CHECKING:
    import duckdb

# What differs between two builds of the same input: when, where and by which version it was built.
_VOLATILE_META = (
    "build_config",
    "built_at",
    "content_hash",
    "duckdb_version",
    "fit_seconds",
    "lutest_version",
    "parts",
)
_ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Verification:
    """What was verified.

    Attributes
    ----------
    path : str
        The table file.
    content_hash : str
        SHA-256 over all rows, as stored and as computed.
    rows : dict
        Table → number of its rows, all of them read.
    size_bytes : int
        Size of the file.
    """

    path: str
    content_hash: str
    rows: dict[str, int]
    size_bytes: int


def verify(path: str | os.PathLike[str]) -> Verification:
    """Check a table file as a whole.

    The seal over every byte of the file, before DuckDB sees any of it; all that a load checks; the content hash over
    every row of every table, for which DuckDB checks the checksum of every block; and that the counts of runs agree.

    Parameters
    ----------
    path : str or path-like
        A file that `lutest build` wrote.

    Returns
    -------
    Verification

    Raises
    ------
    TableError
        No such file, not a table, of another version, damaged, or changed since it was built.
    """
    name = os.fspath(path)
    refuse_unfinished(name)
    if name.lower().endswith(EXPORT_ENDING):
        raise TableError(f"{name}: verify checks table files, not exports, which have no seal: each load checks those")
    while True:
        if os.path.isfile(name):  # else reading it says what is wrong
            check_seal(name, required=True)
        figures = read_figures(name)
        for ending in LOG_ENDINGS:
            if os.path.exists(name + ending):
                raise TableError(f"{name}: {name + ending} holds changes that another program has not written into it")
        checked = _check(name)
        if figures.meta.get("content_hash") == checked.content_hash:
            return checked
        # a build replaced the file between the two: both are whole, but not the same


def _check(path: str) -> Verification:
    import duckdb  # here, so that nothing but reading a file needs DuckDB

    try:
        with connect(path, threads=1) as connection:
            size_bytes = os.stat(path).st_size
            stored = connection.execute("SELECT value FROM meta WHERE key = 'content_hash'").fetchone()
            if stored is None:
                raise TableError(f"{path}: table meta holds no content hash to verify it by; {REBUILD}")
            computed = content_hash(connection)
            if stored[0] != computed:
                raise TableError(
                    f"{path}: its rows have the content hash {computed}, but {stored[0]} when it was built: "
                    f"changed or damaged since; {REBUILD}"
                )
            _check_accounts(path, connection)
            _check_parent(path, connection)
            return Verification(path, computed, row_counts(connection), size_bytes)
    except (duckdb.CatalogException, duckdb.BinderException) as error:
        raise TableError(
            f"{path}: not a table of this version of lutest: {str(error).splitlines()[0]}; {REBUILD}"
        ) from error
    except duckdb.Error as error:
        raise TableError(f"{path}: damaged: {str(error).splitlines()[0]}; {REBUILD}") from error


def _check_parent(path: str, connection: duckdb.DuckDBPyConnection) -> None:
    """Check that a calibrated table keeps its parent as it was."""
    stored = connection.execute("SELECT value FROM meta WHERE key = 'parent_content_hash'").fetchone()
    if stored is not None and content_hash(connection, parent_schema(1)) != stored[0]:
        raise TableError(f"{path}: its schema parent is not the table {stored[0]} that it was calibrated from")


def _check_accounts(path: str, connection: duckdb.DuckDBPyConnection) -> None:
    rejected: dict[int, int] = dict(
        connection.execute("SELECT source_id, count(*) FROM rejected_runs GROUP BY source_id").fetchall()
    )
    used_in_all = 0
    # the path is the one column that the content hash leaves out: read it here
    for source_id, shown, *counts in connection.execute(
        "SELECT source_id, path, rows_read, rows_used, rows_rejected FROM sources ORDER BY source_id"
    ).fetchall():
        read, used, left_out = counts
        used_in_all += used
        if read != used + left_out or left_out != rejected.pop(source_id, 0):
            raise TableError(
                f"{path}: table sources: {shown}: {read} runs read, {used} used, {left_out} rejected: "
                f"they do not add up with rejected_runs; {REBUILD}"
            )
    if rejected:
        raise TableError(f"{path}: table rejected_runs: source_id {min(rejected)} is not in sources; {REBUILD}")
    for table in ("prefill", "output_length"):
        row = connection.execute(f"SELECT coalesce(sum(n), 0) FROM {table}").fetchone()
        if row is None or row[0] != used_in_all:
            raise TableError(f"{path}: table {table}: n adds up to {row and row[0]} runs, not {used_in_all}; {REBUILD}")


def content_hash(connection: duckdb.DuckDBPyConnection, database: str | None = None) -> str:
    """SHA-256 over the rows of all tables in their stated order.

    Neither the layout of the file counts nor the paths of the sources; numbers count to the last bit.

    Parameters
    ----------
    connection : duckdb connection
        Has the table file open.
    database : str, optional
        Name under which the file is attached, or of a schema in it; the current database if not given.
    """
    digest = hashlib.sha256()
    prefix = f"{quote(database)}." if database else ""
    key_columns = stored_key_columns(connection, prefix)
    for table in TABLES.values():
        digest.update(f"table {table.name}\n".encode())
        # Ties in the order (rejected rows of one place) are told apart by all the other columns.
        where = f"WHERE key NOT IN {_VOLATILE_META!r}" if table.name == "meta" else ""
        columns = "* EXCLUDE (path)" if table.name == "sources" else "*"
        # DuckDB 1.2 does not always sort texts beyond ASCII by their bytes, as it does their hexadecimal digits.
        texts = {column.name for column in table.expand((), key_columns) if column.type == "VARCHAR"}
        names = table.ordered_by(key_columns)
        order = ", ".join(f"hex(encode({quote(name)}))" if name in texts else quote(name) for name in names)
        cursor = connection.execute(f"SELECT {columns} FROM {prefix}{quote(table.name)} {where} ORDER BY {order}")
        digest.update(repr([column[0] for column in cursor.description or ()]).encode())
        while rows := cursor.fetchmany(_ROWS_AT_ONCE):
            digest.update(repr(rows).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def parent_schema(place: int) -> str:
    """Schema with the tables of the parent of a calibrated table, and of the parent's parents."""
    return "parent" if place == 1 else f"parent_{place}"


def row_counts(connection: duckdb.DuckDBPyConnection, database: str | None = None) -> dict[str, int]:
    """Number of rows of each table.

    Parameters
    ----------
    connection : duckdb connection
        Has the table file open.
    database : str, optional
        Name under which the file is attached; the current database if not given.
    """
    prefix = f"{quote(database)}." if database else ""
    counts = {}
    for name in TABLES:
        row = connection.execute(f"SELECT count(*) FROM {prefix}{quote(name)}").fetchone()
        assert row is not None
        counts[name] = row[0]
    return counts
