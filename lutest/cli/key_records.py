"""What a table file says of its configurations and sources, read as records and laid out for people."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lutest.cli.text_tables import format_table
from lutest.judging.finding import count

if TYPE_CHECKING:
    import duckdb

    from lutest.reader.table import LatencyTable

__all__ = [
    "KEY_HEADERS",
    "KEY_NAMES",
    "count_runs",
    "format_key_table",
    "open_table",
    "read_key_records",
    "read_records",
]

KEY_HEADERS = ("tier", "top_k", "blocks")
KEY_NAMES = ("tier", "top_k", "num_blocks")


@contextlib.contextmanager
def open_table(path: str | os.PathLike[str]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Connect to a table file, read-only; what DuckDB says of it names the file."""
    from lutest.tablefile.sql import connect, database_errors

    with connect(path) as connection, database_errors(f"{path}: cannot be read as a latency table: "):
        yield connection


def read_records(connection: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    """Rows of a query, by column."""
    cursor = connection.execute(query)
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def read_key_records(table: LatencyTable) -> list[dict[str, Any]]:
    """One record per configuration, tiers in the order of the table."""
    with open_table(table.path) as connection:
        keys = read_records(
            connection,
            """
            SELECT configs.*, kv_len_min, kv_len_max
            FROM configs LEFT JOIN (
                SELECT tier, top_k, num_blocks, min(kv_len) AS kv_len_min, max(kv_len) AS kv_len_max
                FROM decode_curve GROUP BY tier, top_k, num_blocks
            ) AS ranges USING (tier, top_k, num_blocks)
            ORDER BY tier, top_k, num_blocks
            """,
        )
    return sorted(keys, key=lambda key: table.tiers.index(key["tier"]))


def format_key_table(keys: Sequence[Mapping[str, Any]], *, upper: bool) -> str:
    """Lay out configurations, with their upper bounds and measured ranges if asked for."""
    headers = [*KEY_HEADERS, "n", "prefill P50", "P95"]
    names = [*KEY_NAMES, "n", "prefill_p50_ms", "prefill_p95_ms"]
    if upper:
        headers.append("P95 at most")
        names.append("prefill_p95_upper_ms")
    headers += ["step P50", "step P95"]
    names += ["decode_step_p50_ms", "decode_step_p95_ms"]
    rows = [[key[name] for name in names] for key in keys]
    if upper:
        headers += ["prompt tokens", "KV length"]
        for row, key in zip(rows, keys, strict=True):
            row.append(f"{key['prompt_tokens_min']}–{key['prompt_tokens_max']}")
            row.append(None if key["kv_len_min"] is None else f"{key['kv_len_min']}–{key['kv_len_max']}")
    return f"{format_table(headers, rows)}\nlatencies in ms; step: one decode step"


def count_runs(sources: Sequence[Mapping[str, Any]]) -> str:
    """Runs read, used and rejected, over all sources."""
    read, used, rejected = (
        sum(source[name] for source in sources) for name in ("rows_read", "rows_used", "rows_rejected")
    )
    return f"{count(read, 'run')} read, {used:,} used, {rejected:,} rejected"
