"""Raw fields into canonical runs, and the structural checks that a run must pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import duckdb

from lutest.reader.names import quote

__all__ = ["raw_fields", "write_runs"]

MAX_MS = 1e9  # 11 days: beyond it a value is a broken clock
MIN_MS = 1e-6  # a nanosecond: no clock tells less
MAX_TOKENS = 1e9
_TIMES = ("prefill_ms", "decode_ms", "total_ms")
_WHOLE = ("top_k", "num_blocks", "prompt_tokens", "output_tokens", "vision_tokens", "text_tokens")
_NUMBERS = (*_WHOLE, *_TIMES, "accuracy")
_REQUIRED = ("tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", "prefill_ms")
_TEXTS = ("tier", "workload", "sample_id", "device", "model")


class Rule(Protocol):
    """What is read of a column rule."""

    @property
    def alternatives(self) -> tuple[tuple[str, ...], ...]:
        """Sums of fields; the first one that a run has is taken."""

    @property
    def constant(self) -> str | None:
        """The value for all runs, instead of a field."""


def raw_fields(columns: Mapping[str, Rule]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the raw fields that a mapping needs: scalars, and those that may hold lists of steps."""
    scalars: dict[str, None] = {}
    for name, rule in columns.items():
        if name != "decode_steps_ms":
            scalars.update((field, None) for fields in rule.alternatives for field in fields)
    steps = tuple(field for fields in columns["decode_steps_ms"].alternatives for field in fields)
    return tuple(scalars), steps


def write_runs(connection: duckdb.DuckDBPyConnection, columns: Mapping[str, Rule], milliseconds: float) -> None:
    """Create ``runs``: one row a run, canonical columns, and ``reason`` and ``detail`` where a check failed.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``raw_runs`` and ``source_files``.
    columns : mapping
        Canonical column → where it comes from.
    milliseconds : float
        Milliseconds in one unit of the sources' times.
    """
    unit = repr(milliseconds)
    texts = [f"{_text(columns[name])} AS {name}_text" for name in (*_NUMBERS, *_TEXTS)]
    numbers = [f"{_number(columns[name])}{f' * {unit}' if name in _TIMES else ''} AS {name}_value" for name in _NUMBERS]
    connection.execute(
        f"""
        CREATE OR REPLACE TABLE runs AS
        WITH as_read AS (
            SELECT
                source_id, "row", problem, steps_problem, step_positions,
                {"steps" if milliseconds == 1.0 else f"[step * {unit} FOR step IN steps]"} AS steps,
                {", ".join(texts)},
                {", ".join(numbers)}
            FROM raw_runs
        ),
        completed AS (
            SELECT
                as_read.* REPLACE (
                    CASE
                        WHEN decode_ms_text IS NOT NULL THEN decode_ms_value
                        WHEN output_tokens_value = 1 THEN 0.0
                        WHEN step_positions IS NULL AND len(steps) > 0 THEN list_sum(steps)
                    END AS decode_ms_value,
                    coalesce(workload_text, source_files.folder, 'default') AS workload_text
                ),
                coalesce(len(steps), 0) > 0 AS timed
            FROM as_read JOIN source_files USING (source_id)
        ),
        judged AS (
            SELECT *, CASE {" ".join(_verdicts(columns))} END AS verdict
            FROM completed
        )
        SELECT
            source_id,
            "row",
            tier_text AS tier,
            TRY_CAST(top_k_value AS INTEGER) AS top_k,
            TRY_CAST(num_blocks_value AS INTEGER) AS num_blocks,
            workload_text AS workload,
            TRY_CAST(prompt_tokens_value AS BIGINT) AS prompt_tokens,
            TRY_CAST(output_tokens_value AS BIGINT) AS output_tokens,
            prefill_ms_value AS prefill_ms,
            decode_ms_value AS decode_ms,
            coalesce(total_ms_value, prefill_ms_value + decode_ms_value) AS total_ms,
            total_ms_value IS NOT NULL AS total_given,
            CASE WHEN timed THEN steps END AS decode_steps_ms,
            CASE WHEN timed THEN step_positions END AS step_positions,
            timed,
            NOT timed AND output_tokens_value >= 2 AND decode_ms_value = 0 AS clamped,
            sample_id_text AS sample_id,
            accuracy_value AS accuracy,
            TRY_CAST(vision_tokens_value AS BIGINT) AS vision_tokens,
            TRY_CAST(text_tokens_value AS BIGINT) AS text_tokens,
            device_text AS device,
            model_text AS model,
            verdict.reason AS reason,
            -- on one line, whatever stood in the field
            regexp_replace(verdict.detail, '[\\p{{Cc}}\\p{{Zl}}\\p{{Zp}}]+', ' ', 'g') AS detail,
            -- lengths before texts, and a mark for NULL: no value can pass for the one beside it
            md5(concat_ws(
                '|', length(tier_text), tier_text, top_k_value, num_blocks_value,
                coalesce(length(sample_id_text) || ':' || sample_id_text, '-'),
                prompt_tokens_value, output_tokens_value, prefill_ms_value, decode_ms_value,
                coalesce(total_ms_value::VARCHAR, '-'), coalesce(accuracy_value::VARCHAR, '-'), steps::VARCHAR
            )) AS run_hash
        FROM judged
        """
    )


def _field(name: str) -> str:
    return quote(f"f:{name}")


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _case(rule: Rule, joined: str, cast: bool) -> str:
    branches = []
    for fields in rule.alternatives:
        present = " AND ".join(f"{_field(field)} IS NOT NULL" for field in fields)
        terms = [f"TRY_CAST({_field(field)} AS DOUBLE)" if cast else _field(field) for field in fields]
        branches.append(f"WHEN {present} THEN {joined.join(terms)}")
    return f"CASE {' '.join(branches)} END"


def _text(rule: Rule) -> str:
    return _literal(rule.constant) if rule.constant is not None else _case(rule, " || ' + ' || ", cast=False)


def _number(rule: Rule) -> str:
    if rule.constant is not None:
        return f"TRY_CAST({_literal(rule.constant)} AS DOUBLE)"
    return _case(rule, " + ", cast=True)


def _verdict(condition: str, reason: str, detail: str) -> str:
    return f"WHEN {condition} THEN struct_pack(reason := '{reason}', detail := {detail})"


def _verdicts(columns: Mapping[str, Rule]) -> list[str]:
    """Checks in the order in which they are told: the first that fails names the reason."""

    def wanted(name: str) -> str:
        return " or ".join(" + ".join(fields) for fields in columns[name].alternatives)

    def because(name: str, fault: str) -> str:
        shown = f"left({name}_text, 60)"
        if name == "decode_ms":
            shown = f"coalesce({shown}, 'the sum of its steps')"
        return f"'{name} is ' || {shown} || '{fault}'"

    checks = [_verdict("problem IS NOT NULL", "unreadable_row", "problem")]
    for name in _REQUIRED:
        missing = f"{name}_text IS NULL OR {name}_text = ''"
        checks.append(_verdict(missing, "missing_value", _literal(f"no {name}: wants {wanted(name)}")))
    for name in _NUMBERS:
        value = f"{name}_value"
        not_a_number = f"{name}_text IS NOT NULL AND {value} IS NULL"
        checks.append(_verdict(not_a_number, "not_a_number", because(name, ", not a number")))
        checks.append(_verdict(f"NOT isfinite({value})", "not_finite", because(name, ", not a finite number")))
        if name == "accuracy":
            checks.append(_verdict(f"abs({value}) > {MAX_TOKENS!r}", "out_of_range", because(name, ", beyond 1e9")))
            continue
        limit = MAX_MS if name in _TIMES else MAX_TOKENS
        checks.append(_verdict(f"{value} < 0", "negative_value", because(name, ", below 0")))
        checks.append(_verdict(f"{value} > {limit!r}", "out_of_range", because(name, f", above {limit:g}")))
        if name in _TIMES:
            least = because(name, f", between 0 and {MIN_MS:g} ms")
            checks.append(_verdict(f"{value} > 0 AND {value} < {MIN_MS!r}", "out_of_range", least))
        if name in _WHOLE:
            checks.append(_verdict(f"{value} <> floor({value})", "not_whole", because(name, ", not a whole number")))
    checks += [
        _verdict(f"{name}_value < 1", "out_of_range", because(name, ", below 1")) for name in ("top_k", "num_blocks")
    ]
    step_count = "coalesce(list_max(step_positions), len(steps))"
    checks += [
        _verdict("output_tokens_value < 1", "no_output_tokens", because("output_tokens", ": a run has at least 1")),
        _verdict("prefill_ms_value = 0", "zero_prefill", "'prefill_ms is 0: clamped or never measured'"),
        _verdict("total_ms_value = 0", "zero_total", "'total_ms is 0: clamped or never measured'"),
        _verdict("steps_problem IS NOT NULL", "bad_steps", "steps_problem"),
        _verdict(
            "decode_ms_value IS NULL",
            "missing_value",
            _literal(f"no decode_ms: wants {wanted('decode_ms')}, or decode_steps_ms: {wanted('decode_steps_ms')}"),
        ),
        _verdict(
            "timed AND len(list_distinct(step_positions)) <> list_max(step_positions)",
            "bad_steps",
            "'a position before the last one has no step'",
        ),
        _verdict(
            f"timed AND {step_count} <> output_tokens_value - 1",
            "step_count_mismatch",
            f"{step_count} || ' steps for ' || output_tokens_value::BIGINT || ' output tokens, which take one less'",
        ),
        _verdict(
            "timed AND NOT (isfinite(list_min(steps)) AND isfinite(list_max(steps)))",
            "not_finite",
            "'a decode step is not a finite number'",
        ),
        _verdict("timed AND list_min(steps) < 0", "negative_value", "'a decode step is below 0: ' || list_min(steps)"),
        _verdict("timed AND list_min(steps) = 0", "zero_step", "'a decode step is 0: clamped or never measured'"),
        _verdict(
            f"timed AND list_min(steps) < {MIN_MS!r}",
            "out_of_range",
            f"'a decode step is below {MIN_MS:g} ms: ' || list_min(steps)",
        ),
        _verdict(
            f"timed AND list_max(steps) > {MAX_MS!r}",
            "out_of_range",
            f"'a decode step is above {MAX_MS:g} ms: ' || list_max(steps)",
        ),
    ]
    return checks
