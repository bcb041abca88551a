"""What is wrong with a set of runs, before anyone builds on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import duckdb

from lutest.builder.clean import write_accepted_runs
from lutest.judging.drift import check_drift
from lutest.judging.fencepost import PER_TOKEN_FIELDS, check_fencepost, check_kv_growth, check_per_token_field
from lutest.judging.finding import Finding
from lutest.judging.run_checks import (
    check_clock,
    check_duplicates,
    check_outliers,
    check_rejected,
    check_thin_keys,
)
from lutest.judging.step_regression import fit_steps, read_step_sample
from lutest.judging.subtraction import check_clamped, check_short_outputs, check_unaccounted_time
from lutest.reader.errors import SourceError
from lutest.runs.canonical import raw_fields, write_runs
from lutest.runs.configuration import BuildConfig, load_config, parse_config
from lutest.runs.sources import Source, SourceFields, check_served_columns, field_column, read_sources
from lutest.runs.work import work_database

__all__ = ["Finding", "diagnose"]

Progress = Callable[[str, int, int], None]


def diagnose(
    runs: Source | Sequence[Source],
    *,
    config: str | os.PathLike[str] | Mapping[str, object] | BuildConfig | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Look for what would make a table built on these runs wrong, or worth less than it seems.

    Parameters
    ----------
    runs : path, DataFrame, or sequence of them
        Sources of runs, as for a build; paths are relative to the current folder.
    config : path, mapping or BuildConfig, optional
        Where `columns`, `time_unit` and `cleaning.k` are taken from.
    progress : callable, optional
        Called with (what, done, total) now and then.

    Returns
    -------
    list of Finding
        Always in this order: fencepost, kv_growth, per_token_field (one for each such field that the runs have),
        clamped, subtraction, unaccounted_time, duplicates, outliers, drift, thin_keys, rejected_runs, clock.

    Raises
    ------
    LutestError
        A source cannot be read, or the sources hold no runs at all.
    """
    given = runs if isinstance(runs, list | tuple) else [runs]
    settings = _settings(config)
    with work_database(Path("diagnose")) as connection:
        per_token = _read(connection, given, settings, progress)
        if not connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone():
            raise SourceError("the sources hold no runs at all")
        # Outliers are looked for even where the configuration would keep them.
        kept = write_accepted_runs(connection, "iqr", settings.cleaning.k)
        sample = read_step_sample(connection)
        fit = fit_steps(sample)
        return [
            check_fencepost(sample, fit),
            check_kv_growth(fit),
            *check_per_token_field(connection, per_token, settings.milliseconds),
            check_clamped(connection),
            check_short_outputs(connection, sample, fit),
            check_unaccounted_time(connection),
            check_duplicates(connection),
            check_outliers(connection, settings.cleaning.k, kept),
            check_drift(connection),
            check_thin_keys(connection),
            check_rejected(connection),
            check_clock(connection),
        ]


def _settings(config: str | os.PathLike[str] | Mapping[str, object] | BuildConfig | None) -> BuildConfig:
    if config is None:
        return BuildConfig()
    if isinstance(config, BuildConfig):
        return config
    return parse_config(config) if isinstance(config, Mapping) else load_config(config)


def _read(
    connection: duckdb.DuckDBPyConnection, given: Sequence[Source], settings: BuildConfig, progress: Progress | None
) -> dict[str, str]:
    """Read sources as a build does, with their times per token beside; field → column of ``raw_runs``."""
    scalars, steps = raw_fields(settings.columns)
    known = {name.lower() for name in scalars}
    extra = tuple(name for name in PER_TOKEN_FIELDS if name.lower() not in known)
    fields = SourceFields((*scalars, *extra), steps)
    served = read_sources(connection, given, fields, base=Path(), progress=progress)
    check_served_columns(connection, served, settings.columns, settings.time_unit)
    write_runs(connection, settings.columns, settings.milliseconds)
    return {name: field_column(name) for name in PER_TOKEN_FIELDS if name in fields.scalars}
