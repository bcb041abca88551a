"""Runs read to be held against a table: structurally checked, without duplicates, of configurations that it holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import duckdb
import pandas as pd

from lutest.builder.clean import write_accepted_runs
from lutest.reader.errors import SourceError
from lutest.reader.figures import described_key
from lutest.reader.names import quote
from lutest.reader.table import LatencyTable
from lutest.runs.configuration import BuildConfig, Config, config_of_meta, resolve_config
from lutest.runs.sources import Source, listed
from lutest.runs.work import read_runs

Progress = Callable[[str, int, int], None]


def match_runs(
    connection: duckdb.DuckDBPyConnection,
    table: LatencyTable,
    runs: Source | Sequence[Source],
    config: Config | None = None,
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
        Where `columns` and `time_unit` are taken from, when the runs have other field names or units than those that
        the table was built from. The key is the table's in any case.
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
    read_runs(connection, listed(runs), matching_settings(table, config), Path(), progress)
    return match_read_runs(connection, table)


def matching_settings(table: LatencyTable, config: Config | None = None) -> BuildConfig:
    """How runs are read that are held against a table: by its key, and as its own were where `config` says nothing."""
    own = config_of_meta(table.meta)
    settings = resolve_config(config, own)
    columns = {name: settings.columns.get(name, rule) for name, rule in own.columns.items()}
    return replace(settings, key=own.key, columns=columns)


def match_read_runs(connection: duckdb.DuckDBPyConnection, table: LatencyTable) -> dict[str, int]:
    """As `match_runs`, of runs that are read already, with the settings of `matching_settings`."""
    write_accepted_runs(connection, "none", math.inf)
    names = ", ".join(quote(column.name) for column in table.figures.key_columns)
    definitions = ", ".join(f"{quote(column.name)} {column.type}" for column in table.figures.key_columns)
    frame = pd.DataFrame([(number, *key) for number, key in enumerate(table.keys)])
    connection.register("table_keys_frame", frame)
    connection.execute(f"CREATE OR REPLACE TABLE table_keys (key_id BIGINT, {definitions})")
    connection.execute("INSERT INTO table_keys SELECT * FROM table_keys_frame")
    connection.unregister("table_keys_frame")
    connection.execute(
        "CREATE OR REPLACE VIEW matched_runs AS SELECT table_keys.key_id, accepted_runs.* EXCLUDE (key_id) "
        f"FROM accepted_runs JOIN table_keys USING ({names})"
    )
    rejected = connection.execute(
        "SELECT reason, count(*) AS n FROM rejections GROUP BY reason ORDER BY n DESC, reason"
    ).fetchall()
    unknown = connection.execute(f"SELECT count(*) FROM accepted_runs ANTI JOIN table_keys USING ({names})").fetchone()
    left_out: dict[str, int] = dict(rejected)
    if unknown is not None and unknown[0]:
        left_out["configuration not in the table"] = unknown[0]
    if connection.execute("SELECT 1 FROM matched_runs LIMIT 1").fetchone() is None:
        raise SourceError(_no_runs(connection, table, left_out))
    return left_out


def _no_runs(connection: duckdb.DuckDBPyConnection, table: LatencyTable, left_out: Mapping[str, int]) -> str:
    if not left_out:
        return "the sources hold no runs at all"
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items())
    columns = table.figures.key_columns
    names = ", ".join(quote(column.name) for column in columns)
    example = connection.execute(f'SELECT {names} FROM accepted_runs ORDER BY source_id, "row" LIMIT 1').fetchone()
    if example is None:
        return f"no run is left to judge the table by: {reasons}"
    return (
        f"no run is left to judge the table by: {reasons}; the runs have configurations such as "
        f"{described_key(columns, example)}, the table such as {described_key(columns, table.keys[0])}"
    )
