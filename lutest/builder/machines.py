"""Runs of several models or devices under one key: their figures would be those of no machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import duckdb

from lutest.reader.errors import BuildError
from lutest.reader.figures import KeyColumn
from lutest.runs.sources.discovery import printable

_MOST_SHOWN = 2  # values of a column, and files of a value


def find_mixed(connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, list[str]]]:
    """Models and devices that share a key with another one.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``runs``.

    Returns
    -------
    dict
        ``model``, ``device`` or both → value → files of its runs. A run that names none is told apart from nothing.
    """
    found = {column: _sharing(connection, column, "key_id") for column in ("model", "device")}
    return {column: files for column, files in found.items() if files}


def _sharing(connection: duckdb.DuckDBPyConnection, column: str, group: str) -> dict[str, list[str]]:
    rows = connection.execute(
        f"""
        WITH sound AS (
            SELECT {group}, {column} AS value, source_id FROM runs WHERE reason IS NULL AND {column} IS NOT NULL
        ),
        shared AS (
            SELECT {group} FROM sound GROUP BY {group} HAVING count(DISTINCT value) > 1
        )
        SELECT value, list(DISTINCT path ORDER BY path)
        FROM sound JOIN shared USING ({group}) JOIN source_files USING (source_id)
        GROUP BY value
        ORDER BY value
        """
    ).fetchall()
    return {str(value): files for value, files in rows}


def refuse_mixed(
    connection: duckdb.DuckDBPyConnection,
    mixed: Mapping[str, Mapping[str, Sequence[str]]],
    key_columns: Sequence[KeyColumn],
) -> NoReturn:
    """Say which models or devices share keys, in which files, and what to do about it.

    Raises
    ------
    BuildError
        Always.
    """
    missing = list(mixed)
    if len(mixed) > 1:  # one of the two may tell the other apart
        missing = next(
            (
                [name]
                for name, other in (("model", "device"), ("device", "model"))
                if not _sharing(connection, other, f"key_id, {name}")
            ),
            missing,
        )
    wanted = ", ".join([*missing, *(column.name for column in key_columns)])
    said = "; ".join(_described(name, files) for name, files in mixed.items())
    raise BuildError(
        f"one figure would mix machines, for no key column tells them apart: {said}. Add a key column "
        f"(`key: [{wanted}]`), or mix them on purpose with `--mixed` (`mixed=True`)"
    )


def _described(name: str, files: Mapping[str, Sequence[str]]) -> str:
    shown = [f"{printable(value)!r:.80} ({_listed(paths)})" for value, paths in files.items()]
    more = f", and {len(shown) - _MOST_SHOWN} more" if len(shown) > _MOST_SHOWN else ""
    return f"{len(shown)} {name}s: {', '.join(shown[:_MOST_SHOWN])}{more}"


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _MOST_SHOWN} more" if len(paths) > _MOST_SHOWN else ""
    return ", ".join(printable(path) for path in paths[:_MOST_SHOWN]) + more
