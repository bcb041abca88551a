"""Parts: what became of each source, in Parquet, never changed and found again by a hash of all that it rests on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import duckdb

from lutest.reader.names import literal

if TYPE_CHECKING:
    from lutest.runs.sources.run_rows import SourceFields

FORMAT = 1
ENDING = ".part"  # no ending of runs: a folder of parts is no source
_ROW_GROUP_BYTES = "32MB"  # what each thread holds before it writes
_GLOB = re.compile(r"[*?\[]")


class PartOf(NamedTuple):
    """A source, and the part that it became."""

    sha256: str
    shown: str
    folder: str | None
    part: Path


def part_name(sha256: str, folder: str | None, fields: SourceFields) -> str:
    """Name of the part of a source with these bytes, of which these fields are read."""
    described = json.dumps([FORMAT, sha256, folder, fields.scalars, fields.steps])
    return hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()[:40] + ENDING


def write_part(connection: duckdb.DuckDBPyConnection, query: str, part: Path, **described: object) -> None:
    """Write the rows of a query as a part, with what is known of its source beside them."""
    connection.execute(
        f"COPY ({query}) TO {literal(part)} (FORMAT parquet, COMPRESSION snappy, "
        f"ROW_GROUP_SIZE_BYTES '{_ROW_GROUP_BYTES}', KV_METADATA {{lutest_part: {literal(json.dumps(described))}}})"
    )


def open_parts(connection: duckdb.DuckDBPyConnection, parts: Sequence[PartOf]) -> None:
    """Create ``source_files``, and ``raw_runs`` as a view of the parts; sources are numbered as they are given."""
    names = ", ".join(literal(_GLOB.sub(r"[\g<0>]", str(name))) for name in dict.fromkeys(held.part for held in parts))
    scanned = f"read_parquet([{names}], filename = true, hive_partitioning = false)"
    connection.execute("CREATE OR REPLACE TABLE source_parts (source_id INTEGER, part VARCHAR)")
    connection.executemany(
        "INSERT INTO source_parts VALUES (?, ?)", [(number, str(held.part)) for number, held in enumerate(parts, 1)]
    )
    connection.execute(
        f"""
        CREATE OR REPLACE VIEW raw_runs AS
        SELECT source_id, scanned.* EXCLUDE (filename)
        FROM {scanned} AS scanned JOIN source_parts ON scanned.filename = source_parts.part
        """
    )
    described = dict(
        connection.execute(
            f"SELECT file_name, decode(value) FROM parquet_kv_metadata([{names}]) WHERE key = 'lutest_part'::BLOB"
        ).fetchall()
    )
    rows = dict(connection.execute("SELECT source_id, count(*) FROM raw_runs GROUP BY source_id").fetchall())
    for number, held in enumerate(parts, 1):
        told = json.loads(described[str(held.part)])
        connection.execute(
            "INSERT INTO source_files VALUES (?, ?, ?, ?, ?, ?, ?)",
            [number, held.shown, held.sha256, held.folder, rows.get(number, 0), told["tool"], told["fields"]],
        )
