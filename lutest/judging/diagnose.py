"""What is wrong with a set of runs, before anyone builds on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lutest.builder.clean import write_accepted_runs
from lutest.judging.fencepost import PER_TOKEN_FIELDS, check_fencepost, check_kv_growth, check_per_token_fields
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
from lutest.judging.trend import check_trend
from lutest.reader.errors import SourceError
from lutest.runs.configuration import Config, resolve_config
from lutest.runs.sources import Source, listed
from lutest.runs.work import read_runs, work_database

__all__ = ["Finding", "diagnose"]

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
        clamped, subtraction, unaccounted_time, duplicates, outliers, trend, thin_keys, rejected_runs, clock.

    Raises
    ------
    LutestError
        A source cannot be read, or the sources hold no runs at all.
    """
    settings = resolve_config(config)
    with work_database() as connection:
        read_runs(connection, listed(runs), settings, Path(), progress, extra_fields=PER_TOKEN_FIELDS)
        if not connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone():
            raise SourceError("the sources hold no runs at all")
        # Outliers are looked for even where the configuration would keep them.
        kept = write_accepted_runs(connection, "iqr", settings.cleaning.k)
        sample = read_step_sample(connection)
        fit = fit_steps(sample)
        return [
            check_fencepost(sample, fit),
            check_kv_growth(fit),
            *check_per_token_fields(connection, settings.milliseconds),
            check_clamped(connection),
            check_short_outputs(connection, sample, fit),
            check_unaccounted_time(connection),
            check_duplicates(connection),
            check_outliers(connection, settings.cleaning.k, kept),
            check_trend(connection),
            check_thin_keys(connection),
            check_rejected(connection),
            check_clock(connection),
        ]
