"""What decode_ms holds: n or n - 1 steps, growth with KV length, and what timing stages in separate passes leaves."""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
import pandas as pd

from lutest.judging.finding import Finding, Severity, brief_ms, graded, percent
from lutest.judging.step_regression import StepFit
from lutest.reader.names import quote
from lutest.runs.sources.run_rows import field_column
from lutest.tablefile.description import records

PER_TOKEN_FIELDS = ("T_decode_per_token", "decode_per_token_ms")
NEAR_WHOLE = 0.3  # steps: an offset this close to 0 or 1 step is taken for it
APPARENT = 0.1  # growth over output lengths worth a word
FLAT = 0.05  # growth over output lengths that is none
NOTED_GROWTH = 0.01  # per 100 tokens of KV length
LONGEST_FOR_FIELD = 50  # tokens: beyond them n and n - 1 are too close to tell apart in a rounded field
_FIELD_TOLERANCE = 0.005
ROUNDING_MS = 2e-4  # three stages stored to 0.1 µs each
EXACT = 1e-6  # of the total: what the arithmetic of single precision and more leaves
NEGATIVE = 1e-5  # of the total: below minus this, stages overlap
NOISY_SHORT_OUTPUT = 0.1  # typical error of a step at the shortest outputs that is worth a word


def check_fencepost(sample: pd.DataFrame, fit: StepFit | None) -> Finding:
    """Say which denominator fits: n - 1 as it should be, n, or neither.

    Parameters
    ----------
    sample : DataFrame
        Accepted runs of two tokens or more, as `read_step_sample` gives them.
    fit : StepFit or None
        The regression on them.
    """
    if fit is None:
        sentence = (
            "too few runs of two tokens or more with a decode time to tell which denominator fits, n or n − 1: "
            "profile longer outputs"
        )
        return Finding("fencepost", "note", sentence, {"n_runs": len(sample), "denominator": None})
    over_n, over_steps = _by_band(sample, fit, 0), _by_band(sample, fit, 1)
    apparent, step, denominator = _growth(over_n), fit.step_ms, _denominator(fit)
    figures: dict[str, Any] = {
        "n_runs": len(sample),
        "step_ms": step,
        "extra_steps": fit.extra_steps,
        "extra_steps_low": fit.extra_steps_interval[0],
        "extra_steps_high": fit.extra_steps_interval[1],
        "correlation_over_n": _correlation(sample, fit, 0),
        "correlation_over_n_minus_1": _correlation(sample, fit, 1),
        "growth_over_n": apparent,
        "growth_over_n_minus_1": _growth(over_steps),
        "ms_over_n": over_n,
        "ms_over_n_minus_1": over_steps,
        "denominator": denominator,
    }
    severity: Severity = "note"
    extra = "{:.2f} ({:.2f} to {:.2f}) steps".format(fit.extra_steps, *fit.extra_steps_interval).replace("-", "−")
    if not np.isfinite(fit.extra_steps):
        sentence = (
            "within each configuration all runs have the same number of output tokens, so which denominator fits, n or "
            "n − 1, cannot be told: profile several output lengths"
        )
    elif denominator == "n - 1" and apparent < APPARENT:
        severity = "ok"
        sentence = (
            f"n − 1 fits: decode_ms holds the time of n − 1 steps ({extra} more), and over these output lengths "
            "the fencepost hardly shows"
        )
    elif denominator == "n - 1":
        correlation, left = _signed(figures["correlation_over_n"]), _signed(figures["correlation_over_n_minus_1"])
        listed = f"{' / '.join(map(brief_ms, over_n.values()))} ms at {' / '.join(over_n)}"
        sentence = (
            f"the apparent KV-cache growth of {percent(apparent)} ({listed} tokens, correlation with n {correlation}) "
            f"that decode_ms / n shows is the fencepost, not the KV cache: n − 1 fits, {_steps_are(over_steps, step)} "
            f"(correlation {left}); a run of n tokens has n − 1 decode steps, so divide by n − 1"
        )
    elif denominator == "n":
        severity = "warning"
        sentence = (
            f"decode_ms holds n steps where a run of n tokens has n − 1 ({extra} more): decode_ms / n is "
            f"{_flat_or_range(over_n)}, decode_ms / (n − 1) falls from {_ends(over_steps)}; the step behind the "
            "first token was timed as decode, or output_tokens leaves out the end of sequence: correct it before "
            "building, for a table counts n − 1 steps"
        )
    elif denominator is None:
        sentence = (
            f"whether decode_ms holds n − 1 steps or n cannot be told ({extra} more than n − 1): profile more runs, "
            "short and long"
        )
    else:
        severity = "warning"
        sentence = (
            f"neither n nor n − 1 fits: a run holds the time of {extra} more than its n − 1, "
            f"{brief_ms(fit.extra_steps * step)} ms whatever its length: look for an offset between timing passes, or "
            "a first step that is unlike the others"
        )
    return Finding("fencepost", severity, sentence, figures)


def check_kv_growth(fit: StepFit | None) -> Finding:
    """Say how much a step grows with KV length once the fencepost is out."""
    if fit is None or not np.isfinite(fit.growth):
        sentence = "whether a step grows with KV length cannot be told: prompt and output lengths vary too little"
        return Finding("kv_growth", "note", sentence, {"growth_per_100_tokens": None})
    growth, low, high = (100 * value for value in (fit.growth, *fit.growth_interval))
    figures = {
        "growth_per_100_tokens": growth,
        "growth_per_100_tokens_low": low,
        "growth_per_100_tokens_high": high,
        "step_ms": fit.step_ms,
    }
    figure = f"{percent(growth)} of the step per 100 tokens (95 % interval {percent(low)} to {percent(high)})"
    at = f"{figure} at {brief_ms(fit.step_ms)} ms"
    if low <= 0 <= high or max(abs(low), abs(high)) < 1e-6:
        sentence = f"after dividing by n − 1 no growth of the step with KV length is to be seen: {at}"
        return Finding("kv_growth", "ok", sentence, figures)
    sentence = f"after dividing by n − 1 the step {'grows' if growth > 0 else 'falls'} with KV length by {at}"
    if abs(growth) < NOTED_GROWTH:
        return Finding("kv_growth", "ok", sentence, figures)
    advice = "take it at its KV length (decode_step_ms), not one figure per configuration"
    return Finding("kv_growth", "note", f"{sentence}: {advice}", figures)


def check_per_token_fields(connection: duckdb.DuckDBPyConnection, milliseconds: float) -> list[Finding]:
    """Say by what a stored time per token was divided; no finding where no run has such a field.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``raw_runs``, with what runs have of `PER_TOKEN_FIELDS`, and ``accepted_runs``.
    milliseconds : float
        Milliseconds in one unit of the sources' times.
    """
    findings = []
    for name in PER_TOKEN_FIELDS:
        (figures,) = records(
            connection,
            f"""
            WITH stored AS (
                SELECT TRY_CAST({quote(field_column(name))} AS DOUBLE) * {milliseconds!r} AS per_token,
                    decode_ms, output_tokens AS n
                FROM accepted_runs JOIN raw_runs USING (source_id, "row")
                WHERE output_tokens BETWEEN 2 AND {LONGEST_FOR_FIELD} AND decode_ms > 0
            )
            SELECT
                '{name}' AS field,
                count(per_token) AS n_runs,
                avg(CAST(abs(per_token * n / decode_ms - 1) < {_FIELD_TOLERANCE} AS INTEGER)) AS share_over_n,
                avg(CAST(abs(per_token * (n - 1) / decode_ms - 1) < {_FIELD_TOLERANCE} AS INTEGER))
                    AS share_over_n_minus_1
            FROM stored
            """,
        )
        if not figures["n_runs"]:
            continue
        over_n, over_steps = figures["share_over_n"], figures["share_over_n_minus_1"]
        severity: Severity = "note"
        sentence = f"{name} is neither decode_ms / n nor decode_ms / (n − 1): do not use it without knowing what it is"
        if over_n > over_steps and over_n >= 0.5:
            severity = "warning"
            sentence = (
                f"{name} is decode_ms / n in {percent(over_n)} of runs, the fencepost error: a run of n tokens has "
                "n − 1 decode steps; do not use the field, divide decode_ms by n − 1"
            )
        elif over_steps >= 0.5:
            severity = "ok"
            sentence = f"{name} is decode_ms / (n − 1) in {percent(over_steps)} of runs, as it should be"
        findings.append(Finding("per_token_field", severity, sentence, figures))
    return findings


def check_clamped(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Zeros of decode_ms in runs that have decode steps, and in one-token runs that were not timed step by step."""
    (figures,) = records(
        connection,
        """
        SELECT
            count(*) FILTER (output_tokens >= 2) AS n_runs,
            count(*) FILTER (clamped) AS n_clamped,
            avg(CAST(clamped AS INTEGER)) FILTER (output_tokens >= 2) AS share,
            avg(CAST(clamped AS INTEGER)) FILTER (output_tokens = 2) AS share_at_2_tokens,
            count(*) FILTER (output_tokens = 1) AS n_one_token,
            avg(CAST(decode_ms = 0 AS INTEGER)) FILTER (output_tokens = 1) AS share_zero_one_token
        FROM accepted_runs
        """,
    )
    n, one_token = figures["n_runs"], ""
    if figures["n_one_token"]:
        zeros = percent(figures["share_zero_one_token"])
        one_token = f"; of {figures['n_one_token']:,} one-token runs, rightly zero, {zeros} are"
    if not figures["n_clamped"]:
        sentence = f"none of {n:,} runs of two tokens or more has a decode time of zero{one_token}"
        return Finding("clamped", "ok", sentence, figures)
    at_two = f", {percent(figures['share_at_2_tokens'])} of those with two" if figures["share_at_2_tokens"] else ""
    sentence = (
        f"{figures['n_clamped']:,} of {n:,} runs of two tokens or more ({percent(figures['share'])}{at_two}) have "
        "decode_ms clamped at zero: keep them, a build takes them as censored from below, and without them decode "
        f"comes out too slow; better, time every decode step{one_token}"
    )
    return Finding("clamped", graded(figures["share"], 0.0, 0.01), sentence, figures)


def check_short_outputs(connection: duckdb.DuckDBPyConnection, sample: pd.DataFrame, fit: StepFit | None) -> Finding:
    """The error of time per step at short and long outputs, and the offset that is no step's."""
    if fit is None:
        return Finding("subtraction", "note", "too few decode times to say how exact they are", {})
    relative = _relative(sample, fit, 1).dropna()
    by_band = relative.groupby(sample["band"], observed=True)
    spread = (relative - by_band.transform("median")).abs().groupby(sample["band"], observed=True).median()
    untimed = float((~sample["timed"][relative.index]).mean())
    first, last = float(spread.iloc[0]), float(spread.iloc[-1])
    figures = {"typical_error_of_step": spread.to_dict(), "share_untimed": untimed, "first": first, "last": last}
    offset = ""
    if untimed and len(fit.offset_ms):
        low, median, high = map(float, fit.offset_ms.quantile([0.0, 0.5, 1.0]))
        figures["offset_ms"] = {"min": low, "p50": median, "max": high}
        offset = f", and runs carry an offset of {brief_ms(low)} to {brief_ms(high)} ms that belongs to no step"
    (one_token,) = records(
        connection,
        "SELECT count(*) AS n, quantile_cont(decode_ms, 0.5) AS p50, quantile_cont(decode_ms, 0.95) AS p95 "
        "FROM accepted_runs WHERE output_tokens = 1 AND NOT timed",
    )
    if untimed and one_token["n"]:
        figures["one_token_decode_ms"] = one_token
        if one_token["p95"] > 0:
            offset += f" (one-token runs, which have no decode, show up to {brief_ms(one_token['p95'])} ms, P95)"
    span = f"{percent(first)} of a step at {spread.index[0]} tokens"
    if len(spread) > 1:
        span += f" and {percent(last)} at {spread.index[-1]}"
    if untimed and first >= NOISY_SHORT_OUTPUT and first >= 2 * last:
        sentence = (
            f"decode_ms was not timed step by step in {percent(untimed)} of runs, and its typical error is {span}"
            f"{offset}: short outputs say little, time every decode step within one run"
        )
        return Finding("subtraction", "warning", sentence, figures)
    how = "short outputs are about as exact as long ones" if untimed else "steps were timed one by one"
    return Finding("subtraction", "ok", f"{how}: the typical deviation of a run's time per step is {span}", figures)


def check_unaccounted_time(connection: duckdb.DuckDBPyConnection) -> Finding:
    """Time that no stage accounts for: total_ms less prefill_ms and decode_ms."""
    (figures,) = records(
        connection,
        f"""
        SELECT
            count(*) AS n_runs,
            quantile_cont(remainder_ms, 0.5) AS p50_ms,
            quantile_cont(remainder_ms, 0.95) AS p95_ms,
            quantile_cont(remainder_ms / total_ms, 0.5) AS share_of_total,
            avg(CAST(remainder_ms < -{NEGATIVE} * total_ms - {ROUNDING_MS} AS INTEGER)) AS share_negative,
            avg(CAST(abs(remainder_ms) <= {EXACT} * total_ms + {ROUNDING_MS} AND NOT timed AS INTEGER)) AS share_exact
        FROM (SELECT *, total_ms - prefill_ms - decode_ms AS remainder_ms FROM accepted_runs)
        WHERE total_given AND NOT clamped AND total_ms > 0 AND (output_tokens >= 2 OR decode_ms > 0 OR timed)
        """,
    )
    if not figures["n_runs"]:
        sentence = (
            "the runs give no total of their own, so time that no stage accounts for cannot be seen: record total_ms"
        )
        return Finding("unaccounted_time", "note", sentence, figures)
    if figures["share_exact"] >= 0.99:
        sentence = (
            f"totals are exactly prefill + decode in {percent(figures['share_exact'])} of runs: decode_ms was made by "
            "subtraction, and holds whatever time no stage accounts for"
        )
        return Finding("unaccounted_time", "note", sentence, figures)
    p50, p95, share = brief_ms(figures["p50_ms"]), brief_ms(figures["p95_ms"]), figures["share_of_total"]
    amount = f"{p50} ms at P50 and {p95} ms at P95, {percent(share)} of the total"
    if figures["share_negative"] >= 0.01:
        sentence = (
            f"in {percent(figures['share_negative'])} of runs the stages add up to more than the total: they overlap, "
            f"or were timed in separate passes; time them within one run (total less stages: {amount})"
        )
        return Finding("unaccounted_time", "warning", sentence, figures)
    severity = graded(share, 0.01, 0.05)
    advice = "" if severity == "ok" else ": find out what runs between the stages, for no figure of the table holds it"
    return Finding("unaccounted_time", severity, f"no stage accounts for {amount}{advice}", figures)


def _denominator(fit: StepFit) -> str | None:
    low, high = fit.extra_steps_interval
    if not (np.isfinite(low) and np.isfinite(high)) or (low <= 0 and high >= 1):
        return None
    if abs(fit.extra_steps) <= NEAR_WHOLE or low <= 0 <= high:
        return "n - 1"
    if abs(fit.extra_steps - 1) <= NEAR_WHOLE or low <= 1 <= high:
        return "n"
    return "neither"


def _relative(sample: pd.DataFrame, fit: StepFit, less: int) -> pd.Series:
    """decode_ms / (n - less) in steps of its configuration."""
    return sample["decode_ms"] / (sample["output_tokens"] - less) / sample["key_id"].map(fit.level_ms)


def _by_band(sample: pd.DataFrame, fit: StepFit, less: int) -> dict[str, float]:
    """Median time per token by band of output lengths, in ms of the middle configuration."""
    medians = _relative(sample, fit, less).groupby(sample["band"], observed=True).median() * fit.step_ms
    return dict(medians.dropna())


def _correlation(sample: pd.DataFrame, fit: StepFit, less: int) -> float:
    """Pearson's, within configurations; 0 where the time per token does not vary."""
    pair = pd.DataFrame({"relative": _relative(sample, fit, less), "n": sample["output_tokens"]}).dropna()
    pair -= pair.groupby(sample["key_id"]).transform("mean")
    if pair["relative"].abs().max() < 1e-9 or not pair["n"].any():
        return 0.0
    return float(pair["relative"].corr(pair["n"]))


def _growth(by_band: dict[str, float]) -> float:
    """From the shortest outputs to the longest."""
    values = [value for value in by_band.values() if value > 0]  # short outputs may be clamped at zero
    return values[-1] / values[0] - 1 if values else 0.0


def _ends(by_band: dict[str, float]) -> str:
    first, last = next(iter(by_band)), next(reversed(by_band))
    return f"{brief_ms(by_band[first])} ms at {first} tokens to {brief_ms(by_band[last])} at {last}"


def _steps_are(by_band: dict[str, float], step: float) -> str:
    furthest = max(abs(value / step - 1) for value in by_band.values())
    if furthest < FLAT:
        within = f" within {percent(furthest)}" if furthest >= 0.005 else ""
        return f"the steps are constant at {brief_ms(step)} ms{within} at all output lengths"
    return f"the steps take {_ends(by_band)}"


def _flat_or_range(by_band: dict[str, float]) -> str:
    values = list(by_band.values())
    if abs(_growth(by_band)) < FLAT:
        return f"constant at {brief_ms(float(np.median(values)))} ms"
    return f"{brief_ms(min(values))} to {brief_ms(max(values))} ms"


def _signed(correlation: float) -> str:
    return f"{correlation:.2f}".replace("-0.00", "0.00").replace("-", "−")
