"""Views and macros of the file: the reader's arithmetic for SQL users."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb

from lutest.reader.names import quantile_suffix

__all__ = ["write_macros"]


def write_macros(connection: duckdb.DuckDBPyConnection, quantiles: Sequence[float]) -> None:
    """Create the views and macros, each with its comment, in the database in use.

    Parameters
    ----------
    connection : duckdb connection
        The tables of the file exist in its current database.
    quantiles : sequence of float
        Levels that the table holds.

    Notes
    -----
    Inside a macro, a column named like a parameter is ambiguous to DuckDB, within the views that it reads as well.
    So the segment views rename the key columns, and qualify every column that they read.
    """
    suffixes = [quantile_suffix(q) for q in quantiles]
    for statement in (
        _segments("prefill_segments", "prefill_curve", "prompt_tokens", suffixes, "ms", beyond="slope"),
        _segments("decode_segments", "decode_curve", "kv_len", suffixes, "ms", beyond="slope", extra="p50_sum_ms"),
        _segments("ratio_segments", "decode_total", "decode_steps", suffixes, "ratio", beyond="hold"),
        _CORRELATIONS,
        _configs(suffixes),
        *_scalar_macros(quantiles),
        _FEASIBLE,
    ):
        connection.execute(statement)
    for statement in _COMMENTS:
        connection.execute(statement)


def _segments(
    view: str, table: str, place: str, suffixes: Sequence[str], unit: str, *, beyond: str, extra: str | None = None
) -> str:
    """One row per segment [start, stop) of a piecewise-linear curve; the last one has no stop."""
    lines = []
    for suffix in suffixes:
        value = f"c.{suffix}_{unit}"
        step = f"({value} - lag({value}) OVER along) / (c.{place} - lag(c.{place}) OVER along)"
        last = f"greatest(coalesce({step}, 0), 0)" if beyond == "slope" else "0"
        lines.append(f"{value} AS {suffix}_start")
        lines.append(
            f"coalesce((lead({value}) OVER along - {value}) / (lead(c.{place}) OVER along - c.{place}), {last})"
            f" AS {suffix}_slope"
        )
    if extra:
        lines.append(f"c.{extra} AS sum_start")
    return f"""
        CREATE VIEW {view} AS
        SELECT
            c.tier AS key_tier,
            c.top_k AS key_top_k,
            c.num_blocks AS key_num_blocks,
            c.{place} AS start,
            lag(c.{place}) OVER along IS NULL AS is_first,
            lead(c.{place}) OVER along AS stop,
            {("," + chr(10) + "            ").join(lines)}
        FROM {table} AS c
        WINDOW along AS (PARTITION BY c.tier, c.top_k, c.num_blocks ORDER BY c.{place})
    """


_CORRELATIONS = """
    CREATE VIEW correlations AS
    SELECT t.* RENAME (tier AS key_tier, top_k AS key_top_k, num_blocks AS key_num_blocks)
    FROM total AS t
"""


def _configs(suffixes: Sequence[str]) -> str:
    prefill = ", ".join(f"p.{suffix}_ms AS prefill_{suffix}_ms" for suffix in suffixes)
    decode = ", ".join(f"d.{suffix}_ms AS decode_step_{suffix}_ms" for suffix in suffixes)
    return f"""
        CREATE VIEW configs AS
        SELECT
            p.tier, p.top_k, p.num_blocks, p.n,
            {prefill}, p.p95_upper_ms AS prefill_p95_upper_ms,
            p.prompt_tokens_min, p.prompt_tokens_p50, p.prompt_tokens_max,
            {decode}, d.p95_upper_ms AS decode_step_p95_upper_ms,
            d.n AS n_decode_runs, d.n_steps AS n_decode_steps, d.n_clamped
        FROM prefill AS p
        LEFT JOIN decode AS d ON d.tier = p.tier AND d.top_k = p.top_k AND d.num_blocks = p.num_blocks
        ORDER BY p.tier, p.top_k, p.num_blocks
    """


def _pick(quantiles: Sequence[float], expression: str) -> str:
    """CASE over the levels of the table; `expression` holds {suffix}."""
    branches = " ".join(f"WHEN q = {q!r} THEN {expression.replace('{suffix}', quantile_suffix(q))}" for q in quantiles)
    held = ", ".join(f"{q:g}" for q in quantiles)
    return f"CASE {branches} ELSE error('this table holds q = {held}, not q = ' || q) END"


_OF_KEY = "s.key_tier = tier AND s.key_top_k = top_k AND s.key_num_blocks = num_blocks"


def _on_curve(view: str, place: str, value: str) -> str:
    """Value at a place: the segment that holds it, the first knot's value before it."""
    return f"""(
        SELECT {value}
        FROM {view} AS s
        WHERE {_OF_KEY}
            AND (s.start <= {place} OR s.is_first)
            AND (s.stop > {place} OR s.stop IS NULL)
    )"""


def _scalar_macros(quantiles: Sequence[float]) -> list[str]:
    key = "tier, top_k, num_blocks"
    prefill_at = "s.{suffix}_start + greatest(prompt_tokens - s.start, 0) * s.{suffix}_slope"
    step_at = "s.{suffix}_start + greatest(kv_len - s.start, 0) * s.{suffix}_slope"
    ratio_at = "s.{suffix}_start + greatest(decode_steps - s.start, 0) * s.{suffix}_slope"
    # Sum over KV lengths 1 to kv_len: from the knot on an arithmetic series, before the first knot a constant.
    sum_at = """
        CASE
            WHEN s.is_first AND kv_len <= s.start THEN kv_len * s.p50_start
            ELSE s.sum_start + (kv_len - s.start) * s.p50_start
                + s.p50_slope * (kv_len - s.start) * (kv_len - s.start + 1) / 2
        END
    """
    lower = "CASE WHEN q < 0.5 THEN -1 ELSE 1 END"
    return [
        f"CREATE MACRO prefill_ms({key}, prompt_tokens, q) AS"
        f" {_on_curve('prefill_segments', 'prompt_tokens', _pick(quantiles, prefill_at))}",
        f"CREATE MACRO decode_step_ms({key}, kv_len, q) AS"
        f" {_on_curve('decode_segments', 'kv_len', _pick(quantiles, step_at))}",
        f"CREATE MACRO decode_sum_ms({key}, kv_len) AS {_on_curve('decode_segments', 'kv_len', sum_at)}",
        f"CREATE MACRO decode_ratio({key}, decode_steps, q) AS"
        f" {_on_curve('ratio_segments', 'decode_steps', _pick(quantiles, ratio_at))}",
        f"""
        CREATE MACRO decode_ms({key}, prompt_tokens, output_tokens, q) AS
            CASE
                WHEN output_tokens = 1 THEN 0.0
                ELSE (
                    decode_sum_ms({key}, prompt_tokens + output_tokens - 1) - decode_sum_ms({key}, prompt_tokens)
                ) * decode_ratio({key}, output_tokens - 1, q)
            END
        """,
        f"""
        CREATE MACRO correlation({key}, q) AS (
            SELECT {_pick(quantiles, "s.{suffix}_correlation")}
            FROM correlations AS s
            WHERE {_OF_KEY}
        )
        """,
        "CREATE MACRO combined_ms(prefill_p50_ms, prefill_q_ms, decode_p50_ms, decode_q_ms, c, q) AS"
        f" prefill_p50_ms + decode_p50_ms + {lower} * sqrt("
        "pow(prefill_q_ms - prefill_p50_ms, 2) + pow(decode_q_ms - decode_p50_ms, 2)"
        " + 2 * c * abs(prefill_q_ms - prefill_p50_ms) * abs(decode_q_ms - decode_p50_ms))",
        f"""
        CREATE MACRO total_ms({key}, prompt_tokens, output_tokens, q) AS
            CASE
                WHEN output_tokens = 1 THEN prefill_ms({key}, prompt_tokens, q)
                ELSE combined_ms(
                    prefill_ms({key}, prompt_tokens, 0.5),
                    prefill_ms({key}, prompt_tokens, q),
                    decode_ms({key}, prompt_tokens, output_tokens, 0.5),
                    decode_ms({key}, prompt_tokens, output_tokens, q),
                    correlation({key}, q),
                    q
                )
            END
        """,
    ]


_FEASIBLE = """
    CREATE MACRO feasible(budget_ms) AS TABLE
        SELECT c.*
        FROM configs AS c
        WHERE c.prefill_p95_ms <= 0.8 * budget_ms
"""

_COMMENTS = (
    "COMMENT ON VIEW prefill_segments IS 'Segments of prefill_curve: value at the start and slope, per quantile'",
    "COMMENT ON VIEW decode_segments IS 'Segments of decode_curve: value at the start and slope, per quantile'",
    "COMMENT ON VIEW ratio_segments IS 'Segments of decode_total: ratio at the start and slope, per quantile'",
    "COMMENT ON VIEW correlations IS 'The table total, with key columns named as macros need them'",
    "COMMENT ON VIEW configs IS 'One wide row per configuration'",
    "COMMENT ON MACRO prefill_ms IS 'Quantile q of prefill latency at a prompt length, ms'",
    "COMMENT ON MACRO decode_step_ms IS 'Quantile q of one decode step at a KV length, ms'",
    "COMMENT ON MACRO decode_sum_ms IS 'Sum of the P50 decode steps over KV lengths 1 to kv_len, ms'",
    "COMMENT ON MACRO decode_ratio IS 'Quantile q of decode_ms over the sum of its P50 steps'",
    "COMMENT ON MACRO decode_ms IS 'Quantile q of everything after the first token, ms'",
    "COMMENT ON MACRO correlation IS 'How far deviations of prefill and decode add up in a total'",
    "COMMENT ON MACRO combined_ms IS 'Total from the P50 and quantile q of prefill and decode'",
    "COMMENT ON MACRO total_ms IS 'Quantile q of prefill + decode, ms'",
    "COMMENT ON MACRO TABLE feasible IS 'Configurations whose P95 prefill takes at most 80 % of the budget'",
)
