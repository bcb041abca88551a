"""The file: its tables, columns, comments and version, and the names of its quantile columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lutest.reader.errors import ConfigError, TableError
from lutest.reader.figures import KeyColumn
from lutest.reader.names import KEY_COLUMNS, REBUILD, literal, quantile_suffix

if TYPE_CHECKING:
    import duckdb

STORAGE_VERSION = "v1.2.0"


# A table with the columns that order its rows, then its columns, with comments; lines indented further carry one on.
# {key} stands for the key columns, and a column with {q} in its name for one per quantile of the build.
_SCHEMA = """
prefill ({key}): Prefill latency (vision + projector + LLM prefill) per configuration, all prompts together
    {key}
    n BIGINT: Accepted runs
    {q}_ms DOUBLE: {q} of prefill_ms of the runs at hand (Hyndman-Fan type 7); curves are about runs to come
    p95_upper_ms DOUBLE: Distribution-free 95 % upper confidence bound of P95; NULL below 59 runs
    mean_ms DOUBLE: Mean of prefill_ms
    std_ms DOUBLE: Sample standard deviation of prefill_ms; NULL for one run
    min_ms DOUBLE: Least prefill_ms
    max_ms DOUBLE: Largest prefill_ms
    prompt_tokens_p50 BIGINT: Median prompt_tokens: stands in for a prompt length not given
    prompt_tokens_min BIGINT: Least prompt_tokens
    prompt_tokens_max BIGINT: Largest prompt_tokens
    vision_tokens_p50 BIGINT: Median of prompt_tokens less text tokens, which the configuration adds to a text; NULL
        where the runs do not hold them apart
prefill_curve ({key}, prompt_tokens): Prefill latency over prompt length: knots of a piecewise-linear curve
    {key}
    prompt_tokens BIGINT: Vision + text tokens in the KV cache after prefill
    n BIGINT: Runs whose nearest knot this is
    {q}_ms DOUBLE: {q} of prefill_ms at this prompt length, of runs to come
    {q}_se_ms DOUBLE: Standard error of {q}_ms; NULL where runs are too few to tell, or carried over from another device
    n_eff DOUBLE: Effective number of independent runs of the configuration behind its curve
    source VARCHAR: measured: runs stand at this place; interpolated: between such places; extrapolated: beyond them;
        calibrated: carried over from another device or state of the machine
decode ({key}): Latency of one decode step per configuration, all KV lengths together
    {key}
    n BIGINT: Accepted runs of two tokens or more
    n_steps BIGINT: Their decode steps, output_tokens - 1 each
    n_clamped BIGINT: Runs among n whose decode_ms was clamped at zero
    {q}_ms DOUBLE: {q} of a decode step; over timed steps where there are any, else over the fitted curve
    p95_upper_ms DOUBLE: Upper 95 % confidence bound of P95, with the rank that one step a run would give, as the steps
        of a run depend on each other; NULL below 59 runs with timed steps
    mean_ms DOUBLE: Mean of a timed decode step; without timed steps, all decode time over all steps, p50_ms if all of
        that was clamped at zero
    std_ms DOUBLE: Sample standard deviation of a timed decode step; NULL without timed steps
    steps VARCHAR: timed: every step was measured; totals: recovered from decode_ms of whole runs
decode_curve ({key}, kv_len): Latency of a decode step over KV length: knots of a piecewise-linear curve
    {key}
    kv_len BIGINT: KV length that the step attends over: prompt_tokens + i for step i
    n BIGINT: Decode steps whose nearest knot this is
    {q}_ms DOUBLE: {q} of the step at this KV length, of runs to come
    {q}_se_ms DOUBLE: Standard error of {q}_ms; NULL where runs are too few to tell, or carried over from another device
    n_eff DOUBLE: Effective number of independent steps of the configuration behind its curve: those of a run resemble
        each other; without timed steps, runs that tell something of them
    p50_sum_ms DOUBLE: Sum of the P50 curve over KV lengths 1 to this one
    source VARCHAR: measured: runs stand at this place; interpolated: between such places; extrapolated: beyond them;
        calibrated: carried over from another device or state of the machine
decode_total ({key}, decode_steps): Quantiles of decode_ms as ratios to the sum of its P50 steps, over the number of
        steps
    {key}
    decode_steps BIGINT: Number of decode steps, output_tokens - 1
    n BIGINT: Runs whose nearest knot this is
    {q}_ratio DOUBLE: {q} of decode_ms divided by the sum of the P50 curve over its steps
    {q}_se_ratio DOUBLE: Standard error of {q}_ratio; NULL where runs are too few to tell, or carried over from another
        device
    n_eff DOUBLE: Effective number of the configuration's runs near this number of steps
    source VARCHAR: measured: runs stand at this place; interpolated: between such places; extrapolated: beyond them;
        calibrated: carried over from another device or state of the machine
total ({key}): How the deviations of prefill and decode from their P50 combine in a total
    {key}
    n BIGINT: Runs behind the figures
    {q}_correlation DOUBLE: c in sqrt(a^2 + d^2 + 2 c a d), the deviation of {q} of a total; a, d: of prefill and
        decode
output_length (workload, output_tokens): How many accepted runs produced how many tokens
    workload VARCHAR: What the requests were
    output_tokens BIGINT: Generated tokens, end of sequence included
    n BIGINT: Accepted runs
quality ({key}, workload): Accuracy of the runs that carry one
    {key}
    workload VARCHAR: What the requests were
    n BIGINT: Accepted runs with an accuracy
    accuracy DOUBLE: Mean accuracy
    accuracy_lower DOUBLE: Lower end of its 95 % confidence interval; NULL for one run
    accuracy_upper DOUBLE: Upper end of its 95 % confidence interval; NULL for one run
sources (source_id): The files and frames that the table was built from
    source_id INTEGER: Number of the source
    path VARCHAR: Path as given to the build
    sha256 VARCHAR: SHA-256 of the content
    rows_read BIGINT: Runs found
    rows_used BIGINT: Runs that the table rests on
    rows_rejected BIGINT: Runs left out, each with a row in rejected_runs
    problem VARCHAR: Why the file could not be read, where the build went on without it
rejected_runs (source_id, row): Every run that was read and not used, and why
    source_id INTEGER: Source of the run
    row BIGINT: Place of the run in its source, from 1
    reason VARCHAR: Short name of the reason
    detail VARCHAR: The value at fault and what would be right
    {key}
    workload VARCHAR: What the request was
    prompt_tokens BIGINT: Prompt length, as far as it could be read
    output_tokens BIGINT: Generated tokens, as far as they could be read
    prefill_ms DOUBLE: Prefill latency, as far as it could be read
    decode_ms DOUBLE: Decode latency, as far as it could be read
    total_ms DOUBLE: Total latency, as far as it could be read
meta (key): What the table is, what it was built from and with
    key VARCHAR: Name
    value VARCHAR: Value, as text or JSON
"""


class Column(NamedTuple):
    """A column of a table."""

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

    def expand(self, quantiles: Sequence[float], key_columns: Sequence[KeyColumn]) -> tuple[Column, ...]:
        """Columns with the key columns in place of the key, and one per quantile in place of each ``{q}``."""
        expanded: list[Column] = []
        for column in self.columns:
            if column.name == "{key}":
                expanded += [Column(key.name, key.type, f"Of the configuration, a {key.kind}") for key in key_columns]
                continue
            suffixes = [quantile_suffix(q) for q in quantiles] if "{q}" in column.name else [""]
            for suffix in suffixes:
                comment = column.comment.replace("{q}", suffix.upper().replace("_", "."))
                expanded.append(Column(column.name.replace("{q}", suffix), column.type, comment))
        return tuple(expanded)

    def ordered_by(self, key_columns: Sequence[KeyColumn]) -> tuple[str, ...]:
        """Columns that its rows are ordered by."""
        names = [key.name for key in key_columns]
        return tuple(name for held in self.order for name in (names if held == "{key}" else [held]))


def _parsed(text: str) -> Iterator[Table]:
    for block in re.split(r"\n(?=\w)", re.sub(r"\n {8}", " ", text.strip())):
        head, *lines = block.splitlines()
        names, comment = head.split(": ", 1)
        name, order = names.rstrip(")").split(" (")
        columns = []
        for line in lines:
            described, _, said = line.strip().partition(": ")
            column, _, kind = described.partition(" ")
            columns.append(Column(column, kind, said))
        yield Table(name, comment, tuple(columns), tuple(order.split(", ")))


TABLES = {table.name: table for table in _parsed(_SCHEMA)}

MOST_KEY_COLUMNS = 8
# What a view and searches say of a configuration, and what macros and methods call their arguments.
_TAKEN = (
    "accuracy", "budget_ms", "by", "latency_ms", "margin", "missing", "n_decode_runs", "n_decode_steps",
    "output_tokens", "p_at_least", "prefill_share", "prompt_tokens_by", "q", "quality", "self", "text_tokens",
)  # fmt: skip
_OF_A_QUANTILE = re.compile(r"(prefill_|decode_step_)?p\d+(_\d+)?_((upper|se)_ms|ms|(se_)?ratio|correlation)")


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
