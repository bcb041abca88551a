"""What timing the stages in separate passes does to runs: clamped zeros, noisy short outputs, unaccounted time."""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np

from lutest.judging.finding import Finding, brief_ms, graded, percent
from lutest.judging.step_regression import BANDS, StepFit, StepSample, group_median

__all__ = ["check_clamped", "check_short_outputs", "check_unaccounted_time"]

ROUNDING_MS = 2e-4  # three stages stored to 0.1 µs each
EXACT = 1e-6  # of the total: what the arithmetic of single precision and more leaves
NEGATIVE = 1e-5  # of the total: below minus this, stages overlap
NOISY_SHORT_OUTPUT = 0.1  # typical error of a step at the shortest outputs that is worth a word


def check_clamped(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Zeros of decode_ms in runs that have decode steps, and in one-token runs that were not timed step by step."""
    row = connection.execute(
        """
        SELECT
            count(*) FILTER (output_tokens >= 2),
            count(*) FILTER (clamped),
            count(*) FILTER (output_tokens = 2),
            count(*) FILTER (clamped AND output_tokens = 2),
            count(*) FILTER (output_tokens = 1),
            count(*) FILTER (output_tokens = 1 AND decode_ms = 0)
        FROM accepted_runs
        """
    ).fetchone()
    assert row is not None
    n, clamped, n_two, clamped_two, n_one, zero_one = map(int, row)
    figures: dict[str, Any] = {
        "n_runs": n,
        "n_clamped": clamped,
        "share": clamped / n if n else None,
        "share_at_2_tokens": clamped_two / n_two if n_two else None,
        "n_one_token": n_one,
        "share_zero_one_token": zero_one / n_one if n_one else None,
    }
    one_token = f"; of {n_one:,} one-token runs, rightly zero, {percent(zero_one / n_one)} are" if n_one else ""
    if not clamped:
        return Finding(
            "clamped", "ok", f"none of {n:,} runs of two tokens or more has a decode time of zero{one_token}", figures
        )
    at_two = f", {percent(clamped_two / n_two)} of those with two" if clamped_two else ""
    sentence = (
        f"{clamped:,} of {n:,} runs of two tokens or more ({percent(clamped / n)}{at_two}) have decode_ms clamped at "
        "zero: keep them, a build takes them as censored from below, and without them decode comes out too slow; "
        f"better, time every decode step{one_token}"
    )
    return Finding("clamped", graded(clamped / n, 0.0, 0.01), sentence, figures)


def check_short_outputs(connection: duckdb.DuckDBPyConnection, sample: StepSample, fit: StepFit | None) -> Finding:
    """The error of time per step at short and long outputs, and the offset that is no step's."""
    if fit is None:
        return Finding("subtraction", "note", "too few decode times to say how exact they are", {})
    relative = sample.decode_ms / (sample.output_tokens - 1) / fit.level_ms[sample.key]
    held = np.isfinite(relative)
    relative, band = relative[held], sample.band[held]
    middle = group_median(relative, band, len(BANDS))
    spread = group_median(np.abs(relative - middle[band]), band, len(BANDS))
    errors = {name: float(value) for name, value in zip(BANDS, spread, strict=True) if np.isfinite(value)}
    untimed = float(np.mean(~sample.timed[held]))
    figures: dict[str, Any] = {"typical_error_of_step": errors, "share_untimed": untimed}
    offset = ""
    if untimed:
        offsets = fit.offset_ms[np.isfinite(fit.offset_ms)]
        if len(offsets):
            low, median, high = map(float, np.quantile(offsets, [0.0, 0.5, 1.0]))
            figures["offset_ms"] = {"min": low, "p50": median, "max": high}
            offset = f", and runs carry an offset of {brief_ms(low)} to {brief_ms(high)} ms that belongs to no step"
        one_token = _one_token_runs(connection)
        if one_token is not None:
            figures["one_token_decode_ms"] = one_token
            if one_token["p95"] > 0:
                offset += f" (one-token runs, which have no decode, show up to {brief_ms(one_token['p95'])} ms, P95)"
    first, last = next(iter(errors.items())), next(reversed(errors.items()))
    span = f"{percent(first[1])} of a step at {first[0]} tokens"
    if first != last:
        span += f" and {percent(last[1])} at {last[0]}"
    noisy = untimed > 0 and first[1] >= NOISY_SHORT_OUTPUT and first[1] >= 2 * last[1]
    figures["first"], figures["last"] = first[1], last[1]
    if noisy:
        sentence = (
            f"decode_ms was not timed step by step in {percent(untimed)} of runs, and its typical error is {span}"
            f"{offset}: short outputs say little, time every decode step within one run"
        )
        return Finding("subtraction", "warning", sentence, figures)
    how = "steps were timed one by one" if untimed == 0 else "short outputs are about as exact as long ones"
    return Finding("subtraction", "ok", f"{how}: the typical deviation of a run's time per step is {span}", figures)


def check_unaccounted_time(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Time that no stage accounts for: total_ms less prefill_ms and decode_ms."""
    row = connection.execute(
        f"""
        WITH remainders AS (
            SELECT total_ms - prefill_ms - decode_ms AS remainder_ms, total_ms, timed
            FROM accepted_runs
            WHERE total_given AND NOT clamped AND total_ms > 0 AND (output_tokens >= 2 OR decode_ms > 0 OR timed)
        )
        SELECT
            count(*),
            quantile_cont(remainder_ms, 0.5),
            quantile_cont(remainder_ms, 0.95),
            quantile_cont(remainder_ms / total_ms, 0.5),
            avg(CAST(remainder_ms < -{NEGATIVE} * total_ms - {ROUNDING_MS} AS INTEGER)),
            avg(CAST(abs(remainder_ms) <= {EXACT} * total_ms + {ROUNDING_MS} AS INTEGER)) FILTER (NOT timed),
            count(*) FILTER (NOT timed)
        FROM remainders
        """
    ).fetchone()
    assert row is not None
    n, median, p95, share, negative, exact, n_untimed = row
    if not n:
        return Finding(
            "unaccounted_time",
            "note",
            "the runs give no total of their own, so time that no stage accounts for cannot be seen: record total_ms",
            {"n_runs": 0},
        )
    figures = {"n_runs": n, "p50_ms": median, "p95_ms": p95, "share_of_total": share, "share_negative": negative}
    if n_untimed == n and exact >= 0.99:
        return Finding(
            "unaccounted_time",
            "note",
            f"totals are exactly prefill + decode in {percent(exact)} of runs: decode_ms was made by subtraction, and "
            "holds whatever time no stage accounts for",
            figures,
        )
    amount = f"{brief_ms(median)} ms at P50 and {brief_ms(p95)} ms at P95, {percent(share)} of the total"
    if negative >= 0.01:
        return Finding(
            "unaccounted_time",
            "warning",
            f"in {percent(negative)} of runs the stages add up to more than the total: they overlap, or were timed in "
            f"separate passes; time them within one run (total less stages: {amount})",
            figures,
        )
    severity = graded(share, 0.01, 0.05)
    advice = "" if severity == "ok" else ": find out what runs between the stages, for no figure of the table holds it"
    return Finding("unaccounted_time", severity, f"no stage accounts for {amount}{advice}", figures)


def _one_token_runs(connection: duckdb.DuckDBPyConnection) -> dict[str, float] | None:
    row = connection.execute(
        "SELECT count(*), quantile_cont(decode_ms, [0.5, 0.95]) FROM accepted_runs "
        "WHERE output_tokens = 1 AND NOT timed"
    ).fetchone()
    if row is None or not row[0]:
        return None
    return {"n": row[0], "p50": row[1][0], "p95": row[1][1]}
