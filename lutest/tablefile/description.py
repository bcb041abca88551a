"""What a table file is and holds, as plain values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lutest.reader.names import quote
from lutest.tablefile.sql import connect, database_errors

if TYPE_CHECKING:
    import duckdb

    from lutest.reader.table import LatencyTable

LEAST_RUNS_FOR_BOUND = 59  # fewer runs have no distribution-free 95 % upper bound of a P95


def describe(table: LatencyTable) -> dict[str, Any]:
    """What a table is and holds.

    Returns
    -------
    dict
        ``path``, ``meta``, ``key_columns``; ``keys``, a record per configuration in the table's order, with
        ``runs_wanted`` until its P95 has an upper bound and, of a calibrated table, ``own_runs``; ``sources``;
        ``rejected``, reason → runs, the most first.

    Raises
    ------
    LutestError
        The table was not read from a table file, or that can no longer be read.
    """
    key = ", ".join(map(quote, table.key_columns))
    with (
        connect(table.path) as connection,
        database_errors(f"{table.path}: cannot be read as a latency table: "),
    ):
        keys = records(
            connection,
            f"""
            SELECT configs.*, kv_len_min, kv_len_max
            FROM configs LEFT JOIN (
                SELECT {key}, min(kv_len) AS kv_len_min, max(kv_len) AS kv_len_max FROM decode_curve GROUP BY {key}
            ) AS ranges USING ({key})
            ORDER BY {key}
            """,
        )
        sources = records(connection, "SELECT path, rows_read, rows_used, rows_rejected FROM sources ORDER BY path")
        reasons = connection.execute(
            "SELECT reason, count(*) AS n FROM rejected_runs GROUP BY reason ORDER BY n DESC, reason"
        ).fetchall()
    calibration = json.loads(table.meta.get("calibration", "{}"))
    own = {tuple(held): n for held, n in calibration.get("n_by_key", ())}
    for record in keys:
        record["runs_wanted"] = max(0, LEAST_RUNS_FOR_BOUND - record["n"])
        if calibration:
            record["own_runs"] = own.get(tuple(record[name] for name in table.key_columns), 0)
    return {
        "path": table.path,
        "meta": dict(table.meta),
        "key_columns": list(table.key_columns),
        "keys": keys,
        "sources": sources,
        "rejected": dict(reasons),
        "parts": _parts(table),
    }


def _parts(table: LatencyTable) -> dict[str, int] | None:
    """How many parts a table keeps beside it, and how large they are; None where it keeps none."""
    from lutest.tablefile.store import parts_folder  # here, for it brings in DuckDB

    names = {name for *_, name in json.loads(table.meta.get("parts", "[]"))}
    folder = parts_folder(Path(os.path.realpath(table.path)))
    sizes = [path.stat().st_size for path in map(folder.joinpath, names) if path.is_file()]
    return {"n": len(sizes), "size_bytes": sum(sizes)} if names else None


def records(connection: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    """Rows of a query, by column."""
    cursor = connection.execute(query)
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
