"""Runs of the new device beside what the table says of each: what calibration is fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import duckdb
import numpy as np
from numpy.typing import NDArray

from lutest.reader.curves import key_pieces, sum_to
from lutest.reader.table import LatencyTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_RUNS = 200  # more are picked by their hash: with so many, a table of their own is better than a calibrated one
_MOST_STEPS = 100_000
_LEAST_SHARE = 1e-3  # of what is predicted: stands for a decode that was clamped at zero


@dataclass(frozen=True)
class PairedSteps:
    """Timed decode steps, all arrays of shape (n_steps,).

    Attributes
    ----------
    key_id : ndarray of int
        Place of the configuration in the table.
    observed_ms : ndarray
    predicted_ms : dict
        Quantile of the table → what it says of the same.
    place : ndarray of int
        Which run it is of, rising in order of source and row.
    """

    key_id: Ints
    observed_ms: Floats
    predicted_ms: Mapping[float, Floats]
    place: Ints


@dataclass(frozen=True)
class PairedRuns(PairedSteps):
    """Runs of one stage, all arrays of shape (n,): prefill, or decode per step.

    A mean step is taken for one of the curve of steps: the ratio of a typical total to its P50 steps is divided out.

    Attributes
    ----------
    n_steps : ndarray
        Decode steps of the run, times that ratio; 1 for prefill.
    weight : ndarray
        How much a run says, at most 1: the mean of few steps less than that of many.
    """

    n_steps: Floats
    weight: Floats


def pair_runs(connection: duckdb.DuckDBPyConnection, table: LatencyTable) -> tuple[PairedRuns, PairedRuns]:
    """Runs of ``matched_runs`` for prefill, and those of two tokens or more for decode."""
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE paired_runs AS
        SELECT row_number() OVER (ORDER BY source_id, "row") AS place, *
        FROM matched_runs
        QUALIFY row_number() OVER (ORDER BY run_hash, source_id, "row") <= {MOST_RUNS}
        """
    )
    runs = connection.execute(
        "SELECT place, key_id, prompt_tokens, output_tokens, prefill_ms, decode_ms FROM paired_runs ORDER BY place"
    ).df()
    place, key_id, prompt, output, prefill_ms, decode_ms = (runs[name].to_numpy() for name in runs)
    predicted = {q: table.batch.prefill_ms(key_id, prompt, q) for q in table.quantiles}
    prefill = PairedRuns(key_id, prefill_ms, predicted, place, np.ones(len(key_id)), np.ones(len(key_id)))
    several = (output >= 2) & _has_decode(table)[key_id]
    place, key_id, prompt, output, decode_ms = (
        values[several] for values in (place, key_id, prompt, output, decode_ms)
    )
    n_steps = output.astype(np.int64) - 1
    typical_ms = table.batch.decode_ms(key_id, prompt, output, 0.5)
    as_steps = n_steps * typical_ms / _step_sums(table, key_id, prompt, n_steps)
    predicted = {q: table.batch.decode_ms(key_id, prompt, output, q) / as_steps for q in table.quantiles}
    observed = np.maximum(decode_ms / as_steps, _LEAST_SHARE * predicted[0.5])
    return prefill, PairedRuns(key_id, observed, predicted, place, as_steps, n_steps / (n_steps + 2.0))


def _step_sums(table: LatencyTable, key_id: Ints, prompt_tokens: Ints, n_steps: Ints) -> Floats:
    """Sum of the P50 steps of each run."""
    median = table.quantiles.index(0.5)
    curves = {number: key_pieces(table.figures.keys[number], median).step for number in np.unique(key_id).tolist()}
    sums = []
    for number, prompt, steps in zip(key_id.tolist(), prompt_tokens.tolist(), n_steps.tolist(), strict=True):
        curve = curves[number]
        assert curve is not None
        sums.append(sum_to(curve, median, prompt + steps) - sum_to(curve, median, prompt))
    return np.array(sums, dtype=np.float64)


def _has_decode(table: LatencyTable) -> NDArray[np.bool_]:
    return np.array([key.decode_curve is not None for key in table.figures.keys])


def pair_steps(connection: duckdb.DuckDBPyConnection, table: LatencyTable) -> PairedSteps:
    """Timed steps of the runs that `pair_runs` picked."""
    steps = connection.execute(
        f"""
        WITH unnested AS (
            SELECT
                place, key_id, prompt_tokens,
                unnest(decode_steps_ms) AS step_ms,
                unnest(coalesce(step_positions, range(1, len(decode_steps_ms) + 1)::INTEGER[])) AS position
            FROM paired_runs
            WHERE timed
        )
        SELECT place, key_id, prompt_tokens + position AS kv_len, step_ms
        FROM unnested
        WHERE step_ms > 0
        ORDER BY place, position
        LIMIT {_MOST_STEPS}
        """
    ).df()
    steps = steps[_has_decode(table)[steps["key_id"].to_numpy(dtype=np.int64)]]
    place, key_id, kv_len, step_ms = (steps[name].to_numpy() for name in steps)
    predicted = {q: table.batch.decode_step_ms(key_id, kv_len, q) for q in table.quantiles}
    return PairedSteps(key_id, step_ms.astype(np.float64), predicted, place)
