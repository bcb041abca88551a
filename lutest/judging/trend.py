"""Whether runs get slower or faster in the order in which they were taken."""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lutest.judging.finding import Finding, graded, percent

__all__ = ["check_trend"]

SAMPLE_RUNS_PER_KEY = 1000
LEAST_RUNS = 30
LEAST_PER_KEY = 5  # fewer runs of a configuration are no line over length and no order
MOST_RUNS_PAIRED = 2000  # the Theil–Sen slope looks at all pairs
LEAST_STEPS_UNTIMED = 8  # shorter outputs that were not timed step by step are noise
CONSTANT = 1e-12  # range of log latencies that arithmetic alone makes
NOTED, WARNED = 0.02, 0.05  # change from the first to the last tenth

Floats = NDArray[np.float64]

_STAGES = {
    "prefill": ("prefill_ms", "prompt_tokens", "TRUE"),
    "decode step": (
        "decode_ms / (output_tokens - 1)",
        "prompt_tokens + output_tokens / 2.0",
        f"decode_ms > 0 AND output_tokens >= 2 AND (timed OR output_tokens > {LEAST_STEPS_UNTIMED})",
    ),
}


def check_trend(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Trend of prefill and decode step over the order of runs.

    Notes
    -----
    The order is that of numeric sample ids within a source, workload and configuration, else that of rows. Latencies
    are taken as logarithms, less the median of their configuration and a resistant line over length (Tukey, 1977).
    The trend is the Theil–Sen slope with its 95 % interval (P. K. Sen, JASA 63, 1968), beside Spearman's rank
    correlation.
    """
    figures: dict[str, Any] = {}
    told: list[str] = []
    worst = 0.0
    for stage, (value, length, condition) in _STAGES.items():
        trend = _trend(*_residuals(connection, value, length, condition))
        if trend is None:
            continue
        figures[stage] = trend
        sure = trend["change_low"] > 0 or trend["change_high"] < 0
        if sure:
            worst = max(worst, abs(trend["change"]))
        told.append(
            f"{stage} {trend['change']:+.1%} ({trend['change_low']:+.1%} to {trend['change_high']:+.1%}, "
            f"Spearman {trend['spearman']:+.2f})".replace("%", " %").replace("-", "−")
        )
    if not told:
        return Finding("trend", "note", f"fewer than {LEAST_RUNS} runs in a known order: no trend can be seen", figures)
    severity = graded(worst, NOTED, WARNED)
    change = f"from the first to the last tenth of the runs: {'; '.join(told)}"
    if severity == "ok":
        return Finding("trend", severity, f"no trend to speak of {change}", figures)
    advice = "let the machine warm up and settle, and take the configurations in turn, in random order"
    return Finding("trend", severity, f"latencies move by {percent(worst)} {change}: {advice}", figures)


def _residuals(connection: duckdb.DuckDBPyConnection, value: str, length: str, condition: str) -> tuple[Floats, Floats]:
    """Place in the order, in (0, 1), and log latency less what configuration and length explain."""
    columns = connection.execute(
        f"""
        WITH ordered AS (
            SELECT
                key_id, run_hash, source_id, "row", workload,
                CAST({length} AS DOUBLE) AS length,
                ln({value}) AS y,
                count(*) OVER sequence AS n,
                CASE
                    WHEN count(TRY_CAST(sample_id AS DOUBLE)) OVER sequence = count(*) OVER sequence
                    THEN TRY_CAST(sample_id AS DOUBLE) ELSE "row"
                END AS place
            FROM accepted_runs
            WHERE {condition}
            WINDOW sequence AS (PARTITION BY source_id, workload, key_id)
        ),
        placed AS (
            SELECT *, (row_number() OVER sequence - 0.5) / n AS position
            FROM ordered
            WHERE n >= {LEAST_PER_KEY}
            WINDOW sequence AS (PARTITION BY source_id, workload, key_id ORDER BY place, "row")
        )
        SELECT key_id, CAST(position AS DOUBLE) AS position, length, y
        FROM placed
        QUALIFY row_number() OVER (PARTITION BY key_id ORDER BY run_hash, source_id, "row") <= {SAMPLE_RUNS_PER_KEY}
        ORDER BY run_hash, source_id, "row"
        """
    ).fetchnumpy()
    key = np.asarray(columns["key_id"], dtype=np.int64)
    position, length_of, y = (np.asarray(columns[name], dtype=np.float64) for name in ("position", "length", "y"))
    residual = np.empty(len(y))
    order = np.argsort(key, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
        if len(rows):
            straight = y[rows] - _slope(length_of[rows], y[rows]) * length_of[rows]
            residual[rows] = straight - np.median(straight)
    return position, residual


def _slope(x: Floats, y: Floats) -> float:
    third = len(x) // 3
    order = np.argsort(x, kind="stable")
    if third == 0:
        return 0.0
    low, high = order[:third], order[-third:]
    run = float(np.median(x[high]) - np.median(x[low]))
    return float(np.median(y[high]) - np.median(y[low])) / run if run > 0 else 0.0


def _trend(position: Floats, residual: Floats) -> dict[str, Any] | None:
    if len(position) < LEAST_RUNS or np.ptp(position) == 0:
        return None
    n_paired = min(len(position), MOST_RUNS_PAIRED)
    every = np.linspace(0, len(position) - 1, n_paired).astype(np.int64)  # rows stand in the order of a hash
    if np.ptp(residual) < CONSTANT:
        slope = low = high = spearman = 0.0
    else:
        slope, _, low, high = stats.theilslopes(residual[every], position[every], alpha=0.95)
        spearman = float(stats.spearmanr(position, residual).statistic)
    tenth = np.minimum((position * 10).astype(np.int64), 9)
    medians = [float(np.expm1(np.median(residual[tenth == i]))) if (tenth == i).any() else None for i in range(10)]
    # from the middle of the first tenth to the middle of the last
    change, change_low, change_high = (float(np.expm1(0.9 * value)) for value in (slope, low, high))
    return {
        "n_runs": len(position),
        "change": change,
        "change_low": change_low,
        "change_high": change_high,
        "spearman": spearman,
        "by_tenth": medians,
    }
