"""Checks of runs one by one and of their number: rejects, duplicates, outliers, thin configurations, coarse clocks."""

from __future__ import annotations

import math
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from lutest.judging.finding import Finding, brief_ms, count, graded, percent

__all__ = ["check_clock", "check_duplicates", "check_outliers", "check_rejected", "check_thin_keys"]

RUNS_FOR_P95 = 20  # below, P95 is the largest run or lies beyond it
RUNS_FOR_BOUND = math.ceil(math.log(0.05) / math.log(0.95))  # 59: the largest run bounds P95 with 95 % confidence
RAW_FENCES = 1.5  # Tukey's usual k, on the raw scale
CLOCK_SAMPLE = 20_000
FINE_CLOCK = 1e-4  # of the median: ticks below it do not show
MOST_DISTINCT = 0.9  # share of distinct values that a coarse clock may leave
NAMED_KEYS = 3


def check_rejected(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Runs that no build can use, by reason."""
    total = _count(connection, "SELECT count(*) FROM runs")
    reasons = connection.execute(
        'SELECT reason, count(*) AS n, first(detail ORDER BY source_id, "row") FROM runs WHERE reason IS NOT NULL '
        "GROUP BY reason ORDER BY n DESC, reason"
    ).fetchall()
    rejected = sum(n for _, n, _ in reasons)
    figures: dict[str, Any] = {
        "n_runs": total,
        "n_rejected": rejected,
        "share": rejected / total if total else None,
        "by_reason": {reason: {"n": n, "example": detail} for reason, n, detail in reasons},
    }
    if not rejected:
        return Finding("rejected_runs", "ok", f"all of {count(total, 'run')} are sound in structure", figures)
    named = "; ".join(f"{n:,} {reason}, such as: {detail}" for reason, n, detail in reasons[:NAMED_KEYS])
    more = f"; and {len(reasons) - NAMED_KEYS} reasons more" if len(reasons) > NAMED_KEYS else ""
    sentence = f"{rejected:,} of {count(total, 'run')} ({percent(rejected / total)}) no build can use: {named}{more}"
    return Finding("rejected_runs", graded(rejected / total, 0.0, 0.01), sentence, figures)


def check_duplicates(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Runs that occur more than once."""
    total = _count(connection, "SELECT count(*) FROM runs WHERE reason IS NULL")
    copies = connection.execute(
        "SELECT path, count(*) AS n FROM rejections JOIN source_files USING (source_id) WHERE reason = 'duplicate' "
        "GROUP BY path ORDER BY n DESC, path"
    ).fetchall()
    n = sum(held for _, held in copies)
    share = n / total if total else 0.0
    figures = {"n_runs": total, "n_duplicates": n, "share": share, "by_source": dict(copies[:20])}
    if not n:
        return Finding("duplicates", "ok", f"none of {count(total, 'run')} occurs twice", figures)
    sentence = (
        f"{n:,} of {count(total, 'run')} ({percent(share)}) repeat others and count once, most of them in "
        f"{copies[0][0]}: a run saved twice, or a merged file beside its parts"
    )
    return Finding("duplicates", graded(share, 0.0, 0.05), sentence, figures)


def check_outliers(connection: duckdb.DuckDBPyConnection, k: float, kept: int) -> Finding:
    """Outliers by the fences of a build, and what fences on the raw scale would have cut instead.

    `kept` runs lie beyond the fences and are too many to be outliers.
    """
    row = connection.execute(
        """
        SELECT
            count(*) FILTER (rejections.reason IS NULL OR rejections.reason = 'outlier'),
            count(*) FILTER (rejections.reason = 'outlier'),
            count(*) FILTER (rejections.reason = 'outlier' AND detail LIKE '% above %')
        FROM (SELECT source_id, "row" FROM runs) LEFT JOIN rejections USING (source_id, "row")
        """
    ).fetchone()
    assert row is not None
    n, outliers, slow = map(int, row)
    share = outliers / n if n else 0.0
    raw_share, p95_change = _raw_fences(connection)
    figures = {
        "n_runs": n,
        "n_outliers": outliers,
        "n_slow": slow,
        "n_fast": outliers - slow,
        "share": share,
        "n_kept": kept,
        "k": k,
        "raw_fence_share": raw_share,
        "raw_fence_p95_change": p95_change,
    }
    found = (
        f"{outliers:,} of {count(n, 'run')} ({percent(share)}; {slow:,} slow, {outliers - slow:,} fast) lie beyond the "
        f"fences of a build ({k:g} interquartile ranges, log scale, at their prompt length)"
    )
    raw = f"fences of {RAW_FENCES:g} on raw prefill would cut {percent(raw_share)}" + (
        f" and with them {percent(-p95_change)} off P95" if p95_change < 0 else ""
    )
    if kept:
        found += f"; {kept:,} more do, too many for outliers: a build keeps them, and P95 is theirs"
    severity = graded((outliers + kept) / n if n else 0.0, 0.01, 0.05)
    advice = "" if severity == "ok" else ", look at what else ran on the machine"
    return Finding("outliers", severity, f"{found}; {raw}{advice}", figures)


def check_thin_keys(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Configurations with too few runs for a P95 or for its upper bound."""
    found = connection.execute(
        "SELECT n, keys.* EXCLUDE (key_id) FROM keys JOIN "
        "(SELECT key_id, count(*) AS n FROM accepted_runs GROUP BY key_id) USING (key_id) ORDER BY n, key_id"
    )
    names = [column[0] for column in found.description or ()][1:]
    rows = found.fetchall()
    thin = [row for row in rows if row[0] < RUNS_FOR_BOUND]
    guessed = [row for row in rows if row[0] < RUNS_FOR_P95]
    missing = sum(RUNS_FOR_BOUND - row[0] for row in thin)
    figures = {
        "n_keys": len(rows),
        "n_below_59": len(thin),
        "n_below_20": len(guessed),
        "runs_missing": missing,
        "keys": [
            {**dict(zip(names, key, strict=True)), "n": n, "runs_missing": RUNS_FOR_BOUND - n} for n, *key in thin
        ],
    }
    if not rows:
        return Finding("thin_keys", "warning", "no configuration has a run that a build can use", figures)
    of_all = f"of {count(len(rows), 'configuration')}"
    if not thin:
        return Finding(
            "thin_keys",
            "ok",
            f"each {of_all} has the {RUNS_FOR_BOUND} runs that bound a P95; the fewest: {rows[0][0]:,}",
            figures,
        )
    named = ", ".join(f"{' '.join(map(str, key))} ({n:,}, {RUNS_FOR_BOUND - n} more)" for n, *key in thin[:NAMED_KEYS])
    more = f" and {len(thin) - NAMED_KEYS} more" if len(thin) > NAMED_KEYS else ""
    guess = f", and with fewer than {RUNS_FOR_P95}, as {len(guessed)} of them, P95 is guesswork" if guessed else ""
    verb = "has" if len(thin) == 1 else "have"
    sentence = (
        f"{len(thin)} {of_all} {verb} too few runs for an upper bound of P95 ({RUNS_FOR_BOUND}){guess}: profile {named}"
        f"{more}, {count(missing, 'run')} in all"
    )
    return Finding("thin_keys", "warning" if guessed else "note", sentence, figures)


def check_clock(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Ticks of the clock that are large beside what it times."""
    figures: dict[str, Any] = {}
    told: list[str] = []
    worst = 0.0
    for stage, relation, value in (
        ("prefill", "accepted_runs", "prefill_ms"),
        ("decode step", "(SELECT unnest(decode_steps_ms) AS step_ms FROM accepted_runs WHERE timed)", "step_ms"),
        ("decode_ms", "(SELECT decode_ms FROM accepted_runs WHERE NOT timed AND decode_ms > 0)", "decode_ms"),
    ):
        found = connection.execute(
            f"SELECT {value} AS value FROM {relation} ORDER BY hash({value}), {value} LIMIT {CLOCK_SAMPLE}"
        ).fetchnumpy()["value"]
        values = np.asarray(found, dtype=np.float64)
        if len(values) < 2:
            continue
        middle, n_distinct = float(np.median(values)), len(np.unique(values))
        tick = _tick(values, middle)
        figures[stage] = {"n": len(values), "n_distinct": n_distinct, "p50_ms": middle, "tick_ms": tick}
        # Distinct values alone may be multiples of one time by chance, or because a step never varies.
        if tick is not None and middle > 0 and n_distinct < MOST_DISTINCT * len(values):
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


def _raw_fences(connection: duckdb.DuckDBPyConnection) -> tuple[float, float]:
    """Share of runs beyond 1.5 raw interquartile ranges of prefill, and the median change of P95 without them."""
    row = connection.execute(
        f"""
        WITH sound AS (
            SELECT key_id, prefill_ms
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
                count(*) FILTER (NOT inside) AS n_cut,
                quantile_cont(prefill_ms, 0.95) FILTER (inside) / quantile_cont(prefill_ms, 0.95) - 1 AS change
            FROM judged GROUP BY key_id
        )
        SELECT coalesce(sum(n_cut) / sum(n), 0), coalesce(median(change), 0) FROM by_key
        """
    ).fetchone()
    assert row is not None
    return float(row[0]), float(row[1])


def _tick(values: NDArray[np.float64], middle: float) -> float | None:
    """The step that all values are multiples of; None where there is none that shows."""
    distinct = np.unique(values)
    gaps = np.diff(distinct)
    gaps = gaps[gaps > 1e-9 * max(middle, 1e-300)]  # sums of rounded times differ in their last bits
    if not len(gaps):
        return None
    tick = float(gaps.min())
    if middle > 0 and tick < FINE_CLOCK * middle:
        return None
    multiples = distinct / tick
    return tick if float(np.mean(np.abs(multiples - np.round(multiples)) < 0.02)) >= 0.99 else None


def _count(connection: duckdb.DuckDBPyConnection, query: str) -> int:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])
