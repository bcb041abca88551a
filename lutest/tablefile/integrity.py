"""What tells a whole table from anything else: its content hash, its row counts, and the names that no table has."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from lutest.reader.names import quote
from lutest.tablefile.schema import TABLES

if TYPE_CHECKING:
    import duckdb

__all__ = ["VOLATILE_META", "content_hash", "parent_schema", "row_counts"]


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
