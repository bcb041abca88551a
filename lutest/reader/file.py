"""Reading a table file, or the export of one, into plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from lutest.reader.checked_figures import Row, check_figures
from lutest.reader.errors import TableError
from lutest.reader.figures import Figures
from lutest.reader.names import REBUILD, quote, refuse_other_files
from lutest.reader.seal import check_seal

if TYPE_CHECKING:
    import duckdb

EXPORT_ENDING = ".json"
EXPORT_FORMAT = "lutest export"
EXPORT_VERSION = 1
_LARGEST = 2**63 - 1  # what a table file holds at most
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
        return _read_export(name)
    if os.path.getsize(name) <= _SEAL_CHECKED_BYTES:
        check_seal(name, required=False)
    refuse_other_files(name)
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


def _read_export(path: str) -> Figures:
    """Read and check a JSON file that `lutest export` wrote; see there for the format.

    Raises
    ------
    TableError
        Not an export, of another version, or not sound: naming the file, table, configuration and value.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, parse_int=_whole_number, parse_constant=_refuse)
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        cause = "values are nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise TableError(f"{path}: not JSON as `lutest export` writes it: {cause}") from error
    if not isinstance(content, dict) or content.get("format") != EXPORT_FORMAT:
        raise TableError(f'{path}: not an export of lutest: it has no "format": "{EXPORT_FORMAT}"')
    found = repr(content.get("version"))
    if found != repr(EXPORT_VERSION):
        raise TableError(f"{path}: has version {found:.40} of the export format, this lutest reads {EXPORT_VERSION}")
    tables = content.get("tables")

    def rows(table: str, columns: Sequence[str]) -> list[Row]:
        held = tables.get(table) if isinstance(tables, dict) else None
        if not isinstance(held, dict):
            raise TableError(f"{path}: table {table} is missing")
        names, values = held.get("columns"), held.get("rows")
        if not isinstance(names, list) or not isinstance(values, list):
            raise TableError(f"{path}: table {table} is not made of columns and rows")
        try:
            places = [names.index(column) for column in columns]
        except ValueError:
            missing = next(column for column in columns if column not in names)
            raise TableError(f"{path}: table {table} has no column {missing}") from None
        for number, row in enumerate(values, 1):
            if not isinstance(row, list) or len(row) != len(names):
                raise TableError(f"{path}: table {table}, row {number}: not a list of {len(names)} values")
            if any(isinstance(value, list | dict) for value in row):
                raise TableError(f"{path}: table {table}, row {number}: a value is a list or an object")
        return [tuple(row[place] for place in places) for row in values]

    return check_figures(path, rows)


def _whole_number(text: str) -> int:
    if len(text) > len(str(-_LARGEST)) or abs(int(text)) > _LARGEST:
        raise ValueError(f"the number {text[:30]} is too large")
    return int(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
