"""Runs read to be held against a table: structurally checked, without duplicates, of configurations that it holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import duckdb
import pandas as pd

from lutest.builder.clean import write_accepted_runs
from lutest.reader.errors import SourceError
from lutest.reader.figures import Key
from lutest.reader.table import LatencyTable
from lutest.runs.configuration import BuildConfig, load_config, parse_config
from lutest.runs.sources import Source
from lutest.runs.work import read_runs

__all__ = ["match_runs"]

Progress = Callable[[str, int, int], None]


def match_runs(
    connection: duckdb.DuckDBPyConnection,
    table: LatencyTable,
    runs: Source | Sequence[Source],
    config: str | os.PathLike[str] | Mapping[str, object] | BuildConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Read runs into the view ``matched_runs``: columns of ``accepted_runs`` and ``key_id``, the place in the table.

    Outliers stay: a user meets them too.

    Parameters
    ----------
    connection : duckdb connection
        A work database.
    table : LatencyTable
        Whose configurations count.
    runs : path, DataFrame, or sequence of them
        Sources of runs, as for a build; paths are relative to the current folder.
    config : path, mapping or BuildConfig, optional
        Where `columns` and `time_unit` are taken from, when the sources have field names or units of their own.
    progress : callable, optional
        Called with (what, done, total) now and then.

    Returns
    -------
    dict
        Why runs were left out → how many.

    Raises
    ------
    LutestError
        A source cannot be read, or no run is left.
    """
    settings = _settings(config)
    given = runs if isinstance(runs, list | tuple) else [runs]
    read_runs(connection, given, settings, Path(), progress)
    write_accepted_runs(connection, "none", settings.cleaning.k)
    frame = pd.DataFrame([(number, *key) for number, key in enumerate(table.keys)], columns=["key_id", *Key._fields])
    connection.register("table_keys_frame", frame)
    connection.execute("CREATE OR REPLACE TABLE table_keys AS SELECT * FROM table_keys_frame")
    connection.unregister("table_keys_frame")
    connection.execute(
        "CREATE OR REPLACE VIEW matched_runs AS "
        "SELECT key_id, accepted_runs.* FROM accepted_runs JOIN table_keys USING (tier, top_k, num_blocks)"
    )
    rejected = connection.execute(
        "SELECT reason, count(*) AS n FROM rejections GROUP BY reason ORDER BY n DESC, reason"
    ).fetchall()
    unknown = connection.execute(
        "SELECT count(*) FROM accepted_runs ANTI JOIN table_keys USING (tier, top_k, num_blocks)"
    ).fetchone()
    left_out: dict[str, int] = dict(rejected)
    if unknown is not None and unknown[0]:
        left_out["configuration not in the table"] = unknown[0]
    if connection.execute("SELECT 1 FROM matched_runs LIMIT 1").fetchone() is None:
        raise SourceError(_no_runs(connection, table, left_out))
    return left_out


def _settings(config: str | os.PathLike[str] | Mapping[str, object] | BuildConfig | None) -> BuildConfig:
    if config is None:
        return BuildConfig()
    if isinstance(config, BuildConfig):
        return config
    return parse_config(config) if isinstance(config, Mapping) else load_config(config)


def _no_runs(connection: duckdb.DuckDBPyConnection, table: LatencyTable, left_out: Mapping[str, int]) -> str:
    if not left_out:
        return "the sources hold no runs at all"
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
    example = connection.execute(
        'SELECT tier, top_k, num_blocks FROM accepted_runs ORDER BY source_id, "row" LIMIT 1'
    ).fetchone()
    if example is None:
        return f"no run is left to judge the table by: {reasons}"
    return (
        f"no run is left to judge the table by: {reasons}; the runs have (tier, top_k, num_blocks) such as "
        f"{tuple(example)}, the table such as {tuple(table.keys[0])}"
    )
