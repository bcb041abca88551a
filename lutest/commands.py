"""The verbs of the command line: each does its work and prints figures, for people or as JSON.

Whatever is heavy is imported inside of them, so that `--help` and mistyped arguments answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError
from .report import count, format_table, one_line, to_json, unique_names

if TYPE_CHECKING:
    import duckdb

    from .table import LatencyTable

__all__ = [
    "build",
    "convert",
    "diagnose",
    "evaluate",
    "export",
    "feasible",
    "info",
    "lookup",
    "profile",
    "sql",
    "verify",
]

_LEAST_RUNS_FOR_BOUND = 59  # fewer runs have no distribution-free 95 % upper bound of a P95
_MOST_SOURCES_SHOWN = 20
_KEY_HEADERS = ("tier", "top_k", "blocks")
_KEY_NAMES = ("tier", "top_k", "num_blocks")


def build(arguments: argparse.Namespace) -> None:
    """Build a table and print its summary."""
    import lutest

    from .build import build as build_table
    from .config import DEFAULT_CONFIG
    from .sql import database_errors

    with database_errors(), _progress_bar() as progress:
        summary = build_table(
            arguments.config or DEFAULT_CONFIG, runs=arguments.runs, output=arguments.output, progress=progress
        )
    keys = _keys(lutest.load(summary.output))
    if arguments.json:
        _print_json({**_plain(summary), "keys": keys})
        return
    sources = [
        (source.path, source.rows_read, source.rows_used, source.rows_rejected)
        for source in summary.sources[:_MOST_SOURCES_SHOWN]
    ]
    print(format_table(("source", "read", "used", "rejected"), sources))
    if len(summary.sources) > len(sources):
        print(f"… {count(len(summary.sources), 'source')} in all: {_accounts(_plain(summary)['sources'])}")
    for reason, n in summary.rejected.items():
        print(f"  {count(n, 'run')} rejected: {reason}")
    if summary.n_clamped:
        print(f"  {count(summary.n_clamped, 'run')} clamped at zero decode: kept as censored from below")
    if summary.n_kept_beyond_fences:
        kept = count(summary.n_kept_beyond_fences, "run")
        print(f"  {kept} beyond the outlier fences: kept, for over 5 % of all runs are a tail, not outliers")
    print()
    print(_key_table(keys, upper=False))
    print(f"\nwritten to {summary.output} in {summary.seconds:.1f} s, content hash {summary.content_hash}")


def convert(arguments: argparse.Namespace) -> None:
    """Write runs as one Parquet file and print what was written."""
    from .convert import convert as convert_runs
    from .sql import database_errors

    with database_errors(), _progress_bar() as progress:
        summary = convert_runs(arguments.sources, arguments.output, config=arguments.config, progress=progress)
    if arguments.json:
        _print_json(_plain(summary))
        return
    for reason, n in summary.problems.items():
        print(f"  {count(n, 'run')} that a build will reject: {reason}")
    print(
        f"{count(summary.rows, 'run')} written to {summary.output} in {summary.seconds:.1f} s, "
        f"{summary.size_bytes / 1024:,.0f} KiB, columns {', '.join(summary.columns)}"
    )


def export(arguments: argparse.Namespace) -> None:
    """Write a table as plain data and print what was written."""
    from .export import export as export_table

    summary = export_table(arguments.table, arguments.output, parquet=arguments.parquet)
    if arguments.json:
        _print_json(_plain(summary))
        return
    print(f"{count(sum(summary.rows.values()), 'row')} of {len(summary.rows)} tables written to {summary.output}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Judge a table by runs and print the figures."""
    from .evaluate import evaluate as evaluate_table
    from .evaluate.evaluation import render_evaluation
    from .sql import database_errors

    with database_errors(), _progress_bar() as progress:
        evaluation = evaluate_table(arguments.table, arguments.runs, config=arguments.config, progress=progress)
    if arguments.json:
        _print_json(evaluation.as_dict())
        return
    print(render_evaluation(evaluation))


def diagnose(arguments: argparse.Namespace) -> None:
    """Print what is wrong with runs."""
    from .diagnose import diagnose as diagnose_runs
    from .diagnose.finding import render_findings
    from .sql import database_errors

    with database_errors(), _progress_bar() as progress:
        findings = diagnose_runs(arguments.runs, config=arguments.config, progress=progress)
    if arguments.json:
        _print_json({"findings": [finding.as_dict() for finding in findings]})
        return
    print(render_findings(findings))


def info(arguments: argparse.Namespace) -> None:
    """Print what a table is and holds."""
    import lutest

    table = lutest.load(arguments.table)  # says what is wrong with a file that is no table
    with _opened(table.path) as connection:
        meta = dict(connection.execute('SELECT "key", "value" FROM meta ORDER BY "key"').fetchall())
        sources = _records(connection, "SELECT path, rows_read, rows_used, rows_rejected FROM sources ORDER BY path")
        rejected = connection.execute(
            "SELECT reason, count(*) AS n FROM rejected_runs GROUP BY reason ORDER BY n DESC, reason"
        ).fetchall()
    keys = _keys(table)
    for key in keys:
        key["runs_wanted"] = max(0, _LEAST_RUNS_FOR_BOUND - key["n"])
    if arguments.json:
        content = {"path": arguments.table, "meta": meta, "tiers": list(table.tiers), "keys": keys}
        _print_json({**content, "sources": sources, "rejected": dict(rejected)})
        return
    facts = [
        ("table", arguments.table),
        ("model", _names(meta.get("model"))),
        ("device", _names(meta.get("device"))),
        (
            "built",
            f"{meta.get('built_at')} by lutest {meta.get('lutest_version')}, DuckDB {meta.get('duckdb_version')}",
        ),
        ("schema version", meta.get("schema_version")),
        ("content hash", meta.get("content_hash")),
        ("quantiles", ", ".join(map(str, json.loads(meta.get("quantiles", "[]"))))),
        ("tiers", ", ".join(table.tiers)),
        ("sources", f"{count(len(sources), 'file')}: {_accounts(sources)}"),
        ("rejected", ", ".join(f"{n:,} {reason}" for reason, n in rejected) or "none"),
    ]
    for name, value in facts:
        print(f"{name:<16}{one_line(value)}")
    print()
    print(_key_table(keys, upper=True))
    thin = [key for key in keys if key["runs_wanted"]]
    if thin:
        print(f"\nthin: no upper bound of P95 below {_LEAST_RUNS_FOR_BOUND} runs")
        for key in thin:
            name = " ".join(str(key[part]) for part in _KEY_NAMES)
            print(f"  {one_line(name)}: {count(key['n'], 'run')}, {key['runs_wanted']} more wanted")


def verify(arguments: argparse.Namespace) -> None:
    """Check a table as a whole and print what was checked."""
    from .verify import verify as verify_table

    verified = verify_table(arguments.table)
    if arguments.json:
        _print_json(_plain(verified))
        return
    rows = count(sum(verified.rows.values()), "row")
    print(
        f"{verified.path}: whole: {verified.size_bytes / 1024:,.0f} KiB as sealed, "
        f"{rows} in {len(verified.rows)} tables with content hash {verified.content_hash}"
    )


def lookup(arguments: argparse.Namespace) -> None:
    """Print the estimate for one configuration, part by part."""
    import lutest

    table = lutest.load(arguments.table, missing=arguments.missing)
    entry = table.lookup(arguments.tier, arguments.top_k, arguments.num_blocks)
    explanation = entry.explain(arguments.prompt_tokens, arguments.output_tokens, arguments.q)
    fitting = None
    if arguments.budget_ms is not None:
        fitting = entry.max_output_tokens(arguments.budget_ms, arguments.prompt_tokens, arguments.q)
    if arguments.json:
        content = explanation.as_dict()
        if fitting is not None:
            content.update(budget_ms=arguments.budget_ms, max_output_tokens=fitting)
        _print_json(content)
        return
    print("\n".join(map(one_line, str(explanation).split("\n"))))
    if fitting is not None:
        print(f"  {arguments.budget_ms:g} ms fit {count(fitting, 'output token')}")


def feasible(arguments: argparse.Namespace) -> None:
    """Print the configurations that fit a budget."""
    import lutest

    table = lutest.load(arguments.table)
    prompt_tokens, output_tokens, q = arguments.prompt_tokens, arguments.output_tokens, arguments.q
    keys = table.feasible(
        arguments.budget_ms,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefill_share=arguments.prefill_share,
        q=q,
        margin=arguments.margin,
    )
    found = []
    for key in keys:
        entry = table.lookup(*key)
        record = {**key._asdict(), "n": entry.n, "prefill_ms": entry.prefill_ms(prompt_tokens, q)}
        if output_tokens is not None:
            record["total_ms"] = entry.total_ms(prompt_tokens, output_tokens, q)
        found.append(record)
    if arguments.json:
        _print_json({"budget_ms": arguments.budget_ms, "q": q, "feasible": found})
        return
    if output_tokens is None:
        condition = f"prefill within {arguments.prefill_share:g} of {arguments.budget_ms:g} ms"
    else:
        condition = f"the total of {count(output_tokens, 'output token')} within {arguments.budget_ms:g} ms"
    condition += f" at q = {q:g}" + (f", margin {arguments.margin:g}" if arguments.margin else "")
    if not found:
        print(f"none of the {count(len(table.keys), 'configuration')} has {condition}")
        return
    print(f"{len(found)} of {count(len(table.keys), 'configuration')} have {condition}")
    headers = (*_KEY_HEADERS, "n", "prefill ms", *(("total ms",) if output_tokens is not None else ()))
    print(format_table(headers, [list(record.values()) for record in found]))


def profile(arguments: argparse.Namespace) -> None:
    """Profile a model with random weights and print what was recorded."""
    from .profile.output_lengths import parse_output_lengths
    from .profile.sweep import run_sweep

    lengths = None if arguments.output_lengths is None else parse_output_lengths(arguments.output_lengths)
    with _run_bar(arguments.minutes) as progress:
        summary = run_sweep(
            arguments.output,
            arguments.preset,
            tiers=arguments.tiers,
            top_k=arguments.top_k,
            num_blocks=arguments.blocks,
            output_lengths=lengths,
            runs_per_key=arguments.runs,
            minutes=arguments.minutes,
            warmup_rounds=arguments.warmup,
            seed=arguments.seed,
            device=arguments.device,
            threads=arguments.threads,
            synchronization=arguments.synchronization,
            progress=progress,
        )
    if arguments.json:
        _print_json(_plain(summary))
        return
    print(f"{summary.model}, on {summary.device}")
    print(
        f"{count(summary.n_recorded, 'run')} of {count(summary.n_keys, 'configuration')} recorded in {summary.output} "
        f"in {summary.seconds:.0f} s, {summary.n_missing:,} still to do; "
        f"{count(summary.n_warmup, 'warm-up run')} left out"
    )
    share = (
        f", {summary.step_overhead_us / 10 / summary.step_p50_ms:.2g} % of its median" if summary.step_p50_ms else ""
    )
    print(f"recording adds {summary.step_overhead_us:.2g} µs to a decode step{share}")


def sql(arguments: argparse.Namespace) -> None:
    """Run a query and print its rows."""
    import csv

    from .sql import run_query

    try:
        query = sys.stdin.read() if arguments.query == "-" else arguments.query
    except UnicodeDecodeError as error:
        raise ArgumentError(f"the query on standard input is not {error.encoding} at byte {error.start}") from error
    names, rows = run_query(
        arguments.table,
        query,
        unsafe=arguments.unsafe,
        memory_limit=arguments.memory_limit,
        threads=arguments.threads,
        timeout_s=arguments.timeout,
    )
    if arguments.json:
        unique = unique_names(names)
        _print_json([dict(zip(unique, row, strict=True)) for row in rows])
    elif arguments.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(rows)
    elif names:
        print(format_table(names, rows))


# Figures


def _keys(table: LatencyTable) -> list[dict[str, Any]]:
    """One record per configuration, tiers in the order of the table."""
    with _opened(table.path) as connection:
        keys = _records(
            connection,
            """
            SELECT configs.*, kv_len_min, kv_len_max
            FROM configs LEFT JOIN (
                SELECT tier, top_k, num_blocks, min(kv_len) AS kv_len_min, max(kv_len) AS kv_len_max
                FROM decode_curve GROUP BY tier, top_k, num_blocks
            ) AS ranges USING (tier, top_k, num_blocks)
            ORDER BY tier, top_k, num_blocks
            """,
        )
    return sorted(keys, key=lambda key: table.tiers.index(key["tier"]))


def _accounts(sources: Sequence[Mapping[str, Any]]) -> str:
    read, used, rejected = (
        sum(source[name] for source in sources) for name in ("rows_read", "rows_used", "rows_rejected")
    )
    return f"{count(read, 'run')} read, {used:,} used, {rejected:,} rejected"


def _key_table(keys: Sequence[Mapping[str, Any]], *, upper: bool) -> str:
    headers = [*_KEY_HEADERS, "n", "prefill P50", "P95"]
    names = [*_KEY_NAMES, "n", "prefill_p50_ms", "prefill_p95_ms"]
    if upper:
        headers.append("P95 at most")
        names.append("prefill_p95_upper_ms")
    headers += ["step P50", "step P95"]
    names += ["decode_step_p50_ms", "decode_step_p95_ms"]
    rows = [[key[name] for name in names] for key in keys]
    if upper:
        headers += ["prompt tokens", "KV length"]
        for row, key in zip(rows, keys, strict=True):
            row.append(f"{key['prompt_tokens_min']}–{key['prompt_tokens_max']}")
            row.append(None if key["kv_len_min"] is None else f"{key['kv_len_min']}–{key['kv_len_max']}")
    return f"{format_table(headers, rows)}\nlatencies in ms; step: one decode step"


def _names(value: str | None) -> str:
    names = json.loads(value) if value else []
    return "; ".join(map(str, names)) or "not said by the runs"


def _records(connection: duckdb.DuckDBPyConnection, query: str) -> list[dict[str, Any]]:
    cursor = connection.execute(query)
    names = [column[0] for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[duckdb.DuckDBPyConnection]:
    from .sql import connect, database_errors

    with connect(path) as connection, database_errors(f"{path}: cannot be read as a latency table: "):
        yield connection


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on a terminal; in a pipe, nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:

        def show(what: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            name = one_line(what)[-40:]
            if bar.desc != f"{name}: ":
                bar.set_description(name)

        yield show


@contextlib.contextmanager
def _run_bar(minutes: float | None) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of runs with the time left on a terminal; in a pipe, nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    limit = "" if minutes is None else f"at most {minutes:g} min"
    with tqdm(unit="run", desc=limit, leave=False, dynamic_ncols=True, file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:  # what earlier sessions did says nothing of the time left
                bar.total = total
                bar.initial = bar.n = done - 1
            bar.update(done - bar.n)

        yield show


def _plain(summary: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(summary)


def _print_json(value: object) -> None:
    print(to_json(value))
