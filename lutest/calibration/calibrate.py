"""Carrying a table to another device, or another state of the same one, with few runs."""

from __future__ import annotations

import datetime
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb

from lutest.builder.machines import find_mixed
from lutest.builder.matched_runs import match_runs
from lutest.calibration.calibrated_rows import write_calibrated_rows
from lutest.calibration.online import OnlineCalibrator
from lutest.calibration.paired_runs import MOST_RUNS, pair_runs, pair_steps
from lutest.calibration.table_maps import StageCalibration, fit_maps
from lutest.reader import __version__
from lutest.reader.errors import ArgumentError, SourceError
from lutest.reader.figures import Key
from lutest.reader.file import read_figures
from lutest.reader.loading import load
from lutest.runs.configuration import BuildConfig
from lutest.runs.sources import Progress, Source
from lutest.runs.work import work_database
from lutest.tablefile.store import locked, temporary_path, write_table
from lutest.tablefile.verify import verify

HASH_LENGTH = 16  # characters of a run's hash that the table keeps
LEAST_RUNS = 10  # fewer say little of one scale, and nothing of P95


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did.

    Attributes
    ----------
    output : Path
        The new table.
    content_hash, parent_content_hash : str
        Of the new table, and of the one that it came from.
    n_runs : int
        Runs taken; 0 where the correction of an `OnlineCalibrator` was written.
    left_out : dict
        Why other runs were not taken → how many.
    warnings : tuple of str
        What makes the table say less than it seems to.
    prefill, decode : StageCalibration or None
        None for a stage that no run says anything of: it stays as it was.
    """

    output: Path
    content_hash: str
    parent_content_hash: str
    n_runs: int
    left_out: dict[str, int]
    warnings: tuple[str, ...]
    prefill: StageCalibration | None
    decode: StageCalibration | None


def calibrate(
    table: str | os.PathLike[str],
    runs: Source | Sequence[Source] | OnlineCalibrator,
    output: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, object] | BuildConfig | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Carry a table to another device, or another state of the same one, with few runs.

    Parameters
    ----------
    table : path
        The table to start from; its file is read, and stays as it is.
    runs : path, DataFrame, sequence of them, or OnlineCalibrator
        Runs of the new device: 10 to 100, best of configurations and prompt lengths that `lutest.plan` proposes.
        Or a calibrator of this table, whose correction is written.
    output : path
        The new table. Its rows say ``calibrated``; the old table's rows are in its schema ``parent``.
    config : path, mapping or BuildConfig, optional
        Where `columns` and `time_unit` are taken from. Left out: from the table's own build.
    progress : callable, optional
        Called with (what, done, total) now and then.

    Returns
    -------
    Calibration

    Raises
    ------
    LutestError
        The table or a source cannot be read, no run is left, or the new table cannot be written.

    Notes
    -----
    Per stage, a P50 of t becomes ``max(scale · t + offset, least)``. Configurations share what runs do not tell apart,
    so ten runs end in one scale and many in a scale of each; see `lutest.calibration.stage_fit`. The other quantiles
    are stretched to fit runs that the map did not see; see `lutest.calibration.table_maps`.
    """
    parent = Path(table)
    verify(parent)
    held = load(parent)
    target = Path(output)
    with locked(target, [parent]) as replaced, work_database(temporary_path(replaced)) as connection:
        dropped = ("content_hash", "parts", "sessions")
        meta = {name: value for name, value in held.meta.items() if name not in dropped}
        left_out: dict[str, int] = {}
        sources: list[dict[str, object]] = []
        hashes: list[str] = []
        n_by_key: list[tuple[Key, int]] = []
        n_runs, prefill, decode = 0, None, None
        if isinstance(runs, OnlineCalibrator):
            given, found = runs.table.meta.get("content_hash"), held.meta["content_hash"]
            if given != found:
                raise ArgumentError(
                    f"the calibrator corrects the table with content hash {given}, but {held.path} has {found}"
                )
            maps = runs.maps()
        else:
            left_out = match_runs(connection, held, runs, config, progress)
            for name, values in find_mixed(connection).items():
                raise SourceError(
                    f"runs of several {name}s: {', '.join(values)}; a table becomes one of them at a time"
                )
            pairs = pair_runs(connection, held)
            maps, prefill, decode = fit_maps(held.figures, *pairs, pair_steps(connection, held))
            n_runs = len(pairs[0].key_id)
            ((matched,),) = connection.execute("SELECT count(*) FROM matched_runs").fetchall()
            if matched > n_runs:
                left_out[f"beyond the {MOST_RUNS} runs that are taken"] = matched - n_runs
            sources = _sources(connection)
            rows = connection.execute(f"SELECT left(run_hash, {HASH_LENGTH}), key_id FROM paired_runs ORDER BY 1, 2")
            hashes, numbers = map(list, zip(*rows.fetchall(), strict=True))
            n_by_key = [(held.keys[number], n) for number, n in sorted(Counter(numbers).items())]
            meta |= {name: _distinct(connection, name) for name in ("device", "model")}
        meta |= {
            "lutest_version": __version__,
            "duckdb_version": duckdb.__version__,
            "built_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "parent_content_hash": held.meta["content_hash"],
            "calibration": json.dumps({"n_runs": n_runs, "runs": sources, "n_by_key": n_by_key, "run_hashes": hashes}),
            "calibration_maps": json.dumps([{"key": key, **asdict(each)} for key, each in maps.items()]),
        }
        relations = write_calibrated_rows(connection, parent, held.figures, maps)
        columns = held.figures.key_columns
        digest = write_table(connection, replaced, relations, held.quantiles, columns, meta, read_figures, parent)
    warnings: tuple[str, ...] = ()
    if 0 < n_runs < LEAST_RUNS:
        warnings = (
            f"calibrated with {n_runs} run{'' if n_runs == 1 else 's'}: that is one scale at best, and P95 is a guess; "
            f"take {LEAST_RUNS} or more, of configurations that `lutest plan` proposes",
        )
    return Calibration(target, digest, held.meta["content_hash"], n_runs, left_out, warnings, prefill, decode)


def own_run_hashes(meta: Mapping[str, str]) -> list[str]:
    """Beginnings of the hashes of the runs that a table was calibrated with."""
    return list(json.loads(meta.get("calibration", "{}")).get("run_hashes", []))


def _sources(connection: duckdb.DuckDBPyConnection) -> list[dict[str, object]]:
    rows = connection.execute(
        """
        SELECT sha256, rows_read, count(key_id) AS rows_used
        FROM source_files LEFT JOIN paired_runs USING (source_id)
        GROUP BY source_id, sha256, rows_read
        ORDER BY sha256, rows_read, rows_used
        """
    ).fetchall()
    return [dict(zip(("sha256", "rows_read", "rows_used"), row, strict=True)) for row in rows]


def _distinct(connection: duckdb.DuckDBPyConnection, column: str) -> str:
    rows = connection.execute(
        f"SELECT DISTINCT {column} FROM paired_runs WHERE {column} IS NOT NULL ORDER BY 1 LIMIT 20"
    ).fetchall()
    return json.dumps([value for (value,) in rows])
