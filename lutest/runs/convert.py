"""Runs of any source into one compact Parquet file that a build reads again: one row a run, canonical columns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pandas as pd

from lutest.reader.errors import BuildError, ConfigError
from lutest.reader.figures import KeyColumn
from lutest.reader.names import literal, quote
from lutest.runs.configuration import Config, resolve_config
from lutest.runs.sources import Source, listed
from lutest.runs.sources.discovery import list_sources
from lutest.runs.work import read_runs, work_database
from lutest.tablefile.store import RUNS_MARK, locked, replacing

Progress = Callable[[str, int, int], None]

# A rejected run must be rejected by the next build as well. Where the canonical columns cannot show its fault (text in
# a column of numbers, half a token), the file leaves out its prefill_ms, without which no run is used.
_FAULTS_SHOWN = ("missing_value", "no_output_tokens", "step_count_mismatch", "unreadable_row", "zero_prefill")
_FIRST = ("workload", "sample_id")
_COLUMNS = {
    "prompt_tokens": "prompt_tokens",
    "vision_tokens": "vision_tokens",
    "text_tokens": "text_tokens",
    "output_tokens": "output_tokens",
    "prefill_ms": f"CASE WHEN reason IS NULL OR reason IN {_FAULTS_SHOWN!r} THEN prefill_ms END",
    "decode_ms": "CASE WHEN NOT coalesce(one_pass, false) THEN decode_ms END",  # else told by the total again
    "decode_steps_ms": "decode_steps_ms",
    "total_ms": "CASE WHEN total_given THEN total_ms END",
    "accuracy": "accuracy",
    "started_ms": "started_ms",
    "device": "device",
    "model": "model",
}


@dataclass(frozen=True)
class ConvertSummary:
    """What a conversion did."""

    output: Path
    rows: int
    problems: dict[str, int]
    columns: tuple[str, ...]
    size_bytes: int
    seconds: float


def convert(
    sources: Source | Sequence[Source],
    output: str | os.PathLike[str],
    *,
    config: Config | None = None,
    progress: Progress | None = None,
) -> ConvertSummary:
    """Write the runs of sources into one Parquet file that a build reads without any configuration but its key.

    Parameters
    ----------
    sources : path, DataFrame, or sequence of them
        Files, folders and globs of runs; paths are relative to the current folder.
    output : path
        The file to write, ending in ``.parquet``; relative to the current folder.
    config : path, mapping or BuildConfig, optional
        Where `key`, `columns` and `time_unit` are taken from, when the sources have a key, field names or units of
        their own. The file has the key columns under their names.
    progress : callable, optional
        Called with (what, done, total) now and then.

    Returns
    -------
    ConvertSummary
        Rows written, and how many of them a build will reject, by reason.

    Raises
    ------
    LutestError
        A source cannot be read, holds no runs, or the file cannot be written. A file that stood at the output is
        then unchanged.

    Notes
    -----
    Times are in milliseconds. Each run becomes a row, those that a build rejects included; a value that could not be
    read is NULL. Columns without any value are left out. Steps are a list per run, or one list per position where
    positions were timed several times. Rows are ordered by configuration and sample, so the same runs give the same
    rows.
    """
    started = time.perf_counter()
    target = Path(output)
    if target.suffix.lower() != ".parquet":
        raise ConfigError(f"{target}: the output must end in .parquet, for sources are told apart by their endings")
    settings, given = resolve_config(config), listed(sources)
    files = list_sources([source for source in given if not isinstance(source, pd.DataFrame)], Path())
    with locked(target, files, "runs") as replaced, work_database() as connection:
        key = read_runs(connection, given, settings, Path(), progress)
        columns = _select_columns(connection, key)
        _write(connection, target, replaced, columns, key)
        problems = connection.execute(
            "SELECT reason, count(*) AS n FROM runs WHERE reason IS NOT NULL GROUP BY reason ORDER BY n DESC, reason"
        ).fetchall()
        counted = connection.execute("SELECT count(*) FROM runs").fetchone()
        assert counted is not None
    return ConvertSummary(
        output=target,
        rows=counted[0],
        problems=dict(problems),
        columns=tuple(columns),
        size_bytes=target.stat().st_size,
        seconds=time.perf_counter() - started,
    )


def _select_columns(connection: duckdb.DuckDBPyConnection, key: Sequence[KeyColumn]) -> dict[str, str]:
    """Columns that hold any value, with their expressions."""
    columns = {name: quote(name) for name in (*_FIRST, *(column.name for column in key))}
    columns |= {name: expression for name, expression in _COLUMNS.items() if name not in columns}
    repeated = connection.execute("SELECT 1 FROM runs WHERE step_positions IS NOT NULL LIMIT 1").fetchone()
    if repeated:
        columns["decode_steps_ms"] = "coalesce(steps_by_position, [[step] FOR step IN decode_steps_ms])"
        _write_steps_by_position(connection)
    else:
        connection.execute("CREATE OR REPLACE VIEW convertible AS SELECT * FROM runs")
    counts = ", ".join(f"count({expression})" for expression in columns.values())
    filled = connection.execute(f"SELECT count(*), {counts} FROM convertible").fetchone()
    assert filled is not None
    if not filled[0]:
        raise BuildError("the sources hold no runs at all")
    kept = {name: columns[name] for name, n in zip(columns, filled[1:], strict=True) if n}
    if not kept.keys() - {"workload"}:  # the workload may be the name of the folder, and then says nothing of a run
        raise BuildError(f"none of the {filled[0]} rows can be read as a run; are the field names mapped in `columns`?")
    return kept


def _write_steps_by_position(connection: duckdb.DuckDBPyConnection) -> None:
    """Create ``convertible``: ``runs`` with steps as one list per position where a run has step_positions."""
    connection.execute(
        """
        CREATE OR REPLACE TABLE convertible AS
        WITH flat AS (
            SELECT source_id, "row", unnest(decode_steps_ms) AS step, unnest(step_positions) AS position,
                generate_subscripts(decode_steps_ms, 1) AS place
            FROM runs WHERE step_positions IS NOT NULL
            UNION ALL
            -- a position that was never timed still has its place
            SELECT source_id, "row", NULL, unnest(range(1, list_max(step_positions) + 1)), 0
            FROM runs WHERE step_positions IS NOT NULL
        ),
        by_position AS (
            SELECT source_id, "row", position,
                coalesce(list(step ORDER BY place) FILTER (step IS NOT NULL), []::DOUBLE[]) AS steps
            FROM flat GROUP BY source_id, "row", position
        ),
        by_run AS (
            SELECT source_id, "row", list(steps ORDER BY position) AS steps_by_position
            FROM by_position GROUP BY source_id, "row"
        )
        SELECT runs.*, steps_by_position FROM runs LEFT JOIN by_run USING (source_id, "row")
        """
    )


def _write(
    connection: duckdb.DuckDBPyConnection,
    target: Path,
    replaced: Path,
    columns: dict[str, str],
    key: Sequence[KeyColumn],
) -> None:
    selected = ", ".join(f"{expression} AS {quote(name)}" for name, expression in columns.items())
    sample = "convertible.sample_id"  # what stands in the runs, not in the columns that are written
    ordered = ", ".join(
        [*(f"convertible.{quote(column.name)}" for column in key), f"try_cast({sample} AS BIGINT)", sample]
    )
    try:
        connection.execute("SET preserve_insertion_order = true")  # rows stay as ordered, whatever the threads
        with replacing(replaced) as temporary:
            connection.execute(
                f"""
                COPY (
                    SELECT {selected} FROM convertible
                    ORDER BY {ordered}, source_id, "row"
                ) TO {literal(temporary)} (FORMAT parquet, COMPRESSION zstd, {RUNS_MARK})
                """
            )
    except duckdb.Error as error:
        raise BuildError(f"{target}: cannot write the runs: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise BuildError(f"{target}: cannot write the runs: {error.strerror or error}") from error
