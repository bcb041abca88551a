"""Which runs the table rests on: structural rejects, duplicates and outliers go into ``rejections`` with a reason."""

from __future__ import annotations

import duckdb

LEAST_RUNS = 12  # with fewer runs, quartiles say too little to call a run an outlier
MOST_BINS = 8  # medians that the line over prompt length goes through
MOST_OUTLIERS = 0.05  # share of runs above which what lies beyond the fences is the tail that P95 is about
LEAST_TAIL = 12  # runs of one key beyond its fences that are more than chance
LEAST_SPREAD = 0.01  # interquartile range in log units below which a key's noise is that of the clock


def write_accepted_runs(connection: duckdb.DuckDBPyConnection, outliers: str, k: float) -> int:
    """Create ``rejections`` (source_id, row, reason, detail) and the view ``accepted_runs`` over ``runs``.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``runs``.
    outliers : {"iqr", "none"}
        How outliers are told.
    k : float
        Fences stand `k` interquartile ranges beyond the quartiles.

    Returns
    -------
    int
        Runs beyond the fences that were kept, for there are too many of them to be outliers.

    Notes
    -----
    Latency is skewed to the right: fences on the raw scale cut off the tail that P95 is about. Here they stand on
    the log scale, per key, on what is left after a line through medians over prompt length has been taken off: the
    outliers do not bend the line that they are judged by (Tukey, Exploratory Data Analysis, 1977, ch. 2 and 7).
    Prefill is judged in every run, the mean decode step only where steps were timed: by subtraction, short outputs
    are mostly noise, and noise is not an outlier.
    Keys with few runs, or with most of their runs at one value of a coarse clock, are not judged. Where more than 5 %
    of all runs lie beyond the fences, or a dozen and 5 % of a key's, they are no outliers but a second mode of the
    machine (a busy neighbour, a hot GPU, a request that waits for another) that will come again: they are kept.
    """
    connection.execute(
        """
        CREATE OR REPLACE TABLE rejections AS
        SELECT source_id, "row", reason, detail FROM runs WHERE reason IS NOT NULL
        """
    )
    _reject_duplicates(connection)
    kept = 0
    if outliers == "iqr":
        kept += _reject_outliers(connection, "prefill_ms", "prefill_ms", "TRUE", k)
        step = "decode_ms / (output_tokens - 1)"
        kept += _reject_outliers(connection, "decode step", step, "timed AND decode_ms > 0", k)
    connection.execute(
        """
        CREATE OR REPLACE VIEW accepted_runs AS
        SELECT * FROM runs ANTI JOIN rejections USING (source_id, "row")
        """
    )
    return kept


def _reject_duplicates(connection: duckdb.DuckDBPyConnection) -> None:
    # Files may overlap (a merged file beside its `_rank<r>` parts), so a run occurs as often as in the one file that
    # has it most often. Within a file, equal rows are one run twice only if something tells runs apart: an id, timed
    # steps, or a clock finer than 0.1 ms.
    connection.execute(
        """
        INSERT INTO rejections
        WITH copies AS (
            SELECT
                source_id,
                "row",
                run_hash,
                CASE
                    WHEN sample_id IS NOT NULL OR timed OR prefill_ms <> round(prefill_ms, 1) THEN 1
                    ELSE row_number() OVER (PARTITION BY run_hash, source_id ORDER BY "row")
                END AS occurrence
            FROM runs
            WHERE reason IS NULL
        ),
        ranked AS (
            SELECT
                source_id,
                "row",
                row_number() OVER same AS place,
                first_value(source_id) OVER same AS first_source_id,
                first_value("row") OVER same AS first_row
            FROM copies
            WINDOW same AS (PARTITION BY run_hash, occurrence ORDER BY source_id, "row")
        )
        SELECT
            source_id,
            "row",
            'duplicate',
            'the same run as row ' || first_row || ' of source ' || first_source_id
        FROM ranked
        WHERE place > 1
        """
    )


def _reject_outliers(connection: duckdb.DuckDBPyConnection, name: str, value: str, condition: str, k: float) -> int:
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE judged AS
        WITH candidates AS (
            SELECT source_id, "row", key_id, ln(1 + prompt_tokens) AS x, {value} AS value,
                ln({value}) AS y
            FROM runs ANTI JOIN rejections USING (source_id, "row")
            WHERE {condition}
        ),
        binned AS (
            SELECT
                *,
                floor(
                    (row_number() OVER (PARTITION BY key_id ORDER BY x, y) - 1)
                    * least({MOST_BINS}, greatest(count(*) OVER (PARTITION BY key_id) // 8, 1))
                    / count(*) OVER (PARTITION BY key_id)
                ) AS bin
            FROM candidates
        ),
        medians AS (
            SELECT key_id, median(x) AS centre, median(y) AS level
            FROM binned
            GROUP BY key_id, bin
        ),
        centres AS (
            SELECT key_id, centre, median(level) AS level
            FROM medians
            GROUP BY key_id, centre
        ),
        segments AS (
            SELECT
                key_id, centre, level,
                CASE WHEN lag(centre) OVER along IS NULL THEN -1 ELSE centre END AS start,
                coalesce(
                    (lead(level) OVER along - level) / (lead(centre) OVER along - centre),
                    (level - lag(level) OVER along) / (centre - lag(centre) OVER along),
                    0
                ) AS slope
            FROM centres
            WINDOW along AS (PARTITION BY key_id ORDER BY centre)
        ),
        residuals AS (
            SELECT candidates.*, y - (level + slope * (x - centre)) AS residual
            FROM candidates ASOF JOIN segments
                ON candidates.key_id = segments.key_id AND candidates.x >= segments.start
        ),
        fences AS (
            SELECT
                key_id,
                quantile_cont(residual, 0.25) AS q1,
                quantile_cont(residual, 0.75) AS q3,
                $k * greatest(q3 - q1, {LEAST_SPREAD}) AS reach
            FROM residuals
            GROUP BY key_id
            HAVING count(*) >= {LEAST_RUNS} AND q3 > q1
        )
        SELECT
            *,
            count(*) FILTER (low OR high) OVER of_key >= {LEAST_TAIL}
                AND count(*) FILTER (low OR high) OVER of_key > {MOST_OUTLIERS} * count(*) OVER of_key AS in_tail
        FROM (
            SELECT source_id, "row", key_id, value, residual < q1 - reach AS low, residual > q3 + reach AS high
            FROM residuals JOIN fences USING (key_id)
        )
        WINDOW of_key AS (PARTITION BY key_id)
        """,
        {"k": k},
    )
    counts = connection.execute(
        "SELECT count(*), count(*) FILTER (low OR high), count(*) FILTER ((low OR high) AND in_tail) FROM judged"
    ).fetchone()
    assert counts is not None
    n_judged, n_beyond, n_tail = counts
    if n_beyond > MOST_OUTLIERS * n_judged:
        return int(n_beyond)
    connection.execute(
        f"""
        INSERT INTO rejections
        SELECT
            source_id,
            "row",
            'outlier',
            printf('{name} %.6g ms lies more than %.4g interquartile ranges ', value, $k::DOUBLE)
            || CASE WHEN low THEN 'below' ELSE 'above' END
            || ' the quartiles of its key (log scale, at its prompt length)'
        FROM judged
        WHERE (low OR high) AND NOT in_tail
        """,
        {"k": k},
    )
    return int(n_tail)
