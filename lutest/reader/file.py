"""Reading a table file, or the export of one, into plain values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lutest.reader.checked_figures import Row, check_figures
from lutest.reader.errors import TableError
from lutest.reader.export_file import EXPORT_ENDING, read_export
from lutest.reader.figures import Figures
from lutest.reader.names import REBUILD, quote
from lutest.reader.seal import check_seal

if TYPE_CHECKING:
    import duckdb

__all__ = ["read_figures"]

_CONFIGURATION: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "enable_external_access": "false",
    "lock_configuration": "true",
    "threads": "1",
}
_SEAL_CHECKED_BYTES = 16 << 20  # costs next to nothing up to here; beyond, rejected runs have made the file large


def read_figures(path: str | os.PathLike[str]) -> Figures:
    """Read and check a whole table file; no connection stays open.

    Parameters
    ----------
    path : str or path-like
        A file that `lutest build` wrote, or a JSON file that `lutest export` wrote.

    Returns
    -------
    Figures

    Raises
    ------
    TableError
        No such file, not a table, of another version, or damaged: naming the file, table, configuration and value.
    """
    name = os.fspath(path)
    if not os.path.exists(name):
        raise TableError(f"{name}: no such table file; build one with `lutest build`")
    if not os.path.isfile(name):  # a pipe would be waited for
        raise TableError(f"{name}: is {'a folder' if os.path.isdir(name) else 'no regular file'}, not a table file")
    if name.lower().endswith(EXPORT_ENDING):
        return read_export(name)
    if os.path.getsize(name) <= _SEAL_CHECKED_BYTES:
        check_seal(name, required=False)
    import duckdb  # here, so that nothing but reading a file needs DuckDB

    try:
        connection = _open(name)
    except duckdb.Error as error:
        raise TableError(f"{name}: cannot be opened as a DuckDB file: {_first_line(error)}") from error
    try:
        with connection:
            return check_figures(name, lambda table, columns: _rows(name, connection, table, columns))
    except duckdb.Error as error:
        raise TableError(f"{name}: damaged: {_first_line(error)}; {REBUILD}") from error


def _open(name: str) -> duckdb.DuckDBPyConnection:
    import duckdb

    try:
        return duckdb.connect(name, read_only=True, config=_CONFIGURATION)
    except duckdb.ConnectionException:
        pass  # DuckDB wants one configuration per file and process, and the caller has this file open with another
    try:
        return duckdb.connect(name, read_only=True)
    except duckdb.ConnectionException:
        return duckdb.connect(name)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _rows(name: str, connection: duckdb.DuckDBPyConnection, table: str, columns: Sequence[str]) -> list[Row]:
    import duckdb

    try:
        return connection.execute(f"SELECT {', '.join(map(quote, columns))} FROM {quote(table)}").fetchall()
    except (duckdb.CatalogException, duckdb.BinderException) as error:
        raise TableError(
            f"{name}: not a latency table that this version of lutest reads: {_first_line(error)}; {REBUILD}"
        ) from error
