"""Runs of the new device beside what the table says of each: what calibration is fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import duckdb
import numpy as np
from numpy.typing import NDArray

from lutest.reader.table import LatencyTable

__all__ = ["MOST_RUNS", "PairedRuns", "PairedSteps", "pair_runs", "pair_steps"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_RUNS = 200  # more are picked by their hash: with so many, a table of their own is better than a calibrated one
_MOST_STEPS = 100_000
_LEAST_SHARE = 1e-3  # of what is predicted: stands for a decode that was clamped at zero


@dataclass(frozen=True)
class PairedRuns:
    """Runs of one stage, all arrays of shape (n,).

    Attributes
    ----------
    key_id : ndarray of int
        Place of the configuration in the table.
    observed_ms : ndarray
        Prefill, or decode per step.
    predicted_ms : dict
        Quantile of the table → what it says of the same.
    weight : ndarray
        How much a run says, at most 1: the mean of few steps less than that of many.
    place : ndarray of int
        Which run it is, from 0 in order of source and row.
    n_steps : ndarray of int
        Decode steps of the run; 1 for prefill.
    """

    key_id: Ints
    observed_ms: Floats
    predicted_ms: Mapping[float, Floats]
    weight: Floats
    place: Ints
    n_steps: Ints


@dataclass(frozen=True)
class PairedSteps:
    """Timed decode steps, all arrays of shape (n_steps,); `place` and `key_id` as in `PairedRuns`."""

    key_id: Ints
    observed_ms: Floats
    predicted_ms: Mapping[float, Floats]
    place: Ints


def pair_runs(connection: duckdb.DuckDBPyConnection, table: LatencyTable) -> tuple[PairedRuns, PairedRuns]:
    """Runs of ``matched_runs`` for prefill, and those of two tokens or more for decode."""
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE paired_runs AS
        WITH picked AS (
            SELECT *
            FROM matched_runs
            QUALIFY row_number() OVER (ORDER BY run_hash, source_id, "row") <= {MOST_RUNS}
        )
        SELECT row_number() OVER (ORDER BY source_id, "row") - 1 AS place, *
        FROM picked
        """
    )
    runs = connection.execute(
        "SELECT place, key_id, prompt_tokens, output_tokens, prefill_ms, decode_ms FROM paired_runs ORDER BY place"
    ).fetchnumpy()
    held = {name: np.asarray(values) for name, values in runs.items()}
    key_id, prompt = held["key_id"], held["prompt_tokens"]
    prefill = PairedRuns(
        key_id,
        held["prefill_ms"].astype(np.float64),
        {q: table.batch.prefill_ms(key_id, prompt, q) for q in table.quantiles},
        np.ones(len(key_id)),
        held["place"],
        np.ones(len(key_id), dtype=np.int64),
    )
    has_decode = np.array([key.decode_curve is not None for key in table.figures.keys])
    several = (held["output_tokens"] >= 2) & has_decode[key_id]
    key_id, prompt, output = key_id[several], prompt[several], held["output_tokens"][several]
    n_steps = output - 1
    predicted = {q: table.batch.decode_ms(key_id, prompt, output, q) / n_steps for q in table.quantiles}
    observed = np.maximum(held["decode_ms"][several] / n_steps, _LEAST_SHARE * predicted[0.5])
    decode = PairedRuns(key_id, observed, predicted, n_steps / (n_steps + 2.0), held["place"][several], n_steps)
    return prefill, decode


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
    ).fetchnumpy()
    held = {name: np.asarray(values) for name, values in steps.items()}
    has_decode = np.array([key.decode_curve is not None for key in table.figures.keys])
    known = has_decode[held["key_id"]] if len(held["key_id"]) else np.zeros(0, dtype=bool)
    held = {name: values[known] for name, values in held.items()}
    predicted = {q: table.batch.decode_step_ms(held["key_id"], held["kv_len"], q) for q in table.quantiles}
    return PairedSteps(held["key_id"], held["step_ms"].astype(np.float64), predicted, held["place"])
