"""Which runs the table rests on: structural rejects, duplicates and outliers go into ``rejections`` with a reason."""

from __future__ import annotations

import duckdb

OUTPUT_BAND_ENDS = (1, 2, 5, 10, 20, 50)  # output tokens: bands of lengths whose runs are alike, one more beyond
LEAST_RUNS = 12  # with fewer runs, quartiles say too little to call a run an outlier
MOST_BINS = 8  # medians that the line over prompt length goes through
# More of a key's runs beyond one fence are no accidents but a mode of the machine that comes again. Half of each cuts
# hardly anything, twice as much cuts into what P95 is about.
MOST_OUTLIERS, LEAST_MODE = 0.01, 3
LEAST_SPREAD = 0.01  # of the logarithm: below, an interquartile range is the clock's, whatever its tick


def write_accepted_runs(connection: duckdb.DuckDBPyConnection, outliers: str, k: float) -> int:
    """Create ``rejections`` (source_id, row, reason, detail) and two views of ``runs``.

    ``accepted_runs`` are those without a rejection, ``sound_runs`` those and the outliers.

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
    Prefill is judged in every run, the mean decode step only where steps were timed, and among runs of about as many
    steps: a mean of many is calmer than one step, and lies elsewhere where some steps wait. By subtraction, short
    outputs are mostly noise, and noise is not an outlier.
    Fences stand no nearer than the clock's tick, counted as an interquartile range, can tell. Three runs or more, and
    over 1 % of a key's, beyond one fence are no outliers but a mode of the machine (a busy neighbour, a hot GPU, a
    request that waits for another): they are kept, and so is the last run of a key's output lengths or prompt lengths.
    What is cut the fit puts back into every quantile above the median.
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
        kept += _reject_outliers(connection, "prefill_ms", "prefill_ms", "1", "0", "TRUE", k)
        kept += _reject_outliers(
            connection, "decode step", "decode_ms", "(output_tokens - 1)", output_band(), "timed AND decode_ms > 0", k
        )
    connection.execute(
        """
        CREATE OR REPLACE VIEW accepted_runs AS
        SELECT * FROM runs ANTI JOIN rejections USING (source_id, "row");
        CREATE OR REPLACE VIEW sound_runs AS
        SELECT runs.*, rejections.reason IS NOT NULL AS outlier
        FROM runs LEFT JOIN rejections USING (source_id, "row")
        WHERE rejections.reason IS NULL OR rejections.reason = 'outlier'
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


def output_band() -> str:
    """SQL: number of the band of ``output_tokens``."""
    return " + ".join(f"(output_tokens > {end})::INTEGER" for end in OUTPUT_BAND_ENDS)


def _reject_outliers(
    connection: duckdb.DuckDBPyConnection, name: str, time_ms: str, steps: str, kind: str, condition: str, k: float
) -> int:
    """Judge ``time_ms / steps`` among a key's runs of one `kind`; how many beyond the fences are kept."""
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE judged AS
        WITH candidates AS (
            SELECT
                source_id, "row", key_id, {kind} AS kind, ({output_band()}) AS band,
                floor(log2(greatest(prompt_tokens, 1))) AS octave,
                ln(1 + prompt_tokens) AS x, {time_ms} AS time_ms, time_ms / {steps} AS value, ln(value) AS y
            FROM runs ANTI JOIN rejections USING (source_id, "row")
            WHERE {condition}
        ),
        ticks AS (  -- times on a coarse clock are far apart or equal, but for what adding up steps leaves
            SELECT key_id, min(gap_ms) AS tick_ms
            FROM (
                SELECT key_id, time_ms - lag(time_ms) OVER (PARTITION BY key_id ORDER BY time_ms) AS gap_ms, time_ms
                FROM candidates
            )
            WHERE gap_ms > 1e-9 * time_ms
            GROUP BY key_id
        ),
        binned AS (
            SELECT
                *,
                floor(
                    (row_number() OVER (PARTITION BY key_id, kind ORDER BY x, y) - 1)
                    * least({MOST_BINS}, greatest(count(*) OVER (PARTITION BY key_id, kind) // 8, 1))
                    / count(*) OVER (PARTITION BY key_id, kind)
                ) AS bin
            FROM candidates
        ),
        medians AS (
            SELECT key_id, kind, median(x) AS centre, median(y) AS level
            FROM binned
            GROUP BY key_id, kind, bin
        ),
        centres AS (
            SELECT key_id, kind, centre, median(level) AS level
            FROM medians
            GROUP BY key_id, kind, centre
        ),
        segments AS (
            SELECT
                key_id, kind, centre, level,
                CASE WHEN lag(centre) OVER along IS NULL THEN -1 ELSE centre END AS start,
                coalesce(
                    (lead(level) OVER along - level) / (lead(centre) OVER along - centre),
                    (level - lag(level) OVER along) / (centre - lag(centre) OVER along),
                    0
                ) AS slope
            FROM centres
            WINDOW along AS (PARTITION BY key_id, kind ORDER BY centre)
        ),
        residuals AS (
            SELECT candidates.*, y - (level + slope * (x - centre)) AS residual
            FROM candidates ASOF JOIN segments
                ON candidates.key_id = segments.key_id AND candidates.kind = segments.kind
                    AND candidates.x >= segments.start
        ),
        quartiles AS (
            SELECT
                key_id, kind, quantile_cont(residual, 0.25) AS q1, quantile_cont(residual, 0.75) AS q3
            FROM residuals
            GROUP BY key_id, kind
            HAVING count(*) >= {LEAST_RUNS}
        ),
        fenced AS (
            SELECT
                *,
                $k * greatest(q3 - q1, coalesce(tick_ms, 0) / time_ms, {LEAST_SPREAD}) AS reach,
                CASE WHEN residual < q1 - reach THEN -1 WHEN residual > q3 + reach THEN 1 ELSE 0 END AS side
            FROM residuals JOIN quartiles USING (key_id, kind) LEFT JOIN ticks USING (key_id)
        )
        SELECT
            source_id, "row", value, side,
            count(*) OVER of_side >= {LEAST_MODE} AND count(*) OVER of_side > {MOST_OUTLIERS} * count(*) OVER of_key
                OR bool_and(side <> 0) OVER (PARTITION BY key_id, band)
                OR bool_and(side <> 0) OVER (PARTITION BY key_id, octave) AS kept
        FROM fenced
        WINDOW of_key AS (PARTITION BY key_id), of_side AS (PARTITION BY key_id, side)
        """,
        {"k": k},
    )
    connection.execute(
        f"""
        INSERT INTO rejections
        SELECT
            source_id,
            "row",
            'outlier',
            printf('{name} %.6g ms lies more than %.4g interquartile ranges ', value, $k::DOUBLE)
            || CASE WHEN side < 0 THEN 'below' ELSE 'above' END
            || ' the quartiles of its key (log scale, at its prompt length)'
        FROM judged
        WHERE side <> 0 AND NOT kept
        """,
        {"k": k},
    )
    (n_kept,) = connection.execute("SELECT count(*) FROM judged WHERE side <> 0 AND kept").fetchall()
    return int(n_kept[0])
