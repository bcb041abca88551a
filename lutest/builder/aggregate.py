"""Per-key figures of the accepted runs, in DuckDB SQL, out of core."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import duckdb

from lutest.builder.order_statistics import write_order_statistics
from lutest.reader.figures import KeyColumn
from lutest.reader.names import quantile_column, quote

SAMPLE_RUNS_PER_KEY = 1000
SAMPLE_STEPS_PER_KEY = 20_000


def write_aggregates(
    connection: duckdb.DuckDBPyConnection,
    quantiles: Sequence[float],
    key_columns: Sequence[KeyColumn],
    upper_rank: Callable[[int], int | None],
) -> None:
    """Create the aggregates of ``accepted_runs``; quantiles and extremes count outliers, which will come again.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``accepted_runs`` and ``sound_runs``.
    quantiles : sequence of float
        Levels, each in (0, 1).
    key_columns : sequence of KeyColumn
        What a configuration is made of.
    upper_rank : callable
        Sample size → rank (from 1) of the order statistic that bounds P95 from above, or None.

    Notes
    -----
    Tables made, with ``key_id`` for the configuration: ``prefill``, ``decode``, ``output_length``, ``quality``,
    ``run_sample`` and ``step_sample`` (a bounded number per key, picked by a hash of the run).
    Means and deviations add up whole nanoseconds, so that they do not depend on the order of rows or threads.
    """
    # Joins as they are written: what stands on the right is held in memory, and steps never do.
    connection.execute("SET disabled_optimizers = 'join_order,build_side_probe_side'")
    _write_steps(connection)
    _write_prefill(connection, quantiles, upper_rank)
    _write_decode(connection, quantiles, upper_rank)
    _write_samples(connection, key_columns)
    connection.execute("SET disabled_optimizers = ''")
    _write_output_length(connection)
    _write_quality(connection)


def _quantile_columns(quantiles: Sequence[float]) -> str:
    return ", ".join(map(quantile_column, quantiles))


_STD = (
    "CASE WHEN n_values > 1 THEN"
    " sqrt(greatest(sum_square_ns - sum_ns * sum_ns / n_values, 0) / (n_values - 1)) / 1e6 END AS std_ms"
)


def _write_steps(connection: duckdb.DuckDBPyConnection) -> None:
    # A view: steps are many, and each use streams over them.
    connection.execute(
        """
        CREATE OR REPLACE VIEW steps AS
        WITH numbered AS (
            SELECT
                source_id, "row", key_id, prompt_tokens, outlier,
                unnest(decode_steps_ms) AS step_ms,
                unnest(coalesce(step_positions, range(1, len(decode_steps_ms) + 1)::INTEGER[])) AS position
            FROM run_steps JOIN sound_runs USING (source_id, "row")
            WHERE timed
        )
        SELECT source_id, "row", key_id, outlier, position, prompt_tokens + position AS kv_len, step_ms
        FROM numbered
        """
    )


def _write_prefill(
    connection: duckdb.DuckDBPyConnection, quantiles: Sequence[float], upper_rank: Callable[[int], int | None]
) -> None:
    counts = "(SELECT key_id, count(*) FILTER (NOT outlier) AS n FROM sound_runs GROUP BY key_id)"
    write_order_statistics(connection, "prefill_figures", "sound_runs", "prefill_ms", quantiles, upper_rank, counts)
    vision = "coalesce(CASE WHEN text_tokens <= prompt_tokens THEN prompt_tokens - text_tokens END, vision_tokens)"
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE prefill AS
        WITH grouped AS (
            SELECT
                key_id,
                min(prefill_ms) AS min_ms,
                max(prefill_ms) AS max_ms,
                quantile_disc(prompt_tokens, 0.5) FILTER (NOT outlier) AS prompt_tokens_p50,
                min(prompt_tokens) FILTER (NOT outlier) AS prompt_tokens_min,
                max(prompt_tokens) FILTER (NOT outlier) AS prompt_tokens_max,
                -- all but the text: what the configuration itself adds to a prompt
                CASE WHEN count({vision}) = count(*) THEN quantile_disc({vision}, 0.5) END AS vision_tokens_p50
            FROM sound_runs
            GROUP BY key_id
        )
        SELECT
            key_id, n_values AS n, {_quantile_columns(quantiles)}, p95_upper_ms,
            sum_ns / n_values / 1e6 AS mean_ms, {_STD}, min_ms, max_ms,
            prompt_tokens_p50, prompt_tokens_min, prompt_tokens_max, vision_tokens_p50
        FROM grouped JOIN prefill_figures USING (key_id)
        """
    )


def _write_decode(
    connection: duckdb.DuckDBPyConnection, quantiles: Sequence[float], upper_rank: Callable[[int], int | None]
) -> None:
    connection.execute(
        """
        CREATE OR REPLACE TEMP TABLE decode_runs AS
        SELECT
            key_id,
            count(*) AS n,
            CAST(sum(output_tokens - 1) AS BIGINT) AS n_steps,
            count(*) FILTER (clamped) AS n_clamped,
            count(*) FILTER (timed) AS n_timed,
            CAST(sum(CAST(round(decode_ms * 1e6) AS HUGEINT)) AS DOUBLE)
                / sum(output_tokens - 1) / 1e6 AS of_totals_ms
        FROM accepted_runs
        WHERE output_tokens >= 2
        GROUP BY key_id
        """
    )
    # Steps of one run are not independent, so their bound has the rank that as many runs would give.
    counts = "(SELECT key_id, n_timed AS n FROM decode_runs)"
    write_order_statistics(connection, "step_figures", "steps", "step_ms", quantiles, upper_rank, counts)
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE decode AS
        SELECT
            key_id, n, n_steps, n_clamped, {_quantile_columns(quantiles)}, p95_upper_ms,
            coalesce(sum_ns / n_values / 1e6, of_totals_ms) AS mean_ms, {_STD},
            CASE WHEN n_timed > 0 THEN 'timed' ELSE 'totals' END AS steps,
            n_timed
        FROM decode_runs LEFT JOIN step_figures USING (key_id)
        """
    )


def _write_samples(connection: duckdb.DuckDBPyConnection, key_columns: Sequence[KeyColumn]) -> None:
    # Runs are picked by a hash of what they are, not of how long they took: so the order of the input does not
    # matter, nor the unit of time. Equal ones are told apart by the order of their times.
    key = ", ".join(f"accepted_runs.{quote(column.name)}" for column in key_columns)
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE run_sample AS
        WITH alike AS (
            SELECT
                source_id, "row",
                row_number() OVER (
                    PARTITION BY key_id, prompt_tokens, output_tokens
                    ORDER BY prefill_ms, decode_ms, total_ms, run_hash
                ) AS place
            FROM accepted_runs
        ),
        hashed AS (
            SELECT
                source_id, "row", key_id,
                md5(concat_ws('|', {key}, prompt_tokens, output_tokens, place)) AS run_hash,
                workload, prompt_tokens, output_tokens, prefill_ms, decode_ms, total_ms,
                total_given, one_pass, timed, clamped
            FROM accepted_runs JOIN alike USING (source_id, "row")
        )
        SELECT *
        FROM hashed
        QUALIFY row_number() OVER (PARTITION BY key_id ORDER BY run_hash) <= {SAMPLE_RUNS_PER_KEY}
        ORDER BY key_id, run_hash
        """
    )
    # Whole runs, so that what the steps of a run have in common can be told.
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE step_sample AS
        WITH chosen AS (
            SELECT source_id, "row", run_hash
            FROM run_sample
            WHERE timed
            QUALIFY sum(output_tokens - 1) OVER (PARTITION BY key_id ORDER BY run_hash)
                    - (output_tokens - 1) < {SAMPLE_STEPS_PER_KEY}
        )
        SELECT key_id, run_hash, position, kv_len, step_ms
        FROM steps JOIN chosen USING (source_id, "row")
        ORDER BY key_id, run_hash, position
        """
    )


def _write_output_length(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute(
        """
        CREATE OR REPLACE TABLE output_length AS
        SELECT workload, output_tokens, count(*) AS n
        FROM accepted_runs
        GROUP BY workload, output_tokens
        """
    )


def _write_quality(connection: duckdb.DuckDBPyConnection) -> None:
    # Normal interval for a mean; accuracies are few-valued, and a key has tens of runs at least where it matters.
    connection.execute(
        """
        CREATE OR REPLACE TABLE quality AS
        WITH grouped AS (
            SELECT
                key_id, workload,
                count(*) AS n,
                CAST(sum(CAST(round(accuracy * 1e9) AS HUGEINT)) AS DOUBLE) / count(*) / 1e9 AS accuracy,
                CAST(sum(CAST(round(accuracy * accuracy * 1e9) AS HUGEINT)) AS DOUBLE) / count(*) / 1e9 AS mean_square
            FROM accepted_runs
            WHERE accuracy IS NOT NULL
            GROUP BY key_id, workload
        ),
        spread AS (
            SELECT
                *,
                CASE
                    WHEN n > 1 THEN 1.959964 * sqrt(greatest(mean_square - accuracy * accuracy, 0) / (n - 1))
                END AS half
            FROM grouped
        )
        SELECT
            key_id, workload, n, accuracy,
            accuracy - half AS accuracy_lower, accuracy + half AS accuracy_upper
        FROM spread
        """
    )
