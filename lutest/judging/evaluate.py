"""How well a table predicts runs: errors, pinball loss and coverage, per stage, configuration and output length."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from lutest.builder.matched_runs import match_runs
from lutest.judging import metrics
from lutest.judging.provenance import provenance_warnings
from lutest.reader.figures import Key
from lutest.reader.loading import load
from lutest.reader.names import quantile_suffix
from lutest.reader.table import LatencyTable
from lutest.runs.configuration import Config
from lutest.runs.sources import Source
from lutest.runs.work import work_database

__all__ = ["BANDS", "STAGES", "Evaluation", "Score", "evaluate"]

STAGES = ("prefill", "decode step", "decode total", "total")
BANDS = ("1", "2", "3–5", "6–10", "11–20", "21–50", "51+")  # output tokens

_BAND_ENDS = np.array([1, 2, 5, 10, 20, 50])  # of BANDS but the last
MAX_STEPS = 2_000_000  # beyond them whole runs are picked by their hash, so that memory stays bounded

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Columns = dict[str, NDArray[Any]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Score:
    """Figures of one stage over one group of runs.

    Attributes
    ----------
    stage : str
        One of `STAGES`.
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
        named: dict[str, Any] = {
            "stage": self.stage,
            "n": self.n,
            **{name: _or_none(getattr(self, name)) for name in ("r_squared", "mae_ms", "mape", "median_ape", "bias")},
            "pinball_ms": {quantile_suffix(q): _or_none(value) for q, value in self.pinball_ms.items()},
            "coverage": {quantile_suffix(q): _or_none(value) for q, value in self.coverage.items()},
        }
        if self.output_tokens is not None:
            named = {"output_tokens": self.output_tokens, **named}
        return {**dict(zip(key_columns, self.key or (), strict=False)), **named}


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
        judged = _judged_runs(connection)
        n_runs = len(judged["key_id"])
        observations, step_note = _observations(connection, held, judged)
        warnings = provenance_warnings(connection, held)
    if step_note:
        warnings = (*warnings, step_note)
    overall, by_band, by_key = _all_scores(held, observations)
    n_clamped = int(judged["clamped"].sum())
    return Evaluation(held.path, held.key_columns, n_runs, n_clamped, left_out, warnings, overall, by_band, by_key)


def _judged_runs(connection: duckdb.DuckDBPyConnection) -> Columns:
    return _columns(
        connection,
        """
        SELECT key_id, prompt_tokens, output_tokens, prefill_ms, decode_ms, total_ms, clamped
        FROM matched_runs
        ORDER BY source_id, "row"
        """,
    )


def _columns(connection: duckdb.DuckDBPyConnection, query: str) -> Columns:
    return {name: np.asarray(values) for name, values in connection.execute(query).fetchnumpy().items()}


@dataclass(frozen=True)
class _Observations:
    """Observed values of one stage, with what the table says of each, by quantile."""

    key_id: Ints
    output_tokens: Ints
    observed: Floats
    predicted: dict[float, Floats]


def _observations(
    connection: duckdb.DuckDBPyConnection, table: LatencyTable, runs: Columns
) -> tuple[dict[str, _Observations], str]:
    has_decode = np.array([key.decode_curve is not None for key in table.figures.keys])
    several = runs["output_tokens"] >= 2
    decodable = several & has_decode[runs["key_id"]]
    batch = table.batch

    def observe(part: Columns, value: str, predict: Callable[[float], Floats]) -> _Observations:
        predicted = {q: predict(q) for q in table.quantiles}
        return _Observations(part["key_id"], part["output_tokens"], part[value], predicted)

    def only(chosen: NDArray[np.bool_]) -> Columns:
        return {name: values[chosen] for name, values in runs.items()}

    decoded, whole = only(decodable), only(decodable | ~several)
    steps, n_all_steps = _timed_steps(connection, has_decode)
    found = {
        "prefill": observe(runs, "prefill_ms", lambda q: batch.prefill_ms(runs["key_id"], runs["prompt_tokens"], q)),
        "decode step": observe(steps, "step_ms", lambda q: batch.decode_step_ms(steps["key_id"], steps["kv_len"], q)),
        "decode total": observe(
            decoded,
            "decode_ms",
            lambda q: batch.decode_ms(decoded["key_id"], decoded["prompt_tokens"], decoded["output_tokens"], q),
        ),
        "total": observe(
            whole,
            "total_ms",
            lambda q: batch.total_ms(whole["key_id"], whole["prompt_tokens"], whole["output_tokens"], q),
        ),
    }
    n_steps = len(steps["key_id"])
    note = f"decode steps are judged by {n_steps:,} of {n_all_steps:,}, whole runs picked by their hash"
    return found, note if n_steps < n_all_steps else ""


def _timed_steps(connection: duckdb.DuckDBPyConnection, has_decode: NDArray[np.bool_]) -> tuple[Columns, int]:
    """Timed steps of configurations with decode figures, bounded, and how many there are in all."""
    ids = [int(number) for number in np.flatnonzero(has_decode)]
    timed = f"timed AND list_contains({ids}::BIGINT[], key_id)"
    total = connection.execute(f"SELECT sum(len(decode_steps_ms)) FROM matched_runs WHERE {timed}").fetchone()
    steps = _columns(
        connection,
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
                key_id, output_tokens, prompt_tokens, run_hash, source_id, "row",
                unnest(decode_steps_ms) AS step_ms,
                unnest(coalesce(step_positions, range(1, len(decode_steps_ms) + 1)::INTEGER[])) AS position
            FROM chosen
        )
        SELECT key_id, output_tokens, prompt_tokens + position AS kv_len, step_ms
        FROM unnested
        ORDER BY source_id, "row", position, step_ms
        """,
    )
    return steps, int(total[0]) if total is not None and total[0] is not None else 0


def _all_scores(
    table: LatencyTable, observations: Mapping[str, _Observations]
) -> tuple[tuple[Score, ...], tuple[Score, ...], tuple[Score, ...]]:
    overall: list[Score] = []
    by_band: list[Score] = []
    by_key: list[Score] = []
    for stage, held in observations.items():
        everything = np.arange(len(held.key_id))
        if not len(everything):
            continue
        overall.append(_score(stage, held, everything))
        bands = np.searchsorted(_BAND_ENDS, held.output_tokens)
        by_band += [_score(stage, held, rows, band=BANDS[place]) for place, rows in _groups(bands)]
        by_key += [_score(stage, held, rows, key=table.keys[place]) for place, rows in _groups(held.key_id)]
    return tuple(overall), tuple(by_band), tuple(by_key)


def _groups(numbers: Ints) -> list[tuple[int, Ints]]:
    """Each number that occurs, increasing, and the rows where it does."""
    order = np.argsort(numbers, kind="stable")
    found, starts = np.unique(numbers[order], return_index=True)
    return list(zip(map(int, found), np.split(order, starts[1:]), strict=True))


def _score(stage: str, held: _Observations, rows: Ints, key: Key | None = None, band: str | None = None) -> Score:
    observed = held.observed[rows]
    median = held.predicted[0.5][rows]
    return Score(
        stage=stage,
        key=key,
        output_tokens=band,
        n=len(rows),
        r_squared=metrics.r_squared(observed, median),
        mae_ms=metrics.mean_absolute_error(observed, median),
        mape=metrics.mape(observed, median),
        median_ape=metrics.median_ape(observed, median),
        bias=metrics.median_bias(observed, median),
        pinball_ms={q: metrics.pinball_loss(observed, values[rows], q) for q, values in held.predicted.items()},
        coverage={q: metrics.coverage(observed, values[rows]) for q, values in held.predicted.items()},
    )


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
