"""Which denominator turns decode_ms into the time of a step, n or n - 1, and the KV growth that is left after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from lutest.judging.finding import Finding, brief_ms, percent
from lutest.judging.step_regression import BANDS, StepFit, StepSample, group_median
from lutest.reader.names import quote
from lutest.runs.sources import field_column

__all__ = ["PER_TOKEN_FIELDS", "check_fencepost", "check_kv_growth", "check_per_token_fields"]

PER_TOKEN_FIELDS = ("T_decode_per_token", "decode_per_token_ms")
NEAR_WHOLE = 0.3  # steps: an offset this close to 0 or 1 step is taken for it
APPARENT = 0.1  # growth over output lengths worth a word
FLAT = 0.05  # growth over output lengths that is none
NOTED_GROWTH = 0.01  # per 100 tokens of KV length
LONGEST_FOR_FIELD = 50  # tokens: beyond them n and n - 1 are too close to tell apart in a rounded field
_FIELD_TOLERANCE = 0.005

Floats = NDArray[np.float64]


def check_fencepost(sample: StepSample, fit: StepFit | None) -> Finding:
    """Say which denominator fits: n - 1 as it should be, n, or neither.

    Parameters
    ----------
    sample : StepSample
        Accepted runs of two tokens or more.
    fit : StepFit or None
        The regression on them.
    """
    if fit is None:
        return Finding(
            "fencepost",
            "note",
            "too few runs of two tokens or more with a decode time to tell which denominator fits, n or n − 1: "
            "profile longer outputs",
            {"n_runs": len(sample.key), "denominator": None},
        )
    over_n, over_steps = _by_band(sample, fit, 0), _by_band(sample, fit, 1)
    correlation_n, correlation_steps = _correlation(sample, fit, 0), _correlation(sample, fit, 1)
    apparent, left = _growth(over_n), _growth(over_steps)
    step = float(np.nanmedian(fit.level_ms))
    figures: dict[str, Any] = {
        "n_runs": len(sample.key),
        "step_ms": step,
        "extra_steps": fit.extra_steps,
        "extra_steps_low": fit.extra_steps_interval[0],
        "extra_steps_high": fit.extra_steps_interval[1],
        "correlation_over_n": correlation_n,
        "correlation_over_n_minus_1": correlation_steps,
        "growth_over_n": apparent,
        "growth_over_n_minus_1": left,
        "ms_over_n": over_n,
        "ms_over_n_minus_1": over_steps,
    }
    if not np.isfinite(fit.extra_steps):
        return Finding(
            "fencepost",
            "note",
            "within each configuration all runs have the same number of output tokens, so which denominator fits, n or "
            "n − 1, cannot be told: profile several output lengths",
            {**figures, "denominator": None},
        )
    denominator = _denominator(fit)
    figures["denominator"] = denominator
    naive = f"{_listed(over_n)} tokens, correlation with n {_signed(correlation_n)}"
    extra = _interval(fit.extra_steps, fit.extra_steps_interval)
    if denominator == "n - 1":
        if apparent < APPARENT:
            sentence = (
                f"n − 1 fits: decode_ms holds the time of n − 1 steps ({extra} more), and over these output lengths "
                "the fencepost hardly shows"
            )
            return Finding("fencepost", "ok", sentence, figures)
        sentence = (
            f"the apparent KV-cache growth of {percent(apparent)} ({naive}) that decode_ms / n shows is the fencepost, "
            f"not the KV cache: n − 1 fits, {_steps_are(over_steps, step)} (correlation {_signed(correlation_steps)}); "
            "a run of n tokens has n − 1 decode steps, so divide by n − 1"
        )
        return Finding("fencepost", "note", sentence, figures)
    if denominator == "n":
        sentence = (
            f"decode_ms holds n steps where a run of n tokens has n − 1 ({extra} more): decode_ms / n is "
            f"{_flat_or_range(over_n)}, decode_ms / (n − 1) falls from {_ends(over_steps)}; the step behind the "
            "first token was timed as decode, or output_tokens leaves out the end of sequence: correct it before "
            "building, for a table counts n − 1 steps"
        )
        return Finding("fencepost", "warning", sentence, figures)
    if denominator is None:
        sentence = (
            f"whether decode_ms holds n − 1 steps or n cannot be told ({extra} more than n − 1): profile more runs, "
            "short and long"
        )
        return Finding("fencepost", "note", sentence, figures)
    sentence = (
        f"neither n nor n − 1 fits: a run holds the time of {extra} more than its n − 1, "
        f"{brief_ms(fit.extra_steps * step)} ms whatever its length: look for an offset between timing passes, or a "
        "first step that is unlike the others"
    )
    return Finding("fencepost", "warning", sentence, figures)


def check_kv_growth(fit: StepFit | None) -> Finding:
    """Say how much a step grows with KV length once the fencepost is out."""
    if fit is None or not np.isfinite(fit.growth):
        return Finding(
            "kv_growth",
            "note",
            "whether a step grows with KV length cannot be told: prompt and output lengths vary too little",
            {"growth_per_100_tokens": None},
        )
    growth, (low, high) = 100 * fit.growth, (100 * end for end in fit.growth_interval)
    step = float(np.nanmedian(fit.level_ms))
    figures = {
        "growth_per_100_tokens": growth,
        "growth_per_100_tokens_low": low,
        "growth_per_100_tokens_high": high,
        "step_ms": step,
    }
    figure = f"{percent(growth)} of the step per 100 tokens (95 % interval {percent(low)} to {percent(high)})"
    if low <= 0 <= high or max(abs(low), abs(high)) < 1e-6:
        return Finding(
            "kv_growth",
            "ok",
            f"after dividing by n − 1 no growth of the step with KV length is to be seen: {figure} at "
            f"{brief_ms(step)} ms",
            figures,
        )
    direction = "grows" if growth > 0 else "falls"
    sentence = f"after dividing by n − 1 the step {direction} with KV length by {figure} at {brief_ms(step)} ms"
    if abs(growth) >= NOTED_GROWTH:
        sentence += ": take it at its KV length (decode_step_ms), not one figure per configuration"
    return Finding("kv_growth", "note" if abs(growth) >= NOTED_GROWTH else "ok", sentence, figures)


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
        row = connection.execute(
            f"""
            WITH stored AS (
                SELECT TRY_CAST({quote(field_column(name))} AS DOUBLE) * {milliseconds!r} AS per_token,
                    decode_ms, output_tokens AS n
                FROM accepted_runs JOIN raw_runs USING (source_id, "row")
                WHERE output_tokens BETWEEN 2 AND {LONGEST_FOR_FIELD} AND decode_ms > 0
            )
            SELECT
                count(*),
                avg(CAST(abs(per_token * n / decode_ms - 1) < {_FIELD_TOLERANCE} AS INTEGER)),
                avg(CAST(abs(per_token * (n - 1) / decode_ms - 1) < {_FIELD_TOLERANCE} AS INTEGER))
            FROM stored
            WHERE per_token IS NOT NULL
            """
        ).fetchone()
        if row is None or not row[0]:
            continue
        n, over_n, over_steps = row
        figures = {"field": name, "n_runs": n, "share_over_n": over_n, "share_over_n_minus_1": over_steps}
        if over_n > over_steps and over_n >= 0.5:
            sentence = (
                f"{name} is decode_ms / n in {percent(over_n)} of runs, the fencepost error: a run of n tokens has "
                "n − 1 decode steps; do not use the field, divide decode_ms by n − 1"
            )
            findings.append(Finding("per_token_field", "warning", sentence, figures))
        elif over_steps >= 0.5:
            sentence = f"{name} is decode_ms / (n − 1) in {percent(over_steps)} of runs, as it should be"
            findings.append(Finding("per_token_field", "ok", sentence, figures))
        else:
            sentence = (
                f"{name} is neither decode_ms / n nor decode_ms / (n − 1): do not use it without knowing what it is"
            )
            findings.append(Finding("per_token_field", "note", sentence, figures))
    return findings


def _denominator(fit: StepFit) -> str | None:
    low, high = fit.extra_steps_interval
    if not (np.isfinite(low) and np.isfinite(high)) or (low <= 0 and high >= 1):
        return None
    if abs(fit.extra_steps) <= NEAR_WHOLE or low <= 0 <= high:
        return "n - 1"
    if abs(fit.extra_steps - 1) <= NEAR_WHOLE or low <= 1 <= high:
        return "n"
    return "neither"


def _relative(sample: StepSample, fit: StepFit, less: int) -> Floats:
    """decode_ms / (n - less) in steps of its configuration."""
    return np.asarray(sample.decode_ms / (sample.output_tokens - less) / fit.level_ms[sample.key], dtype=np.float64)


def _by_band(sample: StepSample, fit: StepFit, less: int) -> dict[str, float]:
    """Median time per token by band of output lengths, in ms of the middle configuration."""
    relative = _relative(sample, fit, less)
    held = np.isfinite(relative)
    medians = group_median(relative[held], sample.band[held], len(BANDS)) * float(np.nanmedian(fit.level_ms))
    return {band: float(value) for band, value in zip(BANDS, medians, strict=True) if np.isfinite(value)}


def _correlation(sample: StepSample, fit: StepFit, less: int) -> float:
    """Pearson's, within configurations; 0 where the time per token does not vary."""
    relative = _relative(sample, fit, less)
    held = np.isfinite(relative)
    key = sample.key[held]
    pair = []
    for values in (relative[held], sample.output_tokens[held].astype(np.float64)):
        sizes = np.maximum(np.bincount(key), 1)
        pair.append(values - (np.bincount(key, values) / sizes)[key])
    spread = np.sqrt((pair[0] ** 2).sum() * (pair[1] ** 2).sum())
    if np.abs(pair[0]).max(initial=0.0) < 1e-9 or spread == 0:
        return 0.0
    return float((pair[0] * pair[1]).sum() / spread)


def _growth(by_band: Mapping[str, float]) -> float:
    """From the shortest outputs to the longest."""
    values = [value for value in by_band.values() if value > 0]  # short outputs may be clamped at zero
    return values[-1] / values[0] - 1 if values else 0.0


def _listed(by_band: Mapping[str, float]) -> str:
    return f"{' / '.join(map(brief_ms, by_band.values()))} ms at {' / '.join(by_band)}"


def _ends(by_band: Mapping[str, float]) -> str:
    first, *_ = ends = list(by_band.items())
    last = ends[-1]
    return f"{brief_ms(first[1])} ms at {first[0]} tokens to {brief_ms(last[1])} at {last[0]}"


def _steps_are(by_band: Mapping[str, float], step: float) -> str:
    furthest = max(abs(value / step - 1) for value in by_band.values())
    if furthest < FLAT:
        within = f" within {percent(furthest)}" if furthest >= 0.005 else ""
        return f"the steps are constant at {brief_ms(step)} ms{within} at all output lengths"
    return f"the steps take {_ends(by_band)}"


def _flat_or_range(by_band: Mapping[str, float]) -> str:
    values = list(by_band.values())
    if abs(_growth(by_band)) < FLAT:
        return f"constant at {brief_ms(float(np.median(values)))} ms"
    return f"{brief_ms(min(values))} to {brief_ms(max(values))} ms"


def _signed(correlation: float) -> str:
    return f"{correlation:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _interval(value: float, ends: tuple[float, float]) -> str:
    return f"{value:.2f} ({ends[0]:.2f} to {ends[1]:.2f}) steps".replace("-", "−")
