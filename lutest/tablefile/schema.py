"""The file: its tables, columns, comments and version, and the names of its quantile columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lutest.reader.names import KEY_COLUMNS, quantile_suffix

__all__ = ["STORAGE_VERSION", "TABLES", "Column", "Table"]

STORAGE_VERSION = "v1.2.0"


@dataclass(frozen=True)
class Column:
    """A column; one with ``{q}`` in its name stands for one column per quantile of the build."""

    name: str
    type: str
    comment: str


@dataclass(frozen=True)
class Table:
    """A table of the file."""

    name: str
    comment: str
    columns: tuple[Column, ...]
    order: tuple[str, ...]

    def expand(self, quantiles: Sequence[float]) -> tuple[Column, ...]:
        """Columns with one per quantile in place of each ``{q}``."""
        expanded: list[Column] = []
        for column in self.columns:
            if "{q}" not in column.name:
                expanded.append(column)
                continue
            for q in quantiles:
                suffix = quantile_suffix(q)
                comment = column.comment.replace("{q}", suffix.upper().replace("_", "."))
                expanded.append(Column(column.name.replace("{q}", suffix), column.type, comment))
        return tuple(expanded)


_KEYS = (
    Column("tier", "VARCHAR", "Vision-token tier of the configuration"),
    Column("top_k", "INTEGER", "Experts per token of the configuration"),
    Column("num_blocks", "INTEGER", "Active transformer blocks of the configuration"),
)
_SOURCE = Column(
    "source",
    "VARCHAR",
    "measured: runs stand at this place; interpolated: between such places; extrapolated: beyond them; calibrated: "
    "carried over from another device or state of the machine",
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "prefill",
            "Prefill latency (vision + projector + LLM prefill) per configuration, all prompts together",
            (
                *_KEYS,
                Column("n", "BIGINT", "Accepted runs"),
                Column("{q}_ms", "DOUBLE", "{q} of prefill_ms (Hyndman-Fan type 7)"),
                Column(
                    "p95_upper_ms",
                    "DOUBLE",
                    "Distribution-free 95 % upper confidence bound of P95; NULL below 59 runs",
                ),
                Column("mean_ms", "DOUBLE", "Mean of prefill_ms"),
                Column("std_ms", "DOUBLE", "Sample standard deviation of prefill_ms; NULL for one run"),
                Column("min_ms", "DOUBLE", "Least prefill_ms"),
                Column("max_ms", "DOUBLE", "Largest prefill_ms"),
                Column("prompt_tokens_p50", "BIGINT", "Median prompt_tokens: stands in for a prompt length not given"),
                Column("prompt_tokens_min", "BIGINT", "Least prompt_tokens"),
                Column("prompt_tokens_max", "BIGINT", "Largest prompt_tokens"),
            ),
            KEY_COLUMNS,
        ),
        Table(
            "prefill_curve",
            "Prefill latency over prompt length: knots of a piecewise-linear curve",
            (
                *_KEYS,
                Column("prompt_tokens", "BIGINT", "Vision + text tokens in the KV cache after prefill"),
                Column("n", "BIGINT", "Runs whose nearest knot this is"),
                Column("{q}_ms", "DOUBLE", "{q} of prefill_ms at this prompt length"),
                _SOURCE,
            ),
            (*KEY_COLUMNS, "prompt_tokens"),
        ),
        Table(
            "decode",
            "Latency of one decode step per configuration, all KV lengths together",
            (
                *_KEYS,
                Column("n", "BIGINT", "Accepted runs of two tokens or more"),
                Column("n_steps", "BIGINT", "Their decode steps, output_tokens - 1 each"),
                Column("n_clamped", "BIGINT", "Runs among n whose decode_ms was clamped at zero"),
                Column(
                    "{q}_ms",
                    "DOUBLE",
                    "{q} of a decode step; over timed steps where there are any, else over the fitted curve",
                ),
                Column(
                    "p95_upper_ms",
                    "DOUBLE",
                    "Distribution-free 95 % upper confidence bound of P95; NULL below 59 runs with timed steps",
                ),
                Column(
                    "mean_ms",
                    "DOUBLE",
                    "Mean of a timed decode step; without timed steps, all decode time over all steps, p50_ms if "
                    "all of that was clamped at zero",
                ),
                Column(
                    "std_ms", "DOUBLE", "Sample standard deviation of a timed decode step; NULL without timed steps"
                ),
                Column(
                    "steps", "VARCHAR", "timed: every step was measured; totals: recovered from decode_ms of whole runs"
                ),
            ),
            KEY_COLUMNS,
        ),
        Table(
            "decode_curve",
            "Latency of a decode step over KV length: knots of a piecewise-linear curve",
            (
                *_KEYS,
                Column("kv_len", "BIGINT", "KV length that the step attends over: prompt_tokens + i for step i"),
                Column("n", "BIGINT", "Decode steps whose nearest knot this is"),
                Column("{q}_ms", "DOUBLE", "{q} of the step at this KV length"),
                Column("p50_sum_ms", "DOUBLE", "Sum of the P50 curve over KV lengths 1 to this one"),
                _SOURCE,
            ),
            (*KEY_COLUMNS, "kv_len"),
        ),
        Table(
            "decode_total",
            "Quantiles of decode_ms as ratios to the sum of its P50 steps, over the number of steps",
            (
                *_KEYS,
                Column("decode_steps", "BIGINT", "Number of decode steps, output_tokens - 1"),
                Column("n", "BIGINT", "Runs whose nearest knot this is"),
                Column("{q}_ratio", "DOUBLE", "{q} of decode_ms divided by the sum of the P50 curve over its steps"),
                _SOURCE,
            ),
            (*KEY_COLUMNS, "decode_steps"),
        ),
        Table(
            "total",
            "How the deviations of prefill and decode from their P50 combine in a total",
            (
                *_KEYS,
                Column("n", "BIGINT", "Runs behind the figures"),
                Column(
                    "{q}_correlation",
                    "DOUBLE",
                    "c in sqrt(a^2 + d^2 + 2 c a d), the deviation of {q} of a total; a, d: of prefill and decode",
                ),
            ),
            KEY_COLUMNS,
        ),
        Table(
            "prefill_bins",
            "Prefill latency by bins of prompt length: plain quantiles, to hold the curve against",
            (
                *_KEYS,
                Column("bin", "BIGINT", "Number of the bin, from 0"),
                Column("least_prompt_tokens", "BIGINT", "Least prompt_tokens in the bin"),
                Column("largest_prompt_tokens", "BIGINT", "Largest prompt_tokens in the bin"),
                Column("mean_prompt_tokens", "DOUBLE", "Mean prompt_tokens in the bin"),
                Column("n", "BIGINT", "Runs"),
                Column("n_runs", "BIGINT", "Runs that they come from"),
                Column("{q}_ms", "DOUBLE", "{q} of prefill_ms in the bin (Hyndman-Fan type 7)"),
            ),
            (*KEY_COLUMNS, "bin"),
        ),
        Table(
            "decode_bins",
            "Latency of timed decode steps by bins of KV length: plain quantiles, to hold the curve against",
            (
                *_KEYS,
                Column("bin", "BIGINT", "Number of the bin, from 0"),
                Column("least_kv_len", "BIGINT", "Least kv_len in the bin"),
                Column("largest_kv_len", "BIGINT", "Largest kv_len in the bin"),
                Column("mean_kv_len", "DOUBLE", "Mean kv_len in the bin"),
                Column("n", "BIGINT", "Timed decode steps"),
                Column("n_runs", "BIGINT", "Runs that they come from"),
                Column("{q}_ms", "DOUBLE", "{q} of the steps in the bin (Hyndman-Fan type 7)"),
            ),
            (*KEY_COLUMNS, "bin"),
        ),
        Table(
            "output_length",
            "How many accepted runs produced how many tokens",
            (
                Column("workload", "VARCHAR", "What the requests were"),
                Column("output_tokens", "BIGINT", "Generated tokens, end of sequence included"),
                Column("n", "BIGINT", "Accepted runs"),
            ),
            ("workload", "output_tokens"),
        ),
        Table(
            "quality",
            "Accuracy of the runs that carry one",
            (
                *_KEYS,
                Column("workload", "VARCHAR", "What the requests were"),
                Column("n", "BIGINT", "Accepted runs with an accuracy"),
                Column("accuracy", "DOUBLE", "Mean accuracy"),
                Column("accuracy_lower", "DOUBLE", "Lower end of its 95 % confidence interval; NULL for one run"),
                Column("accuracy_upper", "DOUBLE", "Upper end of its 95 % confidence interval; NULL for one run"),
            ),
            (*KEY_COLUMNS, "workload"),
        ),
        Table(
            "sources",
            "The files and frames that the table was built from",
            (
                Column("source_id", "INTEGER", "Number of the source"),
                Column("path", "VARCHAR", "Path as given to the build"),
                Column("sha256", "VARCHAR", "SHA-256 of the content"),
                Column("rows_read", "BIGINT", "Runs found"),
                Column("rows_used", "BIGINT", "Runs that the table rests on"),
                Column("rows_rejected", "BIGINT", "Runs left out, each with a row in rejected_runs"),
            ),
            ("source_id",),
        ),
        Table(
            "rejected_runs",
            "Every run that was read and not used, and why",
            (
                Column("source_id", "INTEGER", "Source of the run"),
                Column("row", "BIGINT", "Place of the run in its source, from 1"),
                Column("reason", "VARCHAR", "Short name of the reason"),
                Column("detail", "VARCHAR", "The value at fault and what would be right"),
                *_KEYS,
                Column("workload", "VARCHAR", "What the request was"),
                Column("prompt_tokens", "BIGINT", "Prompt length, as far as it could be read"),
                Column("output_tokens", "BIGINT", "Generated tokens, as far as they could be read"),
                Column("prefill_ms", "DOUBLE", "Prefill latency, as far as it could be read"),
                Column("decode_ms", "DOUBLE", "Decode latency, as far as it could be read"),
                Column("total_ms", "DOUBLE", "Total latency, as far as it could be read"),
            ),
            ("source_id", "row"),
        ),
        Table(
            "meta",
            "What the table is, what it was built from and with",
            (
                Column("key", "VARCHAR", "Name"),
                Column("value", "VARCHAR", "Value, as text or JSON"),
            ),
            ("key",),
        ),
    )
}
