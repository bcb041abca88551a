"""Whether runs are those that a table was built from, or come from another device or model."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb

from lutest.reader.names import quote
from lutest.reader.table import LatencyTable
from lutest.tablefile.sql import connect

__all__ = ["provenance_warnings"]

LEAST_SHARE_KNOWN = 0.05  # of the table's extreme runs; fewer may meet by chance
LEAST_SHARE_DISTINCT = 0.9  # below it the clock is so coarse that equal times say nothing
_SAME_TIME = 1e-9  # relative: survives a change of unit
_ADVICE = "these figures say how well the table fits its own runs, not what it predicts; judge it by runs it never saw"


def provenance_warnings(connection: duckdb.DuckDBPyConnection, table: LatencyTable) -> tuple[str, ...]:
    """Warn of runs that do not test a table, one sentence each.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``source_files`` and ``matched_runs``.
    table : LatencyTable
        Its file, where it is still there, says what it was built from.

    Notes
    -----
    Two traces of the table's own runs are looked for: sources with the same SHA-256, and, since runs may have been
    converted since, the least and the largest prefill of each configuration, which the file keeps. Of runs that are
    measured anew none meets such a value but by chance.
    """
    warnings = []
    held = _built_from(table)
    if held is None:
        warnings.append(
            "whether the table was built from these very runs is not known: its file is not at hand, or has changed"
        )
    else:
        digests, extremes = held
        same = _runs_of_same_files(connection, digests)
        total = _one(connection, "SELECT count(*) FROM matched_runs")
        if same:
            warnings.append(
                f"{same:,} of {int(total):,} runs come from files that the table was built from (same SHA-256): "
                f"{_ADVICE}"
            )
        else:
            share = _share_known(connection, extremes)
            if share >= LEAST_SHARE_KNOWN:
                warnings.append(
                    f"the table was built from some of these very runs: of the extreme prefill times it was built "
                    f"from, {share:.0%} stand among them: {_ADVICE}"
                )
    warnings += [warning for name in ("device", "model") if (warning := _mismatch(connection, table, name))]
    return tuple(warnings)


def _built_from(table: LatencyTable) -> tuple[list[str], list[tuple[int, float]]] | None:
    """SHA-256 of the sources, and (key_id, least or largest prefill) of each configuration."""
    if not table.path or not Path(table.path).is_file():
        return None
    with connect(table.path) as file:
        content = file.execute("SELECT value FROM meta WHERE key = 'content_hash'").fetchone()
        if content is None or content[0] != table.meta.get("content_hash"):
            return None
        digests = [digest for (digest,) in file.execute("SELECT sha256 FROM sources").fetchall()]
        columns = ", ".join(map(quote, table.key_columns))
        rows = file.execute(f"SELECT min_ms, max_ms, {columns} FROM prefill").fetchall()
    numbers = {key: number for number, key in enumerate(table.keys)}
    return digests, [(numbers[tuple(key)], value) for low, high, *key in rows for value in {low, high}]


def _runs_of_same_files(connection: duckdb.DuckDBPyConnection, digests: list[str]) -> int:
    return int(
        _one(
            connection,
            "SELECT count(*) FROM matched_runs JOIN source_files USING (source_id) WHERE list_contains(?, sha256)",
            [digests],
        )
    )


def _share_known(connection: duckdb.DuckDBPyConnection, extremes: list[tuple[int, float]]) -> float:
    distinct = _one(
        connection,
        """
        SELECT sum(n_distinct) / sum(n)
        FROM (
            SELECT count(DISTINCT prefill_ms) AS n_distinct, count(*) AS n
            FROM matched_runs GROUP BY key_id
        )
        """,
    )
    if distinct < LEAST_SHARE_DISTINCT:
        return 0.0
    connection.execute("CREATE OR REPLACE TEMP TABLE extremes (key_id INTEGER, value DOUBLE)")
    connection.executemany("INSERT INTO extremes VALUES (?, ?)", extremes)
    return _one(
        connection,
        f"""
        WITH nearest AS (
            SELECT min(abs(prefill_ms - value) / value) AS distance
            FROM extremes JOIN matched_runs USING (key_id)
            GROUP BY key_id, value
        )
        SELECT coalesce(avg(CAST(distance < {_SAME_TIME} AS INTEGER)), 0) FROM nearest
        """,
    )


def _mismatch(connection: duckdb.DuckDBPyConnection, table: LatencyTable, name: str) -> str:
    held = set(json.loads(table.meta.get(name, "[]")))
    rows = connection.execute(
        f"SELECT DISTINCT {name} FROM matched_runs WHERE {name} IS NOT NULL ORDER BY 1"
    ).fetchall()
    strange = [value for (value,) in rows if value not in held]
    if not held or not strange:
        return ""
    return f"the runs come from another {name} ({'; '.join(strange[:3])}) than the table ({'; '.join(sorted(held))})"


def _one(connection: duckdb.DuckDBPyConnection, query: str, parameters: list[object] | None = None) -> float:
    row = connection.execute(query, parameters or []).fetchone()
    assert row is not None
    return float(row[0]) if row[0] is not None else 0.0
