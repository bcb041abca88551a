"""Reading a JSON export of a table: plain data from a stranger, checked like a table file, without DuckDB."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn

from lutest.reader.checked_figures import Row, check_figures
from lutest.reader.errors import TableError
from lutest.reader.figures import Figures

__all__ = ["EXPORT_ENDING", "EXPORT_FORMAT", "EXPORT_VERSION", "read_export"]

EXPORT_ENDING = ".json"
EXPORT_FORMAT = "lutest export"
EXPORT_VERSION = 1
_LARGEST = 2**63 - 1  # what a table file holds at most


def read_export(path: str) -> Figures:
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
