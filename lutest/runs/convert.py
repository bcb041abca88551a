"""Runs of any source into one compact Parquet file that a build reads again: one row a run, canonical columns."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from lutest.reader.errors import BuildError, ConfigError
from lutest.reader.names import quote
from lutest.runs.configuration import BuildConfig, load_config
from lutest.runs.sources import Source
from lutest.runs.work import read_runs, work_database
from lutest.tablefile.store import locked, temporary_path

__all__ = ["ConvertSummary", "convert"]

Progress = Callable[[str, int, int], None]

# A rejected run must be rejected by the next build as well. Where the canonical columns cannot show its fault (text in
# a column of numbers, half a token), the file leaves out its prefill_ms, without which no run is used.
_FAULTS_SHOWN = ("missing_value", "no_output_tokens", "step_count_mismatch", "unreadable_row", "zero_prefill")
_COLUMNS = {
    "workload": "workload",
    "sample_id": "sample_id",
    "tier": "tier",
    "top_k": "top_k",
    "num_blocks": "num_blocks",
    "prompt_tokens": "prompt_tokens",
    "vision_tokens": "vision_tokens",
    "text_tokens": "text_tokens",
    "output_tokens": "output_tokens",
    "prefill_ms": f"CASE WHEN reason IS NULL OR reason IN {_FAULTS_SHOWN!r} THEN prefill_ms END",
    "decode_ms": "decode_ms",
    "decode_steps_ms": "decode_steps_ms",
    "total_ms": "CASE WHEN total_given THEN total_ms END",
    "accuracy": "accuracy",
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
    config: str | os.PathLike[str] | BuildConfig | None = None,
    progress: Progress | None = None,
) -> ConvertSummary:
    """Write the runs of sources into one Parquet file that a build reads without any configuration.

    Parameters
    ----------
    sources : path, DataFrame, or sequence of them
        Files, folders and globs of runs; paths are relative to the current folder.
    output : path
        The file to write, ending in ``.parquet``; relative to the current folder.
    config : path or BuildConfig, optional
        Where `columns` and `time_unit` are taken from, when the sources have field names or units of their own.
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
    if target.is_dir():
        raise BuildError(f"{target}: is a folder; name a file, such as {target / 'runs.parquet'}")
    settings = config if isinstance(config, BuildConfig) else BuildConfig() if config is None else load_config(config)
    given: Sequence[Source] = sources if isinstance(sources, list | tuple) else [sources]
    with work_database() as connection:
        read_runs(connection, given, settings, Path(), progress)
        columns = _select_columns(connection)
        _write(connection, target, columns)
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


def _select_columns(connection: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """Columns that hold any value, with their expressions."""
    columns = dict(_COLUMNS)
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


def _write(connection: duckdb.DuckDBPyConnection, target: Path, columns: dict[str, str]) -> None:
    selected = ", ".join(f"{expression} AS {quote(name)}" for name, expression in columns.items())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target) as replaced, _temporary(replaced) as temporary:
            name = str(temporary).replace("'", "''")
            connection.execute("SET preserve_insertion_order = true")  # rows stay as ordered, whatever the threads
            connection.execute(
                f"""
                COPY (
                    SELECT {selected} FROM convertible
                    ORDER BY convertible.tier, convertible.top_k, convertible.num_blocks,
                        try_cast(convertible.sample_id AS BIGINT), convertible.sample_id, source_id, "row"
                ) TO '{name}' (FORMAT parquet, COMPRESSION zstd)
                """
            )
            os.replace(temporary, replaced)
    except duckdb.Error as error:
        raise BuildError(f"{target}: cannot write the runs: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise BuildError(f"{target}: cannot write the runs: {error.strerror or error}") from error


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A file beside the target that is gone afterwards, unless it took the target's place."""
    temporary = temporary_path(target)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
