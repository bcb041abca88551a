"""What tells a whole table from anything else: its content hash, its row counts, and the names that no table has."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from .errors import TableError
from .schema import TABLES, quote

if TYPE_CHECKING:
    import duckdb

__all__ = [
    "LOG_ENDINGS",
    "TEMPORARY_ENDING",
    "VOLATILE_META",
    "content_hash",
    "parent_schema",
    "refuse_unfinished",
    "row_counts",
]

TEMPORARY_ENDING = ".lutest-tmp"  # what a build leaves when it is killed
LOG_ENDINGS = (".wal", ".wal.checkpoint", ".wal.recovery")  # DuckDB's own, of changes not yet in the file itself

# What differs between two builds of the same input: when, where and by which version it was built.
VOLATILE_META = ("build_config", "built_at", "content_hash", "duckdb_version", "fit_seconds", "lutest_version")
_ROWS_AT_ONCE = 10_000


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
    for table in TABLES.values():
        prefix = f"{quote(database)}." if database else ""
        digest.update(f"table {table.name}\n".encode())
        # Ties in the order (rejected rows of one place) are told apart by all the other columns.
        where = f"WHERE key NOT IN {VOLATILE_META!r}" if table.name == "meta" else ""
        columns = "* EXCLUDE (path)" if table.name == "sources" else "*"
        # DuckDB 1.2 does not always sort texts beyond ASCII by their bytes, as it does their hexadecimal digits.
        texts = {column.name for column in table.columns if column.type == "VARCHAR"}
        order = ", ".join(f"hex(encode({quote(name)}))" if name in texts else quote(name) for name in table.order)
        cursor = connection.execute(f"SELECT {columns} FROM {prefix}{quote(table.name)} {where} ORDER BY {order}")
        names = [column[0] for column in cursor.description or ()]
        digest.update(repr(names).encode())
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
    counts = {}
    for name in TABLES:
        prefix = f"{quote(database)}." if database else ""
        row = connection.execute(f"SELECT count(*) FROM {prefix}{quote(name)}").fetchone()
        assert row is not None
        counts[name] = row[0]
    return counts


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
