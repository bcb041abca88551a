"""How well a table predicts runs: errors, pinball loss and coverage, per stage, configuration and output length."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lutest.builder.matched_runs import match_runs
from lutest.judging import metrics
from lutest.judging.finding import plain
from lutest.reader.figures import Key
from lutest.reader.loading import load
from lutest.reader.names import quantile_suffix, quote
from lutest.reader.table import LatencyTable
from lutest.runs.configuration import Config
from lutest.runs.sources import Source
from lutest.runs.work import work_database
from lutest.tablefile.sql import connect

BANDS = ("1", "2", "3–5", "6–10", "11–20", "21–50", "51+")  # output tokens

_BAND_ENDS = np.array([1, 2, 5, 10, 20, 50])  # of BANDS but the last
MAX_STEPS = 2_000_000  # beyond them whole runs are picked by their hash, so that memory stays bounded
LEAST_SHARE_KNOWN = 0.05  # of the table's extreme runs; fewer may meet by chance
LEAST_SHARE_DISTINCT = 0.9  # below it the clock is so coarse that equal times say nothing
_SAME_TIME = 1e-9  # relative: survives a change of unit
_ADVICE = "these figures say how well the table fits its own runs, not what it predicts; judge it by runs it never saw"

Floats = NDArray[np.float64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Score:
    """Figures of one stage over one group of runs.

    Attributes
    ----------
    stage : str
        ``prefill``, ``decode step``, ``decode total`` or ``total``.
    key : tuple or None
        The configuration; None for all.
    output_tokens : str or None
        The band of output lengths; None for all.
    n : int
        Observations: runs, or steps.
    r_squared : float
        Of P50; NaN where all observations are equal.
    mae_ms : float
        Mean absolute error of P50.
    mape, median_ape, bias : float
        Of P50, as fractions: mean and median absolute error, and median signed error (above 0: predicted too high),
        each relative to the observation. How observations of zero count is said in `lutest.judging.metrics`.
    pinball_ms, coverage : dict
        Quantile → mean pinball loss in ms, and share of observations at or below the prediction.
    """

    stage: str
    key: Key | None
    output_tokens: str | None
    n: int
    r_squared: float
    mae_ms: float
    mape: float
    median_ape: float
    bias: float
    pinball_ms: dict[float, float]
    coverage: dict[float, float]

    def as_dict(self, key_columns: Sequence[str]) -> dict[str, Any]:
        """Plain values, the configuration's under their names; None where a figure does not exist."""
        named = {**dict(zip(key_columns, self.key or (), strict=False)), **vars(self)}
        for name in ("pinball_ms", "coverage"):
            named[name] = {quantile_suffix(q): value for q, value in named[name].items()}
        left_out = {"key"} if self.output_tokens else {"key", "output_tokens"}
        return {name: plain(value) for name, value in named.items() if name not in left_out}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes
    ----------
    table : str
        Path of the table; empty for one in memory.
    key_columns : tuple of str
        The names of its key columns.
    n_runs : int
        Runs that were judged.
    n_clamped : int
        Runs among them whose decode_ms was clamped at zero.
    left_out : dict
        Why runs were not judged → how many.
    warnings : tuple of str
        What makes the figures say less than they seem to.
    overall, by_output_tokens, by_key : tuple of Score
        Stage by stage; groups without observations are left out.
    """

    table: str
    key_columns: tuple[str, ...]
    n_runs: int
    n_clamped: int
    left_out: dict[str, int]
    warnings: tuple[str, ...]
    overall: tuple[Score, ...]
    by_output_tokens: tuple[Score, ...]
    by_key: tuple[Score, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        named = {name: value for name, value in vars(self).items() if name != "key_columns"}
        for name in ("overall", "by_output_tokens", "by_key"):
            named[name] = [score.as_dict(self.key_columns) for score in named[name]]
        return {**named, "warnings": list(self.warnings)}


def evaluate(
    table: LatencyTable | str | os.PathLike[str],
    runs: Source | Sequence[Source],
    *,
    config: Config | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge a table by runs, best by runs that it was not built from.

    Parameters
    ----------
    table : LatencyTable or path
        The table.
    runs : path, DataFrame, or sequence of them
        Sources of runs, as for a build; paths are relative to the current folder.
    config : path, mapping or BuildConfig, optional
        Where `key`, `columns` and `time_unit` are taken from, instead of what the table was built with.
    progress : callable, optional
        Called with (what, done, total) now and then.

    Returns
    -------
    Evaluation
        Figures for prefill, decode steps (timed ones), decode totals of runs with two tokens or more, and totals.

    Raises
    ------
    LutestError
        The table or a source cannot be read, or no run is of a configuration that the table holds.

    Notes
    -----
    Runs pass the structural checks of a build, and duplicates count once. Outliers stay: a user meets them too.
    """
    held = table if isinstance(table, LatencyTable) else load(table)
    with work_database() as connection:
        left_out = match_runs(connection, held, runs, config, progress)
        return evaluate_matched(connection, held, left_out)


def evaluate_matched(connection: duckdb.DuckDBPyConnection, held: LatencyTable, left_out: dict[str, int]) -> Evaluation:
    """As `evaluate`, of the runs in ``matched_runs``."""
    judged = connection.execute(
        """
        SELECT key_id, prompt_tokens, output_tokens, prefill_ms, decode_ms, total_ms, clamped
        FROM matched_runs
        ORDER BY source_id, "row"
        """
    ).df()
    with_decode = [i for i, key in enumerate(held.figures.keys) if key.decode_curve is not None]
    steps, n_all_steps = _timed_steps(connection, with_decode)
    warnings = list(_provenance_warnings(connection, held, judged))
    if len(steps) < n_all_steps:
        warnings.append(
            f"decode steps are judged by {len(steps):,} of {n_all_steps:,}, whole runs picked by their hash"
        )
    one_token = judged["output_tokens"] < 2
    has_decode = judged["key_id"].isin(with_decode)
    of_run = ["key_id", "prompt_tokens", "output_tokens"]
    overall, by_band, by_key = [], [], []
    for stage, verb, rows, arguments in (
        ("prefill", "prefill_ms", judged, of_run[:2]),
        ("decode step", "decode_step_ms", steps, ["key_id", "kv_len"]),
        ("decode total", "decode_ms", judged[~one_token & has_decode], of_run),
        ("total", "total_ms", judged[one_token | has_decode], of_run),
    ):
        if rows.empty:
            continue
        given = [rows[name].to_numpy() for name in arguments]
        predicted = {q: getattr(held.batch, verb)(*given, q) for q in held.quantiles}
        score = partial(_score, stage, rows[verb].to_numpy(), predicted)
        overall.append(score(np.arange(len(rows))))
        bands = np.searchsorted(_BAND_ENDS, rows["output_tokens"])
        by_band += [score(places, band=BANDS[band]) for band, places in _groups(bands)]
        by_key += [score(places, key=held.keys[key_id]) for key_id, places in _groups(given[0])]
    return Evaluation(
        held.path,
        held.key_columns,
        len(judged),
        int(judged["clamped"].sum()),
        left_out,
        tuple(warnings),
        tuple(overall),
        tuple(by_band),
        tuple(by_key),
    )


def _timed_steps(connection: duckdb.DuckDBPyConnection, with_decode: Sequence[int]) -> tuple[pd.DataFrame, int]:
    """Timed steps of configurations with decode figures, bounded, and how many there are in all."""
    timed = f"timed AND list_contains({list(with_decode)}::BIGINT[], key_id)"
    (total,) = connection.execute(f"SELECT sum(len(decode_steps_ms)) FROM matched_runs WHERE {timed}").fetchall()
    steps = connection.execute(
        f"""
        WITH chosen AS (
            SELECT *
            FROM matched_runs
            WHERE {timed}
            QUALIFY sum(len(decode_steps_ms)) OVER (ORDER BY run_hash, source_id, "row" ROWS UNBOUNDED PRECEDING)
                - len(decode_steps_ms) < {MAX_STEPS}
        ),
        unnested AS (
            SELECT
                key_id, output_tokens, prompt_tokens, source_id, "row",
                unnest(decode_steps_ms) AS decode_step_ms,
                unnest(coalesce(step_positions, range(1, len(decode_steps_ms) + 1)::INTEGER[])) AS position
            FROM chosen
        )
        SELECT key_id, output_tokens, prompt_tokens + position AS kv_len, decode_step_ms
        FROM unnested
        ORDER BY source_id, "row", position, decode_step_ms
        """
    ).df()
    return steps, int(total[0] or 0)


def _groups(numbers: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
    """Each number that occurs, increasing, and the places where it does."""
    return sorted(pd.Series(numbers).groupby(numbers).indices.items())


def _score(
    stage: str,
    observed: Floats,
    predicted: Mapping[float, Floats],
    places: NDArray[np.int64],
    *,
    key: Key | None = None,
    band: str | None = None,
) -> Score:
    value, median = observed[places], predicted[0.5][places]
    return Score(
        stage=stage,
        key=key,
        output_tokens=band,
        n=len(places),
        r_squared=metrics.r_squared(value, median),
        mae_ms=metrics.mean_absolute_error(value, median),
        mape=metrics.mape(value, median),
        median_ape=metrics.median_ape(value, median),
        bias=metrics.median_bias(value, median),
        pinball_ms={q: metrics.pinball_loss(value, estimate[places], q) for q, estimate in predicted.items()},
        coverage={q: metrics.coverage(value, estimate[places]) for q, estimate in predicted.items()},
    )


def _provenance_warnings(
    connection: duckdb.DuckDBPyConnection, table: LatencyTable, judged: pd.DataFrame
) -> Iterator[str]:
    """Warn of runs that do not test a table, one sentence each.

    Notes
    -----
    Two traces of the table's own runs are looked for: sources with the same SHA-256, and, since runs may have been
    converted since, the least and the largest prefill of each configuration, which the file keeps. Of runs that are
    measured anew none meets such a value but by chance.
    """
    held = _built_from(table)
    if held is None:
        yield "whether the table was built from these very runs is not known: its file is not at hand, or has changed"
    else:
        digests, extremes = held
        sources = connection.execute(
            "SELECT sha256, count(*) FROM matched_runs JOIN source_files USING (source_id) GROUP BY sha256"
        ).fetchall()
        same = sum(n for digest, n in sources if digest in digests)
        share = _share_known(judged, extremes)
        if same:
            yield (
                f"{same:,} of {len(judged):,} runs come from files that the table was built from (same SHA-256): "
                f"{_ADVICE}"
            )
        elif share >= LEAST_SHARE_KNOWN:
            yield (
                f"the table was built from some of these very runs: of the extreme prefill times it was built from, "
                f"{share:.0%} stand among them: {_ADVICE}"
            )
    for name in ("device", "model"):
        known = set(json.loads(table.meta.get(name, "[]")))
        rows = connection.execute(f"SELECT DISTINCT {name} FROM matched_runs WHERE {name} IS NOT NULL ORDER BY 1")
        strange = [value for (value,) in rows.fetchall() if value not in known]
        if known and strange:
            yield (
                f"the runs come from another {name} ({'; '.join(strange[:3])}) than the table "
                f"({'; '.join(sorted(known))})"
            )


def _built_from(table: LatencyTable) -> tuple[set[str], list[tuple[int, float]]] | None:
    """SHA-256 of the sources, and (key_id, least or largest prefill) of each configuration."""
    if not table.path or not Path(table.path).is_file():
        return None
    with connect(table.path) as file:
        content = file.execute("SELECT value FROM meta WHERE key = 'content_hash'").fetchone()
        if content is None or content[0] != table.meta.get("content_hash"):
            return None
        digests = {digest for (digest,) in file.execute("SELECT sha256 FROM sources").fetchall()}
        columns = ", ".join(map(quote, table.key_columns))
        rows = file.execute(f"SELECT min_ms, max_ms, {columns} FROM prefill").fetchall()
    numbers = {key: number for number, key in enumerate(table.keys)}
    return digests, [(numbers[tuple(key)], value) for low, high, *key in rows for value in {low, high}]


def _share_known(judged: pd.DataFrame, extremes: Sequence[tuple[int, float]]) -> float:
    """Share of the extreme times, of configurations that the runs have, that stand among theirs."""
    by_key = judged.groupby("key_id")["prefill_ms"]
    if by_key.nunique().sum() < LEAST_SHARE_DISTINCT * len(judged):
        return 0.0
    times = dict(list(by_key))
    met = [
        bool(((times[key_id] / value - 1).abs() < _SAME_TIME).any()) for key_id, value in extremes if key_id in times
    ]
    return float(np.mean(met))
