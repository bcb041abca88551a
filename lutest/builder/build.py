"""Building a table: the stages from sources to the stored file, composed."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, cast

import duckdb
import pandas as pd

from lutest.builder.aggregate import write_aggregates
from lutest.builder.clean import write_accepted_runs
from lutest.builder.fit import FitInput, fit, upper_rank
from lutest.builder.kept_parts import described_parts, earlier_parts, parts_beside
from lutest.builder.machines import find_mixed, refuse_mixed
from lutest.builder.sessions import session_differences
from lutest.reader.errors import BuildError, ConfigError, LutestWarning
from lutest.reader.figures import KeyColumn
from lutest.reader.file import read_figures
from lutest.reader.names import SCHEMA_VERSION, quote
from lutest.runs.configuration import DEFAULT_CONFIG, BuildConfig, Config, config_of_build, resolve_config
from lutest.runs.parts import PartOf
from lutest.runs.plausible import refuse_implausible
from lutest.runs.sources import Source, listed
from lutest.runs.sources.discovery import list_sources, printable
from lutest.runs.work import Limits, read_runs, work_database, work_folder
from lutest.tablefile.store import locked, temporary_path, write_table

# what DuckDB raises when its work database cannot grow, or could not just before
_NO_ROOM = (duckdb.IOException, duckdb.OutOfMemoryException, duckdb.TransactionException, duckdb.FatalException)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SourceSummary:
    """What became of the runs of one source; `problem` is why it could not be read."""

    path: str
    rows_read: int
    rows_used: int
    rows_rejected: int
    problem: str | None = None


@dataclass(frozen=True)
class BuildSummary:
    """What a build did.

    Attributes
    ----------
    output : Path
        The table.
    content_hash : str
        Hash of its logical rows.
    sources : tuple of SourceSummary
        Runs read, used and rejected, per source.
    rejected : dict
        Reason → number of runs.
    n_clamped : int
        Runs used whose decode was clamped at zero.
    n_kept_beyond_fences : int
        Runs beyond the outlier fences that were kept, for there are several of their kind: a mode, or a tail.
    fit_seconds, seconds : float
        How long fitting, and all of it, took.
    """

    output: Path
    content_hash: str
    sources: tuple[SourceSummary, ...]
    rejected: dict[str, int]
    n_clamped: int
    n_kept_beyond_fences: int
    fit_seconds: float
    seconds: float


def build(
    config: Config | Source | Sequence[Source] | None = None,
    *,
    runs: Source | Sequence[Source] | None = None,
    output: str | os.PathLike[str] | None = None,
    mixed: bool = False,
    implausible: bool = False,
    skip_broken: bool = False,
    keep_parts: bool = False,
    memory_limit: str | None = None,
    threads: int | None = None,
    temp_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> BuildSummary:
    """Build a latency table from profiled runs.

    A run needs the values of the key columns (``tier``, ``top_k``, ``num_blocks`` unless `config` has another ``key``),
    ``prompt_tokens`` (vision and text), ``output_tokens`` (end of sequence included), ``prefill_ms`` (all up to the
    first token) and one of ``decode_ms`` (all after it), ``decode_steps_ms`` and ``total_ms``. Other names are mapped
    by ``columns``, other units by ``time_unit``, of the configuration.

    Parameters
    ----------
    config : path, mapping or BuildConfig, or runs
        A ``build.yaml``, or its content: ``key``, ``columns``, ``time_unit`` (s, ms, us, ns), ``quantiles``,
        ``cleaning``, ``sources``, ``output``. Paths in it are relative to its folder. Without it, and without `runs`,
        it is ``tables/build.yaml``. Runs may stand here as well.
    runs : path, DataFrame, or sequence of them, optional
        Files, folders, globs and frames instead of the sources of the configuration; paths are relative to the current
        folder.
    output : path, optional
        Where to write instead of the configuration's ``output``; relative to the current folder.
    mixed : bool
        Whether runs of several models or devices that no key column tells apart may share their figures; the table
        then says so.
    implausible : bool
        Whether to build on times that cannot be what they are called: a decode time that is the total, or seconds for
        milliseconds. Without it, they are refused with the mapping or unit that may be meant.
    skip_broken : bool
        Whether to build without files that cannot be read; they stand in ``sources`` with the reason. Without it, an
        error names all of them.
    keep_parts : bool
        Whether to leave the runs as they were read in the folder ``OUTPUT.parts``, so that `append` can add to them.
    memory_limit : str, optional
        What the work database may take, such as ``8GB``; half of what the machine, or its container, has if not given.
    threads : int, optional
        Of the work database; as many as there are processors if not given.
    temp_dir : path, optional
        Where the work database lies; beside the output if not given.
    progress : callable, optional
        Called with (what, done, total) now and then.

    Returns
    -------
    BuildSummary
        Runs read, used and rejected per source, and the content hash of the table.

    Raises
    ------
    LutestError
        A source cannot be read, an option is not valid, no run is left, or the table cannot be written. A table
        that stood at the output is then unchanged.

    Examples
    --------
    >>> lutest.build("results/", output="tables/mine.duckdb")  # doctest: +SKIP
    >>> config = {"columns": {"prefill_ms": "ttft", "total_ms": "e2e"}, "time_unit": "s"}  # doctest: +SKIP
    >>> lutest.build(config, runs=frame, output="tables/mine.duckdb")  # doctest: +SKIP
    """
    if _are_runs(config):
        if runs is not None:
            raise ConfigError(
                f"runs are given twice: {_shown(config)} and runs={_shown(runs)}; name a configuration first"
            )
        runs, config = config, None
    settings = _settings(cast("Config | None", config), runs is not None)
    given, base = (settings.sources, settings.base) if runs is None else (listed(runs), Path())
    target = _target(settings, output)
    files = list_sources([source for source in given if not isinstance(source, pd.DataFrame)], base)
    with locked(target, files) as replaced:
        return _build(
            settings, given, base, target, replaced, mixed=mixed, implausible=implausible, skip_broken=skip_broken,
            keep_parts=keep_parts, limits=Limits(memory_limit, threads, temp_dir), progress=progress,
        )  # fmt: skip


def append(
    table: str | os.PathLike[str],
    runs: Source | Sequence[Source],
    *,
    memory_limit: str | None = None,
    threads: int | None = None,
    temp_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> BuildSummary:
    """Add runs to a table that was built with `keep_parts`: the table that all runs together would give.

    Parameters
    ----------
    table : path
        The table, which the new one replaces. Its old sources are not read again, and may be gone.
    runs : path, DataFrame, or sequence of them
        Sources of further runs, read as the table was built; paths are relative to the current folder. Those that the
        table has already, by their content, are not counted twice.
    memory_limit, threads, temp_dir, progress
        As in `build`.

    Returns
    -------
    BuildSummary
        Of all runs, with the content hash that a build of all of them would have.

    Raises
    ------
    LutestError
        As `build`; or the table's parts were not kept, are gone, or were read otherwise. The table is then unchanged.
    """
    target, given = Path(table), listed(runs)
    files = list_sources([source for source in given if not isinstance(source, pd.DataFrame)], Path())
    read_figures(target)  # says what is wrong with a file that is no table
    with locked(target, files) as replaced:
        meta = read_figures(replaced).meta
        settings = config_of_build(meta)
        return _build(
            settings, given, Path(), target, replaced, mixed="mixed" in meta, implausible=True, skip_broken=False,
            keep_parts=True, limits=Limits(memory_limit, threads, temp_dir), progress=progress,
            earlier=earlier_parts(replaced, meta, settings),
        )  # fmt: skip


def _build(
    settings: BuildConfig,
    given: Sequence[Source],
    base: Path,
    target: Path,
    replaced: Path,
    *,
    mixed: bool,
    implausible: bool,
    skip_broken: bool,
    keep_parts: bool,
    limits: Limits,
    progress: Progress | None,
    earlier: Sequence[PartOf] = (),
) -> BuildSummary:
    started = time.perf_counter()
    with parts_beside(replaced) as kept, work_database(temporary_path(replaced), limits) as connection:
        parts = work_folder(connection)
        try:
            if keep_parts:
                parts = kept
                parts.mkdir(exist_ok=True)
            key_columns = read_runs(
                connection, given, settings, base, progress, skip_broken=skip_broken, parts=parts, earlier=earlier
            )
            machines = find_mixed(connection)
            if machines and not mixed:
                refuse_mixed(connection, machines, key_columns)
            if not implausible:
                refuse_implausible(connection, settings)
            n_kept = write_accepted_runs(connection, settings.cleaning.outliers, settings.cleaning.k)
            _require_runs(connection)
            write_aggregates(connection, settings.quantiles, key_columns, upper_rank)
            fit_started = time.perf_counter()
            relations = _fit(connection, settings.quantiles, key_columns)
            fit_seconds = time.perf_counter() - fit_started
            _write_accounts(connection, key_columns)
            meta = _meta(connection, settings, fit_seconds)
            if keep_parts:
                meta |= described_parts(connection, parts)
        except _NO_ROOM as error:
            raise BuildError(f"{target}: the build ran out of room: {str(error).splitlines()[0]}") from error
        except OSError as error:
            what = f"keep its parts in {parts}" if keep_parts else "write the table"
            raise BuildError(f"{target}: cannot {what}: {error.strerror or error}") from error
        if machines:
            meta["mixed"] = json.dumps(
                {"model": [], "device": []} | {name: list(held) for name, held in machines.items()}
            )
        digest = write_table(connection, replaced, relations, settings.quantiles, key_columns, meta, read_figures)
        return _summary(connection, target, digest, n_kept, fit_seconds, time.perf_counter() - started)


def _are_runs(given: object) -> TypeGuard[Source | Sequence[Source]]:
    """Whether runs stand where a configuration may: a path that does not end as one does, a frame, a list."""
    if isinstance(given, (str, os.PathLike)):
        return not os.fspath(given).lower().endswith((".yaml", ".yml"))
    return isinstance(given, (pd.DataFrame, list, tuple))


def _shown(runs: object) -> str:
    return f"<DataFrame of {len(runs)} rows>" if isinstance(runs, pd.DataFrame) else f"{runs!r:.80}"


def _settings(config: Config | None, has_runs: bool) -> BuildConfig:
    if config is None and not has_runs:
        if not DEFAULT_CONFIG.exists():
            raise ConfigError(
                f"nothing to build from: there is no {DEFAULT_CONFIG} here; name your runs and a table "
                "(`lutest build RUNS… -o TABLE`), or a configuration (`lutest build --config FILE`)"
            )
        config = DEFAULT_CONFIG
    settings = resolve_config(config)
    if not has_runs and not settings.sources:
        raise ConfigError("no runs: name them (`lutest build RUNS… -o TABLE`), or give `sources` in the configuration")
    return settings


def _target(settings: BuildConfig, output: str | os.PathLike[str] | None) -> Path:
    if output is not None and os.fspath(output):
        return Path(output)
    if not settings.output:
        raise ConfigError(
            "no output: name the table to write, such as `lutest build RUNS… -o table.duckdb`, "
            "or give `output` in the configuration"
        )
    return settings.output_path


def _require_runs(connection: duckdb.DuckDBPyConnection) -> None:
    if connection.execute("SELECT 1 FROM accepted_runs LIMIT 1").fetchone():
        return
    worst = connection.execute(
        """
        SELECT reason, count(*) AS n, min((source_id, "row", path, detail)) AS example
        FROM rejections JOIN source_files USING (source_id)
        GROUP BY reason
        ORDER BY n DESC, reason
        LIMIT 1
        """
    ).fetchone()
    if worst is None:
        empty = [path for (path,) in connection.execute("SELECT path FROM source_files ORDER BY path").fetchall()]
        more = f", nor do {len(empty) - 1} more sources" if len(empty) > 1 else ""
        raise BuildError(f"{printable(empty[0])} holds no runs{more}")
    reason, n, (_, row, path, detail) = worst
    where = f"{printable(path)}, row {row}"
    raise BuildError(f"no run is left to build on; {n} were rejected as {reason}, such as {where}: {detail}")


def _fit(
    connection: duckdb.DuckDBPyConnection, quantiles: Sequence[float], key_columns: Sequence[KeyColumn]
) -> dict[str, str]:
    """Fit, name the keys of all figures again, and tell where the rows of each table of the file stand."""

    def table(name: str) -> pd.DataFrame:
        return connection.execute(f"SELECT * FROM {name} ORDER BY ALL").df()

    ((outlier_share,),) = connection.execute(
        """
        SELECT count(*) FILTER (rejections.reason = 'outlier' AND rejections.detail LIKE '% above %') / count(*)
        FROM sound_runs LEFT JOIN rejections USING (source_id, "row")
        """
    ).fetchall()
    fitted = fit(
        FitInput(
            quantiles=quantiles,
            key_columns=key_columns,
            keys=table("keys").drop(columns="key_id"),
            prefill=table("prefill"),
            decode=table("decode"),
            run_sample=table("run_sample"),
            step_sample=table("step_sample"),
            outlier_share=outlier_share,
        )
    )
    # A mean of 0 says that every run of the key was clamped, and nothing else of its steps.
    fitted.decode["mean_ms"] = fitted.decode["mean_ms"].where(fitted.decode["mean_ms"] > 0, fitted.decode["p50_ms"])
    relations = {name: name for name in ("output_length", "sources", "rejected_runs")}
    for name in ("prefill", "quality", *_FITTED):
        relations[name] = f"named_{name}"
        rows = name
        if name in _FITTED:
            connection.register("fitted_rows", getattr(fitted, name))
            rows = "fitted_rows"
        connection.execute(f"CREATE OR REPLACE TABLE named_{name} AS SELECT * FROM keys JOIN {rows} USING (key_id)")
    connection.unregister("fitted_rows")
    return relations


_FITTED = ("decode", "prefill_curve", "decode_curve", "decode_total", "total")


def _write_accounts(connection: duckdb.DuckDBPyConnection, key_columns: Sequence[KeyColumn]) -> None:
    connection.execute(
        """
        CREATE OR REPLACE TABLE sources AS
        WITH rejected AS (
            SELECT source_id, count(*) AS rows_rejected FROM rejections GROUP BY source_id
        ),
        used AS (
            SELECT source_id, count(*) AS rows_used FROM accepted_runs GROUP BY source_id
        )
        SELECT
            source_id, path, sha256, rows_read,
            coalesce(rows_used, 0) AS rows_used,
            coalesce(rows_rejected, 0) AS rows_rejected,
            NULL::VARCHAR AS problem
        FROM source_files LEFT JOIN rejected USING (source_id) LEFT JOIN used USING (source_id)
        UNION ALL
        SELECT
            (SELECT coalesce(max(source_id), 0) FROM source_files) + row_number() OVER (ORDER BY path),
            path, sha256, 0, 0, 0, problem
        FROM broken_sources
        """
    )
    connection.execute(
        f"""
        CREATE OR REPLACE VIEW rejected_runs AS
        SELECT
            rejections.source_id, rejections."row", rejections.reason, rejections.detail,
            {", ".join(quote(column.name) for column in key_columns)},
            workload, prompt_tokens, output_tokens, prefill_ms, decode_ms, total_ms
        FROM rejections JOIN runs USING (source_id, "row")
        """
    )
    lost = connection.execute(
        "SELECT path, rows_read, rows_used, rows_rejected FROM sources WHERE rows_read <> rows_used + rows_rejected"
    ).fetchone()
    if lost is not None:
        raise BuildError(
            f"{lost[0]}: {lost[1]} runs read, {lost[2]} used and {lost[3]} rejected: this is a bug in lutest"
        )


def _meta(connection: duckdb.DuckDBPyConnection, settings: BuildConfig, fit_seconds: float) -> dict[str, str]:
    from lutest.reader import __version__

    def distinct(column: str) -> str:
        rows = connection.execute(
            f"SELECT DISTINCT {column} FROM accepted_runs WHERE {column} IS NOT NULL ORDER BY 1 LIMIT 20"
        ).fetchall()
        return json.dumps([value for (value,) in rows])

    described = dataclasses.asdict(settings)
    described["base"] = str(settings.base)
    return {
        "schema_version": str(SCHEMA_VERSION),
        "lutest_version": __version__,
        "duckdb_version": duckdb.__version__,
        "built_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quantiles": json.dumps(list(settings.quantiles)),
        "device": distinct("device"),
        "model": distinct("model"),
        "build_config": json.dumps(described),
        "fit_seconds": f"{fit_seconds:.3f}",
        "sessions": json.dumps(session_differences(connection)),
    }


def _summary(
    connection: duckdb.DuckDBPyConnection,
    target: Path,
    digest: str,
    n_kept: int,
    fit_seconds: float,
    seconds: float,
) -> BuildSummary:
    accounts = connection.execute(
        "SELECT path, rows_read, rows_used, rows_rejected, problem FROM sources ORDER BY path"
    ).fetchall()
    unused = connection.execute(
        """
        SELECT path, rows_read, mode(reason), min(detail)
        FROM sources JOIN rejections USING (source_id)
        WHERE rows_used = 0
        GROUP BY path, rows_read ORDER BY path
        """
    ).fetchall()
    for path, rows, reason, detail in unused:
        warnings.warn(
            f"{printable(path)}: none of its {rows:,} runs is used: {reason}, such as: {detail}", LutestWarning, 3
        )
    reasons = connection.execute(
        "SELECT reason, count(*) AS n FROM rejections GROUP BY reason ORDER BY n DESC, reason"
    ).fetchall()
    clamped = connection.execute("SELECT count(*) FROM accepted_runs WHERE clamped").fetchone()
    assert clamped is not None
    return BuildSummary(
        output=target,
        content_hash=digest,
        sources=tuple(SourceSummary(*row) for row in accounts),
        rejected=dict(reasons),
        n_clamped=clamped[0],
        n_kept_beyond_fences=n_kept,
        fit_seconds=fit_seconds,
        seconds=seconds,
    )
