"""The file: its tables, columns, comments and version, and the names of its quantile columns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lutest.reader.errors import ConfigError, TableError
from lutest.reader.figures import KeyColumn
from lutest.reader.names import KEY_COLUMNS, REBUILD, literal, quantile_suffix

if TYPE_CHECKING:
    import duckdb

__all__ = ["STORAGE_VERSION", "TABLES", "Column", "Table", "refuse_key_names", "stored_key_columns"]

STORAGE_VERSION = "v1.2.0"


@dataclass(frozen=True)
class Column:
    """A column; one with ``{q}`` in its name stands for one column per quantile of the build."""

    name: str
    type: str
    comment: str


@dataclass(frozen=True)
class Table:
    """A table of the file; `_KEY` among its columns stands for the key columns."""

    name: str
    comment: str
    columns: tuple[Column, ...]
    order: tuple[str, ...]

    def expand(self, quantiles: Sequence[float], key_columns: Sequence[KeyColumn]) -> tuple[Column, ...]:
        """Columns with the key columns in place of the key, and one per quantile in place of each ``{q}``."""
        expanded: list[Column] = []
        for column in self.columns:
            if column is _KEY:
                expanded += [Column(key.name, key.type, f"Of the configuration, a {key.kind}") for key in key_columns]
            elif "{q}" in column.name:
                for q in quantiles:
                    suffix = quantile_suffix(q)
                    comment = column.comment.replace("{q}", suffix.upper().replace("_", "."))
                    expanded.append(Column(column.name.replace("{q}", suffix), column.type, comment))
            else:
                expanded.append(column)
        return tuple(expanded)

    def ordered_by(self, key_columns: Sequence[KeyColumn]) -> tuple[str, ...]:
        """Columns that its rows are ordered by."""
        names = [key.name for key in key_columns]
        return tuple(name for held in self.order for name in (names if held == _KEY.name else [held]))


_KEY = Column("{key}", "", "")  # stands for the key columns
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
                _KEY,
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
            (_KEY.name,),
        ),
        Table(
            "prefill_curve",
            "Prefill latency over prompt length: knots of a piecewise-linear curve",
            (
                _KEY,
                Column("prompt_tokens", "BIGINT", "Vision + text tokens in the KV cache after prefill"),
                Column("n", "BIGINT", "Runs whose nearest knot this is"),
                Column("{q}_ms", "DOUBLE", "{q} of prefill_ms at this prompt length"),
                _SOURCE,
            ),
            (_KEY.name, "prompt_tokens"),
        ),
        Table(
            "decode",
            "Latency of one decode step per configuration, all KV lengths together",
            (
                _KEY,
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
            (_KEY.name,),
        ),
        Table(
            "decode_curve",
            "Latency of a decode step over KV length: knots of a piecewise-linear curve",
            (
                _KEY,
                Column("kv_len", "BIGINT", "KV length that the step attends over: prompt_tokens + i for step i"),
                Column("n", "BIGINT", "Decode steps whose nearest knot this is"),
                Column("{q}_ms", "DOUBLE", "{q} of the step at this KV length"),
                Column("p50_sum_ms", "DOUBLE", "Sum of the P50 curve over KV lengths 1 to this one"),
                _SOURCE,
            ),
            (_KEY.name, "kv_len"),
        ),
        Table(
            "decode_total",
            "Quantiles of decode_ms as ratios to the sum of its P50 steps, over the number of steps",
            (
                _KEY,
                Column("decode_steps", "BIGINT", "Number of decode steps, output_tokens - 1"),
                Column("n", "BIGINT", "Runs whose nearest knot this is"),
                Column("{q}_ratio", "DOUBLE", "{q} of decode_ms divided by the sum of the P50 curve over its steps"),
                _SOURCE,
            ),
            (_KEY.name, "decode_steps"),
        ),
        Table(
            "total",
            "How the deviations of prefill and decode from their P50 combine in a total",
            (
                _KEY,
                Column("n", "BIGINT", "Runs behind the figures"),
                Column(
                    "{q}_correlation",
                    "DOUBLE",
                    "c in sqrt(a^2 + d^2 + 2 c a d), the deviation of {q} of a total; a, d: of prefill and decode",
                ),
            ),
            (_KEY.name,),
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
                _KEY,
                Column("workload", "VARCHAR", "What the requests were"),
                Column("n", "BIGINT", "Accepted runs with an accuracy"),
                Column("accuracy", "DOUBLE", "Mean accuracy"),
                Column("accuracy_lower", "DOUBLE", "Lower end of its 95 % confidence interval; NULL for one run"),
                Column("accuracy_upper", "DOUBLE", "Upper end of its 95 % confidence interval; NULL for one run"),
            ),
            (_KEY.name, "workload"),
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
                _KEY,
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


MOST_KEY_COLUMNS = 8
# What a view and searches say of a configuration, and what macros and methods call their arguments.
_TAKEN = (
    "accuracy", "budget_ms", "by", "latency_ms", "margin", "missing", "n_decode_runs", "n_decode_steps",
    "output_tokens", "p_at_least", "prefill_share", "prompt_tokens_by", "q", "quality", "self",
)  # fmt: skip
_OF_A_QUANTILE = re.compile(r"(prefill_|decode_step_)?p\d+(_\d+)?_(upper_ms|ms|ratio|correlation)")


def refuse_key_names(names: Sequence[str]) -> None:
    """Refuse names that cannot be those of key columns.

    Raises
    ------
    ConfigError
        None or too many of them, one twice, or one that has another meaning in a table, in SQL or in Python, in upper
        or in lower case.
    """
    if not 0 < len(names) <= MOST_KEY_COLUMNS:
        raise ConfigError(f"`key` has {len(names)} columns; a configuration is made of 1 to {MOST_KEY_COLUMNS}")
    held = {column.name for table in TABLES.values() for column in table.columns}.union(_TAKEN)
    for place, name in enumerate(names):
        plain = name.lower()
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"`key` names the column {name!r}; it needs a name of printable characters")
        if plain in (other.lower() for other in names[:place]):
            raise ConfigError(f"`key` names the column {name} twice, upper and lower case being the same in SQL")
        if plain in held or _OF_A_QUANTILE.fullmatch(plain):
            raise ConfigError(
                f"`key` names the column {name}, a name with a meaning of its own in every table; "
                f"choose another one, such as my_{name}, and say where it comes from: columns: {{my_{name}: {name}}}"
            )


def stored_key_columns(connection: duckdb.DuckDBPyConnection, prefix: str = "") -> tuple[KeyColumn, ...]:
    """The key columns of a table, from its own ``meta``.

    Parameters
    ----------
    connection : duckdb connection
        Has the table file open.
    prefix : str
        Of its tables, such as ``"parent".``.
    """
    row = connection.execute(f"SELECT value FROM {prefix}meta WHERE key = {literal(KEY_COLUMNS)}").fetchone()
    try:
        return tuple(KeyColumn(**column) for column in json.loads(row[0] if row else ""))
    except (TypeError, ValueError) as error:
        raise TableError(f"table meta: {KEY_COLUMNS} does not name the key columns; {REBUILD}") from error
