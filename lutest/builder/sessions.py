"""What profiling sessions differ by: how far the latencies of a later one may lie from those of the table."""

from __future__ import annotations

import duckdb
import numpy as np
import pandas as pd
from scipy import stats

from lutest.builder.fit.observations import Floats
from lutest.builder.fit.quantiles import variance_between

GAP_MS = 30 * 60e3  # between the starts of two runs: from here on, another session
LEAST_RUNS = 5  # of a configuration in a session, for a median
_STAGES = {
    "prefill": ("prefill_ms", "TRUE"),
    "decode_step": ("decode_ms / (output_tokens - 1)", "decode_ms > 0 AND output_tokens >= 2"),
}


def session_differences(connection: duckdb.DuckDBPyConnection) -> dict[str, object]:
    """Estimate how profiling sessions differ, from configurations that were profiled in more than one.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``accepted_runs``.

    Returns
    -------
    dict
        ``n``: sessions, 0 where runs do not say when they started. For ``prefill`` and ``decode_step``, None where no
        two sessions share two configurations, else ``n``, those that do; ``deviation``, the standard deviation of the
        logarithm of latency between sessions, beyond chance; ``p95_factor``, times which P95 is not exceeded by that
        of a later session, in 95 of 100.

    Notes
    -----
    Of the medians of a configuration in a session, at about the same lengths; a session is as far from the others as
    its configurations are on average. The variance between sessions is by moments (DerSimonian and Laird 1986), the
    factor by Student's t for one session more. It stands beside a P95 of the table, which is about runs like those
    that it was built from, and is no part of it.
    """
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE sessions AS
        SELECT *, sum((gap_ms > {GAP_MS})::INTEGER) OVER (ORDER BY started_ms, source_id, "row") AS session
        FROM (
            SELECT *, coalesce(started_ms - lag(started_ms) OVER (ORDER BY started_ms, source_id, "row"), 0) AS gap_ms
            FROM accepted_runs
            WHERE started_ms IS NOT NULL
        )
        """
    )
    ((n,),) = connection.execute("SELECT count(DISTINCT session) FROM sessions").fetchall()
    return {"n": n} | {name: _difference(connection, *stage) for name, stage in _STAGES.items()}


def _difference(connection: duckdb.DuckDBPyConnection, value: str, condition: str) -> dict[str, float] | None:
    medians = connection.execute(
        f"""
        WITH alike AS (
            SELECT
                session, key_id, ln({value}) AS y,
                floor(2 * log2(greatest(prompt_tokens, 1))) AS prompt,
                floor(2 * log2(output_tokens)) AS output
            FROM sessions
            WHERE {condition} AND {value} > 0
        ),
        deviations AS (
            SELECT *, y - median(y) OVER of_kind AS deviation
            FROM alike
            WINDOW of_kind AS (PARTITION BY key_id, prompt, output)
            QUALIFY min(session) OVER of_kind < max(session) OVER of_kind
        )
        SELECT session, key_id, median(deviation) AS y
        FROM deviations
        GROUP BY session, key_id
        HAVING count(*) >= {LEAST_RUNS}
        ORDER BY session, key_id
        """
    ).df()
    effect, variance = _effects(medians)
    if len(effect) < 2:
        return None
    between = variance_between(effect, variance) ** 0.5
    reach = float(stats.t.ppf(0.95, len(effect) - 1)) * between * (1 + 1 / len(effect)) ** 0.5
    return {"n": len(effect), "deviation": round(between, 6), "p95_factor": round(float(np.exp(reach)), 6)}


def _effects(medians: pd.DataFrame) -> tuple[Floats, Floats]:
    """How far each session lies from the others, and the variance of that; sessions of two configurations or more."""
    by_session = medians.groupby("session")["y"]
    found = by_session.agg(["mean", "var", "size"])
    found = found[found["size"] >= 2]
    pooled = float((found["var"] * (found["size"] - 1)).sum() / max((found["size"] - 1).sum(), 1))
    return found["mean"].to_numpy(), np.maximum(pooled / found["size"].to_numpy(), 1e-12)
