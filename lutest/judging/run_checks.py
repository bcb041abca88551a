"""Checks of runs one by one, of their number and of their order: rejects, duplicates, outliers, trend, clock."""

from __future__ import annotations

import math
from typing import Any

import duckdb
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from lutest.judging.finding import Finding, brief_ms, count, graded, percent, plain
from lutest.tablefile.description import records

RUNS_FOR_P95 = 20  # below, P95 is the largest run or lies beyond it
RUNS_FOR_BOUND = math.ceil(math.log(0.05) / math.log(0.95))  # 59: the largest run bounds P95 with 95 % confidence
RAW_FENCES = 1.5  # Tukey's usual k, on the raw scale
CLOCK_SAMPLE = 20_000
FINE_CLOCK = 1e-4  # of the median: ticks below it do not show
MOST_DISTINCT = 0.9  # share of distinct values that a coarse clock may leave
NAMED_KEYS = 3
SAMPLE_RUNS_PER_KEY = 1000
LEAST_RUNS = 30
LEAST_PER_KEY = 5  # fewer runs of a configuration are no line over length and no order
MOST_RUNS_PAIRED = 2000  # the Theil–Sen slope looks at all pairs
LEAST_STEPS_UNTIMED = 8  # shorter outputs that were not timed step by step are noise
CONSTANT = 1e-12  # range of log latencies that arithmetic alone makes

# stage → latency, length, and the runs that tell of it
_STAGES = {
    "prefill": ("prefill_ms", "prompt_tokens", "TRUE"),
    "decode step": (
        "decode_ms / (output_tokens - 1)",
        "prompt_tokens + output_tokens / 2.0",
        f"decode_ms > 0 AND output_tokens >= 2 AND (timed OR output_tokens > {LEAST_STEPS_UNTIMED})",
    ),
}
_TIMES = {
    "prefill": "SELECT prefill_ms AS value FROM accepted_runs",
    "decode step": "SELECT unnest(decode_steps_ms) AS value FROM accepted_runs WHERE timed",
    "decode_ms": "SELECT decode_ms AS value FROM accepted_runs WHERE NOT timed AND decode_ms > 0",
}


def check_rejected(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Runs that no build can use, by reason."""
    (total,) = records(connection, "SELECT count(*) AS n FROM runs")
    reasons = connection.execute(
        'SELECT reason, count(*) AS n, first(detail ORDER BY source_id, "row") FROM runs WHERE reason IS NOT NULL '
        "GROUP BY reason ORDER BY n DESC, reason"
    ).fetchall()
    rejected = sum(n for _, n, _ in reasons)
    share = rejected / total["n"]
    by_reason = {reason: {"n": n, "example": detail} for reason, n, detail in reasons}
    figures = {"n_runs": total["n"], "n_rejected": rejected, "share": share, "by_reason": by_reason}
    of_all = count(total["n"], "run")
    if not rejected:
        return Finding("rejected_runs", "ok", f"all of {of_all} are sound in structure", figures)
    named = "; ".join(f"{n:,} {reason}, such as: {detail}" for reason, n, detail in reasons[:NAMED_KEYS])
    more = f"; and {len(reasons) - NAMED_KEYS} reasons more" if len(reasons) > NAMED_KEYS else ""
    sentence = f"{rejected:,} of {of_all} ({percent(share)}) no build can use: {named}{more}"
    return Finding("rejected_runs", graded(share, 0.0, 0.01), sentence, figures)


def check_duplicates(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Runs that occur more than once."""
    (total,) = records(connection, "SELECT count(*) AS n FROM runs WHERE reason IS NULL")
    copies = connection.execute(
        "SELECT path, count(*) AS n FROM rejections JOIN source_files USING (source_id) WHERE reason = 'duplicate' "
        "GROUP BY path ORDER BY n DESC, path"
    ).fetchall()
    n = sum(held for _, held in copies)
    share = n / max(total["n"], 1)
    figures = {"n_runs": total["n"], "n_duplicates": n, "share": share, "by_source": dict(copies[:20])}
    of_all = count(total["n"], "run")
    if not n:
        return Finding("duplicates", "ok", f"none of {of_all} occurs twice", figures)
    sentence = (
        f"{n:,} of {of_all} ({percent(share)}) repeat others and count once, most of them in {copies[0][0]}: a run "
        "saved twice, or a merged file beside its parts"
    )
    return Finding("duplicates", graded(share, 0.0, 0.05), sentence, figures)


def check_outliers(connection: duckdb.DuckDBPyConnection, k: float, kept: int) -> Finding:
    """Outliers by the fences of a build, and what fences on the raw scale would have cut instead.

    `kept` runs lie beyond the fences and are too many to be outliers.
    """
    (figures,) = records(
        connection,
        f"""
        WITH sound AS (
            SELECT key_id, prefill_ms, rejections.detail
            FROM runs LEFT JOIN rejections USING (source_id, "row")
            WHERE rejections.reason IS NULL OR rejections.reason = 'outlier'
        ),
        quartiles AS (
            SELECT key_id, quantile_cont(prefill_ms, 0.25) AS q1, quantile_cont(prefill_ms, 0.75) AS q3
            FROM sound GROUP BY key_id
        ),
        judged AS (
            SELECT *, prefill_ms BETWEEN q1 - {RAW_FENCES} * (q3 - q1) AND q3 + {RAW_FENCES} * (q3 - q1) AS inside
            FROM sound JOIN quartiles USING (key_id)
        ),
        by_key AS (
            SELECT
                count(*) AS n,
                count(detail) AS n_outliers,
                count(*) FILTER (detail LIKE '% above %') AS n_slow,
                count(*) FILTER (detail NOT LIKE '% above %') AS n_fast,
                count(*) FILTER (NOT inside) AS n_cut,
                quantile_cont(prefill_ms, 0.95) FILTER (inside) / quantile_cont(prefill_ms, 0.95) - 1 AS change
            FROM judged GROUP BY key_id
        )
        SELECT
            coalesce(sum(n), 0) AS n_runs,
            coalesce(sum(n_outliers), 0) AS n_outliers,
            coalesce(sum(n_slow), 0) AS n_slow,
            coalesce(sum(n_fast), 0) AS n_fast,
            coalesce(sum(n_cut) / sum(n), 0) AS raw_fence_share,
            coalesce(median(change), 0) AS raw_fence_p95_change
        FROM by_key
        """,
    )
    n, outliers = figures["n_runs"], figures["n_outliers"]
    share = outliers / max(n, 1)
    figures |= {"share": share, "n_kept": kept, "k": k}
    found = (
        f"{outliers:,} of {count(n, 'run')} ({percent(share)}; {figures['n_slow']:,} slow, {figures['n_fast']:,} fast) "
        f"lie beyond the fences of a build ({k:g} interquartile ranges, log scale, at their prompt length)"
    )
    if kept:
        found += f"; {kept:,} more do, too many for outliers: a build keeps them, and P95 is theirs"
    found += f"; fences of {RAW_FENCES:g} on raw prefill would cut {percent(figures['raw_fence_share'])}"
    if figures["raw_fence_p95_change"] < 0:
        found += f" and with them {percent(-figures['raw_fence_p95_change'])} off P95"
    severity = graded((outliers + kept) / max(n, 1), 0.01, 0.05)
    advice = "" if severity == "ok" else ", look at what else ran on the machine"
    return Finding("outliers", severity, f"{found}{advice}", figures)


def check_trend(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Trend of prefill and decode step over the order of runs.

    Notes
    -----
    The order is that of start times, else of numeric sample ids, within a source, workload and configuration, else that
    of rows. Latencies are taken as logarithms, less the median of their configuration and a resistant line over length
    (Tukey, 1977).
    The trend is the Theil–Sen slope with its 95 % interval (P. K. Sen, JASA 63, 1968), beside Spearman's rank
    correlation.
    """
    figures: dict[str, Any] = {}
    told: list[str] = []
    worst = 0.0
    for stage, (value, length, condition) in _STAGES.items():
        runs = _in_order(connection, value, length, condition)
        if len(runs) < LEAST_RUNS or np.ptp(runs["position"]) == 0:
            continue
        figures[stage] = trend = _trend(runs)
        low, high = trend["change_low"], trend["change_high"]
        if low > 0 or high < 0:
            worst = max(worst, abs(trend["change"]))
        shown = f"{stage} {trend['change']:+.1%} ({low:+.1%} to {high:+.1%}, Spearman {trend['spearman']:+.2f})"
        told.append(shown.replace("%", " %").replace("-", "−"))
    if not told:
        return Finding("trend", "note", f"fewer than {LEAST_RUNS} runs in a known order: no trend can be seen", figures)
    severity = graded(worst, 0.02, 0.05)
    change = f"from the first to the last tenth of the runs: {'; '.join(told)}"
    if severity == "ok":
        return Finding("trend", severity, f"no trend to speak of {change}", figures)
    advice = "let the machine warm up and settle, and take the configurations in turn, in random order"
    return Finding("trend", severity, f"latencies move by {percent(worst)} {change}: {advice}", figures)


def check_thin_keys(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Configurations with too few runs for a P95 or for its upper bound."""
    keys = records(
        connection,
        f"""
        SELECT keys.* EXCLUDE (key_id), n, {RUNS_FOR_BOUND} - n AS runs_missing
        FROM keys JOIN (SELECT key_id, count(*) AS n FROM accepted_runs GROUP BY key_id) USING (key_id)
        ORDER BY n, key_id
        """,
    )
    thin = [key for key in keys if key["runs_missing"] > 0]
    missing, n_guessed = sum(key["runs_missing"] for key in thin), sum(key["n"] < RUNS_FOR_P95 for key in keys)
    figures = {
        "n_keys": len(keys),
        "n_below_59": len(thin),
        "n_below_20": n_guessed,
        "runs_missing": missing,
        "keys": thin,
    }
    if not keys:
        return Finding("thin_keys", "warning", "no configuration has a run that a build can use", figures)
    of_all = f"of {count(len(keys), 'configuration')}"
    if not thin:
        fewest = f"each {of_all} has the {RUNS_FOR_BOUND} runs that bound a P95; the fewest: {keys[0]['n']:,}"
        return Finding("thin_keys", "ok", fewest, figures)
    first = [(*key.values(),) for key in thin[:NAMED_KEYS]]
    named = ", ".join(f"{' '.join(map(str, key))} ({n:,}, {short} more)" for *key, n, short in first)
    more = f" and {len(thin) - NAMED_KEYS} more" if len(thin) > NAMED_KEYS else ""
    guess = f", and with fewer than {RUNS_FOR_P95}, as {n_guessed} of them, P95 is guesswork" if n_guessed else ""
    sentence = (
        f"{len(thin)} {of_all} {'has' if len(thin) == 1 else 'have'} too few runs for an upper bound of P95 "
        f"({RUNS_FOR_BOUND}){guess}: profile {named}{more}, {count(missing, 'run')} in all"
    )
    return Finding("thin_keys", "warning" if n_guessed else "note", sentence, figures)


def check_clock(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Ticks of the clock that are large beside what it times."""
    figures: dict[str, Any] = {}
    told: list[str] = []
    worst = 0.0
    for stage, times in _TIMES.items():
        sample = f"FROM ({times}) ORDER BY hash(value), value LIMIT {CLOCK_SAMPLE}"
        values = connection.execute(sample).df()["value"].to_numpy(np.float64)
        if len(values) < 2:
            continue
        middle, n_distinct = float(np.median(values)), len(np.unique(values))
        tick = _tick(values, middle)
        figures[stage] = {"n": len(values), "n_distinct": n_distinct, "p50_ms": middle, "tick_ms": tick}
        # Distinct values alone may be multiples of one time by chance, or because a step never varies.
        if tick is not None and n_distinct < MOST_DISTINCT * len(values):
            worst = max(worst, tick / middle)
            told.append(f"{stage} comes in steps of {brief_ms(tick)} ms, {percent(tick / middle)} of its median")
        elif n_distinct == 1 and len(values) >= RUNS_FOR_P95:
            worst = max(worst, 0.01)
            told.append(f"{stage} is {brief_ms(middle)} ms in all of {len(values):,} observations")
    severity = graded(worst, 0.01, 0.05)
    if severity == "ok":
        return Finding("clock", "ok", "the clock is fine enough: its steps are below 1 % of what it times", figures)
    sentence = f"{'; '.join(told)}: time with a finer clock, and store it unrounded"
    return Finding("clock", severity, sentence, figures)


def _tick(values: NDArray[np.float64], middle: float) -> float | None:
    """The step that all values are multiples of; None where there is none that shows."""
    distinct = np.unique(values)
    gaps = np.diff(distinct)
    gaps = gaps[gaps > 1e-9 * middle]  # sums of rounded times differ in their last bits
    if not len(gaps) or gaps.min() < FINE_CLOCK * middle:
        return None
    multiples = distinct / gaps.min()
    return float(gaps.min()) if np.mean(np.abs(multiples - np.round(multiples)) < 0.02) >= 0.99 else None


def _in_order(connection: duckdb.DuckDBPyConnection, value: str, length: str, condition: str) -> pd.DataFrame:
    """``position`` in the order, in (0, 1), and log latency ``y`` less what configuration and length explain."""
    runs = connection.execute(
        f"""
        WITH ordered AS (
            SELECT
                key_id, run_hash, source_id, "row", workload,
                CAST({length} AS DOUBLE) AS length,
                ln({value}) AS y,
                count(*) OVER sequence AS n,
                CASE
                    WHEN count(started_ms) OVER sequence = count(*) OVER sequence THEN started_ms
                    WHEN count(TRY_CAST(sample_id AS DOUBLE)) OVER sequence = count(*) OVER sequence
                    THEN TRY_CAST(sample_id AS DOUBLE) ELSE "row"
                END AS place
            FROM accepted_runs
            WHERE {condition}
            WINDOW sequence AS (PARTITION BY source_id, workload, key_id)
        ),
        placed AS (
            SELECT *, CAST((row_number() OVER sequence - 0.5) / n AS DOUBLE) AS position
            FROM ordered
            WHERE n >= {LEAST_PER_KEY}
            WINDOW sequence AS (PARTITION BY source_id, workload, key_id ORDER BY place, "row")
        )
        SELECT key_id, position, length, y
        FROM placed
        QUALIFY row_number() OVER (PARTITION BY key_id ORDER BY run_hash, source_id, "row") <= {SAMPLE_RUNS_PER_KEY}
        ORDER BY run_hash, source_id, "row"
        """
    ).df()
    for _, of_key in runs.groupby("key_id"):
        straight = of_key["y"] - _slope(of_key.sort_values("length", kind="stable")) * of_key["length"]
        runs.loc[of_key.index, "y"] = straight - straight.median()
    return runs


def _slope(runs: pd.DataFrame) -> float:
    """Of the line through the medians of the shortest and of the longest third."""
    third = len(runs) // 3
    if not third:
        return 0.0
    run, rise = (runs[name][-third:].median() - runs[name][:third].median() for name in ("length", "y"))
    return float(rise / run) if run > 0 else 0.0


def _trend(runs: pd.DataFrame) -> dict[str, Any]:
    position, residual = runs["position"].to_numpy(), runs["y"].to_numpy()
    every = np.linspace(0, len(runs) - 1, min(len(runs), MOST_RUNS_PAIRED)).astype(int)  # rows stand in hash order
    slope = low = high = spearman = 0.0
    if np.ptp(residual) >= CONSTANT:
        slope, _, low, high = stats.theilslopes(residual[every], position[every], alpha=0.95)
        spearman = float(stats.spearmanr(position, residual).statistic)
    tenth = np.minimum((position * 10).astype(int), 9)
    medians = np.expm1(runs["y"].groupby(tenth).median()).reindex(range(10))
    # from the middle of the first tenth to the middle of the last
    change, change_low, change_high = (float(np.expm1(0.9 * value)) for value in (slope, low, high))
    return {
        "n_runs": len(runs),
        "change": change,
        "change_low": change_low,
        "change_high": change_high,
        "spearman": spearman,
        "by_tenth": plain(medians.tolist()),
    }
