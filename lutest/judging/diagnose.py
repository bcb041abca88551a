"""What is wrong with a set of runs, before anyone builds on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import duckdb

from lutest.builder.clean import write_accepted_runs
from lutest.judging import decode_checks, run_checks
from lutest.judging.finding import Finding
from lutest.judging.step_regression import fit_steps, read_step_sample
from lutest.reader.errors import SourceError
from lutest.runs.configuration import BuildConfig, Config, resolve_config
from lutest.runs.sources import Source, listed
from lutest.runs.work import read_runs, work_database

Progress = Callable[[str, int, int], None]


def diagnose(
    runs: Source | Sequence[Source],
    *,
    config: Config | None = None,
    progress: Progress | None = None,
) -> list[Finding]:
    """Look for what would make a table built on these runs wrong, or worth less than it seems.

    Parameters
    ----------
    runs : path, DataFrame, or sequence of them
        Sources of runs, as for a build; paths are relative to the current folder.
    config : path, mapping or BuildConfig, optional
        Where `key`, `columns`, `time_unit` and `cleaning.k` are taken from.
    progress : callable, optional
        Called with (what, done, total) now and then.

    Returns
    -------
    list of Finding
        Always in this order: fencepost, kv_growth, per_token_field (one for each such field that the runs have),
        clamped, subtraction, unaccounted_time, duplicates, outliers, trend, thin_keys, rejected_runs, clock. Of runs
        that no build can use, only rejected_runs: nothing else is known of them.

    Raises
    ------
    LutestError
        A source cannot be read, or the sources hold no runs at all.
    """
    settings = resolve_config(config)
    with work_database() as connection:
        read_runs(connection, listed(runs), settings, Path(), progress, extra_fields=decode_checks.PER_TOKEN_FIELDS)
        return findings_of(connection, settings)


def findings_of(connection: duckdb.DuckDBPyConnection, settings: BuildConfig) -> list[Finding]:
    """As `diagnose`, of runs that are read already, with `decode_checks.PER_TOKEN_FIELDS` among their fields."""
    if not connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone():
        raise SourceError("the sources hold no runs at all")
    # Outliers are looked for even where the configuration would keep them.
    kept = write_accepted_runs(connection, "iqr", settings.cleaning.k)
    if not connection.execute("SELECT 1 FROM accepted_runs LIMIT 1").fetchall():
        return [run_checks.check_rejected(connection)]
    sample = read_step_sample(connection)
    fit = fit_steps(sample)
    return [
        decode_checks.check_fencepost(sample, fit),
        decode_checks.check_kv_growth(fit),
        *decode_checks.check_per_token_fields(connection, settings.milliseconds),
        decode_checks.check_clamped(connection),
        decode_checks.check_short_outputs(connection, sample, fit),
        decode_checks.check_unaccounted_time(connection),
        run_checks.check_duplicates(connection),
        run_checks.check_outliers(connection, settings.cleaning.k, kept),
        run_checks.check_trend(connection),
        run_checks.check_thin_keys(connection),
        run_checks.check_rejected(connection),
        run_checks.check_clock(connection),
    ]
